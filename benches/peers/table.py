#!/usr/bin/env python3
"""Tables and pictures of a record of peers, for the README: only what was measured.

    python3 benches/peers/table.py FOLDER [--error-shape 8192,768]

Reads FOLDER/peers.csv (run.py), FOLDER/step.txt (what `bench_cuda` printed in the same call, if it is there) and
FOLDER/samtone-errors.csv (judge_files.py, if it is there), and of other losses step-LOSS.txt and samtone-errors-LOSS.csv; writes
peers.md, time.svg, memory.svg and error.svg beside them. Needs the standard library alone.
"""

import argparse
import csv
import pathlib
import sys
from dataclasses import dataclass, replace

import whole_file
from losses import LOSSES
from svg import Chart, Series, draw

SAMTONE = "samtone"
PRODUCTS = ("products 12", "products 9")
OWN_HEADER = "rows,dim,milliseconds,tflops,extra_mib,loss"
FOOTNOTES = {
    "samtone_query_joint": "¹ The nearest loss in one call: one softmax over passages, other queries and the passage's queries.",
    "qwen3": "² The preset `qwen3` at temperature 0.05: one softmax over passages, other queries and other passages, with a margin of 0.1.",
    "qwen3_cold": "³ The same at temperature 0.01.",
    "clip": "⁴ The preset `clip` at temperature 0.05: passages and queries, half each.",
}
OTHER_LOSS = {loss: text[0] for loss, text in FOOTNOTES.items()}

# Of the engines that come in f32, tf32 and autocast, the charts against B show one or two; tables and the chart of errors have all.
CHARTED = (
    SAMTONE, "products 9", "cuBLAS + Triton", "cuBLAS + Triton f16", "cuBLAS + Triton kept", "Inf-CL-like Triton", "eager f32",
    "eager autocast", "compile autocast", "checkpoint autocast", "MNRL autocast", "Cached MNRL autocast", "memeff Qwen3 bf16",
)  # fmt: skip

Shape = tuple[int, int]


@dataclass(frozen=True)
class Measured:
    """One engine at one shape; what was not measured is None, and the note says why if it is the time."""

    shape: Shape
    engine: str
    ms: float | None
    graphed: bool = False
    tflops: float | None = None
    extra_mib: float | None = None
    error: float | None = None
    loss_name: str = "samtone_query"
    note: str = ""

    @property
    def title(self) -> str:
        return self.engine + OTHER_LOSS.get(self.loss_name, "")

    @property
    def is_ours(self) -> bool:
        return self.engine == SAMTONE


def optional(text: str | None) -> float | None:
    return float(text) if text else None


def read_peers(path: pathlib.Path) -> list[Measured]:
    """Rows of run.py. An engine's time is the faster of its launches and its replayed graph."""
    rows = []
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            launched, graphed = optional(line["milliseconds"]), optional(line["graph_milliseconds"])
            times = [ms for ms in (launched, graphed) if ms is not None]
            rows.append(
                Measured(
                    shape=(int(line["rows"]), int(line["dim"])),
                    engine=line["engine"],
                    ms=min(times) if times else None,
                    graphed=bool(times) and min(times) == graphed,
                    tflops=optional(line["tflops"]),
                    extra_mib=optional(line["extra_mib"]),
                    error=optional(line["gradient_error"]),
                    loss_name=line["loss_name"],
                    note=line["note"],
                )
            )
    return rows


def read_own(folder: pathlib.Path) -> list[Measured]:
    """Steps of our own, of every loss that has one."""
    return [row for loss in dict.fromkeys(loss.own for loss in LOSSES.values()) for row in read_steps(folder, loss)]


def of_loss(stem: str, loss: str, suffix: str) -> str:
    """step.txt is that of samtone_query, step-qwen3.txt that of qwen3."""
    return f"{stem}{suffix}" if loss == "samtone_query" else f"{stem}-{loss}{suffix}"


def read_steps(folder: pathlib.Path, loss: str, stem: str = "step") -> list[Measured]:
    """Rows that `bench_cuda` printed, among whatever else is there, with gradient errors where they were judged."""
    errors: dict[Shape, float] = {}
    judged, printed = folder / of_loss("samtone-errors", loss, ".csv"), folder / of_loss(stem, loss, ".txt")
    if judged.exists():
        with open(judged, newline="") as file:
            for line in csv.DictReader(file):
                errors[int(line["rows"]), int(line["dim"])] = float(line["gradient_error"])
    if not printed.exists():
        return []
    lines = printed.read_text().splitlines()
    start = next((k for k, line in enumerate(lines) if line.startswith(OWN_HEADER)), None)
    if start is None:
        return []
    rows = []
    for line in csv.DictReader(lines[start:]):
        if not (line["rows"].isdigit() and line["loss"]):
            break
        shape, launched = (int(line["rows"]), int(line["dim"])), float(line["milliseconds"])
        ms = min(launched, optional(line.get("graph_milliseconds")) or launched)
        tflops = LOSSES[loss].operations * shape[0] ** 2 * shape[1] / ms / 1e9
        mib, error = float(line["extra_mib"]), errors.get(shape)
        rows.append(Measured(shape, SAMTONE, ms, ms < launched, tflops, mib, error, loss_name=loss))
    return rows


def cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def digits(ms: float) -> str:
    """Three significant digits without an exponent."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def section(shape: Shape, rows: list[Measured]) -> list[str]:
    """One shape: bare products first, then engines by time, then what did not run and why."""
    own = {row.loss_name: row.ms for row in rows if row.is_ours}
    ran = [row for row in rows if row.ms is not None]
    ordered = sorted(ran, key=lambda row: (row.engine not in PRODUCTS, row.ms))
    lines = [f"## B = {shape[0]}, d = {shape[1]}", ""]
    lines += [
        "| engine | ms | samtone's time of this loss × | TFLOP/s | extra MiB | gradient error | settings |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ordered:
        name = f"**{row.title}**" if row.is_ours else row.title
        ms = digits(row.ms) + (" (graph)" if row.graphed else "")
        mine = own.get(LOSSES[row.loss_name or "samtone_query"].own)
        ratio = cell(row.ms / mine if mine else None, ".2f")
        numbers = [cell(row.tflops, ".0f"), cell(row.extra_mib, ".0f"), cell(row.error, ".1e")]
        lines.append("| " + " | ".join([name, ms, ratio, *numbers, row.note.replace("|", "/")]) + " |")
    failed = [row for row in rows if row.ms is None]
    if failed:
        lines += ["", "Did not run:", "", *(f"- {row.title}: {row.note}" for row in failed)]
    return [*lines, ""]


def markdown(rows: list[Measured], about: str) -> str:
    lines = ["# The same step, by others", ""]
    lines += ["Made by `benches/peers/table.py` from the files beside it.", "", "```", *about.splitlines(), "```", ""]
    for shape in sorted({row.shape for row in rows}):
        lines += section(shape, [row for row in rows if row.shape == shape])
    lines += [text + "  " for loss, text in FOOTNOTES.items() if any(row.loss_name == loss for row in rows)]
    return "\n".join(lines).rstrip() + "\n"


def widest(rows: list[Measured]) -> set[Shape]:
    """Of each B the shape with the largest d: what the charts against B show."""
    best: dict[int, int] = {}
    for size, dim in (row.shape for row in rows):
        best[size] = max(dim, best.get(size, 0))
    return set(best.items())


def over_products(rows: list[Measured]) -> list[Measured]:
    """Times as multiples of bare products of the same operations at the same shape, which spreads what milliseconds would pile up."""
    bare = {row.shape: row.ms / 12 for row in rows if row.engine == "products 12" and row.ms}

    def count(row: Measured) -> int:
        return 12 if row.engine in PRODUCTS else LOSSES[row.loss_name].operations

    return [replace(row, ms=row.ms / (bare[row.shape] * count(row))) for row in rows if row.ms and row.shape in bare]


def against_batch(rows: list[Measured], title: str, label: str, value: str) -> Chart:
    rows = [row for row in rows if row.engine in CHARTED and not (row.is_ours and row.loss_name in OTHER_LOSS)]
    shapes = widest(rows)
    dims = " or ".join(str(d) for d in sorted({d for _, d in shapes}))
    ticks = sorted(float(size) for size, _ in shapes)
    chart = Chart(title, f"B (d = {dims})", label, x_ticks=ticks)
    for engine in dict.fromkeys(row.engine for row in rows):
        mine = [row for row in rows if row.engine == engine and row.shape in shapes and row.ms is not None]
        points = [(float(row.shape[0]), getattr(row, value)) for row in mine if getattr(row, value)]
        points = [point for point in points if point[1] > 0]
        if points:
            chart.series.append(Series(mine[0].title, points, first=mine[0].is_ours))
    return chart


def error_chart(rows: list[Measured], shape: Shape) -> Chart:
    title = f"Gradient error and time, B = {shape[0]}, d = {shape[1]} (lower left is better)"
    chart = Chart(title, "ms", "gradient error against float64", joined=False)
    for row in rows:
        if row.shape == shape and row.ms and row.error:
            chart.series.append(Series(row.title, [(row.ms, row.error)], first=row.is_ours))
    return chart


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--error-shape", default="8192,768", metavar="B,d")
    arguments = parser.parse_args()
    folder = arguments.folder
    peers = folder / "peers.csv"
    if not peers.exists():
        print(f"table: {peers} is not there; benches/peers/run.py writes it")
        return 1
    rows = read_own(folder) + read_peers(peers)
    about = folder / "peers-env.txt"
    whole_file.write(
        folder / "peers.md", markdown(rows, about.read_text() if about.exists() else "no peers-env.txt")
    )
    size, dim = (int(part) for part in arguments.error_shape.split(","))
    charts = {
        "time.svg": against_batch(
            over_products(rows),
            "Time of a step, forward and backward",
            "times the bare bf16 products of the same operations",
            "ms",
        ),
        "memory.svg": against_batch(
            [row for row in rows if row.engine not in PRODUCTS], "Memory beyond inputs and gradients", "MiB", "extra_mib"
        ),
        "error.svg": error_chart(rows, (size, dim)),
    }
    for name, chart in charts.items():
        if chart.series:
            whole_file.write(folder / name, draw(chart))
        else:
            (folder / name).unlink(missing_ok=True)
            whole_file.say(f"table: nothing measured for {name}")
    whole_file.say(f"written to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
