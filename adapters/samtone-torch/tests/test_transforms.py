"""torch.func and forward-mode derivatives: every first derivative is right, every second one is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import judge
import pytest
import samtone
import torch
from samtone import _native, ops
from test_loss import MASKS, embeddings
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

OPTIONS: dict[str, Any] = {"loss": "samtone_both", "passage_ids": MASKS["passage_ids"]["passage_ids"]}
REFUSED = "samtone has no second derivatives"


def loss(q: Tensor, p: Tensor, log_beta: Tensor) -> Tensor:
    return samtone.samtone_loss(q, p, log_beta=log_beta, **OPTIONS)


def arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return *embeddings(60, dtype), torch.tensor(2.0)


def wanted(q: Tensor, p: Tensor, log_beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    temperature = (-log_beta.double()).exp().item()
    case = judge.of_preset("samtone_both", q, p, temperature=temperature, **MASKS["passage_ids"])
    gradients = judge.judge(case).gradients
    return gradients["query"], gradients["passage"], gradients["log_beta"]


def backward(*x: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in x]
    return torch.autograd.grad(loss(*leaves), leaves)


REVERSE: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "grad": lambda *x: grad(loss, argnums=(0, 1, 2))(*x),
    "vjp": lambda *x: vjp(loss, *x)[1](torch.tensor(1.0)),
    "jacrev": lambda *x: jacrev(loss, argnums=(0, 1, 2))(*x),
    "grad of one at a time": lambda *x: tuple(grad(loss, argnums=k)(*x) for k in range(3)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", REVERSE)
def test_reverse_mode_gives_the_bits_of_backward(way: str, dtype: torch.dtype) -> None:
    x = arguments(dtype)
    for got, want in zip(REVERSE[way](*x), backward(*x)):
        assert got.dtype == want.dtype and torch.equal(got, want)


def dual(f: Callable[..., Tensor], x: tuple[Tensor, ...], t: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(f(*(forward_ad.make_dual(a, b) for a, b in zip(x, t))))
        assert tangent is not None
        return value, tangent


FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "jvp": jvp,
    "dual": dual,
    "linearize": lambda f, x, t: (f(*x), linearize(f, *x)[1](*t)),
    "in no_grad": lambda f, x, t: torch.no_grad()(jvp)(f, x, t),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", FORWARD)
def test_forward_mode(way: str, dtype: torch.dtype) -> None:
    """The product of gradient and tangent, with the temperature and without."""
    x = arguments(dtype)
    generator = torch.Generator().manual_seed(61)
    tangents = tuple(torch.randn(a.shape, generator=generator).to(a.dtype) for a in x)
    terms = [(g * t.double()).sum().item() for g, t in zip(wanted(*x), tangents)]
    value, got = FORWARD[way](loss, x, tangents)
    scale = sum(abs(term) for term in terms)
    assert got.dtype == torch.float32 and torch.equal(value, loss(*x))
    assert abs(got.item() - sum(terms)) < judge.GRADIENT[dtype] * scale, "all arguments"
    _, got = FORWARD[way](lambda q, p: loss(q, p, x[2]), x[:2], tangents[:2])
    assert abs(got.item() - sum(terms[:2])) < judge.GRADIENT[dtype] * scale, "both towers"
    _, got = FORWARD[way](lambda beta: loss(x[0], x[1], beta), x[2:], tangents[2:])
    assert got.item() == pytest.approx(terms[2], rel=1e-4), "the temperature"


def test_forward_mode_of_an_example() -> None:
    """Two pairs, by hand: with one negative each the loss of row i is log(1 + exp(q_i·p_j - q_i·p_i)), for unit vectors."""
    q = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    p = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    t = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])  # turns the first query towards the second passage
    _, got = jvp(lambda x: samtone.samtone_loss(x, p, loss="info_nce", temperature=1.0), (q,), (t,))
    assert got.item() == pytest.approx(0.5 / (1 + torch.e), rel=1e-5)


def test_jacobians() -> None:
    x = arguments()
    for got, want in zip(jacfwd(loss, argnums=(1, 2))(*x), backward(*x)[1:]):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    # Of several losses at once, with upstream gradients that are batched.
    several = jacrev(lambda q: torch.stack([loss(q, *x[1:]), 2 * loss(q, *x[1:])]))(x[0])
    assert torch.allclose(several, torch.stack([backward(*x)[0], 2 * backward(*x)[0]]), rtol=1e-6, atol=0)


def test_problems_side_by_side() -> None:
    """vmap over towers, ids and temperatures, each of them batched or not, with gradients and without."""
    batches = [embeddings(seed) for seed in (62, 63, 64)]
    q, p = (torch.stack(x) for x in zip(*batches))
    ids = torch.stack([torch.arange(17), torch.arange(17) // 2, torch.arange(17) % 5])
    beta = torch.tensor([1.0, 2.0, 3.0])

    def one(q: Tensor, p: Tensor, ids: Tensor, beta: Tensor) -> Tensor:
        return samtone.samtone_loss(q, p, log_beta=beta, passage_ids=ids)

    got = vmap(one)(q, p, ids, beta)
    assert torch.equal(got, torch.stack([one(*x) for x in zip(q, p, ids, beta)]))
    got = vmap(one, in_dims=(2, None, None, 0))(q.permute(1, 2, 0), p[0], ids[1], beta)
    assert torch.equal(got, torch.stack([one(a, p[0], ids[1], b) for a, b in zip(q, beta)]))
    all_of_them = (0, 1, 3)
    per_sample = vmap(grad(one, argnums=all_of_them))(q, p, ids, beta)
    for k, x in enumerate(zip(q, p, ids, beta)):
        for got, want in zip(per_sample, grad(one, argnums=all_of_them)(*x)):
            assert torch.equal(got[k], want)
    of_sum = grad(lambda q: vmap(one)(q, p, ids, beta).sum())(q)
    assert torch.equal(of_sum, per_sample[0])
    tangents = torch.randn_like(q)
    both = vmap(lambda q, p, ids, beta, t: jvp(lambda x: one(x, p, ids, beta), (q,), (t,))[1])(
        q, p, ids, beta, tangents
    )
    assert torch.allclose(both, (per_sample[0] * tangents).sum((1, 2)), rtol=1e-4)
    leaf = q.clone().requires_grad_()
    vmap(one)(leaf, p, ids, beta).sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, per_sample[0])


def test_prefixes_side_by_side() -> None:
    """Losses and metrics of prefixes, and gradients in both modes, under vmap and without."""
    batches = [embeddings(seed) for seed in (65, 66)]
    q, p = (torch.stack(x) for x in zip(*batches))
    options: dict[str, Any] = {"temperature": 0.2, "prefixes": [3, 8, 20], "prefix_weights": [1.0, 0.0, 0.5]}

    def one(q: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        got = samtone.evaluate(q, p, **options)
        assert got.prefixes
        return got.loss, got.prefixes.losses, *got.prefixes.query_to_passage, *got.prefixes.passage_to_query

    for got, want in zip(vmap(one)(q, p), zip(*(one(*x) for x in zip(q, p)))):
        assert torch.equal(got, torch.stack(want))
    tangents = torch.randn_like(q)
    per_sample = vmap(grad(lambda *x: one(*x)[0], argnums=(0, 1)))(q, p)
    for k, x in enumerate(zip(q, p)):
        leaves = [tensor.requires_grad_() for tensor in x]
        want = torch.autograd.grad(one(*leaves)[0], leaves)
        assert all(torch.equal(a[k], b) for a, b in zip(per_sample, want))
    _, got = jvp(lambda q: vmap(one)(q, p)[0].sum(), (q,), (tangents,))
    assert got.item() == pytest.approx((per_sample[0] * tangents).sum().item(), rel=1e-4)


def test_a_model_as_a_function() -> None:
    q, p = embeddings(65)
    tower, criterion = torch.nn.Linear(24, 8), samtone.SamToNeLoss(temperature=0.1, learnable="log_beta")
    model = torch.nn.ModuleDict({"tower": tower, "criterion": criterion})
    parameters = {name: x.detach() for name, x in model.named_parameters()}

    def step(parameters: dict[str, Tensor]) -> Tensor:
        part = [
            {k.removeprefix(n): x for k, x in parameters.items() if k.startswith(n)} for n in ("tower.", "criterion.")
        ]
        a, b = (functional_call(tower, part[0], x) for x in (q, p))
        evaluation: Tensor = functional_call(criterion, part[1], (a, b))
        return evaluation

    got = grad(step)(parameters)
    criterion(tower(q), tower(p)).backward()
    assert set(got) == {"tower.weight", "tower.bias", "criterion.log_beta"}
    for name, x in model.named_parameters():
        assert x.grad is not None and torch.allclose(got[name], x.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"prefixes": [24]}])
def test_results_beside_the_loss(options: dict[str, Any]) -> None:
    """Metrics are steps: they have derivatives of 0. Losses of rows have derivatives that nobody computes."""
    q, p = embeddings(66)

    def all_of_it(q: Tensor) -> tuple[Tensor, samtone.Evaluation]:
        evaluation = samtone.evaluate(q, p, **options)
        return evaluation.loss, evaluation

    got, evaluation = grad(all_of_it, has_aux=True)(q)
    assert torch.equal(got, grad(lambda x: samtone.samtone_loss(x, p, **options))(q))
    plain = samtone.evaluate(q, p, **options)
    assert (
        torch.equal(evaluation.row_losses, plain.row_losses) and evaluation.query_to_passage == plain.query_to_passage
    )
    assert len(evaluation.prefixes) == len(plain.prefixes) == (4 if options else 0)
    assert all(torch.equal(a, b) for a, b in zip(evaluation.prefixes[:2], plain.prefixes[:2]))
    assert evaluation.prefixes[2:] == plain.prefixes[2:]
    assert (grad(lambda q: samtone.evaluate(q, p).query_to_passage.mrr)(q) == 0).all()
    with pytest.raises(
        samtone.SamtoneError, match="`row_losses` is differentiated; allowed: derivatives of `loss` alone"
    ):
        grad(lambda q: samtone.evaluate(q, p).row_losses.sum())(q)
    _, tangents = jvp(lambda q: samtone.evaluate(q, p).row_losses, (q,), (q,))
    assert tangents.isnan().all()


def test_only_needed_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    step = _native.cpu_step
    monkeypatch.setattr(
        _native, "cpu_step", lambda *a: (asked.append((a[4], *(b is not None for b in a[3]))), step(*a))[1]
    )
    q, p, beta = arguments()
    grad(loss)(q, p, beta)
    vmap(loss, in_dims=(0, None, None))(q[None], p, beta)
    assert asked == [(True, True, False), (False, False, False)]


SECOND: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "hessian": lambda f, x: hessian(f)(x),
    "jacrev of grad": lambda f, x: jacrev(grad(f))(x),
    "jacfwd of jacfwd": lambda f, x: jacfwd(jacfwd(f))(x),
    "grad of grad": lambda f, x: grad(lambda y: grad(f)(y).square().sum())(x),
    "grad of jvp": lambda f, x: grad(lambda y: jvp(f, (y,), (torch.ones_like(x),))[1])(x),
    "jvp of grad": lambda f, x: jvp(grad(f), (x,), (torch.ones_like(x),)),
    "backward of grad": lambda f, x: grad(f)(x.requires_grad_()).sum().backward(),
    "backward of jvp": lambda f, x: jvp(f, (x.requires_grad_(),), (torch.ones_like(x),))[1].backward(),
    "backward of vmap of grad": lambda f, x: vmap(grad(f))(x[None].requires_grad_()).sum().backward(),
    "dual of grad": lambda f, x: dual(grad(f), (x,), (torch.ones_like(x),)),
    "dual of backward": lambda f, x: dual(
        lambda y: torch.autograd.grad(f(y), y, create_graph=True)[0], (x.requires_grad_(),), (torch.ones_like(x),)
    ),
    "backward of dual": lambda f, x: dual(f, (x.requires_grad_(),), (torch.ones_like(x),))[1].backward(),
    "backward of backward": lambda f, x: (
        torch.autograd.grad(f(x.requires_grad_()), x, create_graph=True)[0].sum().backward()
    ),
}


@pytest.mark.parametrize("of", ["query", "passage", "temperature"])
@pytest.mark.parametrize("way", SECOND)
def test_second_derivatives_are_refused(way: str, of: str) -> None:
    q, p, beta = arguments()
    functions = {
        "query": (lambda x: loss(x, p, beta), q),
        "passage": (lambda x: loss(q, x, beta), p),
        "temperature": (lambda x: loss(q, p, x), beta),
    }
    with pytest.raises(samtone.SamtoneError, match=REFUSED):
        SECOND[way](*functions[of])


def test_mixed_second_derivatives_are_refused() -> None:
    q, p, beta = arguments()
    with pytest.raises(samtone.SamtoneError, match=REFUSED):
        grad(lambda beta: grad(loss)(q, p, beta).sum())(beta)
    with pytest.raises(samtone.SamtoneError, match=REFUSED):
        jvp(lambda p: grad(loss)(q, p, beta), (p,), (p,))
    log_beta = beta.clone().requires_grad_()
    (dq,) = torch.autograd.grad(loss(q.requires_grad_(), p, log_beta), q, create_graph=True)
    with pytest.raises(samtone.SamtoneError, match=REFUSED):
        torch.autograd.grad(dq.sum(), log_beta)


def test_a_gradient_that_is_a_constant_to_the_outer_transform() -> None:
    """A step of gradient descent inside, first order outside (first-order MAML)."""
    q, p, beta = arguments()

    def outer(q: Tensor) -> Tensor:
        inner = grad(loss)(q, p, beta).detach()
        return loss(q - 0.1 * inner, p, beta)

    step = grad(loss)(q, p, beta)
    assert torch.equal(grad(outer)(q), grad(loss)(q - 0.1 * step, p, beta))


def test_what_takes_derivatives_itself_is_refused() -> None:
    q, p = embeddings(67)
    tower = torch.nn.Linear(24, 8)

    def step(q: Tensor) -> Tensor:
        return samtone.grad_cache.step(samtone.SamToNeLoss(temperature=0.1), (tower, q.split(4)), (tower, p.split(4)))

    for transform in (grad(step), lambda q: jvp(step, (q,), (q,)), lambda q: dual(step, (q,), (q,))):
        with pytest.raises(samtone.SamtoneError, match="`grad_cache.step` is called within torch.func or forward-mode"):
            transform(q)
    assert tower.weight.grad is None


def test_no_batch_at_all() -> None:
    q, p = embeddings(68)
    with pytest.raises(samtone.SamtoneError, match="mapped by vmap over 0 batches; allowed: 1 or more"):
        vmap(lambda q: samtone.samtone_loss(q, p))(q.expand(0, 12, 24))


TRANSFORMED: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "grad": grad(loss, argnums=(0, 1, 2)),
    "jacrev": jacrev(loss, argnums=(0, 2)),
    "vjp": lambda *x: vjp(loss, *x)[1](torch.tensor(2.0)),
    "jvp": lambda *x: jvp(loss, x, x),
    "jacfwd": jacfwd(loss, argnums=2),
    "vmap": lambda q, p, beta: vmap(loss, in_dims=(0, None, None))(torch.stack([q, 2 * q]), p, beta),
    "vmap of grad": lambda q, p, beta: vmap(grad(loss), in_dims=(0, None, None))(torch.stack([q, 2 * q]), p, beta),
}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", TRANSFORMED)
def test_compiled_transforms(way: str, backend: str) -> None:
    torch._dynamo.reset()
    x = arguments()
    want = TRANSFORMED[way](*x)
    got = torch.compile(TRANSFORMED[way], backend=backend, fullgraph=True)(*x)
    for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want)):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_compiled_code_outside_of_transforms_computes_what_is_needed() -> None:
    """It has the operation of plain calls, for which large gradients on CUDA come in turn."""
    seen: list[tuple[str, Any]] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend((str(x.target), x.args[-1]) for x in graph.graph.nodes if str(x.target).startswith("samtone"))
        return graph

    q, p, beta = arguments()
    for f in (loss, grad(loss)):
        torch._dynamo.reset()
        torch.compile(f, backend=backend, fullgraph=True)(q.requires_grad_(), p, beta)
    everything = ops.QUERY | ops.PASSAGE | ops.TEMPERATURE | ops.AT_ONCE
    assert seen == [("samtone.forward.default", ops.QUERY), ("samtone.transformed.default", everything)]


@pytest.mark.parametrize("way", ["hessian", "grad of grad", "jvp of grad", "grad of jvp", "jacfwd of jacfwd"])
def test_compiled_second_derivatives_are_refused(way: str) -> None:
    torch._dynamo.reset()
    q, p, beta = arguments()
    with pytest.raises(Exception, match=REFUSED):
        torch.compile(lambda q: SECOND[way](lambda x: loss(x, p, beta), q), backend="aot_eager")(q)
