"""Every argument outside of its domain gives a sentence with its name, its value and what is allowed."""

from __future__ import annotations

import sys
from typing import Any

import numpy
import pytest
import samtone
import torch
from samtone import _native
from test_loss import DIM, HARD, ROWS, embeddings

N = ROWS + HARD
CALLS: list[tuple[str, dict[str, Any], str]] = [
    ("a list", {"query": [[1.0]]}, "`query` is a list; allowed: a tensor"),
    ("a vector", {"query": torch.ones(3)}, "`query` is a tensor of shape (3,); allowed: a matrix"),
    (
        "float64",
        {"passage": torch.ones(N, DIM, dtype=torch.float64)},
        "`passage` is of type torch.float64; allowed: torch.float32",
    ),
    ("integers", {"query": torch.ones(ROWS, DIM, dtype=torch.int64)}, "`query` is of type torch.int64"),
    (
        "two types",
        {"passage": torch.ones(N, DIM, dtype=torch.float16)},
        "`passage` is of type f16; allowed: the type of the queries, f32",
    ),
    (
        "two dimensions",
        {"passage": torch.ones(N, 3)},
        "`passage` is embeddings of dimension 3; allowed: the dimension of the queries, 24",
    ),
    (
        "too few passages",
        {"passage": torch.ones(3, DIM)},
        "`passage` is 3 rows; allowed: at least as many rows as there are queries",
    ),
    ("no rows", {"query": torch.ones(0, DIM)}, "`query` is a matrix of shape 0 x 24"),
    ("no columns", {"query": torch.ones(ROWS, 0), "passage": torch.ones(N, 0)}, "at least one row and column"),
    (
        "sparse",
        {"query": torch.eye(ROWS).to_sparse()},
        "`query` is a tensor of layout torch.sparse_coo; allowed: a dense tensor",
    ),
    (
        "two devices",
        {"passage": torch.ones(N, DIM, device="meta")},
        "`passage` is on device meta; allowed: the device of the queries, cpu",
    ),
    ("an unknown loss", {"loss": "simclr"}, "`loss` is 'simclr'; allowed: a `Loss`, or info_nce, bidirectional, clip"),
    ("a temperature of 0", {"temperature": 0.0}, "`temperature` is 0; allowed: a number from 1e-6 to 1e6"),
    ("a temperature of NaN", {"temperature": float("nan")}, "`temperature` is NaN"),
    ("a tensor of 0", {"temperature": torch.tensor(0.0)}, "`temperature` is 0"),
    (
        "two numbers",
        {"temperature": torch.ones(2)},
        "`temperature` is a tensor of shape (2,) and type torch.float32; allowed: one number",
    ),
    ("integers as log_beta", {"log_beta": torch.tensor(3)}, "`log_beta` is a tensor of shape () and type torch.int64"),
    ("log_beta of 50", {"log_beta": 50.0}, "`log_beta` is 50; allowed: a number from -13.816 to 13.816"),
    ("both", {"temperature": 0.1, "log_beta": 3.0}, "`log_beta` is given together with `temperature`"),
    (
        "short query_ids",
        {"query_ids": [1, 2]},
        "`query_ids` is a tensor of 2 elements; allowed: 12, one for each query",
    ),
    (
        "short passage_ids",
        {"passage_ids": [1]},
        "`passage_ids` is a tensor of 1 elements; allowed: 17, one for each passage",
    ),
    (
        "ids of floats",
        {"query_ids": torch.ones(ROWS)},
        "`query_ids` is a tensor of type torch.float32; allowed: integers",
    ),
    (
        "a matrix of ids",
        {"query_ids": torch.ones(ROWS, 1, dtype=torch.int64)},
        "`query_ids` is a tensor of shape (12, 1); allowed: a vector",
    ),
    ("a positive beyond", {"positives": [0] * 11 + [N]}, "`positives` is 17 at row 11; allowed: 0 to 16"),
    (
        "a negative positive",
        {"positives": [0] * 11 + [-1]},
        "`positives` is -1 at index 11; allowed: rows of the passages",
    ),
    ("a positive of 2**33", {"positives": [2**33] + [0] * 11}, "`positives` is 8589934592 at index 0"),
    ("short weights", {"weights": [1.0]}, "`weights` is a tensor of 1 elements"),
    (
        "a negative weight",
        {"weights": [1.0] * 11 + [-2.0]},
        "`weights` is -2 at row 11; allowed: finite numbers of at least 0",
    ),
    ("no weight", {"weights": [0.0] * 12}, "`weights` is 0 in every row"),
    (
        "weights of integers",
        {"weights": torch.ones(ROWS, dtype=torch.int64)},
        "`weights` is a tensor of type torch.int64",
    ),
    (
        "an owner beyond",
        {"hard_negative_owners": [-1] * 16 + [12]},
        "`hard_negative_owners` is 12 at passage 16; allowed: -1",
    ),
    ("an owner of -2", {"hard_negative_owners": [-2] + [-1] * 16}, "`hard_negative_owners` is -2 at passage 0"),
    ("an unknown scope", {"hard_negative_scope": "mine"}, '`hard_negative_scope` is \'mine\'; allowed: "all" or "own"'),
    ("a margin of NaN", {"margin": float("nan")}, "`margin` is NaN; allowed: a finite number"),
    ("an unknown policy", {"zero_norm": "skip"}, '`zero_norm` is \'skip\'; allowed: "error" or "zero_gradient"'),
    ("a small workspace", {"workspace_bytes": 10}, "option `workspace_bytes` is 10, but the smallest plan"),
    ("a negative workspace", {"workspace_bytes": -1}, "`workspace_bytes` is -1"),
    ("skipping nothing", {"tile_skipping": 0}, "`tile_skipping` is 0; allowed: a number above 0 and below 1"),
    ("skipping everything", {"tile_skipping": 1.0}, "`tile_skipping` is 1; allowed: a number above 0 and below 1"),
    ("skipping less", {"tile_skipping": -1.0}, "`tile_skipping` is -1"),
    ("text as temperature", {"temperature": "0.05"}, "`temperature` is '0.05'; allowed: a number, or a tensor of one"),
    ("a list as temperature", {"temperature": [0.05]}, "`temperature` is [0.05]; allowed: a number"),
    ("a complex log_beta", {"log_beta": 1j}, "`log_beta` is 1j; allowed: a number"),
    ("a temperature of 10**400", {"temperature": 10**400}, "`temperature` is a int; allowed: a number"),
    ("text as margin", {"margin": "0.1"}, "`margin` is '0.1'; allowed: a finite number"),
    ("text as skipping", {"tile_skipping": "x"}, "`tile_skipping` is 'x'; allowed: a number above 0 and below 1"),
    ("text as workspace", {"workspace_bytes": "1 GB"}, "`workspace_bytes` is '1 GB'; allowed: a number of bytes"),
    ("half a byte", {"workspace_bytes": 0.5}, "`workspace_bytes` is 0.5; allowed: a number of bytes"),
    (
        "a workspace of 2**70",
        {"workspace_bytes": 2**70},
        "`workspace_bytes` is 1180591620717411303424; allowed: a number",
    ),
    ("no policy", {"zero_norm": None}, '`zero_norm` is None; allowed: "error" or "zero_gradient"'),
    ("an unknown policy for rows", {"no_negative": "skip"}, '`no_negative` is \'skip\'; allowed: "error" or "zero"'),
    ("no scope", {"hard_negative_scope": None}, '`hard_negative_scope` is None; allowed: "all" or "own"'),
    ("sharing by number", {"shared_ids": 1}, "`shared_ids` is 1; allowed: True or False"),
    (
        "sharing without ids",
        {"shared_ids": True, "passage_ids": list(range(N))},
        "`shared_ids` is true without query ids; allowed: false, or query ids and passage ids",
    ),
    ("ids as text", {"query_ids": ["a"] * ROWS}, "`query_ids` is 'a' at index 0; allowed: integers of up to 64 bits"),
    ("a text for ids", {"query_ids": "abc"}, "`query_ids` is a str; allowed: integers"),
    ("a text among ids", {"passage_ids": [1, 2, "x"]}, "`passage_ids` is 'x' at index 2; allowed: integers"),
    ("texts of NumPy", {"query_ids": numpy.array(["a", "b"])}, "`query_ids` is 'a' at index 0; allowed: integers"),
    ("none among ids", {"query_ids": [1, None]}, "`query_ids` is None at index 1; allowed: integers"),
    ("ids in ids", {"query_ids": [[1], [2, 3]]}, "`query_ids` is [1] at index 0; allowed: integers"),
    ("objects", {"query_ids": numpy.array([1, "x", None], object)}, "`query_ids` is 'x' at index 1; allowed: integers"),
    ("ids of 2**64", {"query_ids": [1, 2**64]}, "`query_ids` is 18446744073709551616 at index 1; allowed: integers"),
    ("ids below -2**63", {"query_ids": [-(2**63) - 1]}, "`query_ids` is -9223372036854775809 at index 0"),
    (
        "ids of both kinds",
        {"query_ids": [-1, 2**63]},
        "`query_ids` is from -1 to 9223372036854775808; allowed: integers of up to 64 bits, all signed or all unsigned",
    ),
    ("a set of ids", {"query_ids": {1, 2}}, "`query_ids` is a set; allowed: integers of up to 64 bits"),
    (
        "ids of truth values",
        {"query_ids": [True] * ROWS},
        "`query_ids` is a tensor of type torch.bool; allowed: integers",
    ),
    ("ids of numbers", {"query_ids": [0.5] * ROWS}, "`query_ids` is a tensor of type torch.float32; allowed: integers"),
    (
        "a positive of 2**63",
        {"positives": numpy.array([0, 2**63], numpy.uint64)},
        "`positives` is 9223372036854775808 at index 1; allowed: integers below 2**63",
    ),
    (
        "an owner of 2**63",
        {"hard_negative_owners": [2**63]},
        "`hard_negative_owners` is 9223372036854775808 at index 0",
    ),
    ("weights as text", {"weights": ["a"] * ROWS}, "`weights` is 'a' at index 0; allowed: numbers"),
    ("none among weights", {"weights": [1.0, None]}, "`weights` is None at index 1; allowed: numbers"),
    ("complex weights", {"weights": [1j]}, "`weights` is 1j at index 0; allowed: numbers"),
    (
        "features of a trainer",
        {"query": [{"input_ids": torch.ones(2, 3)}] * 2, "passage": None},
        "`query` is a list of features; allowed: a tensor, rows x dim; a trainer of sentence-transformers, which passes features, "
        "takes `samtone.sentence_transformers.SamToNeLoss(model)`, not `samtone.SamToNeLoss()`",
    ),
    ("skipping NaN", {"tile_skipping": float("nan")}, "`tile_skipping` is NaN"),
    (
        "prefixes in disorder",
        {"prefixes": [8, 3]},
        "`prefixes` is 3 at position 1; allowed: ascending numbers of entries, here at least 9",
    ),
    ("a prefix twice", {"prefixes": [8, 8]}, "`prefixes` is 8 at position 1; allowed: ascending numbers of entries"),
    ("a prefix of 0", {"prefixes": [0, 3]}, "`prefixes` is 0 at position 0; allowed: ascending numbers of entries"),
    ("a prefix of -3", {"prefixes": [-3]}, "`prefixes` is -3 at position 0; allowed: ascending numbers of entries"),
    ("a prefix of 2**70", {"prefixes": [2**70]}, "`prefixes` is 1180591620717411303424 at position 0"),
    (
        "a prefix beyond",
        {"prefixes": [3, DIM + 1]},
        "`prefixes` is 25 at position 1; allowed: at most 24, the dimension of the embeddings",
    ),
    ("no prefix", {"prefixes": []}, "`prefixes` is an empty list; allowed: at least one prefix"),
    ("a number as prefixes", {"prefixes": 8}, "`prefixes` is a int; allowed: a list of integers"),
    ("prefixes as text", {"prefixes": "8"}, "`prefixes` is a str; allowed: a list of integers"),
    ("a set of prefixes", {"prefixes": {3, 8}}, "`prefixes` is a set; allowed: a list of integers"),
    ("half a prefix", {"prefixes": [3, 8.0]}, "`prefixes` is 8.0 at position 1; allowed: a list of integers"),
    ("a text among prefixes", {"prefixes": [3, "8"]}, "`prefixes` is '8' at position 1; allowed: a list of integers"),
    ("a prefix of truth", {"prefixes": [True, 3]}, "`prefixes` is True at position 0; allowed: a list of integers"),
    ("truth of NumPy", {"prefixes": [numpy.True_, 3]}, "`prefixes` is True at position 0"),
    ("no prefix among them", {"prefixes": [None]}, "`prefixes` is None at position 0; allowed: a list of integers"),
    ("prefixes of floats", {"prefixes": torch.ones(2)}, "`prefixes` is 1.0 at position 0; allowed: a list of integers"),
    ("a tensor of one prefix", {"prefixes": torch.tensor(8)}, "`prefixes` is a Tensor; allowed: a list of integers"),
    ("prefixes in a list", {"prefixes": numpy.array([[3, 8]])}, "`prefixes` is [3, 8] at position 0; allowed: a list"),
    (
        "weights of no prefixes",
        {"prefix_weights": [1.0]},
        "`prefix_weights` is given without `prefixes`; allowed: none, or `prefixes` with them",
    ),
    (
        "a weight too few",
        {"prefixes": [3, 8], "prefix_weights": [1.0]},
        "`prefix_weights` is a list of 1 elements; allowed: 2, one for each prefix",
    ),
    (
        "a negative weight of a prefix",
        {"prefixes": [3, 8], "prefix_weights": [1, -1]},
        "`prefix_weights` is -1.0 at position 1; allowed: 0, or from 1e-30 to 1e30",
    ),
    ("a weight of NaN", {"prefixes": [3], "prefix_weights": [float("nan")]}, "`prefix_weights` is NaN at position 0"),
    (
        "an infinite weight",
        {"prefixes": [3], "prefix_weights": [float("inf")]},
        "`prefix_weights` is inf at position 0",
    ),
    ("a weight of 10**400", {"prefixes": [3], "prefix_weights": [10**400]}, "`prefix_weights` is inf at position 0"),
    (
        "prefixes without weight",
        {"prefixes": [3, 8], "prefix_weights": [0, 0.0]},
        "`prefix_weights` is 0 for every prefix; allowed: at least one weight above 0",
    ),
    (
        "a weight as text",
        {"prefixes": [3, 8], "prefix_weights": [1, "2"]},
        "`prefix_weights` is '2' at position 1; allowed: a list of numbers",
    ),
    ("a weight of truth", {"prefixes": [3], "prefix_weights": [True]}, "`prefix_weights` is True at position 0"),
    ("a complex weight", {"prefixes": [3], "prefix_weights": [1j]}, "`prefix_weights` is 1j at position 0"),
    ("one weight for all", {"prefixes": [3], "prefix_weights": 0.5}, "`prefix_weights` is a float; allowed: a list"),
]


@pytest.mark.parametrize("change, sentence", [call[1:] for call in CALLS], ids=[call[0] for call in CALLS])
def test_sentence(change: dict[str, Any], sentence: str) -> None:
    q, p = embeddings()
    arguments = {"query": q, "passage": p} | change
    with pytest.raises(samtone.SamtoneError) as error:
        samtone.samtone_loss(arguments.pop("query"), arguments.pop("passage"), **arguments)
    assert sentence in str(error.value)
    assert isinstance(error.value, ValueError)


BIG = 2**63
READABLE: dict[str, tuple[Any, Any]] = {
    "unsigned of NumPy": (numpy.array([BIG, 7, BIG + 1], numpy.uint64), [1, 7, 3]),
    "unsigned of PyTorch": (torch.tensor([BIG, 7, BIG + 1], dtype=torch.uint64), [1, 7, 3]),
    "integers beyond 2**63": ([BIG, 7, BIG + 1], [1, 7, 3]),
    "small unsigned": (numpy.array([5, 7, 9], numpy.uint16), [5, 7, 9]),
    "another byte order": (numpy.array([5, 7, 9], ">i8"), [5, 7, 9]),
    "in reverse": (numpy.array([9, 7, 5])[::-1], [5, 7, 9]),
    "integers as objects": (numpy.array([5, 7, 9], object), [5, 7, 9]),
    "integers of NumPy in a list": ([numpy.uint64(BIG), numpy.uint64(7), numpy.uint64(BIG + 1)], [1, 7, 3]),
}


@pytest.mark.parametrize("kind", READABLE)
def test_ids_of_any_integers(kind: str) -> None:
    """Only equality counts, whatever holds the integers. One that were taken for another would be a negative less."""
    given, plain = READABLE[kind]
    q, p = (x[:3] for x in embeddings())
    want = samtone.samtone_loss(q, p, query_ids=plain)
    assert torch.equal(samtone.samtone_loss(q, p, query_ids=given), want)
    repeated = [0, 1, 0]
    want = samtone.samtone_loss(q, p, query_ids=[plain[k] for k in repeated])
    assert torch.equal(samtone.samtone_loss(q, p, query_ids=[int(numpy.asarray(given)[k]) for k in repeated]), want)
    if not isinstance(given, list):
        assert torch.equal(samtone.samtone_loss(q, p, query_ids=given[repeated]), want)


@pytest.mark.parametrize("kind", [torch.uint64, torch.uint32, torch.uint16])
def test_positives_of_unsigned_integers(kind: torch.dtype) -> None:
    q, p = embeddings()
    order = torch.arange(ROWS).flip(0)
    want = samtone.samtone_loss(q, p, positives=order)
    assert torch.equal(samtone.samtone_loss(q, p, positives=order.to(kind)), want)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tower", ["query", "passage"])
def test_embeddings_that_are_not_finite(tower: str, value: float) -> None:
    tensors = dict(zip(("query", "passage"), embeddings()))
    tensors[tower][3, 5] = value
    with pytest.raises(
        samtone.SamtoneError, match=f"the {tower} embedding in row 3 contains .* at column 5; allowed: finite"
    ):
        samtone.samtone_loss(**tensors)


def test_a_row_without_negatives() -> None:
    q, p = embeddings()
    with pytest.raises(
        samtone.SamtoneError, match='row 0 has no negative left in group 0 of loss `decoupled`.*`no_negative="zero"`'
    ):
        samtone.samtone_loss(q, p, loss="decoupled", passage_ids=[1] * N)


def test_tensors_without_memory_have_results_without_memory() -> None:
    """So that shapes can be found without computing; nothing is computed on the CPU in place of another device."""
    q, p = (x.to("meta").requires_grad_() for x in embeddings())
    loss = samtone.samtone_loss(q, p)
    assert loss.device.type == "meta" and loss.shape == ()
    loss.backward()
    assert q.grad is not None and q.grad.device.type == "meta" and q.grad.shape == q.shape


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: samtone.Loss.pair(1.5), "`alpha` is 1.5; allowed: a number from 0 to 1"),
        (lambda: samtone.Loss.preset("x"), "`loss` is 'x'"),
        (lambda: samtone.Loss.custom("a|b", [samtone.Group(1.0, ["qp"])]), "`name` is 'a|b'"),
        (lambda: samtone.Loss.custom("a", []), "`groups` is an empty list"),
        (
            lambda: samtone.Loss.custom("a", [samtone.Group(-1.0, ["qp"])]),
            "`coefficient` is -1.0; allowed: 0, or a number from 1e-30 to 1e30",
        ),
        (
            lambda: samtone.Loss.custom("a", [samtone.Group(1.0, [])]),
            "`blocks` is []; allowed: one to four different blocks",
        ),
        (lambda: samtone.Loss.custom("a", [samtone.Group(1.0, ["qp", "qp"])]), "`blocks` is [QP, QP]"),
        (lambda: samtone.Loss.custom("a", [samtone.Group(1.0, ["xy"])]), '`blocks` is "xy"; allowed: qp, pq, qq, pp'),
        (
            lambda: samtone.Loss.custom("a", [samtone.Group(1.0, ["qp"], 3)]),
            "`positive_copies` is 3; allowed: 0, 1 or 2",
        ),
        (lambda: samtone.Loss.custom("a", [samtone.Group(0.0, ["qp"])]), "at least one with a coefficient above 0"),
        (lambda: samtone.SamToNeLoss(temperature=-1.0), "`temperature` is -1"),
        (lambda: samtone.SamToNeLoss(temperature="0.05"), "`temperature` is '0.05'; allowed: a number"),
        (lambda: samtone.SamToNeLoss(zero_norm=None), "`zero_norm` is None"),
        (lambda: samtone.SamToNeLoss(workspace_bytes="x"), "`workspace_bytes` is 'x'"),
        (lambda: samtone.Loss.pair("x"), "`alpha` is 'x'; allowed: a number from 0 to 1"),
        (
            lambda: samtone.Loss.custom("a", [samtone.Group("x", ["qp"])]),
            "`coefficient` is 'x'; allowed: 0, or a number from 1e-30 to 1e30",
        ),
        (
            lambda: samtone.SamToNeLoss(torch.nn.Linear(2, 2)),
            "`loss` is a model (Linear); allowed: a `Loss` or the name of a preset; the loss that takes a model of "
            "sentence-transformers is `samtone.sentence_transformers.SamToNeLoss`, not `samtone.SamToNeLoss`",
        ),
        (lambda: samtone.SamToNeLoss(tile_skipping=2.0), "`tile_skipping` is 2"),
        (lambda: samtone.SamToNeLoss(prefixes=[8, 3]), "`prefixes` is 3 at position 1"),
        (lambda: samtone.SamToNeLoss(prefixes=[3, 8], prefix_weights=[1]), "`prefix_weights` is a list of 1 elements"),
        (lambda: samtone.SamToNeLoss(prefix_weights="x"), "`prefix_weights` is a str; allowed: a list of numbers"),
        (lambda: samtone.SamToNeLoss(learnable="beta"), "`learnable` is 'beta'"),
        (lambda: samtone.SamToNeLoss(hard_negative_scope="x"), "`hard_negative_scope` is 'x'"),
    ],
)
def test_losses_and_modules(make: Any, sentence: str) -> None:
    with pytest.raises(samtone.SamtoneError) as error:
        make()
    assert sentence in str(error.value)


def step(query: Any, passage: Any, gradients: tuple[Any, Any] = (None, None), losses: Any = None) -> Any:
    """The native call itself, with capsules as they come."""
    vector = torch.empty(ROWS, dtype=torch.float64) if losses is None else losses
    names = ("query_ids", "passage_ids", "positives", "weights", "owners")
    settings = _native.Settings("loss=info_nce", 0.1)
    return _native.cpu_step(settings, query, passage, gradients, True, dict.fromkeys(names), vector.__dlpack__(), 1)


def test_capsules_are_taken_once_and_both_kinds() -> None:
    q, p = embeddings()
    want = step(q.__dlpack__(), p.__dlpack__())
    capsule, versioned = q.__dlpack__(), p.__dlpack__(max_version=(1, 0))
    assert step(capsule, versioned) == want
    assert "used_dltensor" in repr(capsule) and "used_dltensor_versioned" in repr(versioned)
    with pytest.raises(ValueError, match="`query` is a capsule that is used up"):
        step(capsule, p.__dlpack__())


def test_capsules_keep_their_memory_and_give_it_back() -> None:
    """The deleter runs once: NumPy's reference count says so."""
    array = numpy.random.default_rng(0).normal(size=(ROWS, DIM)).astype(numpy.float32)
    _, p = embeddings()
    before = sys.getrefcount(array)
    capsule = array.__dlpack__()
    assert sys.getrefcount(array) == before + 1
    step(capsule, p.__dlpack__())
    assert sys.getrefcount(array) == before
    for bad in (array[:, ::2], array.astype(numpy.float64), array[0]):
        count = sys.getrefcount(bad)
        with pytest.raises(samtone.SamtoneError):
            step(bad.__dlpack__(), p.__dlpack__())
        assert sys.getrefcount(bad) == count


def test_outputs_may_not_be_inputs_nor_read_only() -> None:
    q, p = embeddings()
    grad = torch.empty_like(q)
    refused = samtone.SamtoneError
    with pytest.raises(refused, match="`query_gradient` is memory that `query` is in, too; allowed: memory of its own"):
        step(q.__dlpack__(), p.__dlpack__(), (q.__dlpack__(), None))
    with pytest.raises(refused, match="`passage_gradient` is memory that `passage` is in, too"):
        step(q.__dlpack__(), p.__dlpack__(), (None, p.__dlpack__()))
    with pytest.raises(refused, match=r"gradients.query` is 3 x 24; allowed: 12 x 24"):
        step(q.__dlpack__(), p.__dlpack__(), (grad[:3].__dlpack__(), None))
    with pytest.raises(refused, match="`query_gradient` is read-only memory"):
        constant = numpy.zeros((ROWS, DIM), numpy.float32)
        constant.setflags(write=False)
        step(q.__dlpack__(), p.__dlpack__(), (constant.__dlpack__(max_version=(1, 0)), None))
    with pytest.raises(refused, match="`row_losses` is a vector of 3; allowed: 12"):
        step(q.__dlpack__(), p.__dlpack__(), losses=torch.empty(3, dtype=torch.float64))


def test_native_code_knows_every_option() -> None:
    from samtone.options import NAMES

    for name in NAMES:
        with pytest.raises(samtone.SamtoneError, match=f"`{name}` is \\?; allowed: "):
            _native.Settings(f"{name}=?\nloss=clip", 0.1)
    with pytest.raises(samtone.SamtoneError, match='an option "slant"'):
        _native.Settings("slant=1\nloss=clip", 0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'slant'"):
        samtone.samtone_loss(*embeddings(), slant=1)  # type: ignore[call-arg]
