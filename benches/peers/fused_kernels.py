"""Elementwise Triton kernels around matrix products: what a careful user of PyTorch writes instead of a new product kernel.

All logits are to base 2: z_ij = log2(e)/tau * cos(x_i, y_j), from a product of raw embeddings and two inverse norms. Scalars that
depend on the batch are passed as data, never specialized on. `TRITON_INTERPRET=1` runs everything on the CPU.
"""

import triton
import triton.language as tl


@triton.jit
def prepare_rows(query, passage, inverse_q, inverse_p, positive, scale, dim, BLOCK: tl.constexpr):
    """1/|q_i|, 1/|p_i| and the positive's logit z_ii = scale * cos(q_i, p_i) for one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    q = tl.load(query + row * dim + at, mask=at < dim, other=0.0).to(tl.float32)
    p = tl.load(passage + row * dim + at, mask=at < dim, other=0.0).to(tl.float32)
    iq = 1.0 / tl.sqrt(tl.sum(q * q, 0))
    ip = 1.0 / tl.sqrt(tl.sum(p * p, 0))
    tl.store(inverse_q + row, iq)
    tl.store(inverse_p + row, ip)
    tl.store(positive + row, tl.sum(q * p, 0) * iq * ip * scale)


@triton.jit
def masked_logits(tile, i, j, rows, cols, inverse_i, inverse_j, scale, diagonal):
    """Logits of rows i and columns j of a product; -inf beyond the tile and where i - j == diagonal (own positive, or itself)."""
    inside = (i[:, None] < rows) & (j[None, :] < cols)
    dots = tl.load(tile + i[:, None].to(tl.int64) * cols + j[None, :], mask=inside, other=0.0)
    left = tl.load(inverse_i + i, mask=i < rows, other=0.0)
    right = tl.load(inverse_j + j, mask=j < cols, other=0.0)
    logits = dots * (left[:, None] * scale) * right[None, :]
    return tl.where(inside & (i[:, None] - j[None, :] != diagonal), logits, float("-inf"))


@triton.jit
def tile_sums(
    tile, rows, cols, inverse_i, inverse_j, scale, diagonal, row_max, row_sum, col_max, col_sum,
    COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """max and sum of 2^(z - max) of each row over BN columns, and with COLUMNS of each column over BM rows, into partials."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    logits = masked_logits(tile, i, j, rows, cols, inverse_i, inverse_j, scale, diagonal)
    high = tl.max(logits, 1)
    total = tl.sum(tl.exp2(logits - tl.where(high == float("-inf"), 0.0, high)[:, None]), 1)
    tl.store(row_max + tl.program_id(1) * rows + i, high, mask=i < rows)
    tl.store(row_sum + tl.program_id(1) * rows + i, total, mask=i < rows)
    if COLUMNS:
        high = tl.max(logits, 0)
        total = tl.sum(tl.exp2(logits - tl.where(high == float("-inf"), 0.0, high)[None, :]), 0)
        tl.store(col_max + tl.program_id(0) * cols + j, high, mask=j < cols)
        tl.store(col_sum + tl.program_id(0) * cols + j, total, mask=j < cols)


@triton.jit
def merge_sums(part_max, part_sum, parts, count, state_max, state_sum, BLOCK: tl.constexpr):
    """Folds `parts` partial maxima and sums of each of `count` entries into their running state, in a fixed order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    high = tl.load(state_max + at, mask=inside, other=float("-inf"))
    total = tl.load(state_sum + at, mask=inside, other=0.0)
    for part in range(parts):
        other = tl.load(part_max + part * count + at, mask=inside, other=float("-inf"))
        both = tl.maximum(high, other)
        safe = tl.where(both == float("-inf"), 0.0, both)
        more = tl.load(part_sum + part * count + at, mask=inside, other=0.0)
        total = total * tl.exp2(high - safe) + more * tl.exp2(other - safe)
        high = both
    tl.store(state_max + at, high, mask=inside)
    tl.store(state_sum + at, total, mask=inside)


@triton.jit
def close_rows(
    max_a, sum_a, max_b, sum_b, positive, lse_a, lse_b, losses, of_positive, count, BLOCK: tl.constexpr
):  # fmt: skip
    """Per pair: both logsumexps with the positive (base 2), its loss in nats, and dL/d(positive logit) * B.

    With N = sum of the negatives, the derivative of one group is -N/(N + positive), formed without 1 - P.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    z = tl.load(positive + at, mask=inside, other=0.0)
    ma = tl.load(max_a + at, mask=inside, other=0.0)
    mb = tl.load(max_b + at, mask=inside, other=0.0)
    sa = tl.load(sum_a + at, mask=inside, other=0.0)
    sb = tl.load(sum_b + at, mask=inside, other=0.0)
    ha = tl.maximum(ma, z)
    hb = tl.maximum(mb, z)
    a = ha + tl.log2(sa * tl.exp2(ma - ha) + tl.exp2(z - ha))
    b = hb + tl.log2(sb * tl.exp2(mb - hb) + tl.exp2(z - hb))
    tl.store(lse_a + at, a, mask=inside)
    tl.store(lse_b + at, b, mask=inside)
    tl.store(losses + at, ((a - z) + (b - z)) * 0.6931471805599453, mask=inside)
    tl.store(of_positive + at, -(sa * tl.exp2(ma - a) + sb * tl.exp2(mb - b)), mask=inside)


@triton.jit
def gradient_tile(
    tile, out, rows, cols, inverse_i, inverse_j, lse_i, lse_j, scale, gain, diagonal, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """G_ij = gain * (2^(z_ij - lse_i) + 2^(z_ij - lse_j)) / (|x_i| |y_j|), 0 where masked, rounded to the products' type."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    logits = masked_logits(tile, i, j, rows, cols, inverse_i, inverse_j, scale, diagonal)
    li = tl.load(lse_i + i, mask=i < rows, other=0.0)
    lj = tl.load(lse_j + j, mask=j < cols, other=0.0)
    weight = tl.exp2(logits - li[:, None]) + tl.exp2(logits - lj[None, :])
    left = tl.load(inverse_i + i, mask=i < rows, other=0.0)
    right = tl.load(inverse_j + j, mask=j < cols, other=0.0)
    weight = weight * (left[:, None] * gain) * right[None, :]
    inside = (i[:, None] < rows) & (j[None, :] < cols)
    at = out + i[:, None].to(tl.int64) * cols + j[None, :]
    tl.store(at, weight.to(out.dtype.element_ty), mask=inside)


@triton.jit
def finish_gradient(
    accumulated, own, partner, inverse_own, inverse_partner, of_positive, factor, gain, dim, BLOCK: tl.constexpr
):  # fmt: skip
    """In place: u = accumulated/gain + positive's share * y/(|x||y|), then factor * (u - x (x.u)/|x|^2) for one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < dim
    u = tl.load(accumulated + row * dim + at, mask=inside, other=0.0) / gain
    x = tl.load(own + row * dim + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(partner + row * dim + at, mask=inside, other=0.0).to(tl.float32)
    ix = tl.load(inverse_own + row)
    u += y * (tl.load(of_positive + row) * ix * tl.load(inverse_partner + row))
    u = factor * (u - x * (tl.sum(x * u, 0) * ix * ix))
    tl.store(accumulated + row * dim + at, u, mask=inside)
