"""Our best effort with PyTorch's own products: blocks of cosines by cuBLAS, everything elementwise in fused Triton kernels.

samtone_query, with A the softmax of block QP and QQ together (by query) and B that of PQ (by passage):

    L = 1/B sum_i [ log(e^{z_ii} + sum_{j!=i} e^{z_ij} + sum_{j!=i} e^{y_ij}) + log(e^{z_ii} + sum_{j!=i} e^{z_ji}) - 2 z_ii ]

First pass: every block of z = QP' and of the upper half of y = QQ' is multiplied (bf16 in, f32 out), reduced to maxima and sums by
rows and by columns, and merged. Second pass: the same blocks again, or kept ones, become tiles of dL/dz in bf16, each used for two
products that accumulate in f32. 12 B^2 d operations, 9 where the blocks are kept.
"""

import functools
import math
from dataclasses import dataclass, field, replace

import torch
import triton
from fused_kernels import (
    close_rows,
    finish_gradient,
    gradient_tile,
    merge_sums,
    prepare_rows,
    tile_sums,
)

LOG2_E = math.log2(math.e)
LINE = 256


@dataclass(frozen=True)
class Blocks:
    """Rows and columns of a block of cosines, whether all blocks are kept for the second pass, and the elementwise tiles in them."""

    rows: int
    cols: int
    kept: bool = False
    tile_m: int = 32
    tile_n: int = 128
    warps: int = 4

    def __str__(self) -> str:
        elementwise = f"elementwise {self.tile_m} x {self.tile_n}, {self.warps} warps"
        return f"blocks of {self.rows} x {self.cols}{', kept' if self.kept else ''}, {elementwise}"

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        return triton.cdiv(rows, self.tile_m), triton.cdiv(cols, self.tile_n)

    def launch(self) -> dict[str, int]:
        return {"BM": self.tile_m, "BN": self.tile_n, "num_warps": self.warps}


@functools.cache
def accumulates(dtype: torch.dtype) -> bool:
    """Whether this PyTorch's product of 16-bit operands can add to f32 numbers in place: not every version can."""
    left, right = torch.full((2, 16, 16), 2.0, device="cuda", dtype=dtype)
    out = torch.ones(16, 16, device="cuda")
    try:
        torch.ops.aten.addmm.dtype_out(out, left, right, torch.float32, out=out)
    except Exception:  # noqa: BLE001
        return False
    return bool((out == 65.0).all())


def product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """out = left right with f32 results of 16-bit operands; on the CPU, which has no such product, of operands widened exactly."""
    if left.is_cuda:
        torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=out)
    else:
        torch.mm(left.float(), right.float(), out=out)


def accumulate(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """out += left right, likewise."""
    if left.is_cuda and accumulates(left.dtype):
        torch.ops.aten.addmm.dtype_out(out, left, right, torch.float32, out=out)
    elif left.is_cuda:
        out += torch.ops.aten.mm.dtype(left, right, torch.float32)
    else:
        out.addmm_(left.float(), right.float())


@dataclass
class State:
    """Buffers of one number per row that all engines of this shape share: norms, running maxima and sums, logsumexps."""

    rows: int
    device: torch.device
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)

    NAMES = (
        "inverse_q",
        "inverse_p",
        "positive",
        "max_a",
        "sum_a",
        "max_b",
        "sum_b",
        "lse_a",
        "lse_b",
        "losses",
        "of_positive",
    )

    def __post_init__(self) -> None:
        for name in self.NAMES:
            self.vectors[name] = torch.empty(self.rows, device=self.device)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.vectors[name]

    def reset(self) -> None:
        for name in ("max_a", "max_b"):
            self[name].fill_(-math.inf)
        for name in ("sum_a", "sum_b"):
            self[name].zero_()


class TritonStep:
    """What both of our Triton engines do the same way: norms, the end of the first pass, the end of the second."""

    def __init__(self, query: torch.Tensor, passage: torch.Tensor, temperature: float) -> None:
        self.query, self.passage = query, passage
        self.rows, self.dim = query.shape
        self.scale, self.factor = LOG2_E / temperature, 1.0 / (temperature * self.rows)
        self.state = State(self.rows, query.device)
        self.gradients = tuple(torch.empty(self.rows, self.dim, device=query.device) for _ in range(2))
        self.block = triton.next_power_of_2(self.dim)
        # Weights of 1/B would be subnormal numbers of f16; 1024 times larger they fit as long as the rows have norms near 1.
        self.gain = 1024.0 if query.dtype == torch.float16 else 1.0

    def begin(self) -> None:
        s = self.state
        prepare_rows[(self.rows,)](
            self.query, self.passage, s["inverse_q"], s["inverse_p"], s["positive"], self.scale, self.dim, BLOCK=self.block
        )
        s.reset()

    def close(self) -> None:
        s = self.state
        close_rows[(triton.cdiv(self.rows, LINE),)](
            s["max_a"], s["sum_a"], s["max_b"], s["sum_b"], s["positive"],
            s["lse_a"], s["lse_b"], s["losses"], s["of_positive"], self.rows, BLOCK=LINE,
        )  # fmt: skip

    def finish(self) -> None:
        s, (of_query, of_passage) = self.state, self.gradients
        queries, passages = (self.query, s["inverse_q"]), (self.passage, s["inverse_p"])
        for out, (own, inverse), (partner, other) in (
            (of_query, queries, passages),
            (of_passage, passages, queries),
        ):
            finish_gradient[(self.rows,)](
                out, own, partner, inverse, other, s["of_positive"], self.factor, self.gain, self.dim, BLOCK=self.block
            )

    def loss(self) -> float:
        return self.state["losses"].mean().item()


class Fused(TritonStep):
    """One step with preallocated buffers: nothing is allocated after the constructor, so a CUDA graph can hold a step."""

    def __init__(
        self,
        query: torch.Tensor,
        passage: torch.Tensor,
        temperature: float,
        blocks: Blocks,
        operands: torch.dtype | None = None,
    ) -> None:
        self.given = (query, passage)
        towers = [x if operands in (None, x.dtype) else torch.empty_like(x, dtype=operands) for x in self.given]
        super().__init__(*towers, temperature)
        query = self.query
        self.blocks = replace(blocks, rows=min(blocks.rows, self.rows), cols=min(blocks.cols, self.rows))
        size = self.blocks.rows * self.blocks.cols
        device = query.device
        self.tiles = [torch.empty(size, device=device) for _ in range(len(self.plan()) if blocks.kept else 1)]
        self.narrow = torch.empty(size, device=device, dtype=query.dtype)
        col_parts, row_parts = self.blocks.grid(self.blocks.rows, self.blocks.cols)
        self.row_parts = torch.empty(2, row_parts * self.blocks.rows, device=device)
        self.col_parts = torch.empty(2, col_parts * self.blocks.cols, device=device)

    def plan(self) -> list[tuple[bool, slice, slice]]:
        """(queries against queries?, rows, columns) of every block. Of QQ' only blocks that reach the diagonal or lie above it."""

        def cut(size: int, start: int = 0) -> list[slice]:
            return [slice(k, min(k + size, self.rows)) for k in range(start, self.rows, size)]

        passages = [(False, r, c) for r in cut(self.blocks.rows) for c in cut(self.blocks.cols)]
        # The square on the diagonal whole, then what lies to its right: each pair of queries once.
        queries = []
        for r in cut(self.blocks.rows):
            square = slice(r.start, r.stop)
            queries += [(True, r, square)] if self.blocks.rows <= self.blocks.cols else []
            queries += [(True, r, c) for c in cut(self.blocks.cols, r.stop)]
        if self.blocks.rows > self.blocks.cols:
            raise ValueError(
                f"rows {self.blocks.rows} of a block exceed its columns {self.blocks.cols}: allowed up to the columns"
            )
        return passages + queries

    def side(self, same_tower: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The tower of the columns and its inverse norms."""
        return (self.query, self.state["inverse_q"]) if same_tower else (self.passage, self.state["inverse_p"])

    def cosines(self, k: int, same_tower: bool, r: slice, c: slice) -> torch.Tensor:
        tile = self.tiles[k if self.blocks.kept else 0]
        tile = tile[: (r.stop - r.start) * (c.stop - c.start)].view(r.stop - r.start, c.stop - c.start)
        product(self.query[r], self.side(same_tower)[0][c].T, tile)
        return tile

    def reduce(self, tile: torch.Tensor, same_tower: bool, r: slice, c: slice) -> None:
        s = self.state
        rows, cols = tile.shape
        columns = not (same_tower and r == c)
        grid = self.blocks.grid(rows, cols)
        tile_sums[grid](
            tile, rows, cols, s["inverse_q"][r], self.side(same_tower)[1][c], self.scale, c.start - r.start,
            *self.row_parts, *self.col_parts, COLUMNS=columns, **self.blocks.launch(),
        )  # fmt: skip
        self.merge(self.row_parts, grid[1], "a", r)
        if columns:
            self.merge(self.col_parts, grid[0], "a" if same_tower else "b", c)

    def merge(self, partials: torch.Tensor, parts: int, group: str, where: slice) -> None:
        count = where.stop - where.start
        state = (self.state["max_" + group][where], self.state["sum_" + group][where])
        merge_sums[(triton.cdiv(count, LINE),)](*partials, parts, count, *state, BLOCK=LINE)

    def narrowed(self, tile: torch.Tensor, same_tower: bool, r: slice, c: slice) -> torch.Tensor:
        s = self.state
        rows, cols = tile.shape
        out = self.narrow[: rows * cols].view(rows, cols)
        gradient_tile[self.blocks.grid(rows, cols)](
            tile, out, rows, cols, s["inverse_q"][r], self.side(same_tower)[1][c],
            s["lse_a"][r], s["lse_a" if same_tower else "lse_b"][c], self.scale, self.gain, c.start - r.start, **self.blocks.launch(),
        )  # fmt: skip
        return out

    def forward(self) -> None:
        for copy, given in zip((self.query, self.passage), self.given):
            if copy is not given:
                copy.copy_(given)
        self.begin()
        for k, where in enumerate(self.plan()):
            self.reduce(self.cosines(k, *where), *where)
        self.close()

    def backward(self) -> None:
        of_query, of_passage = self.gradients
        of_query.zero_()
        of_passage.zero_()
        for k, (same_tower, r, c) in enumerate(self.plan()):
            if self.blocks.kept:
                tile = self.tiles[k][: (r.stop - r.start) * (c.stop - c.start)].view(r.stop - r.start, -1)
            else:
                tile = self.cosines(k, same_tower, r, c)
            weights = self.narrowed(tile, same_tower, r, c)
            accumulate(weights, self.side(same_tower)[0][c], of_query[r])
            if not (same_tower and r == c):
                accumulate(weights.T, self.query[r], (of_query if same_tower else of_passage)[c])
        self.finish()

    def run(self) -> None:
        self.forward()
        self.backward()
