"""The step of `samtone_query` in PyTorch: loss and gradients, as a user of PyTorch writes them.

    python3 benches/peers/torch_step.py --engine eager --inputs FOLDER --batch 4096 --dim 768

FOLDER holds query.f32 and passage.f32 as `bench_step --write FOLDER` leaves them. Prints one JSON line once warm,
then answers each line `step` on standard input with the milliseconds of a step, until the input ends: benches/record.py
rotates engines that way. `--judge FOLDER…` instead compares gradients in those folders with eager float64.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import resource
import sys
import time

import torch
import torch.nn.functional as F

GRADIENTS = ("query_gradient.f32", "passage_gradient.f32")


def samtone_query(query, passage, temperature):
    """Mean over rows of (logsumexp over passages and other queries) + (logsumexp over queries) - 2 positive logits."""
    query, passage = F.normalize(query, dim=-1), F.normalize(passage, dim=-1)
    logits = query @ passage.T / temperature
    # Under autocast the products come out in 16 bits, where a logit near 100 has steps of 0.5: that is what it costs a user.
    same_tower = (query @ query.T / temperature).fill_diagonal_(-math.inf)
    positive = logits.diagonal()
    to_passage = torch.cat([logits, same_tower], dim=1).logsumexp(dim=1) - positive
    to_query = logits.logsumexp(dim=0) - positive
    return (to_passage + to_query).mean()


def with_prefixes(query, passage, temperature, prefixes):
    """The sum over prefixes of the whole loss of embeddings that are cut off there; without prefixes, the loss."""
    if not prefixes:
        return samtone_query(query, passage, temperature)
    return sum(samtone_query(query[:, :dim], passage[:, :dim], temperature) for dim in prefixes)


def compiled(**options):
    return lambda: torch.compile(with_prefixes, fullgraph=True, dynamic=False, **options)


# Name: (how to make the function, autocast to bf16)
ENGINES = {
    "eager": (lambda: with_prefixes, False),
    "compile": (compiled(), False),
    "compile max-autotune": (compiled(mode="max-autotune"), False),
    "eager bf16 autocast": (lambda: with_prefixes, True),
}


def load(folder, batch, dim, dtype=torch.float32):
    def tower(name):
        path = os.path.join(folder, name)
        return torch.from_file(path, size=batch * dim, dtype=torch.float32).view(batch, dim).clone().to(dtype)

    return tower("query.f32").requires_grad_(), tower("passage.f32").requires_grad_()


def make_step(engine, query, passage, temperature, prefixes):
    make, autocast = ENGINES[engine]
    function = make()

    def step():
        query.grad = passage.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = function(query, passage, temperature, prefixes)
        loss.backward()
        return loss

    return step


class PeakMemory:
    """Peak resident memory beyond what was resident before, in bytes; needs Linux to forget earlier peaks."""

    def __enter__(self):
        gc.collect()
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            self.before = self.status("VmRSS")
        except OSError:
            self.before = None
            self.usage = self.ru_maxrss()
        return self

    def __exit__(self, *_):
        if self.before is None:
            self.bytes = self.ru_maxrss() - self.usage
        else:
            self.bytes = self.status("VmHWM") - self.before

    @staticmethod
    def ru_maxrss():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    @staticmethod
    def status(key):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))


def milliseconds(function):
    started = time.perf_counter()
    function()
    return (time.perf_counter() - started) * 1e3


def serve(arguments):
    query, passage = load(arguments.inputs, arguments.batch, arguments.dim)
    step = make_step(arguments.engine, query, passage, arguments.temperature, arguments.prefixes)
    # Only answers may reach the driver; libraries print what they like.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(report):
        print(json.dumps(report), file=answers, flush=True)

    # With whatever is compiled or tuned.
    first_ms = None if arguments.once else milliseconds(step)
    query.grad = passage.grad = None
    started = time.perf_counter()
    with PeakMemory() as peak:
        loss = step().item()
    step_ms = (time.perf_counter() - started) * 1e3
    if arguments.write:
        os.makedirs(arguments.write, exist_ok=True)
        for name, tensor in zip(GRADIENTS, (query.grad, passage.grad)):
            tensor = tensor.contiguous()
            with open(os.path.join(arguments.write, name), "wb") as file:
                file.write(ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size()))
    # A timed run repeats short steps until it lasts long enough, and reports the mean.
    repeats = max(1, min(1000, math.ceil(arguments.least_ms / max(step_ms, 1e-3))))
    report = {
        "loss": loss,
        "peak_bytes": peak.bytes,
        "first_ms": first_ms,
        "threads": torch.get_num_threads(),
        "version": torch.__version__,
    }
    answer(report)
    for line in sys.stdin:
        if line.strip() != "step":
            raise SystemExit(f"asked for {line.strip()!r}; known is step")
        answer({"ms": milliseconds(lambda: [step() for _ in range(repeats)]) / repeats})


def judge(arguments):
    """Relative errors of gradients: ||g - g64|| / ||g64|| (Frobenius), the worse of the two towers."""
    query, passage = load(arguments.inputs, arguments.batch, arguments.dim, torch.float64)
    loss = make_step("eager", query, passage, arguments.temperature, arguments.prefixes)()
    errors = {}
    for folder in arguments.judge:
        gradients = load_gradients(folder, arguments.batch, arguments.dim)
        relative = [((g - x.grad).norm() / x.grad.norm()).item() for g, x in zip(gradients, (query, passage))]
        # `max` would drop a NaN that comes second.
        errors[folder] = math.nan if any(map(math.isnan, relative)) else max(relative)
    print(json.dumps({"loss": loss.item(), "errors": errors}))


def load_gradients(folder, batch, dim):
    def one(name):
        path = os.path.join(folder, name)
        return torch.from_file(path, size=batch * dim, dtype=torch.float32).view(batch, dim).double()

    return [one(name) for name in GRADIENTS]


def about():
    wanted = ("Math Kernel Library", "MKL-DNN", "OpenMP", "CPU capability")
    lines = [line.strip(" -") for line in torch.__config__.show().splitlines()]
    lines = [line for line in lines if any(word in line for word in wanted) and not line.startswith("Build settings")]
    print(json.dumps({"version": torch.__version__, "build": lines}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, default="eager")
    parser.add_argument("--inputs")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--temperature", type=float, default=0.01)
    parser.add_argument("--prefixes", type=int, nargs="+", default=(), help="Matryoshka prefixes, such as 64 128 256")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--least-ms", type=float, default=100.0)
    parser.add_argument("--once", action="store_true", help="measure memory in the first step, without a warm-up")
    parser.add_argument("--write", help="folder for the gradients of the first step")
    parser.add_argument("--judge", nargs="+", metavar="FOLDER")
    parser.add_argument("--about", action="store_true", help="print the version and its libraries")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.about:
        return about()
    if not arguments.inputs:
        parser.error("--inputs is required")
    return judge(arguments) if arguments.judge else serve(arguments)


if __name__ == "__main__":
    main()
