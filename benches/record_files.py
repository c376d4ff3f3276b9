"""The files of a record: step.csv, env.txt, summary.md, and what the machine says of itself."""

import contextlib
import csv
import dataclasses
import datetime
import io
import os
import pathlib
import platform
import re
import subprocess
import sys

sys.path.append(str(pathlib.Path(__file__).resolve().with_name("peers")))
import whole_file  # noqa: E402

GRADIENT_TOLERANCE = 3e-5
# Above this share of the cores taken by others, timings say little.
QUIET = 0.05
# O(B·d) of the memory mark: two gradients, two accumulators, and as much again for packing.
FREE_MATRICES = 6


@dataclasses.dataclass
class Run:
    """Everything a record is made from."""

    entrants: list
    growth: list
    mark_shape: tuple
    types_shape: tuple
    torch: dict | None
    threads: int
    rounds: int
    seconds: float
    other_load: float | None
    quick: bool

    def find(self, engine, shape, dtype="f32"):
        matching = (e for e in self.entrants if (e.engine, e.shape, e.dtype) == (engine, tuple(shape), dtype))
        return next((e for e in matching if not e.failed), None)


class OtherLoad:
    """Share of the cores that processes other than the measured ones took while those were timed."""

    def __init__(self):
        self.totals = [0.0, 0.0, 0.0]

    @contextlib.contextmanager
    def during(self, pids):
        start = self.now(pids)
        yield
        end = self.now(pids)
        if start and end:
            self.totals = [total + after - before for total, before, after in zip(self.totals, start, end)]

    @staticmethod
    def now(pids):
        """Seconds of all cores: busy, in all, and spent by this process and those of `pids`."""
        if not lines_of("/proc/stat"):
            return None
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, lines_of("/proc/stat")[0].split()[1:9])
        tick = os.sysconf("SC_CLK_TCK")
        busy = user + nice + system + irq + softirq + steal
        # Of a process that has ended nothing is left to read; what it took counts as others' then.
        stats = (lines_of(f"/proc/{pid}/stat") for pid in pids)
        ours = sum(int(x) for lines in stats if lines for x in lines[0].rsplit(")", 1)[1].split()[11:13])
        return busy / tick, (busy + idle + iowait) / tick, ours / tick + sum(os.times()[:2])

    def share(self):
        busy, total, ours = self.totals
        return max(0.0, busy - ours) / total if total else None


def processor():
    for line in lines_of("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def lines_of(path):
    try:
        return pathlib.Path(path).read_text().splitlines()
    except OSError:
        return []


def slug(name):
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def physical_cores():
    """Cores this process may use, each counted once however many threads it runs: PyTorch's default too."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    siblings = {tuple(lines_of(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")) for cpu in cpus}
    return len(cpus) if () in siblings else len(siblings)


def memory(key):
    for line in lines_of("/proc/meminfo"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def available_bytes():
    return memory("MemAvailable")


def locked_version(root, package):
    """Of a dependency, from Cargo.lock."""
    lines = lines_of(root / "Cargo.lock")
    return lines[lines.index(f'name = "{package}"') + 1].split('"')[1]


def commit_of(root):
    """The commit, with `-dirty` if anything but a record differs from it: a run overwrites the record of its own day."""
    commit = output_of(root, "git", "describe", "--always")
    changed = output_of(root, "git", "status", "--porcelain", "--", ".", ":!benches/record")
    return f"{commit}-dirty" if changed.strip() else commit


def output_of(root, *command):
    return subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def number(value, digits=1):
    return "" if value is None else f"{value:.{digits}f}"


def mebibytes(count):
    return None if count is None else count / 2**20


def gflops(entrant):
    """Rate in operations of the stored plan, 9 B²d, whatever the engine computes: the same work for all."""
    return None if not entrant.times else 9e-6 * entrant.batch**2 * entrant.dim / entrant.median_ms


def write(folder, draft, run, root):
    """The whole record; only then does it replace what `folder` has."""
    files = {"step.csv": csv_of(run.entrants), "env.txt": environment(run, root), "summary.md": summary(run, root)}
    for name, text in files.items():
        whole_file.write(draft / name, text)
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        os.replace(draft / name, folder / name)
    draft.rmdir()


def csv_of(entrants):
    file = io.StringIO(newline="")
    rows = csv.writer(file, lineterminator="\n")
    names = "engine,version,B,d,dtype,median_ms,min_ms,gflops_effective,peak_mib,loss,grad_error,repeats,note"
    rows.writerow(names.split(","))
    for e in entrants:
        times = (number(e.median_ms, 3), number(min(e.times, default=None), 3), number(gflops(e)))
        loss = "" if e.loss is None else repr(e.loss)
        error = "" if e.grad_error is None else f"{e.grad_error:.2e}"
        measured = (*times, number(mebibytes(e.peak_bytes)), loss, error, len(e.times))
        rows.writerow((e.engine, e.version, *e.shape, e.dtype, *measured, e.note))
    return file.getvalue()


def environment(run, root):
    flags = next((line.split(":", 1)[1].split() for line in lines_of("/proc/cpuinfo") if line.startswith("flags")), [])
    wanted = [flag for flag in flags if flag in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")]
    identity = [line for line in lines_of("/proc/cpuinfo") if re.match(r"(cpu family|model)\s*:", line)][:2]
    rows = [
        f"processor: {processor()}",
        *(re.sub(r"\s*:\s*", ": ", line) for line in identity),
        f"instruction sets: {' '.join(wanted)}",
        f"cores: {physical_cores()}, threads used: {run.threads}",
        f"memory: {memory('MemTotal') / 2**30:.1f} GiB",
        f"system: {platform.system()} {platform.machine()}",
        f"other processes: {'unknown' if run.other_load is None else format(run.other_load, '.1%')} of the cores",
        f"samtone: {commit_of(root)}",
        f"python: {platform.python_version()}",
        f"torch: {run.torch['version'] if run.torch else 'not installed'}",
        *(run.torch["build"] if run.torch else ()),
        "",
        output_of(root, "rustc", "-vV"),
    ]
    return "\n".join(rows) + "\n"


def summary(run, root):
    commit = commit_of(root)
    torch = f"PyTorch {run.torch['version']}" if run.torch else "PyTorch not installed"
    parts = [
        f"# One step of samtone_query: {processor()}, {run.threads} threads",
        f"{datetime.date.today().isoformat()}, samtone {commit}, {torch}. Loss and both gradients at temperature 0.01; "
        f"medians of {run.rounds} rounds in which the engines take turns, after a warm-up; {run.seconds / 60:.1f} minutes.",
    ]
    parts += warnings(run)
    parts.append("## Marks\n" + ("Small shapes: no mark is judged." if run.quick else marks_table(run)))
    parts.append("## All engines at one shape\n" + engines_table(run, run.mark_shape))
    parts.append("## f32 and bf16\n" + engines_table(run, run.types_shape))
    parts.append("## By shape, f32\n" + shapes_table(run))
    parts.append(
        "GFLOP/s counts 9 B²d for every engine: the products of a step that keeps its logits. Peak memory is what a step adds, "
        "its gradients included: for samtone what it asks its allocator for, for PyTorch what becomes resident. *products* are "
        "bare matrix products of the operations of samtone's plan (9 B²d stored, 12 B²d recomputed) by the gemm crate, "
        "by the fastest of several schedules. Errors are those of the gradients against float64 in PyTorch, Frobenius, the "
        "worse tower; bf16 engines are judged on the rounded inputs."
    )
    return "\n\n".join(parts) + "\n"


def warnings(run):
    found = []
    if run.torch is None:
        found.append("**PyTorch was not installed: nothing here compares with it.**")
    if run.other_load is None:
        found.append("This system does not tell what else ran; the timings hold for a quiet machine only.")
    elif run.other_load > QUIET:
        found.append(
            f"**Other processes took {run.other_load:.0%} of the cores while the engines were timed: the timings are noise.** "
            "Run it again on a quiet machine."
        )
    missing = (e for e in run.entrants if e.failed)
    found += [f"**{e.engine} at {e.batch} x {e.dim}, {e.dtype}: {e.note}**" for e in missing]
    return found


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def ratio(above, below):
    timed = above and below and above.times and below.times
    return above.median_ms / below.median_ms if timed else None


def marks_table(run):
    return table(("mark", "wanted", "measured", ""), [mark(*row) for row in marks(run)])


def mark(name, wanted, measured, passed):
    return (name, wanted, measured or "not measured", "" if measured is None else "PASS" if passed else "FAIL")


def marks(run):
    """(what, bound, measured or None, whether it holds)"""
    at = "B = {}, d = {}".format(*run.mark_shape)
    samtone = run.find("samtone", run.mark_shape)
    eager, products = run.find("eager", run.mark_shape), run.find("products", run.mark_shape)
    compiled = [run.find(engine, run.mark_shape) for engine in ("compile", "compile max-autotune")]
    compiled = min((e for e in compiled if e), key=lambda e: e.median_ms, default=None)
    fastest = f" ({compiled.engine})" if compiled else ""

    def speed(name, value, bound, holds):
        return (f"{at}: {name}", bound, None if value is None else f"{value:.2f}", value is not None and holds(value))

    yield speed("eager PyTorch / samtone", ratio(eager, samtone), "≥ 3", lambda x: x >= 3)
    yield speed(f"torch.compile{fastest} / samtone", ratio(compiled, samtone), "≥ 2", lambda x: x >= 2)
    yield speed("samtone / bare products", ratio(samtone, products), "≤ 1.10", lambda x: x <= 1.1)
    for dim, bound in ((256, 1.2), (768, 1.1), (1024, 1.1)):
        shapes = [(batch, dim) for batch in (2048, 4096, 8192) if (batch, dim) != tuple(run.mark_shape)]
        ratios = [ratio(run.find("samtone", shape), run.find("products", shape)) for shape in shapes]
        worst = max((x for x in ratios if x), default=None)
        measured = None if worst is None else f"{worst:.2f}"
        name = f"d = {dim}, B ≥ 2048: samtone / bare products, the worst"
        yield (name, f"≤ {bound:.2f}", measured, worst is not None and worst <= bound)
    of_prefixes = [run.find(f"samtone {which}", run.mark_shape) for which in ("prefixes", "plain", "calls")]
    one, plain, calls = of_prefixes
    yield speed("samtone, prefixes in one call / no prefixes", ratio(one, plain), "≤ 1.6", lambda x: x <= 1.6)
    yield speed("samtone, prefixes in one call / a call for each", ratio(one, calls), "≤ 0.6", lambda x: x <= 0.6)
    for peer, bound in (("eager", 7), ("compile", 5)):
        value = ratio(run.find(f"{peer} prefixes", run.mark_shape), one)
        yield speed(f"{peer} PyTorch / samtone, with prefixes", value, f"≥ {bound}", lambda x, bound=bound: x >= bound)

    small, large = run.growth
    free = FREE_MATRICES * 4 * large.batch * large.dim
    yield (
        f"B = {large.batch}, d = {large.dim}: peak extra memory",
        f"≤ {mebibytes(large.bound_bytes):.0f} MiB + {FREE_MATRICES} f32 matrices B × d ({mebibytes(free):.0f} MiB)",
        f"{mebibytes(large.peak_bytes):.0f} MiB",
        large.peak_bytes <= large.bound_bytes + free,
    )
    value = ratio(large, small)
    name = f"d = {large.dim}: time at B = {large.batch} / time at B = {small.batch}"
    yield (name, "4 ± 10%", f"{value:.2f}", 3.6 <= value <= 4.4)

    ours = ("samtone", "samtone prefixes")
    judged = [e for e in run.entrants if e.engine in ours and e.dtype == "f32" and e.grad_error is not None]
    worst = None if not judged else max(e.grad_error for e in judged)
    # Not `worst <= …` alone: `max` may lose a NaN.
    passed = all(e.grad_error <= GRADIENT_TOLERANCE for e in judged)
    measured = None if worst is None else f"{worst:.1e} over {len(judged)} shapes"
    yield ("f32 gradients against float64", f"≤ {GRADIENT_TOLERANCE:.0e}", measured, passed)
    pairs = [(e, truth_of(run, e)) for e in judged]
    errors = [abs(e.loss - truth.loss) / abs(truth.loss) for e, truth in pairs]
    measured = f"{max(errors):.1e}" if errors else None
    yield ("f32 loss against float64", f"≤ {GRADIENT_TOLERANCE:.0e}", measured, all(x <= GRADIENT_TOLERANCE for x in errors))


def truth_of(run, entrant):
    """What judged it: float64 of the same inputs and prefixes."""
    dtype = f"f64 ({entrant.dtype} inputs)"
    same = (e for e in run.entrants if e.dtype == dtype and e.shape == entrant.shape)
    prefixes = entrant.engine.endswith(" prefixes")
    return next(e for e in same if e.engine.endswith(" prefixes") == prefixes)


def engines_table(run, shape):
    samtone = run.find("samtone", shape)
    rows = []
    for e in (e for e in run.entrants if e.shape == tuple(shape) and e.times):
        error = "" if e.grad_error is None else f"{e.grad_error:.1e}"
        times = (number(e.median_ms), number(ratio(e, samtone), 2), number(gflops(e)))
        rows.append((e.engine, e.dtype, *times, number(mebibytes(e.peak_bytes), 0), error, e.note))
    header = ("engine", "type", "ms", "× samtone f32", "GFLOP/s", "peak MiB", "gradient error", "")
    return "B = {}, d = {}.\n\n".format(*shape) + table(header, rows)


def shapes_table(run):
    shapes = sorted({e.shape for e in run.entrants if e.engine == "samtone"}, key=lambda s: (s[1], s[0]))
    rows = []
    for shape in shapes:
        samtone, products, eager = (run.find(engine, shape) for engine in ("samtone", "products", "eager"))
        if samtone is None:
            continue
        times = [number(e.median_ms) if e else "" for e in (samtone, products, eager)]
        ratios = (number(ratio(eager, samtone), 2), number(ratio(samtone, products), 2))
        peaks = [number(mebibytes(e.peak_bytes), 0) if e else "" for e in (samtone, eager)]
        error = "" if samtone.grad_error is None else f"{samtone.grad_error:.1e}"
        rows.append((*shape, *times, *ratios, *peaks, number(gflops(samtone)), error, samtone.note))
    header = ("B", "d", "samtone ms", "products ms", "eager ms", "eager / samtone", "samtone / products")
    header += ("samtone MiB", "eager MiB", "GFLOP/s", "gradient error", "logits")
    return table(header, rows)
