"""Gradient errors of another program's files against float64, by the judge of the peers.

    python3 benches/peers/judge_files.py FOLDER --out FILE [--loss qwen3]

FOLDER holds B-d-query.bf16, B-d-passage.bf16, B-d-query_gradient.f32 and B-d-passage_gradient.f32, row-major and little-endian, as
`bench_cuda --write FOLDER` leaves them: gradients of a loss of losses.py, samtone_query unless told otherwise. Writes CSV: rows, dim,
gradient_error (of all rows, or of a sample of a large batch), judged_rows.
"""

import argparse
import csv
import io
import pathlib
import re
import sys

import torch
import whole_file
from losses import LOSSES
from measure import free
from reference import Judge, sampled_rows

SUFFIXES = ("query.bf16", "passage.bf16", "query_gradient.f32", "passage_gradient.f32")


def load(path: pathlib.Path, rows: int, dim: int) -> torch.Tensor:
    dtype = torch.bfloat16 if path.suffix == ".bf16" else torch.float32
    if path.stat().st_size != rows * dim * dtype.itemsize:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes; {rows} x {dim} of {dtype} are {rows * dim * dtype.itemsize}"
        )
    return torch.from_file(str(path), size=rows * dim, dtype=dtype).view(rows, dim)


def judged(
    folder: pathlib.Path, rows: int, dim: int, device: torch.device, loss: str = "samtone_query"
) -> tuple[float, int]:
    """The error, and of how many rows."""
    query, passage, *gradients = (load(folder / f"{rows}-{dim}-{name}", rows, dim).to(device) for name in SUFFIXES)
    sample = sampled_rows(rows, device)
    reference = Judge(query, passage).reference(loss, sample)
    return reference.errors(tuple(gradients)), rows if sample is None else len(sample)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--loss", choices=LOSSES, default="samtone_query")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    matches = [re.fullmatch(r"(\d+)-(\d+)-query\.bf16", path.name) for path in arguments.folder.iterdir()]
    shapes = sorted((int(match[1]), int(match[2])) for match in matches if match)
    if not shapes:
        print(f"judge: no B-d-query.bf16 in {arguments.folder}")
        return 1
    whole_file.writable(arguments.out.parent)
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["rows", "dim", "gradient_error", "judged_rows"])
    for rows, dim in shapes:
        error, count = judged(arguments.folder, rows, dim, torch.device(arguments.device), arguments.loss)
        free(torch.device(arguments.device))
        writer.writerow([rows, dim, f"{error:.3e}", count])
        whole_file.write(arguments.out, table.getvalue())
        whole_file.say(f"{rows} x {dim}: {error:.3e}, of {count} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
