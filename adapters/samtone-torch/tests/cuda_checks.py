"""Calls on CUDA, on the emulated driver: run by test_cuda.py in a process that finds it in place of the machine's own. What the
operations call on CUDA runs as it is, with memory of the driver in place of PyTorch's allocator."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import emulated
import judge
import pytest
import samtone
import torch
from judge import Case, close, gradient_error
from samtone import _native, cuda, ops
from samtone.options import Settings, text_of
from test_loss import LONELY, MASKS, embeddings
from torch._subclasses.fake_tensor import FakeTensorMode

ALL = ops.QUERY | ops.PASSAGE | ops.TEMPERATURE


@pytest.fixture(scope="module")
def memory() -> emulated.EmulatedMemory:
    return emulated.EmulatedMemory(emulated.Driver())


@pytest.fixture(autouse=True)
def _memory_of_the_driver(memory: emulated.EmulatedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = cuda.numbers
    monkeypatch.setattr(cuda, "TorchMemory", lambda device: memory)
    monkeypatch.setattr(cuda, "numbers", lambda state, *place: numbers(memory.read(state), *place))


@pytest.fixture(params=[True, False], ids=["at once", "in turn"])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether gradients come with the loss, or from a call of their own, as those of large batches do."""
    if not request.param:
        in_turn(monkeypatch)
    return bool(request.param)


def in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "AT_ONCE_BYTES", -1)  # not even the derivative of the temperature alone


def annotations(case: Case) -> dict[str, Any]:
    vectors = {"query_ids": case.query_ids, "passage_ids": case.passage_ids, "positives": case.positives}
    named = {name: None if x is None else torch.tensor(x, dtype=torch.int64) for name, x in vectors.items()}
    named["weights"] = None if case.weights is None else torch.tensor(case.weights, dtype=torch.float32)
    named["owners"] = None if case.owners is None else torch.tensor(case.owners, dtype=torch.int64)
    return named


def settings(case: Case, log_beta: bool = False, share: float | None = None) -> Settings:
    loss = case.options()["loss"]
    value = -torch.tensor(case.temperature, dtype=torch.float64).log().item() if log_beta else case.temperature
    spec = loss if isinstance(loss, str) else loss.spec
    options = {
        "margin": float("inf") if case.margin is None else case.margin,
        "zero_norm": case.zero_norm,
        "no_negative": case.no_negative,
        "tile_skipping": share,
        "hard_negative_scope": "own" if case.own else "all",
        "prefixes": case.prefixes,
        "prefix_weights": case.prefix_weights,
    }
    return Settings(text_of(spec, options, log_beta=log_beta, shared_ids=case.shared_ids), value)


class Result:
    """Everything that a step gives, as read back from the device."""

    def __init__(
        self,
        memory: emulated.EmulatedMemory,
        case: Case,
        upstream: float = 1.0,
        wanted: int = ALL,
        log_beta: bool = False,
        pitch: int = 0,
        share: float | None = None,
    ) -> None:
        self.memory, self.case, self.wanted = memory, case, wanted
        self.towers: Any = memory.tensor(case.query, pitch), memory.tensor(case.passage, pitch)
        self.settings, self.annotations = settings(case, log_beta, share), annotations(case)
        call = (self.settings, *self.towers, self.annotations, wanted)
        loss, results, row_losses, *self.left = ops._forward_cuda(*call)
        assert loss.dtype == torch.float32 and torch.equal(loss.isnan(), results[0].isnan())
        self.results, self.row_losses = results.tolist(), row_losses.tolist()
        self.at_once = ops._at_once(*self.towers, wanted)
        self.planned = cuda.planned(memory, *call[:-1], self.wanted_towers, self.at_once)
        self.gradients, derivative = self.backward(upstream) if wanted else ([], torch.zeros(0))
        self.derivative = derivative.item() if wanted & ops.TEMPERATURE else None

    @property
    def wanted_towers(self) -> tuple[bool, bool]:
        return ops._towers(self.wanted)

    def backward(self, upstream: float) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Gradients of both towers, without rows where they are not wanted, and the derivative of the temperature."""
        towers: Any = self.towers
        *gradients, derivative, state = self.left
        assert len(derivative) == (self.at_once and self.wanted & ops.TEMPERATURE != 0)
        assert (state.shape == (0,)) == self.at_once
        if self.at_once:
            # What PyTorch does with them on any device.
            dq, dp = (self.memory.read(gradient) for gradient in gradients)
            assert dq.dtype == dp.dtype == torch.float32
            text, value = self.settings
            of_one = (torch.tensor(upstream), self.case.query, self.case.passage, *[None] * 6)
            left = (dq, dp, derivative, torch.empty(0), torch.tensor([value]))
            got = ops._gradients(*of_one, *left, text, self.wanted)
        else:
            factor: Any = self.memory.put(torch.tensor([upstream]).numpy().tobytes(), (1,), torch.float32)
            *gradients, derivative = ops._backward_cuda(
                self.settings, *towers, self.annotations, state, factor, self.wanted
            )
            got = (*(self.memory.read(gradient) for gradient in gradients), derivative)
        return list(got[:2]), got[2]


def check(
    memory: emulated.EmulatedMemory, case: Case, upstream: float = 1.0, log_beta: bool = False, pitch: int = 0
) -> Result:
    dtype, before = case.query.dtype, emulated.leaked()
    want = judge.judge(case, upstream)
    got = Result(memory, case, upstream, log_beta=log_beta, pitch=pitch)
    limit = judge.LOSS[dtype] + 4 * judge.COSINE / case.temperature
    of_call, *of_prefixes = (got.results[k : k + ops.RESULTS] for k in range(0, len(got.results), ops.RESULTS))
    assert len(of_prefixes) == len(want.prefixes)
    close(of_call[0], want.loss.item(), limit, "loss")
    assert of_call[1:] == pytest.approx(want.metrics, abs=1e-9)
    for prefix, of_prefix in zip(want.prefixes, of_prefixes):
        close(of_prefix[0], prefix.loss.item(), limit, "loss of a prefix")
        assert of_prefix[1:] == pytest.approx(prefix.metrics, abs=1e-9)
    for a, b in zip(got.row_losses, want.row_losses.tolist()):
        close(a, b, 4 * limit, "row loss")
    limit = judge.tolerance(dtype, case.temperature)
    for gradient, name, x in zip(got.gradients, ("query", "passage"), (case.query, case.passage)):
        assert gradient.dtype == dtype
        assert gradient_error(gradient, want.gradients[name], x) <= limit
    assert got.derivative is not None
    close(got.derivative, want.gradients["log_beta" if log_beta else "tau"].item(), limit, "derivative")
    assert emulated.leaked() == before, "a capsule was not given back, or not once"
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", judge.PRESETS)
def test_preset(memory: emulated.EmulatedMemory, preset: str, dtype: torch.dtype, at_once: bool) -> None:
    check(memory, judge.of_preset(preset, *embeddings(40, dtype)), upstream=-2.0)


@pytest.mark.parametrize("mask", MASKS)
def test_mask(memory: emulated.EmulatedMemory, mask: str, at_once: bool) -> None:
    check(memory, judge.of_preset("samtone_both", *embeddings(41), **MASKS[mask]))


# Of 24 entries.
PREFIXES: dict[str, dict[str, Any]] = {
    "all": {"prefixes": [3, 8, 24]},
    "weights": {"prefixes": [3, 7, 16, 20], "prefix_weights": [0.5, 1.0, 0.0, 2.0]},
    "short": {"prefixes": [9]},
    "whole": {"prefixes": [24]},
    "heavy": {"prefixes": [24], "prefix_weights": [3.0]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefixes", PREFIXES)
def test_prefixes(memory: emulated.EmulatedMemory, prefixes: str, dtype: torch.dtype, at_once: bool) -> None:
    check(memory, judge.of_preset("samtone_query", *embeddings(50, dtype), **PREFIXES[prefixes]), upstream=-2.0)


@pytest.mark.parametrize("mask", MASKS)
def test_prefixes_with_masks(memory: emulated.EmulatedMemory, mask: str, at_once: bool) -> None:
    case = judge.of_preset("samtone_both", *embeddings(51), **PREFIXES["weights"], **MASKS[mask])
    check(memory, case, 0.5, log_beta=True, pitch=5)


def test_prefixes_and_the_whole_embedding(memory: emulated.EmulatedMemory, at_once: bool) -> None:
    """The whole embedding is what a call without prefixes computes."""
    case = judge.of_preset("clip", *embeddings(50))
    want = Result(memory, case)
    case.prefixes = [24]
    got = Result(memory, case)
    assert got.results == 2 * want.results and got.derivative == want.derivative
    assert all(torch.equal(a, b) for a, b in zip(got.gradients, want.gradients))


def test_prefixes_that_are_refused_are_nan_or_a_sentence(memory: emulated.EmulatedMemory, at_once: bool) -> None:
    case = judge.of_preset("info_nce", *embeddings(46), **PREFIXES["weights"])
    case.query[4, :3] = 0
    got = Result(memory, case)
    assert got.results[0] != got.results[0] and all(gradient.isnan().all() for gradient in got.gradients)
    sentence = "query embedding in row 4 has norm zero in its first 3 entries"
    with torch.autograd.set_detect_anomaly(True), pytest.raises(samtone.SamtoneError, match=sentence):
        Result(memory, case)
    skipping = judge.of_preset("info_nce", *embeddings(46), **PREFIXES["weights"])
    with pytest.raises(samtone.SamtoneError, match="`tile_skipping` is 0.1; allowed: no tile skipping with prefixes"):
        Result(memory, skipping, share=0.1)


def test_rows_without_negatives(memory: emulated.EmulatedMemory, at_once: bool) -> None:
    check(memory, Case(*embeddings(56), [(1.0, ["qp"], 0)], **LONELY))
    alone = Result(memory, judge.of_preset("decoupled", *(x[:1] for x in embeddings(56)), no_negative="zero"))
    assert alone.results[0] == 0.0 and all((gradient == 0).all() for gradient in alone.gradients)


@pytest.mark.parametrize("log_beta", [True, False])
def test_strides_and_temperature(memory: emulated.EmulatedMemory, log_beta: bool, at_once: bool) -> None:
    check(memory, judge.of_preset("samtone_query", *embeddings(42)), 0.5, log_beta, pitch=5)


def test_frozen_towers(memory: emulated.EmulatedMemory, at_once: bool) -> None:
    case = judge.of_preset("samtone_query", *embeddings(43))
    whole = Result(memory, case, 3.0)
    assert whole.at_once == at_once
    for wanted in range(ALL):
        got = Result(memory, case, 3.0, wanted)
        assert got.at_once == (at_once and wanted != 0)
        assert got.results == whole.results and got.row_losses == whole.row_losses
        for have, want, w in zip(got.gradients, whole.gradients, got.wanted_towers):
            assert have.shape == (len(want) if w else 0, case.query.shape[1])
            assert torch.allclose(have, want if w else want[:0], rtol=1e-5, atol=1e-7)
        if wanted & ops.TEMPERATURE:
            assert got.derivative == pytest.approx(whole.derivative, rel=1e-6)


def test_both_ways_agree_and_backward_may_be_called_again(
    memory: emulated.EmulatedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = judge.of_preset("samtone_both", *embeddings(53), **MASKS["all"])
    together = Result(memory, case, -2.0)
    in_turn(monkeypatch)
    apart = Result(memory, case, -2.0)
    assert together.at_once and not apart.at_once and together.planned is not apart.planned
    assert together.results == apart.results and together.row_losses == apart.row_losses
    assert together.derivative == pytest.approx(apart.derivative, rel=1e-6)
    for a, b in zip(together.gradients, apart.gradients):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    for result in (together, apart):
        gradients, derivative = result.backward(-2.0)
        assert derivative.item() == result.derivative
        assert all(torch.equal(a, b) for a, b in zip(gradients, result.gradients))
        state = memory.read(result.left[-1])
        for a, b in zip(result.backward(1.0)[0], result.gradients):
            assert torch.allclose(-2.0 * a, b, rtol=1e-6, atol=0.0)
        assert torch.equal(memory.read(result.left[-1]), state), "what autograd keeps is only read"


def test_torch_compile_knows_shapes_and_types(memory: emulated.EmulatedMemory, at_once: bool) -> None:
    """What the fake of the operation gives is what the operation gives."""
    options: list[tuple[float | None, dict[str, Any]]] = [(None, {}), (0.1, {}), (None, PREFIXES["weights"])]
    for wanted in range(ALL + 1):
        for share, prefixes in options:
            for mask in ("plain", "positives"):
                case = judge.of_preset("samtone_query", *embeddings(55), **prefixes, **MASKS[mask])
                given = settings(case, share=share)
                q, p, named = memory.tensor(case.query), memory.tensor(case.passage), annotations(case)
                got = ops._forward_cuda(given, q, p, named, wanted)
                with FakeTensorMode(allow_non_fake_inputs=True):
                    towers = (torch.empty(x.shape, device="cuda") for x in (case.query, case.passage))
                    fakes = ops.forward(*towers, None, *named.values(), *given, wanted)
                for have, fake in zip(got, fakes):
                    assert (tuple(have.shape), have.dtype) == (tuple(fake.shape), fake.dtype)


def test_cosines_are_kept_for_gradients_at_once_alone(
    memory: emulated.EmulatedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of so large a dimension that keeping pays."""

    def kept(result: Result) -> bool:
        found = re.search(r"(\d+) of (\d+) squares kept", repr(result.planned.plan))
        assert found is not None and found[1] in ("0", found[2])
        return found[1] != "0"

    generator = torch.Generator().manual_seed(54)
    q = torch.randn(20, 256, generator=generator)
    case = judge.of_preset("samtone_query", q, torch.cat([q, q[:3]]) + torch.randn(23, 256, generator=generator))
    assert kept(check(memory, case, -2.0))
    assert not kept(Result(memory, case, wanted=0))
    in_turn(monkeypatch)
    assert not kept(check(memory, case, -2.0))


def test_transforms_have_gradients_at_once_however_large(
    memory: emulated.EmulatedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.func and forward mode compute every derivative from the gradients, so there must be some."""
    in_turn(monkeypatch)
    case = judge.of_preset("samtone_query", *embeddings(57, torch.bfloat16))
    assert not Result(memory, case).at_once
    got = Result(memory, case, wanted=ALL | ops.AT_ONCE)
    want = judge.judge(case).gradients
    assert got.at_once
    for gradient, name in zip(got.left[:2], ("query", "passage")):
        exact = memory.read(gradient)
        assert exact.dtype == torch.float32
        assert gradient_error(exact, want[name], getattr(case, name)) <= judge.GRADIENT[torch.bfloat16]


def test_plans_are_kept(memory: emulated.EmulatedMemory, at_once: bool) -> None:
    cuda.release()
    case = judge.of_preset("clip", *embeddings(44))
    first, other = Result(memory, case), Result(memory, judge.of_preset("clip", *embeddings(45)))
    assert len(cuda._plans) == 1
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
            at_once,
        )
    assert len(cuda._plans) == cuda.KEPT_PLANS


def test_plans_of_graphs_are_made_before_and_stay(memory: emulated.EmulatedMemory) -> None:
    cuda.release()
    case = judge.of_preset("clip", *embeddings(49))
    q, p = memory.tensor(case.query), memory.tensor(case.passage)
    call = (memory, settings(case), q, p, annotations(case), (True, True), True)
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
            cuda.planned(memory, settings(case), q, p, annotations(case), (True, True), True)
        assert plan not in cuda._plans.values() and plan in cuda._captured.values()
    finally:
        memory.capturing = False
    cuda.release()
    assert not cuda._captured


def test_the_size_of_the_state_is_enough(memory: emulated.EmulatedMemory, at_once: bool) -> None:
    # A share of tile skipping, or prefixes.
    options: list[tuple[float | None, list[int] | None]] = [(None, None), (0.1, None)]
    options += [(None, prefixes) for prefixes in ([8], [5], [3, 8], list(range(1, 9)))]
    for rows, extra in ((1, 0), (3, 4), (63, 1), (257, 100), (200, 5000)):
        x = torch.zeros(rows + extra, 8)
        for preset in judge.PRESETS:
            case = judge.of_preset(preset, x[:rows], x)
            case.zero_norm = "zero_gradient"
            for case.positives in (None, [0] * rows, [k // 2 for k in range(rows)]):
                for share, case.prefixes in options:
                    q, p = memory.tensor(x[:rows]), memory.tensor(x)
                    given = settings(case, share=share)
                    planned = cuda.planned(memory, given, q, p, annotations(case), (True, True), at_once)
                    prefixes = len(case.prefixes or [])
                    shared, skipping = case.positives is not None, share is not None
                    size = cuda.state_bytes(rows, rows + extra, shared=shared, skipping=skipping, prefixes=prefixes)
                    assert planned.plan.state_bytes <= size


def test_tile_skipping_stays_within_its_bound(memory: emulated.EmulatedMemory, at_once: bool) -> None:
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
    off = [a - b for a, b in zip(got.gradients, want.gradients)]
    assert all(x.abs().max() > 0 for x in off), "nothing is skipped"
    assert (off[0].norm(dim=1) * q.norm(dim=1)).max() <= share / case.temperature / len(q) * (1 + 1e-4)
    independent = judge.of_preset("info_nce", *embeddings(52))
    assert Result(memory, independent, share=share).results == Result(memory, independent).results


def test_refused_embeddings_are_nan_or_a_sentence(memory: emulated.EmulatedMemory, at_once: bool) -> None:
    case = judge.of_preset("info_nce", *embeddings(46))
    case.passage[5, 7] = float("inf")
    got = Result(memory, case)
    assert got.results[0] != got.results[0] and all(gradient.isnan().all() for gradient in got.gradients)
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.raises(samtone.SamtoneError, match="passage embedding in row 5 contains"),
    ):
        Result(memory, case)


def test_memory_that_does_not_fit_is_refused(memory: emulated.EmulatedMemory, at_once: bool) -> None:
    case = judge.of_preset("info_nce", *embeddings(47, torch.float16))
    q, p = memory.tensor(case.query), memory.tensor(case.passage)
    made, other = (
        cuda.planned(memory, settings(case), q, p, annotations(case), (True, True), x) for x in (at_once, not at_once)
    )
    state = memory.empty(cuda.state_bytes(12, 17))
    theirs, others = ("f32", "f16") if at_once else ("f16", "f32")
    types = {"f16": torch.float16, "f32": torch.float32}
    dq, dp = (memory.matrix(len(x), 24, types[theirs]) for x in (case.query, case.passage))
    factor = memory.put(b"\0\0\x80\x3f", (1,), torch.float32)
    whole = {"query": q, "passage": p, "state": state}

    def gradients(planned: cuda.Planned, dq: Any, dp: Any) -> None:
        if at_once:
            planned.loss_and_gradients(memory, q, p, state, (dq, dp))
        else:
            planned.backward(memory, q, p, state, (dq, dp), factor)

    for changed, sentence in (
        ({"state": memory.empty(100)}, "`state` is 100 bytes; allowed: .* bytes or more"),
        ({"passage": q}, "`passage` is 12 x 24 of f16 with a row stride of 24; allowed: 17 x 24"),
        ({"query": _OnCpu(case.query)}, "`query` is on the CPU; allowed: memory of a CUDA device"),
        ({"state": made.side}, "`state` is .* bytes|`state` is memory that `side` is in, too"),
    ):
        arguments: dict[str, Any] = whole | changed
        with pytest.raises(samtone.SamtoneError, match=sentence):
            made.forward(memory, **arguments)
        with pytest.raises(samtone.SamtoneError, match=sentence):
            if at_once:
                made.loss_and_gradients(memory, **arguments, gradients=(dq, dp))
            else:
                made.backward(memory, **arguments, gradients=(dq, dp), upstream=factor)
    inside = emulated.DeviceTensor(state.address, (12, 24), types[theirs])
    for (planned, *given), sentence in (
        ((made, inside, dp), "`query_gradient` is memory that `state` is in, too"),
        ((made, dq, None), "`passage_gradient` is a null pointer"),
        (
            (made, memory.matrix(12, 24, types[others]), dp),
            f"`query_gradient` is 12 x 24 of {others} .* 24 of {theirs}",
        ),
        ((made, dp, dp), f"`query_gradient` is 17 x 24 of {theirs} .* allowed: 12 x 24"),
        ((other, dq, dp), "`plan` is made for gradients .*; allowed: one for gradients .*"),
    ):
        with pytest.raises(samtone.SamtoneError, match=sentence):
            gradients(planned, *given)
    with pytest.raises(samtone.SamtoneError, match="`query` is on CUDA device 0; allowed: memory of the host"):
        vector = torch.empty(12, dtype=torch.float64)
        names = dict.fromkeys(annotations(case))
        settings_ = _native.Settings("loss=info_nce", 0.1)
        _native.cpu_step(settings_, cuda.capsule(q), cuda.capsule(p), (None, None), True, names, vector.__dlpack__(), 1)


class _OnCpu:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def detach(self) -> torch.Tensor:
        return self.tensor


def test_nothing_waits_nor_allocates(memory: emulated.EmulatedMemory, at_once: bool) -> None:
    """A stream that is being captured refuses both, so a step that goes through does neither."""
    case = judge.of_preset("samtone_query", *embeddings(48))
    want = Result(memory, case)
    q, p, state = memory.tensor(case.query), memory.tensor(case.passage), memory.empty(cuda.state_bytes(12, 17))
    gradients = [memory.matrix(len(x), 24, torch.float32) for x in (case.query, case.passage)]
    upstream = memory.put(b"\0\0\x80\x3f", (1,), torch.float32)
    plan, workspace = want.planned.plan, memory.empty(want.planned.plan.workspace_bytes)

    def place() -> dict[str, Any]:
        capsules = {"side": want.planned.side, "state": state, "workspace": workspace}
        named = {name: cuda.capsule(tensor) for name, tensor in capsules.items()}
        return {"towers": (cuda.capsule(q), cuda.capsule(p)), "stream": memory.stream, **named}

    taken = (cuda.capsule(gradients[0]), cuda.capsule(gradients[1]))
    call = memory.driver.call
    stream, graph, executable = ctypes.c_void_p(memory.stream), ctypes.c_void_p(), ctypes.c_void_p()
    call("cuStreamBeginCapture_v2", stream, 1)
    if at_once:
        plan.loss_and_gradients(**place(), gradients=taken)
    else:
        plan.forward(**place())
        plan.backward(**place(), gradients=taken, upstream=cuda.capsule(upstream))
    call("cuStreamEndCapture", stream, ctypes.byref(graph))
    call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
    call("cuGraphLaunch", executable, stream)
    results: Any = cuda.numbers(state, plan.offsets[0], 5)  # type: ignore[arg-type]
    assert results.tolist() == want.results
    assert all(torch.equal(memory.read(a), b) for a, b in zip(gradients, want.gradients))
