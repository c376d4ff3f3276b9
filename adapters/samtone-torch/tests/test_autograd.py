"""What autograd, autocast and torch.compile see, and what is read in place."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import judge
import pytest
import samtone
import torch
from judge import gradient_error
from samtone import _native, ops
from samtone.options import text_of
from test_loss import MASKS, embeddings


def gradients(q: torch.Tensor, p: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, p = q.detach().requires_grad_(), p.detach().requires_grad_()
    dq, dp = torch.autograd.grad(samtone.samtone_loss(q, p, **options), (q, p))
    return dq, dp


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_only_needed_gradients_are_computed(needed: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    step = _native.cpu_step
    monkeypatch.setattr(_native, "cpu_step", lambda *a: (asked.append((a[3], a[4])), step(*a))[1])
    q, p = embeddings(20)
    log_beta = torch.tensor(3.0)
    tensors = (q, p, log_beta)
    for tensor, need in zip(tensors, needed):
        tensor.requires_grad_(need)
    samtone.samtone_loss(q, p, log_beta=log_beta).backward()
    ((buffers, differentiate),) = asked
    assert differentiate and [b is not None for b in buffers] == list(needed[:2])
    assert [t.grad is not None for t in tensors] == list(needed)
    whole = gradients(*embeddings(20), log_beta=3.0)
    for tensor, want in zip(tensors[:2], whole):
        assert tensor.grad is None or torch.equal(tensor.grad, want)


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "frozen"])
def test_without_gradients_it_is_a_forward_pass(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    step = _native.cpu_step
    monkeypatch.setattr(_native, "cpu_step", lambda *a: (asked.append(a[4]), step(*a))[1])
    q, p = embeddings(21)
    if how == "frozen":
        loss = samtone.samtone_loss(q, p)
    else:
        with torch.no_grad() if how == "no_grad" else torch.inference_mode():
            loss = samtone.samtone_loss(q.requires_grad_(), p)
    assert not loss.requires_grad and asked == [False]


LAYOUTS = {
    "contiguous": (True, lambda x: x.clone()),
    "columns of a wider matrix": (True, lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]]),
    "every second row": (True, lambda x: x.repeat_interleave(2, 0)[::2]),
    "an odd offset": (True, lambda x: torch.cat([torch.zeros(3, dtype=x.dtype), x.flatten()])[3:].view_as(x)),
    "transposed": (False, lambda x: x.T.contiguous().T),
    "reversed columns": (False, lambda x: x.flip(1).flip(1).T.contiguous().T),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_read_in_place(layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rust sees the addresses of the caller's tensors, and gives the bits that it gives for contiguous copies."""
    seen: list[tuple[int, int]] = []
    step = _native.cpu_step

    def spy(settings: Any, query: Any, passage: Any, *rest: Any) -> Any:
        tensors = [torch.from_dlpack(_Once(capsule)) for capsule in (query, passage)]
        capsules = [tensor.__dlpack__() for tensor in tensors]
        seen.append(_native.addresses(*[tensor.__dlpack__() for tensor in tensors]))
        return step(settings, *capsules, *rest)

    monkeypatch.setattr(_native, "cpu_step", spy)
    q, p = embeddings(22, dtype)
    in_place, change = LAYOUTS[layout]
    strided = change(q), change(p)
    assert torch.equal(strided[0], q)
    got = gradients(*strided)
    own = tuple(x.data_ptr() for x in strided)
    assert (seen[0] == own) == in_place
    assert all(torch.equal(a, b) for a, b in zip(got, gradients(q, p)))


class _Once:
    """Hands out a capsule that exists already."""

    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


def test_gradients_are_written_where_autograd_finds_them() -> None:
    """The only tensors of the size of a tower that a step makes are the gradients and their products with the upstream one."""
    q, p = (torch.randn(300, 64).requires_grad_() for _ in range(2))
    samtone.samtone_loss(q, p).backward()
    with torch.profiler.profile(profile_memory=True) as profile:
        samtone.samtone_loss(q, p, temperature=0.02)
    size = 300 * 64 * 4
    large = [e.self_cpu_memory_usage for e in profile.key_averages() if e.self_cpu_memory_usage >= size]
    assert sum(large) < 3 * size, "a forward call allocated more than the two gradients"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefixes_of_rows_in_place(layout: str, dtype: torch.dtype) -> None:
    q, p = embeddings(22, dtype)
    _, change = LAYOUTS[layout]
    for a, b in zip(gradients(change(q), change(p), **PREFIXES), gradients(q, p, **PREFIXES)):
        assert torch.equal(a, b) and (a[:, 20:] == 0).all()


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_needed_gradients_of_prefixes(needed: tuple[bool, ...]) -> None:
    def after(needed: tuple[bool, ...]) -> list[torch.Tensor]:
        tensors = [x.requires_grad_(need) for x, need in zip((*embeddings(20), torch.tensor(3.0)), needed)]
        samtone.samtone_loss(*tensors[:2], log_beta=tensors[2], **PREFIXES).backward()
        return tensors

    whole = [x.grad for x in after((True, True, True))]
    for tensor, need, gradient in zip(after(needed), needed, whole):
        assert (tensor.grad is not None) == need and (not need or torch.equal(tensor.grad, gradient))


def test_one_tensor_for_both_towers() -> None:
    x, _ = embeddings(23)
    x.requires_grad_()
    samtone.samtone_loss(x, x, loss="bidirectional").backward()
    dq, dp = gradients(x, x, loss="bidirectional")
    assert x.grad is not None and torch.allclose(x.grad, dq + dp, atol=1e-7)


def test_outputs_are_memory_of_their_own() -> None:
    q, p = embeddings(24)
    (dq, dp), (other, _) = gradients(q, p), gradients(q, p)
    pointers = {x.untyped_storage().data_ptr() for x in (q, p, dq, dp, other)}
    assert len(pointers) == 5


def test_gradients_that_are_passed_on_are_nobody_elses() -> None:
    """An upstream gradient of 1 has them passed on without a copy; what becomes of them afterwards must not matter."""
    x, p = embeddings(37)
    x.requires_grad_()
    q = 1.0 * x
    q.retain_grad()
    loss = samtone.samtone_loss(q, p)
    (want,) = torch.autograd.grad(loss, x, retain_graph=True)
    want = want.clone()
    for _ in range(2):
        x.grad = q.grad = None
        loss.backward(retain_graph=True)
        assert torch.equal(x.grad, want)
        x.grad.zero_()
        q.grad.zero_()
    (kept,) = torch.autograd.grad(loss, q, retain_graph=True)
    kept.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_accumulate_and_graphs_are_kept() -> None:
    q, p = (x.requires_grad_() for x in embeddings(25))
    loss = samtone.samtone_loss(q, p)
    loss.backward(retain_graph=True)
    first = q.grad.clone()  # type: ignore[union-attr]
    loss.backward()
    assert torch.equal(q.grad, 2 * first)  # type: ignore[arg-type]


def test_second_derivatives_are_refused() -> None:
    q, p = (x.requires_grad_() for x in embeddings(26))
    (dq,) = torch.autograd.grad(samtone.samtone_loss(q, p), q, create_graph=True)
    with pytest.raises(samtone.SamtoneError, match="second derivatives"):
        dq.square().sum().backward()


def test_second_derivatives_of_a_temperature_alone_are_refused() -> None:
    """Of frozen towers, whose gradients nobody asks for."""
    q, p = embeddings(26)
    log_beta = torch.tensor(2.0, requires_grad=True)
    (first,) = torch.autograd.grad(samtone.samtone_loss(q, p, log_beta=log_beta), log_beta, create_graph=True)
    with pytest.raises(samtone.SamtoneError, match="second derivatives"):
        (first.square() + log_beta).backward()


@pytest.mark.parametrize("options", [{}, {"prefixes": [2, 3, 5], "prefix_weights": [0.5, 1.0, 1.5]}])
def test_gradcheck(options: dict[str, Any]) -> None:
    """PyTorch's own finite differences, with a step and tolerances for an operation that computes in float32."""
    q, p = (x[:5, :6].contiguous().requires_grad_() for x in embeddings(27))
    log_beta = torch.tensor(0.5, requires_grad=True)
    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(
            lambda *x: samtone.samtone_loss(x[0], x[1], log_beta=x[2], **options),
            (q, p, log_beta),
            eps=1e-2,
            atol=2e-3,
            rtol=2e-2,
        )


@pytest.mark.parametrize("options", [{}, {"prefixes": [3, 8, 24], "prefix_weights": [1.0, 0.0, 0.5]}])
def test_operations_are_registered_as_pytorch_wants_them(options: dict[str, Any]) -> None:
    q, p = (x.requires_grad_() for x in embeddings(28))
    ids = torch.arange(len(p))
    arguments = (
        q,
        p,
        torch.tensor(0.1),
        None,
        ids,
        None,
        None,
        None,
        text_of("samtone_both", {"tile_skipping": 0.1} | options),
        0.0,
        3,
    )
    torch.library.opcheck(ops.forward, arguments)
    saved = ops.forward(*arguments)[3:]
    inputs = (torch.tensor(2.0), q.detach(), p.detach(), *arguments[2:8], *saved)
    torch.library.opcheck(ops.backward, (*inputs, arguments[8], arguments[10]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_without_graph_breaks(backend: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    tower = torch.nn.Linear(24, 16)
    criterion = samtone.SamToNeLoss("samtone_both", temperature=0.05, learnable="log_beta", margin=0.1)
    ids = torch.tensor(MASKS["passage_ids"]["passage_ids"])

    def step(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        a, b = tower(q).to(dtype), tower(p).to(dtype)
        return criterion(a, b, passage_ids=ids, weights=torch.ones(len(a)))

    q, p = embeddings(29)
    parameters = [*tower.parameters(), *criterion.parameters()]
    want = step(q, p), *torch.autograd.grad(step(q, p), parameters)
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    got = compiled(q, p), *torch.autograd.grad(compiled(q, p), parameters)
    for a, b in zip(got, want):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


PREFIXES: dict[str, Any] = {"prefixes": [3, 8, 20], "prefix_weights": [1.0, 0, 0.5]}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_with_prefixes(backend: str, dynamic: bool) -> None:
    """Whole graphs, in which losses and metrics of prefixes are results, too: of a module, and of the function, whose options may be
    arguments of what is compiled."""
    torch._dynamo.reset()
    q, p = (x.requires_grad_() for x in embeddings(41))
    module = samtone.SamToNeLoss("samtone_both", temperature=0.05, prefixes=torch.tensor([3, 8, 20]))

    def of_module(q: torch.Tensor, p: torch.Tensor) -> samtone.Evaluation:
        return module.evaluate(2 * q, p)

    def of_function(q: torch.Tensor, p: torch.Tensor, prefixes: Any = PREFIXES["prefixes"]) -> samtone.Evaluation:
        weights = PREFIXES["prefix_weights"]
        return samtone.evaluate(2 * q, p, temperature=0.05, prefixes=prefixes, prefix_weights=weights)

    def of_arguments(q: torch.Tensor, p: torch.Tensor, weights: Any, margin: float) -> samtone.Evaluation:
        more: dict[str, Any] = {"margin": margin, "workspace_bytes": 2**24, "prefixes": [3, 8]}
        return samtone.evaluate(2 * q, p, temperature=0.05, prefix_weights=weights, **more)

    compiled: dict[Any, Any] = {}
    steps: list[Any] = [(of_module, ()), (of_function, ()), (of_function, ([2, 9, 24],)), (of_function, ([4, 5, 6],))]
    steps += [(of_arguments, ([1.0, 0.5], 0.25)), (of_arguments, ([0.25, 2], -0.1))]
    for step, more in steps:
        want = step(q, p, *more)
        if step not in compiled:
            compiled[step] = torch.compile(step, backend=backend, fullgraph=True, dynamic=dynamic)
        got = compiled[step](q, p, *more)
        assert got.prefixes and want.prefixes
        flat = [
            [x.loss, x.row_losses, *x.prefixes[:2], *x.prefixes.query_to_passage, *x.prefixes.passage_to_query]
            for x in (got, want)
        ]
        for a, b in zip(*flat):
            assert a.shape == b.shape and torch.allclose(a, b)
        for a, b in zip(torch.autograd.grad(got.loss, (q, p)), torch.autograd.grad(want.loss, (q, p))):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("options", [{}, {"prefixes": [3, 16]}])
def test_inductor(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    tower = torch.nn.Linear(24, 16)
    q, p = embeddings(34)

    def step(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return samtone.samtone_loss(tower(q), tower(p), temperature=0.1, **options)

    (got,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(q, p), tower.weight)
    (want,) = torch.autograd.grad(step(q, p), tower.weight)
    assert torch.allclose(got, want, atol=1e-5)


def test_compile_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, p: samtone.samtone_loss(2 * q, p), backend="aot_eager", fullgraph=True, dynamic=True
    )
    q, p = embeddings(30)
    for rows in (12, 9, 5):
        x = q[:rows].clone().requires_grad_()
        compiled(x, p).backward()
        assert x.grad is not None and torch.allclose(x.grad, gradients(q[:rows], p)[0], atol=1e-6)


def test_autocast_changes_nothing() -> None:
    q, p = embeddings(31)
    log_beta = torch.tensor(4.0, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = q.to(dtype), p.to(dtype)
        want = samtone.evaluate(a, b, log_beta=log_beta, **PREFIXES)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = samtone.evaluate(a, b, log_beta=log_beta, **PREFIXES)
        assert torch.equal(got.loss, want.loss) and got.loss.dtype == torch.float32
        assert got.prefixes and want.prefixes
        assert torch.equal(got.prefixes.losses, want.prefixes.losses) and got.prefixes.losses.dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tower = torch.nn.Linear(24, 16)
        loss = samtone.samtone_loss(tower(q), tower(p))  # bfloat16 under autocast
        loss.backward()
    assert tower.weight.grad is not None and tower.weight.grad.dtype == torch.float32


def test_same_bits_for_any_number_of_threads() -> None:
    q, p = torch.randn(700, 40), torch.randn(750, 40)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            options: dict[str, Any] = {"prefixes": [7, 25, 38]}
            results.append((samtone.samtone_loss(q, p), *gradients(q, p), *gradients(q, p, **options)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_threads_of_other_pools_end() -> None:
    """PyTorch's number of threads may change, and one pool stays."""

    def alive() -> int:
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        return sum(name.startswith("samtone-") for name in names)

    q, p = embeddings(39)
    before = torch.get_num_threads()
    try:
        for threads in (5, 4, 3, 2, 3):
            torch.set_num_threads(threads)
            samtone.samtone_loss(q, p)
        limit = time.monotonic() + 30
        while alive() != 3 and time.monotonic() < limit:
            time.sleep(0.01)  # threads begin and end by themselves, soon
        assert alive() == 3
    finally:
        torch.set_num_threads(before)


def test_threads_of_python_compute_at_the_same_time() -> None:
    q, p = torch.randn(200, 32), torch.randn(220, 32)
    want = gradients(q, p)
    results: list[Any] = [None] * 6

    def work(k: int) -> None:
        results[k] = [gradients(q, p) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own in results:
        assert all(torch.equal(a, b) for got in own for a, b in zip(got, want))


def test_the_interpreter_is_released_during_a_call() -> None:
    """Another thread of Python counts while a call computes."""
    q, p = torch.randn(3000, 256), torch.randn(3000, 256)
    count, done = [0], threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            count[0] += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    samtone.samtone_loss(q, p)
    done.set()
    ticker.join()
    assert count[0] >= 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    q, p = embeddings(35)
    want = samtone.samtone_loss(q, p).item()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if samtone.samtone_loss(q, p).item() == want else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_default_device_of_pytorch_changes_nothing() -> None:
    q, p = embeddings(36)
    options: dict[str, Any] = {"passage_ids": [0] * 3 + list(range(14)), "weights": [1.0] * 12}
    want = gradients(q, p, **options)
    with torch.device("meta"):
        got = gradients(q, p, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("share", [1e-3, 0.999])
def test_tile_skipping_changes_no_bit_on_the_cpu(share: float) -> None:
    """Nothing is left out there, however much may be; a module has the option, too."""
    q, p = (x.requires_grad_() for x in embeddings(37))
    tau = torch.tensor(0.05, requires_grad=True)

    def step(loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return loss, *torch.autograd.grad(loss, (q, p, tau))

    want = step(samtone.samtone_loss(q, p, loss="samtone_both", temperature=tau))
    got = step(samtone.samtone_loss(q, p, loss="samtone_both", temperature=tau, tile_skipping=share))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    evaluations = [samtone.evaluate(q, p, temperature=0.05, tile_skipping=x).row_losses for x in (None, share)]
    assert torch.equal(*evaluations)
    module = samtone.SamToNeLoss("samtone_both", temperature=0.05, tile_skipping=share)
    plain = samtone.SamToNeLoss("samtone_both", temperature=0.05)
    assert module.options == {"tile_skipping": share} and torch.equal(module(q, p), plain(q, p))


def test_modules_hold_loss_and_temperature() -> None:
    q, p = embeddings(32)
    constant = samtone.SamToNeLoss("qwen3", temperature=0.05, margin=0.1)
    assert not list(constant.parameters()) and "qwen3" in repr(constant)
    assert torch.equal(constant(q, p), samtone.samtone_loss(q, p, loss="qwen3", temperature=0.05, margin=0.1))
    for learnable in ("tau", "log_beta"):
        module = samtone.SamToNeLoss(temperature=0.05, learnable=learnable)
        assert list(module.state_dict()) == [learnable] and module.temperature == pytest.approx(0.05)
        module(q, p).backward()
        want = judge.judge(judge.of_preset("samtone_query", q, p, temperature=0.05)).gradients[learnable]
        assert getattr(module, learnable).grad.item() == pytest.approx(want.item(), rel=1e-4)
    evaluation = constant.evaluate(q, p)
    assert evaluation.row_losses.mean().item() == pytest.approx(evaluation.loss.item(), rel=1e-6)
    assert not evaluation.row_losses.requires_grad


def test_gradients_of_float16_are_scaled_before_they_are_rounded() -> None:
    q, p = embeddings(33, torch.float16)
    p = torch.cat([5 * q, p[12:]])  # trained: tiny gradients
    scale = 2.0**32
    x = q.clone().requires_grad_()
    (samtone.samtone_loss(x, p, temperature=0.02) * scale).backward()
    want = judge.judge(judge.of_preset("samtone_query", q, p, temperature=0.02), scale).gradients["query"]
    assert x.grad is not None and gradient_error(x.grad, want, q) < 2e-3
    assert (want.abs().max() / scale).item() < 6e-8, "float16 would not lose these gradients, so this tests nothing"


def test_plain_tensors_go_straight_and_everything_else_through_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """What watches operations has to see one: modes, subclasses, transforms."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Subclass(torch.Tensor):
        pass

    seen: list[str] = []
    q, p = (x.requires_grad_() for x in embeddings(38))
    want = gradients(q, p)
    calls: list[str] = []
    operation = ops.forward
    monkeypatch.setattr(ops, "forward", lambda *a: (calls.append("operation"), operation(*a))[1])
    assert all(torch.equal(a, b) for a, b in zip(gradients(q, p), want)) and calls == []
    with Watching():
        samtone.samtone_loss(q, p).backward()
    assert calls == ["operation"] and any("samtone.forward" in name for name in seen)
    samtone.samtone_loss(q.detach().as_subclass(Subclass), p.detach())
    assert len(calls) == 2
