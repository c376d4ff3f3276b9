"""Logits never leave the chip: one Triton program per 64 rows, tiles of 64 x 64, after the idea of the Inf-CL paper.

Own code from the published design (arXiv:2410.17243): the first pass keeps a running maximum and sum of its rows; the second
recomputes each tile once for the queries' gradient and once for the passages', whose rows each belong to one program, so nothing is
atomic and results repeat. The gradient of a row of up to 1024 numbers does not fit in registers, so it is read and written by
pieces of the embedding. 18 B^2 d operations for samtone_query: 6 of cosines in the first pass, 6 again and 6 of gradients.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from fused import TritonStep


@triton.jit
def tile_logits(x, y, i, j, rows, dim, inverse_x, inverse_y, scale, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """Logits to base 2 of rows i of x and j of y, -inf on the diagonal and beyond the batch."""
    dots = tl.zeros((BM, BN), tl.float32)
    for d in range(0, dim, BD):
        at = d + tl.arange(0, BD)
        left = tl.load(
            x + i[:, None].to(tl.int64) * dim + at[None, :], mask=(i[:, None] < rows) & (at[None, :] < dim), other=0.0
        )
        right = tl.load(
            y + j[None, :].to(tl.int64) * dim + at[:, None], mask=(j[None, :] < rows) & (at[:, None] < dim), other=0.0
        )
        dots = tl.dot(left, right, dots)
    ix = tl.load(inverse_x + i, mask=i < rows, other=0.0)
    iy = tl.load(inverse_y + j, mask=j < rows, other=0.0)
    kept = (i[:, None] != j[None, :]) & (i[:, None] < rows) & (j[None, :] < rows)
    return tl.where(kept, dots * (ix[:, None] * scale) * iy[None, :], float("-inf"))


@triton.jit
def row_sums(
    x, y, rows, dim, inverse_x, inverse_y, scale, state_max, state_sum,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Continues the running maximum and sum of BM rows of x over all rows of y."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    high = tl.load(state_max + i, mask=i < rows, other=float("-inf"))
    total = tl.load(state_sum + i, mask=i < rows, other=0.0)
    for start in range(0, rows, BN):
        j = start + tl.arange(0, BN)
        logits = tile_logits(x, y, i, j, rows, dim, inverse_x, inverse_y, scale, BM, BN, BD)
        both = tl.maximum(high, tl.max(logits, 1))
        safe = tl.where(both == float("-inf"), 0.0, both)
        total = total * tl.exp2(high - safe) + tl.sum(tl.exp2(logits - safe[:, None]), 1)
        high = both
    tl.store(state_max + i, high, mask=i < rows)
    tl.store(state_sum + i, total, mask=i < rows)


@triton.jit
def row_gradients(
    x, y, out, rows, dim, inverse_x, inverse_y, lse_x, lse_y, scale, gain,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out_i += gain * sum_j (2^(z_ij - lse_i) + 2^(z_ij - lse_j)) / (|x_i| |y_j|) y_j for BM rows, which this program owns."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    lx = tl.load(lse_x + i, mask=i < rows, other=0.0)
    ix = tl.load(inverse_x + i, mask=i < rows, other=0.0)
    for start in range(0, rows, BN):
        j = start + tl.arange(0, BN)
        logits = tile_logits(x, y, i, j, rows, dim, inverse_x, inverse_y, scale, BM, BN, BD)
        ly = tl.load(lse_y + j, mask=j < rows, other=0.0)
        iy = tl.load(inverse_y + j, mask=j < rows, other=0.0)
        weight = (tl.exp2(logits - lx[:, None]) + tl.exp2(logits - ly[None, :])) * (ix[:, None] * gain) * iy[None, :]
        weight = weight.to(y.dtype.element_ty)
        for d in range(0, dim, BD):
            at = d + tl.arange(0, BD)
            right = tl.load(
                y + j[:, None].to(tl.int64) * dim + at[None, :], mask=(j[:, None] < rows) & (at[None, :] < dim), other=0.0
            )
            piece = out + i[:, None].to(tl.int64) * dim + at[None, :]
            inside = (i[:, None] < rows) & (at[None, :] < dim)
            tl.store(piece, tl.dot(weight, right, tl.load(piece, mask=inside, other=0.0)), mask=inside)
        # Pieces are read back by the next tile, perhaps by another thread of this program.
        tl.debug_barrier()


@dataclass(frozen=True)
class Tiling:
    """Tiles of 64 x 64 as published; how much of the embedding at a time, and how Triton runs it, is tuned."""

    dim: int = 64
    warps: int = 4
    stages: int = 2
    rows: int = 64
    cols: int = 64

    def __str__(self) -> str:
        return f"tiles of {self.rows} x {self.cols} x {self.dim}, {self.warps} warps, {self.stages} stages"


class InfClLike(TritonStep):
    """One step of samtone_query with memory of O(B)."""

    def __init__(self, query: torch.Tensor, passage: torch.Tensor, temperature: float, tiling: Tiling) -> None:
        if query.device.type == "cpu" and query.dtype == torch.bfloat16:
            raise RuntimeError("Triton's interpreter multiplies no bf16 matrices")
        super().__init__(query, passage, temperature)
        self.tiling = tiling
        self.launch = {
            "BM": tiling.rows, "BN": tiling.cols, "BD": tiling.dim, "num_warps": tiling.warps, "num_stages": tiling.stages
        }  # fmt: skip
        self.grid = (triton.cdiv(self.rows, tiling.rows),)

    def run(self) -> None:
        s, (of_query, of_passage) = self.state, self.gradients
        q, p = (self.query, s["inverse_q"]), (self.passage, s["inverse_p"])
        a, b = (s["max_a"], s["sum_a"]), (s["max_b"], s["sum_b"])
        self.begin()
        for (x, ix), (y, iy), state in ((q, p, a), (q, q, a), (p, q, b)):
            row_sums[self.grid](x, y, self.rows, self.dim, ix, iy, self.scale, *state, **self.launch)
        self.close()
        of_query.zero_()
        of_passage.zero_()
        la, lb = s["lse_a"], s["lse_b"]
        for (x, ix), (y, iy), out, lx, ly in (
            (q, p, of_query, la, lb),
            (q, q, of_query, la, la),
            (p, q, of_passage, lb, la),
        ):
            row_gradients[self.grid](x, y, out, self.rows, self.dim, ix, iy, lx, ly, self.scale, self.gain, **self.launch)
        self.finish()
