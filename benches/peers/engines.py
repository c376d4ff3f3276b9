"""Every engine of the comparison by name: how to make its step, which loss it computes, where it can run at all."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from losses import LOSSES, TEMPERATURE
from measure import Step, fastest
from torch_step import samtone_query

SMALL = 4096  # up to so many rows, steps are replayed as CUDA graphs, too
ANY = 2**31  # and those that allocate nothing, for all
LONG = 100_000  # from so many rows on, tuning tries less and limits are longer


@dataclass(frozen=True)
class Inputs:
    """The same numbers in bf16 and widened to f32."""

    narrow: tuple[torch.Tensor, torch.Tensor]
    wide: tuple[torch.Tensor, torch.Tensor]

    @property
    def rows(self) -> int:
        return len(self.narrow[0])

    @property
    def dim(self) -> int:
        return self.narrow[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self.narrow[0].device


def make_inputs(rows: int, dim: int, device: torch.device, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Unit rows q of random direction, p = c q + sqrt(1 - c^2) noise, rounded to bf16.

    c = sqrt(2 ln B / d), at most 0.9, is the expected largest cosine with B independent directions: as in the middle of a training
    each positive is about as near as the nearest negative, and neither the loss nor any gradient vanishes.
    """
    source = torch.Generator(device=device).manual_seed(seed)
    noise = [torch.randn(rows, dim, device=device, generator=source) for _ in range(2)]
    cosine = min(0.9, (2 * math.log(rows) / dim) ** 0.5)
    query, other = (F.normalize(x, dim=1) for x in noise)
    passage = F.normalize(cosine * query + (1 - cosine**2) ** 0.5 * other, dim=1)
    narrow = (query.to(dtype), passage.to(dtype))
    return Inputs(narrow, tuple(x.float() for x in narrow))


class Autograd:
    """Forward and backward of a function of f32 leaves, or of bf16 ones if `narrow`; with `autocast`, its products in bf16 as PyTorch's
    users have them.
    """

    def __init__(
        self,
        inputs: Inputs,
        function: Callable[..., torch.Tensor],
        autocast: bool,
        marked: bool = False,
        narrow: bool = False,
    ) -> None:
        self.leaves = [x.detach().requires_grad_() for x in (inputs.narrow if narrow else inputs.wide)]
        self.function, self.autocast, self.marked, self.value = function, autocast, marked, None

    def run(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        if self.marked:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.leaves[0].device.type, dtype=torch.bfloat16, enabled=self.autocast):
            value = self.function(*self.leaves, TEMPERATURE)
        value.backward()
        self.value = value.detach()

    @property
    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(leaf.grad for leaf in self.leaves)

    def loss(self) -> float:
        return self.value.item()


@dataclass(frozen=True)
class Made:
    step: Step
    note: str = ""


def always(_rows: int) -> bool:
    return True


@dataclass(frozen=True)
class Engine:
    name: str
    make: Callable[[Inputs], Made]
    loss: str | None = "samtone_query"
    # Whether a B x B matrix of logits in f32 has to exist, twice: what cannot fit is not tried.
    dense: bool = False
    # Up to so many rows a step is captured as a CUDA graph, and its replays are timed as well.
    graph: int = 0
    wanted: Callable[[int], bool] = always
    # Compilation that may take long; measured last, so that it costs no other engine its time.
    late: bool = False
    limit_s: float = 45.0

    def limit(self, rows: int) -> float:
        return self.limit_s + (30.0 if rows >= LONG else 0.0)


def products(count: int) -> Callable[[Inputs], Made]:
    def make(inputs: Inputs) -> Made:
        from products import Products

        def build(rows: int) -> Products:
            return Products(*inputs.narrow, rows, count)

        most = min(inputs.rows, max(1024, 2**30 // inputs.rows))  # 2 GiB of bf16
        rows = fastest(build, sorted({most, min(most, 8192), min(most, 2048)}, reverse=True), inputs.device)
        return Made(build(rows), f"{rows} rows at a time")

    return make


def plain(precision: str, function: Callable[..., torch.Tensor] = samtone_query, note: str = "") -> Callable[[Inputs], Made]:
    """`precision`: f32, tf32 or bf16 autocast."""

    def make(inputs: Inputs) -> Made:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        return Made(Autograd(inputs, function, precision == "autocast"), note)

    return make


def compiled(precision: str, **options: Any) -> Callable[[Inputs], Made]:
    def make(inputs: Inputs) -> Made:
        torch._dynamo.reset()
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        function = torch.compile(samtone_query, fullgraph=True, dynamic=False, **options)
        return Made(Autograd(inputs, function, precision == "autocast", marked=bool(options)))

    return make


def checkpointed(precision: str) -> Callable[[Inputs], Made]:
    def make(inputs: Inputs) -> Made:
        from torch_losses import chunked

        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")

        def build(size: int) -> Autograd:
            return Autograd(inputs, lambda q, p, t: chunked(q, p, t, size), precision == "autocast")

        sizes = (
            [2048] if inputs.rows >= LONG else sorted({min(size, inputs.rows) for size in (1024, 2048, 4096)}, reverse=True)
        )
        size = fastest(build, sizes, inputs.device)
        return Made(build(size), f"chunks of {size} rows")

    return make


def fused(kept: bool = False, operands: torch.dtype | None = None) -> Callable[[Inputs], Made]:
    def make(inputs: Inputs) -> Made:
        from fused import Blocks, Fused

        def build(blocks: Blocks) -> Fused:
            return Fused(*inputs.narrow, TEMPERATURE, blocks, operands)

        rows = inputs.rows
        shapes = [
            (2048, 4096),
            (1024, 4096),
            (4096, 4096),
            (4096, 8192),
            (8192, 8192),
            (512, rows),
            (1024, rows),
            (2048, rows),
        ]
        if rows >= LONG:
            shapes = [(2048, 4096), (4096, 8192), (8192, 16384)]
        sizes = list(dict.fromkeys((min(r, rows), min(c, rows)) for r, c in shapes))
        best = fastest(build, [Blocks(r, c, kept) for r, c in sizes], inputs.device, graphed=True)
        tiles = [best] if rows >= LONG else [best, *(replace(best, tile_m=m, tile_n=n, warps=w) for m, n, w in ELEMENTWISE)]
        best = fastest(build, tiles, inputs.device, graphed=True)
        return Made(build(best), str(best))

    return make


ELEMENTWISE = ((64, 128, 8), (64, 64, 4), (16, 256, 4))


def inf_cl_like(inputs: Inputs) -> Made:
    from inf_cl_like import InfClLike, Tiling

    def build(tiling: Tiling) -> InfClLike:
        return InfClLike(*inputs.narrow, TEMPERATURE, tiling)

    tilings = [Tiling(64, 4, 3), Tiling(128, 4, 2), Tiling(64, 8, 3), Tiling(64, 4, 2)]
    tilings = [t for t in tilings if t.dim <= inputs.dim] or [Tiling(16, 4, 2)]
    best = fastest(build, tilings[:1] if inputs.rows >= LONG else tilings, inputs.device)
    return Made(build(best), str(best))


def ranking(cached: bool, joint: bool, precision: str) -> Callable[[Inputs], Made]:
    def make(inputs: Inputs) -> Made:
        from sentence import MINI_BATCH, Ranking

        size = f", mini-batches of {MINI_BATCH}" if cached else ""
        note = ("one call: QP, QQ and PQ in one softmax" if joint else "two calls") + size
        return plain(precision, Ranking(cached, joint, TEMPERATURE), note)(inputs)

    return make


def memory_efficient(loss: str, narrow: bool) -> Callable[[Inputs], Made]:
    def make(inputs: Inputs) -> Made:
        from memory_efficient import KERNELS, MemoryEfficient

        def build(kernels: str) -> Autograd:
            return Autograd(inputs, MemoryEfficient(loss, kernels), autocast=False, narrow=narrow)

        kernels = fastest(build, list(KERNELS), inputs.device)
        settings = LOSSES[loss]
        return Made(build(kernels), f"temperature {settings.temperature}, {kernels}")

    return make


def small(rows: int) -> bool:
    return rows <= SMALL


def medium(rows: int) -> bool:
    return rows <= 8192


JOINT = "samtone_query_joint"
ENGINES = [
    Engine("products 12", products(12), loss=None, graph=SMALL),
    Engine("products 9", products(9), loss=None, graph=SMALL),
    Engine("cuBLAS + Triton", fused(), graph=ANY, limit_s=60),
    Engine("cuBLAS + Triton f16", fused(operands=torch.float16), graph=ANY, limit_s=60),
    Engine("cuBLAS + Triton kept", fused(kept=True), graph=ANY, limit_s=60, dense=True),
    Engine("Inf-CL-like Triton", inf_cl_like, graph=ANY, limit_s=60),
    Engine("memeff Qwen3 bf16", memory_efficient("qwen3", True), loss="qwen3", graph=SMALL),
    Engine("memeff CLIP bf16", memory_efficient("clip", True), loss="clip", graph=SMALL),
    Engine("eager f32", plain("f32"), dense=True, graph=SMALL),
    Engine("eager tf32", plain("tf32"), dense=True, graph=SMALL),
    Engine("eager autocast", plain("autocast"), dense=True, graph=SMALL),
    Engine("checkpoint tf32", checkpointed("tf32")),
    Engine("checkpoint autocast", checkpointed("autocast")),
    Engine("MNRL tf32", ranking(False, False, "tf32"), dense=True),
    Engine("MNRL autocast", ranking(False, False, "autocast"), dense=True),
    Engine("MNRL joint autocast", ranking(False, True, "autocast"), loss=JOINT, dense=True),
    Engine("Cached MNRL tf32", ranking(True, False, "tf32")),
    Engine("Cached MNRL autocast", ranking(True, False, "autocast")),
    Engine("Cached MNRL joint autocast", ranking(True, True, "autocast"), loss=JOINT),
    Engine("compile autocast", compiled("autocast"), dense=True, graph=SMALL, late=True, limit_s=60),
    Engine("memeff Qwen3 bf16 cold", memory_efficient("qwen3_cold", True), loss="qwen3_cold", late=True),
    Engine("memeff Qwen3 tf32", memory_efficient("qwen3", False), loss="qwen3", graph=SMALL, late=True),
    Engine("memeff CLIP tf32", memory_efficient("clip", False), loss="clip", graph=SMALL, late=True),
    Engine("compile tf32", compiled("tf32"), dense=True, graph=SMALL, late=True, limit_s=60),
    Engine("compile reduce-overhead autocast", compiled("autocast", mode="reduce-overhead"), dense=True, wanted=small, late=True,
           limit_s=60),
    Engine("compile max-autotune autocast", compiled("autocast", mode="max-autotune"), dense=True, wanted=medium, late=True,
           limit_s=120),
]  # fmt: skip
BY_NAME = {engine.name: engine for engine in ENGINES}
