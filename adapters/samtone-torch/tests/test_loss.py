"""Losses, masks and gradients against the definition in float64, and the golden files."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import judge
import numpy
import pytest
import samtone
import torch
from judge import Case, close, gradient_error

TYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS, HARD, DIM = 12, 5, 24


def embeddings(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(ROWS, DIM, generator=generator)
    p = torch.randn(ROWS + HARD, DIM, generator=generator)
    p[:ROWS] += 0.7 * q
    return q.to(dtype), p.to(dtype)


MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "query_ids": {"query_ids": [7, 8, 7, 1, 2, 3, 4, 5, 6, 8, 10, 7]},
    "passage_ids": {"passage_ids": [0, 1, 2, 0, 4, 5, 1, 7, 8, 9, 10, 11, 0, 13, 14, 5, 16]},
    "shared_ids": {
        "query_ids": [0, 1, 2, 0, 4, 5, 6, 7, 8, 9, 10, 21],
        "passage_ids": [1, 2, 20, 4, 21, 6, 7, 23, 9, 10, 11, 12, 0, 13, 14, 3, 21],
        "shared_ids": True,
    },
    "positives": {"positives": [3, 3, 16, 0, 1, 2, 4, 5, 13, 6, 3, 7]},
    "weights": {"weights": [1.0, 0.0, 2.5, 1.0, 0.5, 1.0, 3.0, 0.0, 1.0, 1.0, 0.25, 1.0]},
    "owners": {"owners": [-1] * ROWS + [0, 3, 3, -1, 11], "own": True},
    "owners of everyone": {"owners": [-1] * ROWS + [0, 3, 3, -1, 11]},
    "margin": {"margin": -0.1},
}
MASKS["all"] = {key: value for mask in MASKS.values() for key, value in mask.items()}


def check(case: Case, upstream: float = 1.0, learn: str | None = None) -> None:
    """Everything that samtone gives for a case, in the type of its embeddings, against the definition."""
    dtype = case.query.dtype
    want = judge.judge(case, upstream)
    q, p = case.query.detach().requires_grad_(), case.passage.detach().requires_grad_()
    options: dict[str, Any] = {"temperature": case.temperature}
    if learn == "tau":
        options = {"temperature": torch.tensor(case.temperature, dtype=torch.float64, requires_grad=True)}
    elif learn == "log_beta":
        log_beta = -torch.tensor(case.temperature, dtype=torch.float64).log()
        options = {"log_beta": log_beta.requires_grad_()}
    got = samtone.evaluate(q, p, **options, **case.options())
    (got.loss * upstream).backward()
    limit = judge.LOSS[dtype] + 4 * judge.COSINE / case.temperature
    close(got.loss.item(), want.loss.item(), limit, "loss")
    for a, b in zip(got.row_losses.tolist(), want.row_losses.tolist()):
        close(a, b, 4 * limit, "row loss")
    metrics = [*got.query_to_passage, *got.passage_to_query]
    assert [m.item() for m in metrics] == pytest.approx(want.metrics, abs=1e-9)
    check_prefixes(got.prefixes, case, want, limit)
    limit = judge.tolerance(dtype, case.temperature)
    for name, tensor in (("query", q), ("passage", p)):
        assert tensor.grad is not None and tensor.grad.dtype == dtype
        error = gradient_error(tensor.grad, want.gradients[name], tensor.detach())
        assert error <= limit, f"{name}: {error}"
    if learn is not None:
        (tensor,) = options.values()
        close(tensor.grad.item(), want.gradients[learn].item(), limit, learn)


def check_prefixes(got: samtone.Prefixes | tuple[()], case: Case, want: judge.Verdict, limit: float) -> None:
    """Losses and metrics of each prefix."""
    if case.prefixes is None:
        assert got == ()
        return
    assert got
    given = zip(case.prefixes, case.prefix_weights or [1.0] * len(case.prefixes))
    assert got.dims.tolist() == [dim for dim, weight in given if weight > 0]
    assert len(got.losses) == len(want.prefixes) == len(got.dims) and got.losses.dtype == torch.float64
    metrics = torch.stack([*got.query_to_passage, *got.passage_to_query], 1).tolist()
    for loss, own, part in zip(got.losses.tolist(), metrics, want.prefixes):
        # Where there is no copy of the positive, a loss of about 0 is the difference of larger numbers.
        assert loss == pytest.approx(part.loss.item(), rel=limit, abs=limit), "loss of a prefix"
        assert own == pytest.approx(part.metrics, abs=1e-9)


def test_presets_are_those_of_the_definition() -> None:
    assert list(samtone.PRESETS) == list(judge.PRESETS)
    for name, groups in judge.PRESETS.items():
        loss = samtone.Loss.preset(name)
        assert loss.name == name
        assert [(g.coefficient, list(g.blocks), g.positive_copies) for g in loss.groups] == groups


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("preset", judge.PRESETS)
def test_preset(preset: str, dtype: torch.dtype) -> None:
    check(judge.of_preset(preset, *embeddings(1, dtype)))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("preset", ["samtone_both", "gte"])
def test_mask(preset: str, mask: str, dtype: torch.dtype) -> None:
    case = judge.of_preset(preset, *embeddings(2, dtype), **MASKS[mask])
    check(case)
    if mask not in ("plain", "owners of everyone"):
        plain = judge.judge(judge.of_preset(preset, *embeddings(2, dtype)))
        assert abs(judge.judge(case).loss - plain.loss) > 1e-4, "the mask has no effect, so that it tests nothing"


def test_shared_ids() -> None:
    """They matter where a text is in both columns; where both columns are the same texts they change no bit."""
    q, p = embeddings(2)
    mask = MASKS["shared_ids"]
    ids = {name: mask[name] for name in ("query_ids", "passage_ids")}
    shared, apart = (samtone.samtone_loss(q, p, temperature=1.0, **ids, shared_ids=x) for x in (True, False))
    assert shared < apart - 1e-3
    both = {"query_ids": range(ROWS), "passage_ids": range(ROWS)}
    twice = [samtone.samtone_loss(q, p[:ROWS], loss="gte", **both, shared_ids=x) for x in (True, False)]
    assert torch.equal(*twice)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_pair(alpha: float) -> None:
    groups = [(1 - alpha, ["qp"], 1), (alpha, ["pp"], 1)]
    check(Case(*embeddings(3), groups, loss=samtone.Loss.pair(alpha)))


def test_custom_groups() -> None:
    groups = [(0.3, ["qp", "pp"], 2), (1e-3, ["pq"], 0), (2.0, ["qq"], 1)]
    # The margin would leave a row of the second group without any term.
    check(Case(*embeddings(4), groups, **MASKS["all"] | {"margin": None}))


@pytest.mark.parametrize("learn", ["tau", "log_beta"])
@pytest.mark.parametrize("upstream", [1.0, -0.37, 1024.0])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_upstream_and_temperature(learn: str, upstream: float, dtype: torch.dtype) -> None:
    check(judge.of_preset("samtone_query", *embeddings(5, dtype), temperature=0.05), upstream, learn)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_temperature_tensors_of_any_type_and_shape(kind: torch.dtype) -> None:
    q, p = embeddings(6)
    log_beta = torch.full((1, 1), 3.0, dtype=kind, requires_grad=True)
    samtone.samtone_loss(q, p, log_beta=log_beta).backward()
    assert log_beta.grad is not None and log_beta.grad.dtype == kind and log_beta.grad.shape == (1, 1)
    want = judge.judge(judge.of_preset("samtone_query", q, p, temperature=float(torch.tensor(-3.0).double().exp())))
    close(log_beta.grad.item(), want.gradients["log_beta"].item(), 1e-5 + judge.ROUNDING.get(kind, 0.0))


def test_zero_norm_policy() -> None:
    q, p = embeddings(7)
    q[4] = 0
    p[14] = 0
    with pytest.raises(
        samtone.SamtoneError, match=r"query embedding in row 4 has norm zero.*zero_norm=\"zero_gradient\""
    ):
        samtone.samtone_loss(q, p)
    q.requires_grad_()
    samtone.samtone_loss(q, p, zero_norm="zero_gradient").backward()
    assert q.grad is not None and (q.grad[4] == 0).all() and (q.grad[3] != 0).any()


# Everyone asks the same, and the third query alone has negatives, its own.
LONELY: dict[str, Any] = {
    "query_ids": [0] * ROWS,
    "owners": [-1] * ROWS + [2] * HARD,
    "own": True,
    "no_negative": "zero",
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("groups", [[(1.0, ["qp"], 0)], [(0.5, ["pp"], 0), (2.0, ["qp", "pq"], 1)]])
def test_rows_without_negatives(groups: list[Any], dtype: torch.dtype) -> None:
    case = Case(*embeddings(10, dtype), groups, **LONELY)
    check(case, learn="tau")
    q, p = case.query.clone().requires_grad_(), case.passage
    for number in (1, ROWS):  # one row alone; all without a negative
        rows = q[:number], p[:number], [0] * number
        loss = samtone.samtone_loss(*rows[:2], loss="decoupled", query_ids=rows[2], no_negative="zero")
        loss.backward()
        assert loss.item() == 0.0 and (q.grad == 0).all()
        module = samtone.SamToNeLoss("decoupled", no_negative="zero")
        assert module(*rows[:2], query_ids=rows[2]).item() == 0.0
        with pytest.raises(samtone.SamtoneError, match="row 0 has no negative left"):
            samtone.SamToNeLoss("decoupled")(*rows[:2], query_ids=rows[2])


LADDERS: dict[str, dict[str, Any]] = {
    "up to the end": {"prefixes": [4, 8, 16, DIM]},
    "weighted": {"prefixes": [3, 10, 17, DIM], "prefix_weights": [0.25, 2.0, 0.0, 1.0]},
    "short of the end": {"prefixes": [5, 19], "prefix_weights": [1.0, 3.0]},
    "every entry": {"prefixes": list(range(1, DIM + 1))},
    "one": {"prefixes": [7], "prefix_weights": [0.5]},
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("ladder", LADDERS)
@pytest.mark.parametrize("preset", judge.PRESETS)
def test_prefixes(preset: str, ladder: str, dtype: torch.dtype) -> None:
    check(judge.of_preset(preset, *embeddings(51, dtype), **LADDERS[ladder]), 3.0, "log_beta")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("preset", ["samtone_both", "gte"])
def test_prefixes_with_masks(preset: str, mask: str) -> None:
    check(judge.of_preset(preset, *embeddings(52), **MASKS[mask] | LADDERS["weighted"]), learn="tau")


def outcome(q: torch.Tensor, p: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """Loss, row losses and metrics, both gradients and that of the temperature."""
    q, p, log_beta = (x.clone().requires_grad_() for x in (q, p, torch.tensor(2.0)))
    got = samtone.evaluate(q, p, log_beta=log_beta, loss="samtone_both", **options)
    results = [got.loss, got.row_losses, *got.query_to_passage, *got.passage_to_query]
    return [*results, *torch.autograd.grad(got.loss, (q, p, log_beta))]


def test_the_whole_embedding_as_a_prefix_keeps_every_bit() -> None:
    want = outcome(*embeddings(53))
    for prefixes, weights in (([DIM], None), ([4, DIM], [0, 1])):
        got = outcome(*embeddings(53), prefixes=prefixes, prefix_weights=weights)
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_entries_beyond_the_last_prefix(dtype: torch.dtype) -> None:
    """They are not read, and their gradients are 0, whatever was in the memory that PyTorch hands out."""
    options: dict[str, Any] = {"prefixes": [3, 11]}
    q, p = embeddings(54, dtype)
    want = outcome(q[:, :11].contiguous(), p[:, :11].contiguous(), **options)
    q[:, 11:], p[:, 11:] = 1e4, -1e4
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        got = outcome(q, p, **options)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    for a, b in zip(got, want):
        if a.shape == b.shape:
            assert torch.equal(a, b)
        else:
            assert torch.equal(a[:, :11], b) and (a[:, 11:] == 0).all()


def test_prefixes_are_losses_of_shorter_embeddings() -> None:
    """Independent of the judge: the sum of calls on what is cut off."""
    q, p = (x.requires_grad_() for x in embeddings(55))
    dims, weights = [2, 9, 20], [1.5, 0.5, 1.0]
    options: dict[str, Any] = {"temperature": 0.1, "passage_ids": MASKS["passage_ids"]["passage_ids"]}
    got = samtone.evaluate(q, p, prefixes=dims, prefix_weights=weights, **options)
    parts = [samtone.evaluate(q[:, :dim], p[:, :dim], **options) for dim in dims]
    want = torch.stack([weight * part.loss for weight, part in zip(weights, parts)]).sum()
    assert got.prefixes
    for k, part in enumerate(parts):
        assert got.prefixes.losses[k].item() == pytest.approx(part.loss.item(), rel=1e-6)
        for a, b in zip(got.prefixes[2:], (part.query_to_passage, part.passage_to_query)):
            assert [x[k].item() for x in a] == pytest.approx([x.item() for x in b])
    assert got.query_to_passage.mrr == got.prefixes.query_to_passage.mrr[-1] != got.prefixes.query_to_passage.mrr[0]
    for a, b in zip(torch.autograd.grad(got.loss, (q, p)), torch.autograd.grad(want, (q, p))):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


KINDS: dict[str, tuple[Any, Any]] = {
    "tuples": ((3, 8), (1, 0.5)),
    "a range": (range(3, 9, 5), None),
    "arrays": (numpy.array([3, 8], numpy.uint16), numpy.array([1.0, 0.5], numpy.float16)),
    "numbers of NumPy": ([numpy.int64(3), 8], [numpy.float32(1), 0.5]),
    "tensors": (torch.tensor([3, 8]), torch.tensor([1.0, 0.5], dtype=torch.bfloat16)),
    "tensors of one": ([torch.tensor(3), torch.tensor(8)], [1, torch.tensor(0.5)]),
    "fractions": ([3, 8], [1, Fraction(1, 2)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_prefixes_of_any_kind(kind: str) -> None:
    prefixes, weights = KINDS[kind]
    q, p = embeddings(56)
    want = samtone.samtone_loss(q, p, prefixes=[3, 8], prefix_weights=None if weights is None else [1.0, 0.5])
    options: dict[str, Any] = {"prefixes": prefixes, "prefix_weights": weights}
    assert torch.equal(samtone.samtone_loss(q, p, **options), want)
    module = samtone.SamToNeLoss(**options)
    if isinstance(prefixes, (torch.Tensor, numpy.ndarray)):
        prefixes[0] = 1  # the module has its own
    assert torch.equal(module(q, p), want) and module.options["prefixes"] == [3, 8]


def test_a_prefix_of_zeros() -> None:
    q, p = embeddings(57)
    q[4, :5] = 0
    p[14, :3] = 0
    p[15] = 0
    with pytest.raises(samtone.SamtoneError, match="query embedding in row 4 has norm zero in its first 3 entries, so"):
        samtone.samtone_loss(q, p, prefixes=[3, DIM])
    check(judge.of_preset("samtone_both", q, p, prefixes=[3, 5, DIM], zero_norm="zero_gradient"))


def test_rows_without_negatives_in_one_prefix() -> None:
    """The margin drops all negatives of some rows in some prefix."""
    case = Case(*embeddings(58), [(1.0, ["qp"], 0)], prefixes=[2, DIM], margin=-1.0)
    with pytest.raises(samtone.SamtoneError, match="has no negative left for the first (2|24) entries in group 0"):
        samtone.samtone_loss(case.query, case.passage, **case.options())
    case.no_negative = "zero"
    check(case)


def test_finite_differences() -> None:
    """Independent of the judge's code: the loss itself, along random directions."""
    q, p = embeddings(8)
    tensors = [q.requires_grad_(), p.requires_grad_()]
    options: dict[str, Any] = {
        "temperature": 0.2,
        "loss": "samtone_both",
        "passage_ids": MASKS["passage_ids"]["passage_ids"],
    }

    def loss(*x: torch.Tensor) -> float:
        return float(samtone.evaluate(*x, **options).row_losses.mean())  # in float64

    gradients = torch.autograd.grad(samtone.samtone_loss(*tensors, **options), tensors)
    generator = torch.Generator().manual_seed(9)
    for k in range(2):
        for _ in range(5):
            step = 1e-2 * torch.randn(tensors[k].shape, generator=generator)
            moved = [
                [x.detach() + sign * step if j == k else x.detach() for j, x in enumerate(tensors)] for sign in (1, -1)
            ]
            slope = (loss(*moved[0]) - loss(*moved[1])) / 2
            want = (gradients[k] * (moved[0][k] - moved[1][k]) / 2).sum().item()
            assert slope == pytest.approx(want, rel=2e-2, abs=2e-5)


@pytest.mark.parametrize("path", judge.GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Any) -> None:
    """The judge against the file, and samtone against the judge on the embeddings as rounded to each type. The upstream gradient
    is that of a gradient scaler: gradients of trained towers underflow in float16 unless it acts before they are rounded."""
    case, file = judge.golden(path)
    of_file = judge.judge(case)
    close(of_file.loss.item(), file["loss"], 1e-9, "the judge itself")
    assert (
        gradient_error(of_file.gradients["query"], torch.tensor(file["grad_q"], dtype=torch.float64), case.query) < 1e-8
    )
    assert (
        gradient_error(of_file.gradients["passage"], torch.tensor(file["grad_p"], dtype=torch.float64), case.passage)
        < 1e-8
    )
    close(of_file.gradients["tau"].item(), file["grad_temperature"], 1e-8, "the judge's tau")
    if case.prefixes is not None:
        losses = [loss for loss, weight in zip(file["prefix_losses"], case.prefix_weights or []) if weight > 0]
        assert [part.loss.item() for part in of_file.prefixes] == pytest.approx(losses, rel=1e-9)
    largest = max(of_file.gradients[name].abs().max().item() for name in ("query", "passage"))
    upstream = 2.0 ** -round(math.log2(largest)) if largest > 0 else 1.0
    for dtype in TYPES:
        if case.query.abs().max() > 6e4 and dtype == torch.float16:
            continue
        rounded = [case.query.to(dtype), case.passage.to(dtype)]
        if any((x.abs().sum(1) == 0).any() or not x.isfinite().all() for x in rounded):
            continue
        case.query, case.passage = rounded
        check(case, upstream, "tau")
        case, _ = judge.golden(path)


def test_there_are_golden_files() -> None:
    assert len(judge.GOLDEN) >= 79
