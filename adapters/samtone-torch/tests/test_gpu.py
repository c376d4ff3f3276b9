"""On a GPU, through autograd, against the definition on the CPU in float64. `pytest -m gpu` runs these alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import judge
import pytest
import samtone
import torch
from conftest import DEVICE, missing
from judge import Case, close, gradient_error
from samtone import cuda, grad_cache
from test_loss import MASKS, TYPES, embeddings
from torch import Tensor

pytestmark = pytest.mark.gpu


def in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on no gradients come at once with the loss on CUDA, as those of large batches do not."""
    monkeypatch.setattr(cuda, "AT_ONCE_BYTES", -1)


@pytest.fixture(params=[True, False], ids=["at once", "in turn"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        in_turn(monkeypatch)


both_ways = pytest.mark.usefixtures("_both_ways")


def leaves(case: Case) -> tuple[Tensor, Tensor]:
    return tuple(x.detach().to(DEVICE).requires_grad_() for x in (case.query, case.passage))  # type: ignore[return-value]


def check(case: Case, upstream: float = 1.0, learn: str | None = None, of: str = DEVICE) -> None:
    """Everything that a call gives; a learned temperature is a tensor on `of`."""
    dtype, want = case.query.dtype, judge.judge(case, upstream)
    q, p = leaves(case)
    value = torch.tensor(case.temperature, dtype=torch.float64)
    temperature = (value if learn == "temperature" else -value.log()).to(of).requires_grad_()
    options: dict[str, Any] = {learn: temperature} if learn else {"temperature": case.temperature}
    got = samtone.evaluate(q, p, **options, **case.options())
    assert got.loss.device.type == got.row_losses.device.type == q.device.type
    (got.loss * upstream).backward()
    limit = judge.LOSS[dtype] + 4 * judge.COSINE / case.temperature
    close(got.loss.item(), want.loss.item(), limit, "loss")
    for a, b in zip(got.row_losses.tolist(), want.row_losses.tolist()):
        close(a, b, 4 * limit, "row loss")
    metrics = [*got.query_to_passage, *got.passage_to_query]
    assert [m.item() for m in metrics] == pytest.approx(want.metrics, abs=1e-9)
    assert bool(got.prefixes) == bool(want.prefixes)
    for k, prefix in enumerate(want.prefixes):
        close(got.prefixes.losses[k].item(), prefix.loss.item(), limit, "loss of a prefix")
        metrics = [x[k] for x in (*got.prefixes.query_to_passage, *got.prefixes.passage_to_query)]
        assert [m.item() for m in metrics] == pytest.approx(prefix.metrics, abs=1e-9)
    limit = judge.tolerance(dtype, case.temperature)
    for name, x in (("query", q), ("passage", p)):
        assert x.grad is not None and x.grad.dtype == dtype and x.grad.device == x.device
        assert gradient_error(x.grad.cpu(), want.gradients[name], x.detach().cpu()) <= limit
    if learn:
        assert temperature.grad is not None and temperature.grad.device == temperature.device
        close(temperature.grad.item(), want.gradients["tau" if learn == "temperature" else learn].item(), limit, learn)


def step(q: Tensor, p: Tensor, scale: float = 1.0, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients, by themselves; the latter times `scale`."""
    loss = samtone.samtone_loss(q, p, **options)
    dq, dp = torch.autograd.grad(loss * scale, (q, p))
    return loss.detach(), dq, dp


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("preset", judge.PRESETS)
def test_presets(preset: str, dtype: torch.dtype) -> None:
    check(judge.of_preset(preset, *embeddings(40, dtype)), upstream=-2.0)


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str) -> None:
    check(judge.of_preset("samtone_both", *embeddings(41), **MASKS[mask]))


@both_ways
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("mask", ["plain", "all"])
def test_prefixes(mask: str, dtype: torch.dtype) -> None:
    prefixes: dict[str, Any] = {"prefixes": [3, 7, 16, 20], "prefix_weights": [0.5, 1.0, 0.0, 2.0]}
    check(judge.of_preset("samtone_both", *embeddings(39, dtype), **prefixes, **MASKS[mask]), -2.0, "log_beta")
    check(judge.of_preset("samtone_query", *embeddings(39, dtype), prefixes=[8, 24], **MASKS[mask]))


@both_ways
@pytest.mark.parametrize("of", ["cpu", DEVICE])
@pytest.mark.parametrize("learn", ["temperature", "log_beta"])
def test_temperatures(learn: str, of: str) -> None:
    check(judge.of_preset("samtone_query", *embeddings(42)), 0.5, learn, of)


@both_ways
def test_frozen_towers() -> None:
    q, p = leaves(judge.of_preset("samtone_query", *embeddings(43)))
    _, dq, dp = step(q, p)
    (only_q,) = torch.autograd.grad(samtone.samtone_loss(q, p.detach()), q)
    (only_p,) = torch.autograd.grad(samtone.samtone_loss(q.detach(), p), p)
    assert torch.allclose(only_q, dq, rtol=1e-5, atol=1e-7) and torch.allclose(only_p, dp, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        assert not samtone.samtone_loss(q, p).requires_grad


def test_tile_skipping_stays_within_its_bound() -> None:
    """As on the emulated driver: what two clusters have in common is skipped."""
    side, share, options = 64, 0.5, {"loss": "info_nce", "temperature": 0.2}
    generator = torch.Generator().manual_seed(51)
    centres = 4 * torch.eye(2, 16).repeat_interleave(side, 0)
    x, y = (centres + 0.3 * torch.randn(2 * side, 16, generator=generator) for _ in range(2))
    q, p = (t.to(DEVICE).requires_grad_() for t in (x, y))
    want, got = step(q, p, **options), step(q, p, tile_skipping=share, **options)
    assert torch.equal(got[0], want[0])
    off = got[1] - want[1]
    assert (off.abs().max() > 0) == (q.device.type == "cuda"), "nothing is skipped on the GPU, or something on the CPU"
    assert ((off.norm(dim=1) * q.norm(dim=1)).max() <= share / 0.2 / len(q) * (1 + 1e-4)).item()


def test_rows_of_any_stride() -> None:
    q, p = embeddings(44, torch.bfloat16)
    wide = [torch.nn.functional.pad(x, (3, 5), value=float("nan")).to(DEVICE) for x in (q, p)]
    views = [x[:, 3:-5].requires_grad_() for x in wide]
    want = step(*(x.detach().contiguous().requires_grad_() for x in views))
    assert same(step(views[0], views[1]), want)
    columns = [x.detach().t().contiguous().t().requires_grad_() for x in views]
    assert same(step(columns[0], columns[1]), want)


@both_ways
def test_same_bits_and_graphs_are_kept() -> None:
    q, p = leaves(judge.of_preset("samtone_both", *embeddings(45)))
    want = step(q, p, loss="samtone_both")
    assert all(same(step(q, p, loss="samtone_both"), want) for _ in range(20))
    log_beta = torch.tensor(2.3, device=DEVICE, requires_grad=True)
    loss = samtone.samtone_loss(q, p, loss="samtone_both", log_beta=log_beta)
    want = torch.autograd.grad(loss, (q, p, log_beta), retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    assert all(torch.equal(x.grad, 2 * once) for x, once in zip((q, p, log_beta), want))
    (-3.0 * loss).backward()
    assert all(torch.allclose(x.grad, -once, rtol=1e-4, atol=1e-6) for x, once in zip((q, p, log_beta), want))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gradients_at_once_and_in_turn_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so large a dimension that the former keep their cosines, and with an upstream gradient without which most of them would
    be too small for float16: both ways round once, after it."""
    generator = torch.Generator().manual_seed(58)
    q = torch.randn(300, 768, generator=generator)
    p = torch.cat([q + torch.randn(300, 768, generator=generator), torch.randn(20, 768, generator=generator)])
    q, p = (x.to(DEVICE, dtype).requires_grad_() for x in (q, p))
    options: dict[str, Any] = {"temperature": 0.05, "scale": 2.0**12, "passage_ids": torch.arange(320) % 290}
    together = step(q, p, **options)
    in_turn(monkeypatch)
    apart = step(q, p, **options)
    close(together[0].item(), apart[0].item(), 1e-6, "loss")
    for a, b, x in zip(together[1:], apart[1:], (q, p)):
        assert a.dtype == b.dtype == dtype and a.abs().max() > 0
        assert gradient_error(a.cpu(), b.cpu().double(), x.detach().cpu()) <= judge.ROUNDING[dtype] + 1e-5


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_batches_of_thousands(dtype: torch.dtype) -> None:
    """By the CPU, on the same numbers in float32: a definition in float64 takes too long."""
    generator = torch.Generator().manual_seed(46)
    q = torch.randn(2200, 192, generator=generator)
    p = torch.cat([q + torch.randn(2200, 192, generator=generator), torch.randn(100, 192, generator=generator)])
    # Scaled, or most of them would be too small for float16.
    options: dict[str, Any] = {"temperature": 0.05, "passage_ids": torch.arange(2300) % 2000, "scale": 2.0**12}
    q, p = q.to(dtype), p.to(dtype)
    want = step(*(x.float().requires_grad_() for x in (q, p)), **options)
    got = step(*(x.to(DEVICE).requires_grad_() for x in (q, p)), **options)
    close(got[0].item(), want[0].item(), 1e-5, "loss")
    for a, b, x in zip(got[1:], want[1:], (q, p)):
        assert gradient_error(a.cpu(), b.double(), x) <= judge.tolerance(dtype, 0.05)


def test_refused_embeddings() -> None:
    q, p = leaves(judge.of_preset("info_nce", *embeddings(47)))
    with torch.no_grad():
        p[5, 7] = float("inf")
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.raises(samtone.SamtoneError, match="embedding in row 5 contains"),
    ):
        samtone.samtone_loss(q, p)
    if DEVICE == "cuda":
        loss, dq, dp = step(q, p)
        assert loss.isnan() and dq.isnan().all() and dp.isnan().all()


def test_a_modules_training_step_with_autocast() -> None:
    tower = torch.nn.Linear(24, 16).to(DEVICE)
    criterion = samtone.SamToNeLoss("samtone_query", temperature=0.1, learnable="log_beta").to(DEVICE)
    optimizer = torch.optim.AdamW([*tower.parameters(), *criterion.parameters()], lr=0.01)
    q, p = (x.to(DEVICE) for x in embeddings(48))
    losses = []
    for _ in range(10):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = criterion(tower(q), tower(p))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_chunks_equal_one_batch() -> None:
    tower = torch.nn.Linear(24, 16).to(DEVICE)
    criterion = samtone.SamToNeLoss("samtone_both", temperature=0.1)
    q, p = (x.to(DEVICE) for x in embeddings(49))
    criterion(tower(q), tower(p)).backward()
    want, tower.weight.grad = tower.weight.grad, None
    grad_cache.step(criterion, (tower, q.split(5)), (tower, p.split(7)))
    assert torch.allclose(tower.weight.grad, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefixes", [None, [4, 16]], ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, prefixes: list[int] | None) -> None:
    torch._dynamo.reset()
    tower = torch.nn.Linear(24, 16).to(DEVICE)
    q, p = (x.to(DEVICE) for x in embeddings(50))

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return 2 * samtone.samtone_loss(tower(a), tower(b), temperature=0.1, prefixes=prefixes)

    loss(q, p).backward()
    want, tower.weight.grad = tower.weight.grad, None
    torch.compile(loss, backend=backend, fullgraph=True)(q, p).backward()
    assert torch.allclose(tower.weight.grad, want, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(missing("sentence-transformers", "sentence_transformers"), reason="no sentence-transformers")
@pytest.mark.parametrize("dims", [None, [2, 4]], ids=str)
@pytest.mark.parametrize("cached", [False, True])
def test_sentence_transformers(cached: bool, dims: list[int] | None) -> None:
    from samtone.sentence_transformers import CachedSamToNeLoss, SamToNeLoss
    from test_sentence_transformers import Encoder, columns

    model = Encoder()
    options: Any = {"mini_batch_size": 2} if cached else {}
    make: Any = CachedSamToNeLoss if cached else SamToNeLoss
    results = []
    for device in ("cpu", DEVICE):
        model.to(device).zero_grad()
        features = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in f.items()} for f in columns(1)]
        loss = make(model, matryoshka_dims=dims, **options)(features, None)
        loss.backward()
        results.append([loss.item(), model.dense.weight.grad.clone().cpu()])
    close(results[1][0], results[0][0], 1e-4)
    assert torch.allclose(results[1][1], results[0][1], rtol=1e-3, atol=1e-4)


# Of CUDA itself.


@contextmanager
def on(stream: torch.cuda.Stream) -> Iterator[None]:
    """On a stream, in order with the current one."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.cuda
@both_ways
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_on_another_stream(dtype: torch.dtype) -> None:
    case = judge.of_preset("samtone_both", *embeddings(51, dtype), passage_ids=[k // 2 for k in range(17)])
    with on(torch.cuda.Stream()):
        for _ in range(3):
            check(case, 3.0)


@pytest.mark.cuda
@both_ways
def test_a_step_waits_for_nothing() -> None:
    q, p = leaves(judge.of_preset("samtone_query", *embeddings(52)))
    ids = torch.arange(17)
    step(q, p, passage_ids=ids)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step(q, p, passage_ids=ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@both_ways
def test_memory_does_not_grow() -> None:
    q, p = leaves(judge.of_preset("samtone_query", *embeddings(53)))
    seen = []
    for _ in range(6):
        step(q, p)
        torch.cuda.synchronize()
        seen.append(torch.cuda.memory_allocated())
    assert len(set(seen[1:])) == 1, seen


@pytest.mark.cuda
@both_ways
def test_a_captured_step_has_the_bits_of_calls_on_new_inputs_too() -> None:
    cuda.release()
    q, p = leaves(judge.of_preset("samtone_both", *embeddings(54)))
    options: dict[str, Any] = {"loss": "samtone_both", "passage_ids": torch.arange(17) // 2}
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with on(stream):
        for _ in range(3):
            step(q, p, **options)
    with torch.cuda.graph(graph, stream=stream):
        captured = step(q, p, **options)
    for k in range(2 * cuda.KEPT_PLANS):  # other plans do not take the place of what the graph reads
        step(q, p, temperature=0.2 + 0.01 * k)
    for seed in (55, 54, 56):
        with torch.no_grad():
            for x, new in zip((q, p), embeddings(seed)):
                x.copy_(new)
        graph.replay()
        assert same(captured, step(q, p, **options)), "other bits"
    cuda.release()


@pytest.mark.cuda
def test_a_capture_without_a_call_before_is_a_sentence() -> None:
    cuda.release()
    q, p = leaves(judge.of_preset("clip", *embeddings(57)))
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(samtone.SamtoneError, match="the first of its kind on it"),
        torch.cuda.graph(graph, stream=torch.cuda.Stream()),
    ):
        samtone.samtone_loss(q, p, loss="clip")
    torch.cuda.synchronize()
    step(q, p, loss="clip")
