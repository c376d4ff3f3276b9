#!/usr/bin/env python3
"""One screen of a record of `gpu.sh run`: how each check ended, steps beside bare products and peers, gradient errors.

    python3 benches/peers/summary.py FOLDER

Reads what is there of checks-PART.csv, env.txt, step*.txt, samtone-errors*.csv and peers.csv; writes FOLDER/summary.md and prints it. Needs
the standard library alone. Exit code 1 if there is no list of checks.
"""

import argparse
import csv
import pathlib
import sys
from dataclasses import replace

from losses import LOSSES
from table import (
    FOOTNOTES,
    OTHER_LOSS,
    SAMTONE,
    Measured,
    Shape,
    digits,
    over_products,
    read_own,
    read_peers,
    read_steps,
)

# Steps as plans do not choose them: file, and name here.
VARIANTS = {
    "step-recomputed": "cosines recomputed",
    "step-kept": "cosines kept",
    "step-sm80": "kernels of 8.0",
    "step-sm80-recomputed": "kernels of 8.0, cosines recomputed",
    "step-prefixes": "with prefixes",
}
WIDEST = 100  # characters of what a failed check said
TELLING = ("error", "failed", "panic", "began and did not", "more than")


def read_checks(folder: pathlib.Path) -> list[dict]:
    """In the order in which they ran, parts by the time of their first check."""
    lines = []
    for path in sorted(folder.glob("checks-*.csv"), key=lambda path: (path.name != "checks-first.csv", path.name)):
        with open(path, newline="") as file:
            lines += list(csv.DictReader(file))
    return lines


def why(folder: pathlib.Path, check: str) -> str:
    """Of a failed check's output what says most: the first test that failed, with its first line, or the first error, or the end."""
    path = folder / f"{check}.txt"
    said = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()] if path.exists() else []
    for line, following in zip(said, [*said[1:], ""]):
        if line.startswith("---- "):
            return f"{line.strip('- ')}: {following}"[:WIDEST].replace("|", "/")
    telling = [line for line in said if any(word in line.lower() for word in TELLING)]
    return (telling or said[-1:] or [""])[0][:WIDEST].replace("|", "/")


def checks_section(folder: pathlib.Path, checks: list[dict]) -> list[str]:
    passed = [check for check in checks if check["result"] == "ok"]
    lines = ["## Checks", "", f"{len(passed)} of {len(checks)} passed.", ""]
    for part in dict.fromkeys(check["part"] for check in checks):
        mine = [f"{check['check']} ({check['seconds']} s)" for check in passed if check["part"] == part]
        if mine:
            lines += [f"Passed in `{part}`: {', '.join(mine)}.", ""]
    others = [check for check in checks if check["result"] != "ok"]
    if others:
        lines += ["| part | not passed | how it ended | what it said |", "|---|---|---|---|"]
        lines += [
            f"| {check['part']} | **{check['check']}** | {check['result']} ({check['seconds']} s) | {why(folder, check['check'])} |"
            for check in others
        ]
        lines.append("")
    return lines


def cell(row: Measured | None, products: dict[tuple, float], own: dict[tuple, float]) -> str:
    """Milliseconds, times bare products, times our own step, gradient error: what is known of them."""
    if row is None:
        return ""
    if row.ms is None:
        return "–"
    parts = [f"{digits(row.ms)} ms"]
    if (ratio := products.get((row.shape, row.engine, row.loss_name))) is not None:
        parts.append(f"{ratio:.2f} P")
    mine = own.get((row.shape, LOSSES[row.loss_name].own)) if row.loss_name else None
    if mine and not row.engine.startswith(SAMTONE):
        parts.append(f"{row.ms / mine:.2f} S")
    if row.error is not None:
        parts.append(f"{row.error:.1e}")
    return ", ".join(parts)


def steps_section(folder: pathlib.Path) -> list[str]:
    peers = read_peers(folder / "peers.csv") if (folder / "peers.csv").exists() else []
    varied = [
        replace(row, engine=f"{SAMTONE}, {name}", error=None)
        for stem, name in VARIANTS.items()
        for row in read_steps(folder, "samtone_query", stem)
    ]
    rows = [*read_own(folder), *varied, *peers]
    shapes = sorted({row.shape for row in rows})
    if not rows:
        return []
    products = {(row.shape, row.engine, row.loss_name): row.ms for row in over_products(rows)}
    own = {(row.shape, row.loss_name): row.ms for row in rows if row.is_ours}
    found: dict[tuple[str, str], dict[Shape, Measured]] = {}
    for row in rows:
        found.setdefault((row.engine, row.loss_name), {})[row.shape] = row
    lines = [
        "## Steps",
        "",
        "Milliseconds; P: times the bare bf16 products of as many operations; S: times our own step of this loss; gradient error.",
        "",
    ]
    lines += ["| engine | " + " | ".join(f"B = {size}, d = {dim}" for size, dim in shapes) + " |"]
    lines += ["|---|" + "---|" * len(shapes)]
    for (engine, loss), by_shape in found.items():
        title = engine + OTHER_LOSS.get(loss, "")
        title = f"**{title}**" if engine == SAMTONE else title
        lines.append("| " + " | ".join([title, *(cell(by_shape.get(shape), products, own) for shape in shapes)]) + " |")
    failed = [f"{row.engine} at B = {row.shape[0]}: {row.note[:WIDEST]}" for row in peers if row.ms is None]
    if failed:
        lines += ["", f"– did not run: {'; '.join(failed[:6])}{'; …' if len(failed) > 6 else ''}."]
    notes = [text for loss, text in FOOTNOTES.items() if any(row.loss_name == loss for row in rows)]
    return [*lines, "", *("  \n".join(notes).splitlines()), ""]


def environment(folder: pathlib.Path) -> tuple[str, list[str]]:
    """Name of the device, and lines about the rest."""
    path = folder / "env.txt"
    said = path.read_text(errors="replace").splitlines() if path.exists() else []
    known = {line.split(" ", 1)[0]: line.split(" ", 1)[-1] for line in said}
    start = next((k for k, line in enumerate(said) if line.startswith("name, ")), None)
    device = said[start + 1].split(", ") if start is not None and start + 1 < len(said) else ["an unknown GPU"]
    labels = said[start].split(", ")[1:] if start is not None else []
    about = [
        f"{known.get('date', 'no date')[:10]}, samtone {known.get('commit', 'unknown')}",
        f"PyTorch {known.get('torch', 'none')}",
    ]
    about += [f"{label.split(' [')[0].replace('_', ' ')} {value}" for label, value in zip(labels, device[1:])]
    peers = folder / "peers-env.txt"
    if peers.exists():
        about += [line for line in peers.read_text().splitlines() if line.split(" ", 1)[0] in ("triton", "memeff")]
    return device[0], about


def summary(folder: pathlib.Path, checks: list[dict]) -> str:
    device, about = environment(folder)
    lines = [
        f"# One step and its checks: {device}",
        "",
        ", ".join(about) + ". Made by `benches/peers/summary.py` from the files beside it.",
        "",
    ]
    return "\n".join([*lines, *checks_section(folder, checks), *steps_section(folder)]).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    checks = read_checks(folder)
    if not checks:
        print(f"summary: no checks-PART.csv in {folder}; benches/gpu.sh run writes them")
        return 1
    text = summary(folder, checks)
    draft = folder / "summary.md.draft"
    draft.write_text(text)
    draft.replace(folder / "summary.md")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
