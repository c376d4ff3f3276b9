"""Gradient errors of another program's files against float64, by the judge of the peers.

    python3 benches/peers/judge_files.py FOLDER --out RECORD

FOLDER has a folder for each loss of losses.py, such as FOLDER/samtone_query, with B-d-query.bf16, B-d-passage.bf16,
B-d-query_gradient.f32 and B-d-passage_gradient.f32, row-major and little-endian, as `bench_cuda --loss LOSS --write FOLDER/LOSS` leaves
them. Writes samtone-errors.csv, and samtone-errors-LOSS.csv for other losses: rows, dim, gradient_error (of all rows, or of a sample of
a large batch), judged_rows. Exit code 1 if an error is larger than bf16 batches are allowed, or there is nothing to judge.
"""

import argparse
import csv
import io
import pathlib
import sys

import torch
import whole_file
from losses import LOSSES
from measure import free
from reference import Judge, sampled_rows
from table import of_loss

ALLOWED = 1e-3  # of bf16 batches, as in tests/support/tolerance.rs
SUFFIXES = ("query.bf16", "passage.bf16", "query_gradient.f32", "passage_gradient.f32")


def load(path: pathlib.Path, rows: int, dim: int) -> torch.Tensor:
    dtype = torch.bfloat16 if path.suffix == ".bf16" else torch.float32
    if path.stat().st_size != rows * dim * dtype.itemsize:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; {rows} x {dim} of {dtype} are {rows * dim * dtype.itemsize}")
    return torch.from_file(str(path), size=rows * dim, dtype=dtype).view(rows, dim)


def judged(folder: pathlib.Path, rows: int, dim: int, device: torch.device, loss: str = "samtone_query") -> tuple[float, int]:
    """The error, and of how many rows."""
    query, passage, *gradients = (load(folder / f"{rows}-{dim}-{name}", rows, dim).to(device) for name in SUFFIXES)
    sample = sampled_rows(rows, device)
    reference = Judge(query, passage).reference(loss, sample)
    return reference.errors(tuple(gradients)), rows if sample is None else len(sample)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the record")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device, found, wrong = torch.device(arguments.device), 0, 0
    whole_file.writable(arguments.out)
    for loss in LOSSES:
        written = (arguments.folder / loss).glob("*-query.bf16")
        shapes = sorted(tuple(map(int, path.name.split("-")[:2])) for path in written)
        if not shapes:
            continue
        table = io.StringIO(newline="")
        writer = csv.writer(table)
        writer.writerow(["rows", "dim", "gradient_error", "judged_rows"])
        for rows, dim in shapes:
            error, count = judged(arguments.folder / loss, rows, dim, device, loss)
            free(device)
            writer.writerow([rows, dim, f"{error:.3e}", count])
            whole_file.write(arguments.out / of_loss("samtone-errors", loss, ".csv"), table.getvalue())
            is_right = error <= ALLOWED  # NaN is not
            verdict = "" if is_right else f", more than the {ALLOWED:.0e} that is allowed"
            whole_file.say(f"{loss}, {rows} x {dim}: {error:.3e}, of {count} rows{verdict}")
            found, wrong = found + 1, wrong + (not is_right)
    if not found:
        whole_file.say(f"judge: no LOSS/B-d-query.bf16 in {arguments.folder}")
    return 0 if found and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
