"""Calls on CUDA, on the emulated driver: run by test_cuda.py in a process that finds it in place of the machine's own."""

from __future__ import annotations

import ctypes
from typing import Any

import emulated
import judge
import pytest
import samtone
import torch
from judge import Case, close, gradient_error
from samtone import _native, cuda
from test_loss import MASKS, embeddings


@pytest.fixture(scope="module")
def memory() -> emulated.EmulatedMemory:
    return emulated.EmulatedMemory(emulated.Driver())


def annotations(case: Case) -> dict[str, Any]:
    vectors = {"query_ids": case.query_ids, "passage_ids": case.passage_ids, "positives": case.positives}
    named = {name: None if x is None else torch.tensor(x, dtype=torch.int64) for name, x in vectors.items()}
    named["weights"] = None if case.weights is None else torch.tensor(case.weights, dtype=torch.float32)
    named["owners"] = None if case.owners is None else torch.tensor(case.owners, dtype=torch.int64)
    return named


def settings(case: Case, log_beta: bool = False, share: float | None = None) -> tuple[Any, ...]:
    loss = case.options()["loss"]
    value = -torch.tensor(case.temperature, dtype=torch.float64).log().item() if log_beta else case.temperature
    spec = loss if isinstance(loss, str) else loss.spec
    return (spec, value, log_beta, case.margin, case.zero_norm, None, share, case.own)


class Result:
    """Everything that a step gives, as read back from the device."""

    def __init__(
        self,
        memory: emulated.EmulatedMemory,
        case: Case,
        upstream: float = 1.0,
        wanted: tuple[bool, bool] = (True, True),
        log_beta: bool = False,
        pitch: int = 0,
        share: float | None = None,
    ) -> None:
        q, p = memory.tensor(case.query, pitch), memory.tensor(case.passage, pitch)
        self.planned = cuda.planned(memory, settings(case, log_beta, share), q, p, annotations(case), wanted)
        size = cuda.state_bytes(
            len(case.query), len(case.passage), shared=case.positives is not None, skipping=share is not None
        )
        state = memory.empty(size)
        self.planned.forward(memory, q, p, state)
        results, row_losses, derivative = self.planned.plan.offsets
        head = memory.read(state)
        self.results = cuda.numbers(head, results, 5).tolist()
        self.row_losses = cuda.numbers(head, row_losses, len(case.query)).tolist()
        self.gradients = [
            memory.tensor(torch.full_like(x, 7.0)) if w else None for x, w in zip((case.query, case.passage), wanted)
        ]
        factor = memory.put(torch.tensor([upstream]).numpy().tobytes(), (1,), torch.float32)
        self.planned.backward(memory, q, p, state, (self.gradients[0], self.gradients[1]), factor)
        self.derivative = cuda.numbers(memory.read(state), derivative, 1).item()
        self.read = [None if g is None else memory.read(g) for g in self.gradients]


def check(
    memory: emulated.EmulatedMemory, case: Case, upstream: float = 1.0, log_beta: bool = False, pitch: int = 0
) -> None:
    dtype, before = case.query.dtype, emulated.leaked()
    want = judge.judge(case, upstream)
    got = Result(memory, case, upstream, log_beta=log_beta, pitch=pitch)
    limit = judge.LOSS[dtype] + 4 * judge.COSINE / case.temperature
    close(got.results[0], want.loss.item(), limit, "loss")
    assert got.results[1:] == pytest.approx(want.metrics, abs=1e-9)
    for a, b in zip(got.row_losses, want.row_losses.tolist()):
        close(a, b, 4 * limit, "row loss")
    limit = judge.tolerance(dtype, case.temperature)
    for gradient, name, x in zip(got.read, ("query", "passage"), (case.query, case.passage)):
        assert gradient is not None and gradient.dtype == dtype
        assert gradient_error(gradient, want.gradients[name], x) <= limit
    close(got.derivative, want.gradients["log_beta" if log_beta else "tau"].item(), limit, "derivative")
    assert emulated.leaked() == before, "a capsule was not given back, or not once"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", judge.PRESETS)
def test_preset(memory: emulated.EmulatedMemory, preset: str, dtype: torch.dtype) -> None:
    check(memory, judge.of_preset(preset, *embeddings(40, dtype)), upstream=-2.0)


@pytest.mark.parametrize("mask", MASKS)
def test_mask(memory: emulated.EmulatedMemory, mask: str) -> None:
    check(memory, judge.of_preset("samtone_both", *embeddings(41), **MASKS[mask]))


@pytest.mark.parametrize("log_beta", [True, False])
def test_strides_and_temperature(memory: emulated.EmulatedMemory, log_beta: bool) -> None:
    check(memory, judge.of_preset("samtone_query", *embeddings(42)), 0.5, log_beta, pitch=5)


def test_frozen_towers(memory: emulated.EmulatedMemory) -> None:
    case = judge.of_preset("samtone_query", *embeddings(43))
    whole = Result(memory, case)
    for wanted in ((True, False), (False, True), (False, False)):
        got = Result(memory, case, wanted=wanted)
        assert got.results == whole.results and got.derivative == pytest.approx(whole.derivative, rel=1e-6)
        for have, want, w in zip(got.read, whole.read, wanted):
            assert (have is None) == (not w)
            assert have is None or torch.allclose(have, want, rtol=1e-5, atol=1e-7)  # type: ignore[arg-type]


def test_plans_are_kept(memory: emulated.EmulatedMemory) -> None:
    cuda.release()
    case = judge.of_preset("clip", *embeddings(44))
    first, other = Result(memory, case), Result(memory, judge.of_preset("clip", *embeddings(45)))
    assert first.planned is other.planned and first.results != other.results
    assert Result(memory, judge.of_preset("gte", *embeddings(44))).planned is not first.planned
    ids = judge.of_preset("clip", *embeddings(44), query_ids=list(range(12)))
    assert Result(memory, ids).planned is not first.planned
    assert Result(memory, case).results == first.results, "same bits"
    for k in range(2 * cuda.KEPT_PLANS):
        case.temperature = 0.1 + 0.01 * k
        cuda.planned(
            memory,
            settings(case),
            memory.tensor(case.query),
            memory.tensor(case.passage),
            annotations(case),
            (True, True),
        )
    assert len(cuda._plans) == cuda.KEPT_PLANS


def test_plans_of_graphs_are_made_before_and_stay(memory: emulated.EmulatedMemory) -> None:
    cuda.release()
    case = judge.of_preset("clip", *embeddings(49))
    q, p = memory.tensor(case.query), memory.tensor(case.passage)
    call = (memory, settings(case), q, p, annotations(case), (True, True))
    memory.capturing = True
    try:
        with pytest.raises(
            samtone.SamtoneError, match="the first of its kind on it; allowed: a call with these shapes"
        ):
            cuda.planned(*call)
        memory.capturing = False
        plan = cuda.planned(*call)
        memory.capturing = True
        assert cuda.planned(*call) is plan
        memory.capturing = False
        for k in range(2 * cuda.KEPT_PLANS):
            case.temperature = 0.2 + 0.01 * k
            cuda.planned(memory, settings(case), q, p, annotations(case), (True, True))
        assert plan not in cuda._plans.values() and plan in cuda._captured.values()
    finally:
        memory.capturing = False
    cuda.release()
    assert not cuda._captured


def test_the_size_of_the_state_is_enough(memory: emulated.EmulatedMemory) -> None:
    for rows, extra in ((1, 0), (3, 4), (63, 1), (257, 100), (200, 5000)):
        x = torch.zeros(rows + extra, 8)
        for preset in judge.PRESETS:
            case = judge.of_preset(preset, x[:rows], x)
            case.zero_norm = "zero_gradient"
            for case.positives in (None, [0] * rows, [k // 2 for k in range(rows)]):
                for share in (None, 0.1):
                    q, p = memory.tensor(x[:rows]), memory.tensor(x)
                    planned = cuda.planned(memory, settings(case, share=share), q, p, annotations(case), (True, True))
                    shared, skipping = case.positives is not None, share is not None
                    size = cuda.state_bytes(rows, rows + extra, shared=shared, skipping=skipping)
                    assert planned.plan.state_bytes <= size


def test_tile_skipping_stays_within_its_bound(memory: emulated.EmulatedMemory) -> None:
    """Two clusters, far from each other at this temperature: their cosines in common are squares that are skipped. A query's gradient is
    then off by at most eta beta / M per unit of its norm (docs/skipping.md); everything but gradients keeps its bits."""
    side, share = 64, 0.5
    generator = torch.Generator().manual_seed(51)
    centres = 4 * torch.eye(2, 16).repeat_interleave(side, 0)
    q, p = (centres + 0.3 * torch.randn(2 * side, 16, generator=generator) for _ in range(2))
    case = judge.of_preset("info_nce", q, p, temperature=0.2)
    want, got = Result(memory, case), Result(memory, case, share=share)
    assert got.planned is not want.planned
    assert got.results == want.results and got.row_losses == want.row_losses
    off = [a - b for a, b in zip(got.read, want.read) if a is not None and b is not None]
    assert all(x.abs().max() > 0 for x in off), "nothing is skipped"
    assert (off[0].norm(dim=1) * q.norm(dim=1)).max() <= share / case.temperature / len(q) * (1 + 1e-4)
    independent = judge.of_preset("info_nce", *embeddings(52))
    assert Result(memory, independent, share=share).results == Result(memory, independent).results


def test_refused_embeddings_are_nan_or_a_sentence(memory: emulated.EmulatedMemory) -> None:
    case = judge.of_preset("info_nce", *embeddings(46))
    case.passage[5, 7] = float("inf")
    got = Result(memory, case)
    assert got.results[0] != got.results[0] and got.read[0] is not None and got.read[0].isnan().all()
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.raises(samtone.SamtoneError, match="passage embedding in row 5 contains"),
    ):
        Result(memory, case)


def test_memory_that_does_not_fit_is_refused(memory: emulated.EmulatedMemory) -> None:
    case = judge.of_preset("info_nce", *embeddings(47))
    q, p = memory.tensor(case.query), memory.tensor(case.passage)
    made = cuda.planned(memory, settings(case), q, p, annotations(case), (True, True))
    state = memory.empty(cuda.state_bytes(12, 17))
    for changed, sentence in (
        ({"state": memory.empty(100)}, "`state` is 100 bytes; allowed: .* bytes or more"),
        ({"passage": q}, "`passage` is 12 x 24 of f32 with a row stride of 24; allowed: 17 x 24"),
        ({"query": _OnCpu(case.query)}, "`query` is on the CPU; allowed: memory of a CUDA device"),
        ({"state": made.side}, "`state` is .* bytes|`state` is memory that `side` is in, too"),
    ):
        arguments: dict[str, Any] = {"query": q, "passage": p, "state": state} | changed
        with pytest.raises(samtone.SamtoneError, match=sentence):
            made.forward(memory, **arguments)
    factor = memory.put(b"\0\0\x80\x3f", (1,), torch.float32)
    with pytest.raises(samtone.SamtoneError, match="`query_gradient` is memory that `query` is in, too"):
        made.backward(memory, q, p, state, (q, memory.tensor(case.passage)), factor)
    with pytest.raises(samtone.SamtoneError, match="`query` is on CUDA device 0; allowed: memory of the host"):
        vector = torch.empty(12, dtype=torch.float64)
        names = dict.fromkeys(annotations(case))
        settings_ = _native.Settings("info_nce", 0.1)
        _native.cpu_step(settings_, cuda.capsule(q), cuda.capsule(p), (None, None), True, names, vector.__dlpack__(), 1)


class _OnCpu:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def detach(self) -> torch.Tensor:
        return self.tensor


def test_nothing_waits_nor_allocates(memory: emulated.EmulatedMemory) -> None:
    """A stream that is being captured refuses both, so a step that goes through does neither."""
    case = judge.of_preset("samtone_query", *embeddings(48))
    want = Result(memory, case)
    q, p, state = memory.tensor(case.query), memory.tensor(case.passage), memory.empty(cuda.state_bytes(12, 17))
    workspace = memory.empty(want.planned.plan.workspace_bytes)
    call = memory.driver.call
    stream, graph, executable = ctypes.c_void_p(memory.stream), ctypes.c_void_p(), ctypes.c_void_p()
    call("cuStreamBeginCapture_v2", stream, 1)
    want.planned.plan.forward(
        (cuda.capsule(q), cuda.capsule(p)),
        cuda.capsule(want.planned.side),
        cuda.capsule(state),
        cuda.capsule(workspace),
        memory.stream,
    )
    call("cuStreamEndCapture", stream, ctypes.byref(graph))
    call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
    call("cuGraphLaunch", executable, stream)
    got = cuda.numbers(memory.read(state), want.planned.plan.offsets[0], 5).tolist()
    assert got == want.results
