"""What it costs the gradient to keep the exponentials of the first pass as bf16 instead of computing them again.

    python3 benches/store_or_recompute.py

Prints, for samtone_query on unit rows, the relative Frobenius error of the gradient of both towers in float64 with
  kept        exponentials rounded to bf16 under one exponent, then gradients of logits rounded to f16
  recomputed  gradients of logits rounded to f16
f16 rounding is under the scale of the kernels: the largest gradient of a logit is 2^13. Needs NumPy.
"""

import numpy as np


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def as_bf16(x):
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32).astype(np.float64)


def as_f16(x, scale):
    return (x * scale).astype(np.float16).astype(np.float64) / scale


def gradients(q, p, tau, how):
    beta, weight = 1 / tau, 0.5 / len(q)
    cosines, queries = q @ p.T, q @ q.T
    positive = np.diag(cosines).copy()
    np.fill_diagonal(queries, -np.inf)
    by_row = np.logaddexp.reduce(np.concatenate([beta * cosines, beta * queries], axis=1), axis=1)
    by_column = np.logaddexp.reduce(beta * cosines, axis=0)
    np.fill_diagonal(cosines, -np.inf)  # positives have a term of their own
    top = beta * max(cosines.max(), queries.max())
    e, e_queries = np.exp(beta * cosines - top), np.exp(beta * queries - top)
    if how == "kept":
        e, e_queries = as_bf16(e), as_bf16(e_queries)
    rows, columns = np.exp(top - by_row), np.exp(top - by_column)
    g = weight * e * (rows[:, None] + columns)
    h = weight * e_queries * (rows[:, None] + rows)
    if how != "exact":
        scale = 2.0**13 / max(g.max(), h.max())
        g, h = as_f16(g, scale), as_f16(h, scale)
    diagonal = -weight * (2 - np.exp(beta * positive - by_row) - np.exp(beta * positive - by_column))
    dq = beta * (g @ p + h @ q + diagonal[:, None] * p)
    dp = beta * (g.T @ q + diagonal[:, None] * q)
    return np.concatenate([x - y * (x * y).sum(axis=1, keepdims=True) for x, y in ((dq, q), (dp, p))])


def main():
    random = np.random.default_rng(0)
    print("data,rows,dim,tau,kept,recomputed")
    for data in ("random", "trained"):
        for rows, dim in ((512, 128), (2048, 256)):
            q, noise = unit(random.normal(size=(rows, dim))), random.normal(size=(rows, dim))
            p = unit(noise if data == "random" else q + 0.9 * noise / np.sqrt(dim))
            for tau in (0.01, 0.05):
                exact = gradients(q, p, tau, "exact")
                errors = [np.linalg.norm(gradients(q, p, tau, how) - exact) / np.linalg.norm(exact) for how in ("kept", "recomputed")]
                print(f"{data},{rows},{dim},{tau}," + ",".join(f"{e:.1e}" for e in errors))


if __name__ == "__main__":
    main()
