#!/usr/bin/env python3
"""Times the same step in samtone, as bare matrix products and in PyTorch, in turns, and writes a record.

    python3 benches/record.py [--quick]

Builds what it needs, and writes step.csv, env.txt and summary.md into benches/record/<processor>/<date>. Uses the PyTorch of
the interpreter that runs it; without one, records the rest and says so. Needs nothing else beyond the standard library.
"""

import argparse
import collections
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import pathlib
import select
import statistics
import subprocess
import sys
import tempfile
import time

import record_files
from record_files import whole_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
TORCH_STEP = ROOT / "benches" / "peers" / "torch_step.py"
SAMTONE, PRODUCTS, EAGER = "samtone", "products", "eager"
COMPILED = ("compile", "compile max-autotune")
AUTOCAST = "eager bf16 autocast"
# Of a call with prefixes: all in one pass, the plain loss of the whole embeddings, and a call for each prefix. What `bench_step --serve` is
# asked for each, in the process of the first.
OF_PREFIXES = {"samtone prefixes": SAMTONE, "samtone plain": "plain", "samtone calls": "calls"}
PREFIXES_IN_ONE, *OTHERS_OF_PREFIXES = OF_PREFIXES
PREFIX_PEERS = ("eager prefixes", "compile prefixes")

# Shapes of the marks; `--quick` tries the machinery at others and judges no mark.
MARK_SHAPE, GROWTH_SHAPES = (4096, 768), ((8192, 256), (16384, 256))
TABLE = [(batch, dim) for batch in (512, 1024, 2048, 4096, 8192) for dim in (256, 768, 1024)]
QUICK_MARK_SHAPE, QUICK_GROWTH_SHAPES = (1024, 256), ((1024, 128), (2048, 128))
QUICK_TABLE = [(512, 256), (1024, 256)]
PREFIXES, QUICK_PREFIXES = (64, 128, 256, 512, 768), (32, 64, 128, 256)
# Both types side by side. Small, because PyTorch's bf16 products are slow where the processor has none of its own.
TYPES_SHAPE, QUICK_TYPES_SHAPE = (1024, 768), (512, 256)
# Judged by float64 up to this B, beyond which it would take longer than the record.
JUDGED_BATCH = 4096
# Fewer rounds from this B on, where a step lasts seconds and hardly varies; the marks' shapes always get all of them.
LARGE_BATCH, LARGE_ROUNDS = 8192, 3
# A peer that is not warm by then, or does not end a step, is given up and the record says so.
WARM_UP_LIMIT_S, STEP_LIMIT_S = 240, 120
# Between two engines, so that the threads of the first one have stopped spinning.
PAUSE_S = 0.05
DID_NOT_RUN = "did not run: "


@dataclasses.dataclass
class Entrant:
    """One engine at one shape, and what was measured of it."""

    engine: str
    batch: int
    dim: int
    dtype: str = "f32"
    # Timed rounds; None: as many as the record has.
    rounds: int | None = None
    version: str = ""
    times: list = dataclasses.field(default_factory=list)
    peak_bytes: int | None = None
    bound_bytes: int | None = None
    loss: float | None = None
    grad_error: float | None = None
    note: str = ""
    prefixes: tuple = ()

    @property
    def ours(self):
        return self.engine in (SAMTONE, PRODUCTS, *OF_PREFIXES)

    @property
    def shape(self):
        return (self.batch, self.dim)

    @property
    def median_ms(self):
        return statistics.median(self.times) if self.times else None

    @property
    def failed(self):
        return self.note.startswith(DID_NOT_RUN)


class Failed(Exception):
    """A peer that did not run; the text says why."""


class Worker:
    """A process that answers each line with a line of JSON."""

    def __init__(self, command, errors):
        self.errors = errors
        self.process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )

    def answer(self, limit_s):
        if not select.select([self.process.stdout], [], [], limit_s)[0]:
            self.process.kill()
            raise Failed(f"given up after {limit_s} s")
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            lines = [text.strip() for text in self.errors.read().splitlines() if text.strip()]
            raise Failed(lines[-1] if lines else f"ended with status {self.process.returncode}")
        return json.loads(line)

    def ask(self, request, limit_s=STEP_LIMIT_S):
        try:
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `answer` tells why the process ended
        return self.answer(limit_s)

    def close(self):
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()


class Recorder:
    def __init__(self, binary, torch, threads, rounds, seed, kept):
        self.binary, self.torch, self.threads, self.rounds, self.seed = binary, torch, threads, rounds, seed
        # Gets what is measured so far, for whoever interrupts the rest.
        self.kept = kept
        self.finished = []
        self.load = record_files.OtherLoad()

    def run(self, entrants, judge=False):
        """Warms all entrants up, then times them in turns; an entrant that fails keeps its note and no times."""
        with tempfile.TemporaryDirectory() as folder:
            workers = {}
            try:
                self.start(entrants, workers, pathlib.Path(folder))
                pids = {worker.process.pid for worker in workers.values()}
                with self.load.during(pids):
                    self.rotate(entrants, workers)
            finally:
                for worker in set(workers.values()):
                    worker.close()
            if judge and self.torch:
                self.judge(entrants, pathlib.Path(folder))
        self.finished += entrants
        whole_file.write(self.kept, record_files.csv_of(self.finished))
        for entrant in entrants:
            show(entrant)

    def start(self, entrants, workers, folder):
        samtone = {}
        for k, entrant in enumerate(entrants):
            key = (*entrant.shape, entrant.dtype, entrant.prefixes)
            try:
                if entrant.engine in OTHERS_OF_PREFIXES:
                    workers[k] = samtone[key]
                    workers[k].ask(OF_PREFIXES[entrant.engine], WARM_UP_LIMIT_S)
                    continue
                if entrant.engine == PRODUCTS:
                    # In the process of the step whose products they are.
                    workers[k] = samtone[key]
                    warm = workers[k].ask(PRODUCTS, WARM_UP_LIMIT_S)
                    entrant.note = warm["schedule"]
                    entrant.version = f"gemm {record_files.locked_version(ROOT, 'gemm')}"
                    continue
                workers[k] = Worker(self.command(entrant, folder), tempfile.TemporaryFile("w+"))
                report = workers[k].answer(WARM_UP_LIMIT_S)
            except Failed as failure:
                if entrant.ours:
                    raise
                entrant.note = f"{DID_NOT_RUN}{failure}"
                continue
            if entrant.engine in (SAMTONE, PREFIXES_IN_ONE):
                samtone[key] = workers[k]
                entrant.note = "stored" if report["stored"] else "recomputed"
                entrant.bound_bytes = report["workspace_bound_bytes"]
            entrant.version = report["version"]
            entrant.loss, entrant.peak_bytes = report["loss"], report["peak_bytes"]

    def command(self, entrant, folder):
        shape = ["--batch", entrant.batch, "--dim", entrant.dim, "--threads", self.threads]
        if entrant.engine in (SAMTONE, PREFIXES_IN_ONE):
            dtype = ["--dtype", entrant.dtype, "--seed", self.seed]
            prefixes = ["--prefixes", ",".join(map(str, entrant.prefixes))] if entrant.prefixes else []
            return [self.binary, "--serve", *shape, *dtype, *prefixes, "--write", self.inputs(entrant, folder)]
        engine = entrant.engine.removesuffix(" prefixes")
        command = [sys.executable, TORCH_STEP, "--engine", engine, *shape, "--inputs", self.inputs(entrant, folder)]
        command += ["--write", self.gradients(entrant, folder), *prefixes_of(entrant.prefixes)]
        return command + (["--once"] if entrant.rounds == 0 else [])

    def inputs(self, entrant, folder):
        """Where the samtone that has the same inputs leaves them."""
        engine = PREFIXES_IN_ONE if entrant.prefixes else SAMTONE
        return self.gradients(dataclasses.replace(entrant, engine=engine), folder)

    @staticmethod
    def gradients(entrant, folder):
        return folder / f"{entrant.engine}-{entrant.batch}-{entrant.dim}-{entrant.dtype}".replace(" ", "-")

    def rotate(self, entrants, workers):
        for round_ in range(max(self.rounds_of(entrant) for entrant in entrants)):
            for turn in range(len(entrants)):
                k = (turn + round_) % len(entrants)
                entrant = entrants[k]
                if entrant.failed or len(entrant.times) == self.rounds_of(entrant):
                    continue
                time.sleep(PAUSE_S)
                try:
                    request = OF_PREFIXES.get(entrant.engine, entrant.engine) if entrant.ours else "step"
                    entrant.times.append(workers[k].ask(request)["ms"])
                except Failed as failure:
                    if entrant.ours:
                        raise
                    entrant.times, entrant.note = [], f"{DID_NOT_RUN}{failure}"

    def rounds_of(self, entrant):
        return self.rounds if entrant.rounds is None else entrant.rounds

    def judge(self, entrants, folder):
        """Gradient errors against eager float64, by inputs."""
        by_inputs = collections.defaultdict(list)
        for entrant in entrants:
            if entrant.times and entrant.engine not in (PRODUCTS, *OTHERS_OF_PREFIXES):
                by_inputs[(*entrant.shape, entrant.dtype, entrant.prefixes)].append(entrant)
        for (batch, dim, dtype, prefixes), group in by_inputs.items():
            folders = {str(self.gradients(entrant, folder)): entrant for entrant in group}
            command = [sys.executable, TORCH_STEP, "--batch", batch, "--dim", dim, "--threads", self.threads]
            command += ["--inputs", self.inputs(group[0], folder), *prefixes_of(prefixes), "--judge", *folders]
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
            judged = json.loads(done.stdout.splitlines()[-1])
            for path, error in judged["errors"].items():
                folders[path].grad_error = error
            engine = "eager prefixes" if prefixes else "eager"
            truth = Entrant(engine, batch, dim, f"f64 ({dtype} inputs)", version=group[-1].version)
            truth.loss, truth.note = judged["loss"], "judge of grad_error, not timed"
            self.finished.append(truth)

    def f32(self, shape, peers, rounds=None):
        engines = [SAMTONE, PRODUCTS, *(peers if self.torch else ())]
        return [Entrant(engine, *shape, rounds=rounds) for engine in engines]


def prefixes_of(prefixes):
    """As torch_step.py takes them."""
    return ["--prefixes", *prefixes] if prefixes else []


def show(entrant):
    result = f"{entrant.median_ms:10.1f} ms" if entrant.times else f"{'-':>10}   "
    whole_file.say(f"{entrant.engine:22} {entrant.batch:6} x {entrant.dim:<5} {entrant.dtype:5} {result}  {entrant.note}")


def build():
    command = ["cargo", "build", "--release", "--example", "bench_step", "--message-format=json-render-diagnostics"]
    built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    messages = (json.loads(line) for line in built.stdout.splitlines())
    return [m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == "bench_step"][-1]


def find_torch():
    """What PyTorch says of itself, or None."""
    if importlib.util.find_spec("torch") is None:
        return None
    command = [sys.executable, str(TORCH_STEP), "--about"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def measure(recorder, quick):
    """All entrants, the marks' shapes first. Returns those from which the growth with B is taken."""
    mark, growth = (QUICK_MARK_SHAPE, QUICK_GROWTH_SHAPES) if quick else (MARK_SHAPE, GROWTH_SHAPES)
    types = QUICK_TYPES_SHAPE if quick else TYPES_SHAPE
    recorder.run(recorder.f32(mark, (EAGER, *COMPILED)), judge=True)
    recorder.run([Entrant(SAMTONE, *mark, "bf16")], judge=True)
    engines = [*OF_PREFIXES, *(PREFIX_PEERS if recorder.torch else ())]
    prefixes = QUICK_PREFIXES if quick else PREFIXES
    recorder.run([Entrant(engine, *mark, prefixes=prefixes) for engine in engines], judge=True)
    narrow = [SAMTONE, *([AUTOCAST] if recorder.torch else ())]
    recorder.run([*recorder.f32(types, (EAGER,)), *(Entrant(engine, *types, "bf16") for engine in narrow)], judge=True)

    grown = [Entrant(SAMTONE, *shape) for shape in growth]
    # For its memory alone: a dozen matrices of B x B, where there is room.
    if recorder.torch and record_files.available_bytes() > 14 * 4 * growth[1][0] ** 2:
        grown.append(Entrant(EAGER, *growth[1], rounds=0, note="memory only, one step"))
    recorder.run(grown)

    for shape in QUICK_TABLE if quick else TABLE:
        if shape not in (mark, types):
            rounds = min(LARGE_ROUNDS, recorder.rounds) if shape[0] >= LARGE_BATCH else None
            recorder.run(recorder.f32(shape, (EAGER,), rounds), judge=shape[0] <= JUDGED_BATCH)
    return grown[:2]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, to try the machinery; judges no mark")
    parser.add_argument("--threads", type=int, default=record_files.physical_cores(), help="default: one per core")
    parser.add_argument("--rounds", type=int, help="timed rounds, at least 5 for a record (default 5; quick: 2)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benches" / "record")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (2 if arguments.quick else 5)
    name = record_files.slug(record_files.processor())
    folder = arguments.out / name / (datetime.date.today().isoformat() + ("-quick" if arguments.quick else ""))
    draft = folder.with_name(f"{folder.name}-unfinished")
    whole_file.writable(draft)

    binary, torch = build(), find_torch()
    if torch is None:
        whole_file.say("PyTorch is not installed here: recording samtone and the bare products only.")
    recorder = Recorder(binary, torch, arguments.threads, rounds, arguments.seed, draft / "step.csv")
    started = time.monotonic()
    try:
        grown = measure(recorder, arguments.quick)
    except KeyboardInterrupt:
        sys.exit(f"interrupted; what was measured until then is in {os.path.relpath(draft)}")
    run = record_files.Run(
        entrants=recorder.finished,
        growth=grown,
        mark_shape=QUICK_MARK_SHAPE if arguments.quick else MARK_SHAPE,
        types_shape=QUICK_TYPES_SHAPE if arguments.quick else TYPES_SHAPE,
        torch=torch,
        threads=arguments.threads,
        rounds=rounds,
        seconds=time.monotonic() - started,
        other_load=recorder.load.share(),
        quick=arguments.quick,
    )
    record_files.write(folder, draft, run, ROOT)
    whole_file.say((folder / "summary.md").read_text())
    whole_file.say(f"written to {os.path.relpath(folder)}")


if __name__ == "__main__":
    main()
