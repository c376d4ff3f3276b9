"""A batch of which each process has a part: `group=`. Processes on gloo against one process with the whole batch (group_worker.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import samtone
import torch
import torch.distributed as dist
from samtone import ops
from samtone.options import group_of, text_of
from samtone.sentence_transformers import SamToNeLoss
from test_distributed import needs_gloo, spread
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = needs_gloo


@pytest.mark.parametrize("size", [2, 4])
def test_the_loss_of_all_processes(size: int, tmp_path: Path) -> None:
    """Four processes, of which one has no row, and one a passage alone."""
    checks = ["values", "trained", *(["compiled", "modules", "side_by_side"] if size == 2 else [])]
    for result in spread(tmp_path, ",".join([str(size), *checks]), "group_worker.py", size):
        for name in checks:
            assert result[name] is None, result[name]


def test_what_is_wrong_in_one_process_every_process_says(tmp_path: Path) -> None:
    results = spread(tmp_path, "3,refused", "group_worker.py", 3)
    assert results[0] == results[1] == results[2]
    sentences = results[0]["refused"]
    assert isinstance(sentences, dict), sentences
    failed = "SamtoneError: rank {} has failed: {}"
    differs = "SamtoneError: the call is another on rank 1, which has {}; allowed: the same on all ranks; rank 0 has {}"
    for name, start in {
        "nan": failed.format(1, "the query embedding in row 2 contains NaN at column 3"),
        "zero": failed.format(0, "the passage embedding in row 8 has norm zero"),
        "temperature": differs.format("temperature 0.05", "temperature 0.06"),
        "reduction": differs.format("the reduction `Mean`", "the reduction `Sum`"),
        "domain": failed.format(1, "argument `temperature` is 0; allowed: a number from 1e-6"),
        "argument": failed.format(1, "argument `passage_ids` is a tensor of type torch.float32; allowed: integers"),
        "length": failed.format(1, "argument `passage_ids` is a list of 3 elements; allowed: 4"),
        "owners": failed.format(1, "argument `hard_negative_owners` is 99 at passage 0; allowed: -1"),
        "dtype": failed.format(1, "argument `query` is of type torch.float64"),
        "rows": failed.format(
            1, "argument `passage` is 2 rows; allowed: at least as many rows as there are queries, 4"
        ),
        "gradients": differs.format("gradients, and `upstream` 1.0", "no gradients"),
    }.items():
        assert sentences.pop(name).startswith(start), name
    assert not sentences


def test_a_process_that_is_late_or_gone(tmp_path: Path) -> None:
    found, _ = spread(tmp_path, "lost", "group_worker.py", 2)
    start = "RuntimeError: torch.distributed failed: rank 0, which sends to rank 1 and receives from rank 1, says: "
    for name in ("late", "again", "gone"):
        assert found[name].startswith(start), found[name]
        assert found[name].endswith("; the ranks no longer agree, so the group cannot be used any more")
    assert "Timed out waiting 2000ms" in found["late"] and found["again"] == found["late"]
    assert 1.5 < float(found["seconds"]) < 30


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Any]:
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(5, 8), torch.randn(7, 8)


def test_a_group_of_one_gives_the_same_bits(world: Any) -> None:
    q, p = (x.requires_grad_() for x in embeddings())
    alone = samtone.evaluate(q, p)
    for reduction in ("mean", "sum"):
        together = samtone.evaluate(q, p, group=world, reduction=reduction)
        assert together.loss.equal(alone.loss) and together.row_losses.equal(alone.row_losses)
        assert together[2:] == alone[2:]
        for a, b in zip(*(torch.autograd.grad(x.loss, (q, p), retain_graph=True) for x in (together, alone))):
            assert a.equal(b)


def test_what_a_group_may_be(world: Any) -> None:
    q, p = embeddings()
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    samtone.samtone_loss(q, p, group=mesh["dp"])
    for given, value in (
        (mesh, "a DeviceMesh of 2 dimensions"),
        (dist.GroupMember.NON_GROUP_MEMBER, "-100, as torch.distributed calls a group that this process is not in"),
        ("elsewhere", "'elsewhere', which torch.distributed does not know"),
        (True, "a bool"),
        ([0, 1], "a list"),
    ):
        with pytest.raises(samtone.SamtoneError, match=f"`group` is {value}.*; allowed: a ProcessGroup of"):
            samtone.samtone_loss(q, p, group=given)  # type: ignore[arg-type]
    with pytest.raises(samtone.SamtoneError, match='`reduction` is \'max\'; allowed: "mean" or "sum"'):
        samtone.SamToNeLoss(group=world, reduction="max")


def test_a_group_that_has_been_left(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    module = samtone.SamToNeLoss(group=dist.group.WORLD)
    module(*embeddings())
    dist.destroy_process_group()
    with pytest.raises(samtone.SamtoneError, match="`group` is '0', which torch.distributed does not know"):
        module(*embeddings())


def test_where_a_group_is_refused(world: Any) -> None:
    q, p = embeddings()
    sentence = "`group` is given within torch.func or forward-mode derivatives; allowed: calls outside of them"
    with pytest.raises(samtone.SamtoneError, match=sentence):
        torch.func.grad(lambda x: samtone.samtone_loss(x, p, group=world))(q)
    with pytest.raises(samtone.SamtoneError, match=sentence):
        torch.func.vmap(lambda x: samtone.samtone_loss(x, p, group=world))(q[None])
    with (
        FakeTensorMode(),
        pytest.raises(
            samtone.SamtoneError, match="`group` is given with tensors on cuda:0; allowed: tensors on the CPU"
        ),
    ):
        q, p = torch.empty(5, 8, device="cuda:0"), torch.empty(7, 8, device="cuda:0")
        samtone.samtone_loss(q, p, group=world)
    sentence = "`gather_across_devices` is True, and embeddings are on cuda:0; allowed: False, or embeddings on the CPU"
    with FakeTensorMode(), pytest.raises(samtone.SamtoneError, match=sentence):
        SamToNeLoss(torch.nn.Identity(), gather_across_devices=True).loss_of([q, q], {})


def test_the_operation_is_registered_as_pytorch_wants_it(world: Any) -> None:
    q, p = (x.requires_grad_() for x in embeddings())
    beta = torch.tensor(2.0, requires_grad=True)
    text = text_of("samtone_both", {"group": world, "reduction": "sum", "prefixes": [4, 8]}, log_beta=True)
    wanted = ops.QUERY | ops.PASSAGE | ops.TEMPERATURE
    torch.library.opcheck(torch.ops.samtone.forward.default, (q, p, beta, *[None] * 5, text, 0.0, wanted))


def test_the_example_of_the_documentation(monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[1] / "docs" / "distributed.md"
    block = page.read_text().partition("```python\n")[2].partition("```")[0]
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    names: dict[str, Any] = {}
    try:
        exec(block, names)
        assert names["loss"].isfinite() and names["tower"].module.weight.grad.any()
    finally:
        dist.destroy_process_group()


def test_a_name_is_kept_in_full() -> None:
    name = 'a\'name\nof "many" words, ' * 9
    assert group_of(text_of("clip", {"prefixes": [2], "group": name, "reduction": "mean"})) == name
    assert group_of(text_of("clip", {"group": None})) is group_of(text_of("clip", {})) is None
