#!/usr/bin/env python3
"""Measures what others do for the same step of samtone_query on a GPU: time, memory and gradient error of each, in one call.

    python3 benches/peers/run.py --out FOLDER [--quick] [--shapes 8192,768 32768,1024] [--engines PART ...]

Writes peers.csv and peers-env.txt into FOLDER. Needs PyTorch and Triton; an engine that lacks something, does not fit or takes too
long says so in its row, and the rest goes on. `--device cpu` with TRITON_INTERPRET=1 tries the machinery without a GPU, at tiny
shapes. A record: this, and the output of `bench_cuda` at the same shapes as step.txt; then `table.py FOLDER`.
"""

import argparse
import csv
import datetime
import io
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import whole_file
from losses import LOSSES

WORKER = pathlib.Path(__file__).with_name("worker.py")
SHAPES = ["512,768", "2048,1024", "8192,256", "8192,768", "32768,1024", "131072,1024"]
QUICK = ["512,768", "8192,768"]
COLUMNS = (
    "rows", "dim", "engine", "loss_name", "milliseconds", "graph_milliseconds", "tflops", "extra_mib",
    "gradient_error", "judged_rows", "loss", "reference_loss", "note",
)  # fmt: skip
# A process starts, and makes inputs and the float64 gradients of a shape, within so many seconds.
START_LIMIT_S = 90.0

Task = tuple[int, int, str]


class Worker:
    """A process that answers with lines of JSON, and everything it started."""

    def __init__(self, request: dict) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(request)],
            stdout=subprocess.PIPE, stderr=self.errors, text=True, start_new_session=True,
        )  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def answer(self, limit_s: float) -> dict:
        """The next line; {"failed": …, "dead": True} if the process ends first or the limit passes."""
        try:
            line = self.lines.get(timeout=limit_s)
        except queue.Empty:
            return {"failed": f"given up after {limit_s:.0f} s", "dead": True}
        if line is not None:
            return json.loads(line)
        code = self.process.wait()
        self.errors.seek(0)
        said = [text.strip() for text in self.errors.read().splitlines() if text.strip()]
        return {"failed": f"process ended with {code}: {said[-1][:160] if said else 'no message'}", "dead": True}

    def close(self) -> None:
        """Ends the process and whatever compilers it left."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.reader.join()
        self.process.stdout.close()
        self.errors.close()


def results(tasks: list[Task], device: str, budget_s: float, limit: Callable[[Task], float]) -> Iterator[tuple[Task, dict]]:
    """Each task's result in order; a worker that dies or hangs costs its task, and another one goes on with the rest."""
    deadline = time.monotonic() + budget_s
    left = list(tasks)
    while left:
        if time.monotonic() > deadline:
            yield from ((task, {"failed": f"not tried: the budget of {budget_s:.0f} s was spent"}) for task in left)
            return
        worker, ready = Worker({"device": device, "tasks": left}), False
        try:
            while left and time.monotonic() <= deadline:
                left_s = max(1.0, deadline - time.monotonic())
                answer = worker.answer(min(left_s, limit(left[0]) if ready else START_LIMIT_S))
                if "ready" in answer:
                    ready = True
                    continue
                task = left.pop(0)
                yield task, answer
                if answer.get("dead") or answer.get("restart"):
                    break
                # The next task may begin with the inputs of another shape.
                ready = ready and bool(left) and left[0][:2] == task[:2]
        finally:
            worker.close()


def row_of(task: Task, result: dict, loss_name: str | None) -> dict:
    """A line of the CSV. TFLOP/s count the loss's products with every cosine computed twice, by the faster of both times."""
    rows, dim, engine = task
    times = [result[key] for key in ("ms", "graph_ms") if key in result]
    count = LOSSES[loss_name].operations if loss_name else int(engine.rpartition(" ")[2])  # bare products are named by theirs
    operations = count * rows**2 * dim
    text = {"milliseconds": "ms", "graph_milliseconds": "graph_ms"}
    line = {
        "rows": rows,
        "dim": dim,
        "engine": engine,
        "loss_name": loss_name or "",
        "judged_rows": result.get("judged_rows", ""),
    }
    line |= {column: f"{result[key]:.4f}" for column, key in text.items() if key in result}
    if times:
        line["tflops"] = f"{operations / min(times) / 1e9:.1f}"
    for column, form in (("extra_mib", ".1f"), ("gradient_error", ".3e"), ("loss", ".6f"), ("reference_loss", ".6f")):
        if result.get(column) is not None:
            line[column] = format(result[column], form)
    line["note"] = result.get("failed", result.get("note", ""))
    return line


def environment(device: str) -> str:
    """What the machine says of itself, as text."""
    worker = Worker({"device": device, "about": True, "tasks": []})
    about = worker.answer(START_LIMIT_S)
    worker.close()
    lines = [f"date {datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"]
    lines += [f"{name} {value}" for name, value in about.items()]
    query = "name,driver_version,clocks.sm,clocks.max.sm,power.limit,memory.total"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
        lines += subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError) as error:
        lines.append(f"nvidia-smi: {error}")
    return "\n".join(lines) + "\n"


def show(line: dict) -> None:
    best = line.get("graph_milliseconds") or line.get("milliseconds")
    numbers = f"{best:>12} ms {line.get('tflops', ''):>7} TFLOP/s {line.get('extra_mib', ''):>9} MiB" if best else " " * 43
    whole_file.say(
        f"{line['rows']:>6} x {line['dim']:<4} {line['engine']:<32}{numbers} {line.get('gradient_error', ''):>10}  {line['note']}"
    )


def parse_shape(text: str) -> tuple[int, int]:
    rows, _, dim = text.partition(",")
    if not (rows.isdigit() and dim.isdigit() and int(rows) > 1 and int(dim) > 0):
        raise argparse.ArgumentTypeError(f"`{text}` is not B,d with B of at least 2")
    return int(rows), int(dim)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the record")
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="B,d")
    parser.add_argument("--quick", action="store_true", help=f"the shapes {' '.join(QUICK)} alone")
    parser.add_argument("--engines", nargs="+", metavar="PART", help="only engines whose name contains one of these")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything (default 480)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    try:
        from engines import ENGINES
    except ImportError as error:
        print(f"peers: cannot run, {error}")
        return 1
    # Whoever ends this process leaves no worker behind on the device.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    shapes = arguments.shapes or [parse_shape(text) for text in (QUICK if arguments.quick else SHAPES)]
    chosen = [e for e in ENGINES if not arguments.engines or any(part in e.name for part in arguments.engines)]
    tasks = [
        (rows, dim, engine.name)
        for late in (False, True)
        for rows, dim in shapes
        for engine in chosen
        if engine.late == late and engine.wanted(rows)
    ]
    whole_file.writable(arguments.out)
    about = environment(arguments.device)
    whole_file.write(arguments.out / "peers-env.txt", about)
    whole_file.say(about)
    engines = {engine.name: engine for engine in chosen}

    def limit(task: Task) -> float:
        return engines[task[2]].limit(task[0])

    measured, table = 0, io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS)
    writer.writeheader()
    for task, result in results(tasks, arguments.device, arguments.budget, limit):
        line = row_of(task, result, engines[task[2]].loss)
        writer.writerow(line)
        # Whole after each result, so that whoever ends this process keeps what is there.
        whole_file.write(arguments.out / "peers.csv", table.getvalue())
        show(line)
        measured += "ms" in result
    whole_file.say(f"{measured} of {len(tasks)} measured")
    return 0 if measured else 1


if __name__ == "__main__":
    sys.exit(main())
