"""Golden vectors for the contrastive loss family, from a formulation that shares nothing with any kernel:
dense float64 logits and automatic differentiation (JAX). docs/loss.md is the definition, docs/golden-format.md
the format.

    python tests/golden/generate.py FOLDER [SEED]

writes one JSON file per case into FOLDER, which must exist. Needs the packages jax and numpy; the default seed
gives the files beside this script, up to the last bit of the machine's arithmetic.
"""
import json, sys
import jax, jax.numpy as jnp, numpy as np

jax.config.update("jax_enable_x64", True)

PRESETS = {  # name -> softmax groups: (coefficient, blocks, copies of the positive in the denominator)
    "info_nce": [(1.0, ["qp"], 1)],
    "clip": [(0.5, ["qp"], 1), (0.5, ["pq"], 1)],
    "bidirectional": [(1.0, ["qp"], 1), (1.0, ["pq"], 1)],
    "samtone_query": [(1.0, ["qp", "qq"], 1), (1.0, ["pq"], 1)],
    "samtone_passage": [(1.0, ["qp"], 1), (1.0, ["pq", "pp"], 1)],
    "samtone_both": [(1.0, ["qp", "qq"], 1), (1.0, ["pq", "pp"], 1)],
    "samtone_query_one_way": [(1.0, ["qp", "qq"], 1)],
    "pair": [(0.9, ["qp"], 1), (0.1, ["pp"], 1)],
    "gte": [(1.0, ["qp", "qq", "pq", "pp"], 2)],
    "qwen3": [(1.0, ["qp", "qq", "pp"], 1)],
    "decoupled": [(1.0, ["qp"], 0)],
}


def keys(M, N, positives, query_ids, passage_ids):
    """Two keys for every row and column; a pair that agrees in either key is never a negative."""
    qid = np.arange(M) if query_ids is None else np.asarray(query_ids)
    pid = np.arange(N) if passage_ids is None else np.asarray(passage_ids)
    owner_qid = np.full(N, np.iinfo(np.int64).min)  # nobody's
    for i in reversed(range(M)):
        for n in range(N):  # copies of a positive, which are nobody's positive themselves
            if n not in positives and pid[n] == pid[positives[i]]:
                owner_qid[n] = qid[i]
    for i in reversed(range(M)):
        owner_qid[positives[i]] = qid[i]  # the lowest row that owns the passage wins
    return qid, pid[positives], owner_qid, pid


def keep_masks(M, N, positives, query_ids, passage_ids, hard_owner, scope, shared_ids=False):
    rq, rp, cq, cp = keys(M, N, positives, query_ids, passage_ids)
    to_query = (rq[:, None] != rq[None, :]) & (rp[:, None] != rp[None, :])
    to_passage = (rq[:, None] != cq[None, :]) & (rp[:, None] != cp[None, :])
    if shared_ids:  # query ids and passage ids name the same texts: nobody's own text, nor its positive's, is its negative
        to_passage &= rq[:, None] != cp[None, :]
        to_query &= rp[:, None] != rq[None, :]
    k = {"qp": to_passage.copy(), "pp": to_passage.copy(), "qq": to_query, "pq": to_query}
    if hard_owner is not None:  # -1: nobody's, seen by all; i: the hard negative of row i
        own = np.asarray(hard_owner)
        others = (own[None, :] >= 0) & (own[None, :] != np.arange(M)[:, None])
        if scope == "own":
            k["qp"] &= ~others
            k["pp"] &= ~others
    return k


def unit(x):
    n = jnp.sqrt(jnp.sum(x * x, 1, keepdims=True))
    return x / n


def row_losses(q, p, tau, groups, positives, keep, margin):
    q, p = unit(q), unit(p)
    pp = p[positives]
    s = {"qp": q @ p.T, "qq": q @ q.T, "pq": pp @ q.T, "pp": pp @ p.T}
    pos = jnp.sum(q * pp, 1)
    total = 0.0
    for coefficient, blocks, copies in groups:
        negatives = 0.0  # sum of exp(z - z_positive): at most exp(2 / tau), so float64 needs no shift for tau >= 0.005
        for b in blocks:
            k = jnp.asarray(keep[b])
            if margin is not None:
                k = k & (jax.lax.stop_gradient(s[b]) <= jax.lax.stop_gradient(pos)[:, None] + margin)
            negatives = negatives + jnp.sum(jnp.where(k, jnp.exp((s[b] - pos[:, None]) / tau), 0.0), 1)
        total = total + coefficient * (jnp.log(copies) + jnp.log1p(negatives / copies) if copies else jnp.log(negatives))
    return total


def make(name, preset, rng, M, N, d, tau, *, positives=None, weights=None, query_ids=None, passage_ids=None,
         hard_owner=None, scope="all", margin=None, data="random", prefixes=None,
         shared_ids=False):
    """`prefixes`: Matryoshka, a list of (number of leading dimensions, weight): the loss is the weighted sum of the same loss of
    the prefixes, each with norms, positives and margins of its own."""
    positives = np.arange(M) if positives is None else np.asarray(positives)
    q = rng.normal(size=(M, d)) * rng.uniform(0.2, 5.0, size=(M, 1))
    p = rng.normal(size=(N, d)) * rng.uniform(0.2, 5.0, size=(N, 1))
    if data == "trained":  # positives close, negatives far
        p[positives] = q + 0.5 * rng.normal(size=(M, d)) * np.linalg.norm(q, axis=1, keepdims=True) / np.sqrt(d)
    if data == "anisotropic":  # a narrow cone: every cosine near 0.9
        base = rng.normal(size=(1, d)) * 3
        q, p = base + rng.normal(size=(M, d)), base + rng.normal(size=(N, d))
    if data == "opposed":  # all cosines between the towers near -1: the positives' logits are the smallest
        base = rng.normal(size=(1, d)) * 5
        q, p = base + rng.normal(size=(M, d)), -base + rng.normal(size=(N, d))
    w = np.ones(M) if weights is None else np.asarray(weights, float)
    keep = keep_masks(M, N, positives, query_ids, passage_ids, hard_owner, scope, shared_ids)
    groups = PRESETS[preset]
    each = lambda q, p, t: [row_losses(q[:, :k], p[:, :k], t, groups, positives, keep, margin) for k, _ in prefixes or [(d, 1)]]
    rows = lambda q, p, t: sum(v * r for (_, v), r in zip(prefixes or [(d, 1)], each(q, p, t)))
    mean = lambda r: jnp.sum(jnp.asarray(w) * r) / w.sum()
    f = lambda q, p, t: mean(rows(q, p, t))
    loss, (dq, dp, dt) = jax.value_and_grad(f, (0, 1, 2))(q, p, tau)
    assert np.isfinite(loss) and np.isfinite(dq).all() and np.isfinite(dp).all()
    lst = lambda a: None if a is None else np.asarray(a).tolist()
    nested = dict(prefixes=[dict(dim=k, weight=v) for k, v in prefixes],
                  prefix_losses=[float(mean(r)) for r in each(q, p, tau)]) if prefixes else {}
    if shared_ids:
        nested["shared_ids"] = True
    return dict(name=name, preset=preset, **nested,
                groups=[dict(coefficient=c, blocks=b, positive_copies=e) for c, b, e in groups],
                rows=M, passages=N, dim=d, temperature=tau, q=lst(q), p=lst(p), positives=lst(positives),
                weights=lst(weights), query_ids=lst(query_ids), passage_ids=lst(passage_ids),
                hard_negative_owner=lst(hard_owner), hard_negative_scope=scope, margin=margin,
                loss=float(loss), row_losses=lst(rows(q, p, tau)), grad_q=lst(dq), grad_p=lst(dp),
                grad_temperature=float(dt))


def main():
    out, seed = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20230761
    rng = np.random.default_rng(seed)
    cases = [make(f"{p}_plain", p, rng, 7, 7, 5, 0.2) for p in PRESETS]
    cases += [make(f"{p}_hard_negatives", p, rng, 5, 17, 8, 0.05, hard_owner=[-1] * 5 + [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, -1, -1],
                   scope=s) for p, s in (("info_nce", "all"), ("samtone_query", "own"), ("samtone_both", "all"), ("qwen3", "own"), ("gte", "all"))]
    cases += [make(f"{p}_{d}_tau001", p, rng, 9, 9, 12, 0.01, data=d) for p in ("samtone_query", "samtone_both") for d in ("random", "trained", "anisotropic", "opposed")]
    cases += [make(f"{p}_trained_tau005", p, rng, 11, 11, 8, 0.05, data="trained") for p in ("samtone_query", "samtone_both", "clip")]
    cases += [make(f"{p}_weighted_shared_positive", p, rng, 6, 9, 7, 0.1, positives=[0, 3, 3, 5, 8, 0], weights=[1, 0, 2.5, .5, 1, 3]) for p in ("samtone_query", "samtone_both", "gte")]
    cases += [make(f"{p}_duplicate_ids", p, rng, 8, 10, 6, 0.07, query_ids=[4, 4, 9, 2, 2, 2, 7, 1], passage_ids=[1, 2, 2, 3, 4, 1, 5, 6, 6, 2]) for p in ("bidirectional", "samtone_query", "samtone_both", "qwen3")]
    cases += [make(f"{p}_margin", p, rng, 8, 8, 4, 0.05, margin=0.1) for p in ("samtone_query", "samtone_both", "qwen3")]
    cases += [make("samtone_query_single_row", "samtone_query", rng, 1, 1, 3, 0.05),
              make("samtone_both_every_negative_masked", "samtone_both", rng, 4, 4, 3, 0.05, query_ids=[1, 1, 1, 1])]
    ladder = [(3, 1.0), (5, 1.0), (8, 1.0), (12, 1.0)]
    nested = lambda suffix, preset, *shape, **more: make(f"{preset}_prefixes{suffix}", preset, rng, *shape, **{"prefixes": ladder, **more})
    cases += [nested("", p, 7, 7, 12, 0.2) for p in PRESETS]
    cases += [nested(f"_{x}_tau001", p, 9, 9, 12, 0.01, data=x, prefixes=[(4, 1.0), (8, 1.0), (12, 1.0)])
              for p in ("samtone_query", "samtone_both") for x in ("random", "trained", "anisotropic", "opposed")]
    cases += [nested("_hard_negatives", p, 5, 17, 12, 0.05, hard_owner=[-1] * 5 + [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, -1, -1], scope=x)
              for p, x in (("info_nce", "own"), ("samtone_both", "own"), ("gte", "all"))]
    cases += [nested("_margin", p, 8, 8, 12, 0.05, margin=0.1) for p in ("samtone_query", "qwen3")]
    cases += [nested("_duplicate_ids", p, 8, 10, 12, 0.07, query_ids=[4, 4, 9, 2, 2, 2, 7, 1], passage_ids=[1, 2, 2, 3, 4, 1, 5, 6, 6, 2])
              for p in ("bidirectional", "samtone_both")]
    cases += [nested("_weighted_shared_positive", "samtone_both", 6, 9, 12, 0.1, positives=[0, 3, 3, 5, 8, 0], weights=[1, 0, 2.5, .5, 1, 3],
                     prefixes=[(3, 0.25), (5, 0.0), (8, 2.0), (12, 1.0)]),
              nested("_short_of_the_end", "samtone_query", 6, 6, 10, 0.1, prefixes=[(3, 1.0), (6, 0.5)]),
              nested("_one_below_the_end", "samtone_query", 6, 6, 10, 0.1, prefixes=[(4, 1.5)]),
              nested("_one_dimension_first", "samtone_both", 6, 6, 4, 0.3, prefixes=[(1, 1.0), (2, 1.0), (4, 1.0)]),
              nested("_every_dimension", "samtone_both", 5, 6, 9, 0.1, prefixes=[(k, 1.0 / k) for k in range(1, 10)])]
    chain = dict(query_ids=[10, 11, 12, 13, 14, 11], passage_ids=[11, 12, 13, 14, 10, 15, 11, 12, 20, 13], shared_ids=True)
    cases += [make(f"{p}_shared_ids", p, rng, 6, 10, 7, 0.1, **chain) for p in ("info_nce", "bidirectional", "samtone_query", "samtone_both", "gte", "qwen3")]
    cases += [make("samtone_both_shared_ids_hard_negatives", "samtone_both", rng, 6, 10, 7, 0.1, hard_owner=[-1] * 6 + [0, 1, 2, 3], scope="own", **chain),
              make("samtone_query_shared_ids_same_texts", "samtone_query", rng, 5, 5, 6, 0.1, query_ids=[1, 2, 3, 4, 5], passage_ids=[1, 2, 3, 4, 5], shared_ids=True),
              make("samtone_both_copies_of_positives", "samtone_both", rng, 4, 9, 6, 0.1, query_ids=[7, 7, 8, 9], passage_ids=[1, 2, 3, 4, 2, 1, 5, 3, 2],
                   hard_owner=[-1] * 4 + [0, 2, 3, 1, 2], scope="all")]
    for c in cases:
        with open(f"{out}/{c['name']}.json", "w") as f:
            json.dump(c, f)
    print(len(cases), "cases")


main()
