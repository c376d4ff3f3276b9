"""The step of `samtone_query` in PyTorch on a GPU, beside bare bf16 matrix products of the same 12 B^2 d operations.

    python3 benches/peers/torch_cuda.py [B,d ...]

Prints CSV: B, d, engine, median milliseconds of 20 steps after 3, MiB beyond inputs and gradients. An engine that does not fit
or compile says why in place of a time.
"""

import statistics
import sys

import torch
from torch_step import samtone_query

SHAPES = ["512,768", "2048,1024", "8192,768", "16384,768", "32768,1024"]


def eager(query, passage, autocast=False):
    query.grad = passage.grad = None
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        loss = samtone_query(query, passage, 0.01)
    loss.backward()


def products(query, passage):
    """12 B^2 d operations in six products of 2 B^2 d, the shapes of cosines and of gradients."""
    tile = min(len(query), 16384)  # the B x B operand in pieces that fit
    q, p = query[:tile].detach().to(torch.bfloat16), passage.detach().to(torch.bfloat16)
    for _ in range(0, len(query), tile):
        for _ in range(3):
            cosines = q @ p.T
        for _ in range(3):
            cosines @ p


def median(step):
    times = []
    for _ in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def main():
    torch.manual_seed(1)
    compiled = torch.compile(eager)
    engines = {
        "products bf16": products,
        "eager f32": eager,
        "eager bf16 autocast": lambda q, p: eager(q, p, autocast=True),
        "compile f32": compiled,
        "compile bf16 autocast": lambda q, p: compiled(q, p, autocast=True),
    }
    print("rows,dim,engine,milliseconds,extra_mib")
    for shape in sys.argv[1:] or SHAPES:
        rows, dim = map(int, shape.split(","))
        query, passage = (torch.randn(rows, dim, device="cuda", requires_grad=True) for _ in range(2))
        for name, engine in engines.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            try:
                time = f"{median(lambda: engine(query, passage)):.4f}"
            except Exception as error:  # out of memory, or no compiler: the others still count
                time = type(error).__name__
            extra = (torch.cuda.max_memory_allocated() - before) / 2**20
            print(f"{rows},{dim},{name},{time},{extra:.1f}", flush=True)
            query.grad = passage.grad = None


if __name__ == "__main__":
    main()
