"""Processes that compute one loss together, each with rows of its own: what connects them.

Native code (src/ranks.rs) says which bytes go where, `exchange` sends them by the point-to-point calls of torch.distributed. Operations
know a group by its name, which compilers take for a constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from . import _native
from .arguments import refused

if TYPE_CHECKING or dist.is_available():
    from torch.distributed.device_mesh import DeviceMesh
if TYPE_CHECKING:
    Group: TypeAlias = dist.ProcessGroup | DeviceMesh | str

# Its own, so that no message meets one that a program sends or receives by itself.
_TAG = 0x5A3
_ALLOWED = (
    "a ProcessGroup of torch.distributed that this process is in, a DeviceMesh of one dimension, the name of a group, "
    "or None"
)
# As long as the group itself is there.
_kept: WeakKeyDictionary[Any, _native.Ranks] = WeakKeyDictionary()


def name_of(group: Group | None) -> str | None:
    """The name that torch.distributed knows the group by. torch.compile traces this.

    Raises:
        SamtoneError: For anything but a group that this process is in.
    """
    if group is None or isinstance(group, str):
        return group
    if dist.is_available():
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise refused("group", f"a DeviceMesh of {group.ndim} dimensions", f'{_ALLOWED}; `mesh["dp"]` has one')
            group = group.get_group()
        if isinstance(group, dist.ProcessGroup):
            name: str = group.group_name
            return name
    given: Any = group
    value = f"a {type(given).__name__}"
    if type(given) is int:  # torch.distributed.GroupMember.NON_GROUP_MEMBER
        value = f"{given}, as torch.distributed calls a group that this process is not in"
    raise refused("group", value, _ALLOWED)


def _resolved(name: str) -> Any:
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    try:
        return _resolve_process_group(name)  # type: ignore[arg-type]
    except (RuntimeError, KeyError, ValueError) as error:
        raise refused("group", f"{name!r}, which torch.distributed does not know", _ALLOWED) from error


def ranks_of(name: str) -> _native.Ranks:
    """This process's calls in the group of that name."""
    group = _resolved(name)
    found = _kept.get(group)
    if found is None:
        found = _kept[group] = _native.Ranks(group.rank(), group.size(), partial(exchange, name))
    return found


def exchange(name: str, to: int, out: memoryview, source: int, into: memoryview) -> None:
    """Sends `out` to rank `to` of the group and fills `into` with what rank `source` sends, both at once. An empty message is not
    sent, since the other rank knows that it is empty.

    The memory of both belongs to native code, and nobody uses it after this has returned. If a wait fails, the other operation is given
    up together with this frame, and gloo does not touch the memory of an operation that is given up."""
    group = _resolved(name)
    received, sent = (torch.frombuffer(x, dtype=torch.uint8) if len(x) > 0 else None for x in (into, out))
    operations = []
    if received is not None:
        operations.append(dist.P2POp(dist.irecv, received, group=group, tag=_TAG, group_peer=source))
    if sent is not None:
        operations.append(dist.P2POp(dist.isend, sent, group=group, tag=_TAG, group_peer=to))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


@contextmanager
def told(ranks: _native.Ranks) -> Iterator[None]:
    """Whatever is refused within, the other processes, which wait in the call, are told of. All of them raise the same error."""
    try:
        yield
    except _native.SamtoneError as error:
        ranks.give_up(str(error))


def release_memory() -> None:
    """Gives back the memory that calls keep for the next one."""
    _native.release_memory()
    for ranks in list(_kept.values()):
        ranks.release()
