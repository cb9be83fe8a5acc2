"""Who the ranks of one start of the trainer are, and the id that they share."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from typing import Any, Optional

from weightd.errors import INVALID_ARGUMENT, GroupError


@dataclass(frozen=True)
class Group:
    """This rank's place in its trainer group.

    Attributes:
        id: equal on all ranks, different at every start.
        order: creation time in microseconds since 1970; a newer group supersedes an older one.
        rank: in [0, world_size).
        world_size: ranks of the trainer.
    """

    id: str
    order: int
    rank: int
    world_size: int


def new_group() -> str:
    """Draws an id for one start of a trainer: ``<random>@<microseconds since 1970>``.

    Draw it once, in the process that starts all ranks, and give it to each as ``group=``. Where
    torch.distributed is initialised, ranks share one by themselves.
    """
    return f"{uuid.uuid4().hex}@{time.time_ns() // 1000}"


def resolve(group: Optional[str], rank: Optional[int], world_size: Optional[int]) -> Group:
    """Finds rank, world size and group id. A torch.distributed collective if ``group`` is None.

    Raises:
        errors.GroupError: rank outside of the world, or no way to share an id.
    """
    alone = rank == 0 and world_size == 1
    known = rank is not None and world_size is not None and (group is not None or alone)
    distributed = None if known else _distributed()
    if world_size is None:
        world_size = distributed.get_world_size() if distributed else 1
    if rank is None:
        rank = distributed.get_rank() if distributed else 0
    if not 0 <= rank < world_size:
        raise _error(
            f"rank is outside of the trainer: rank={rank}, world_size={world_size}",
            "pass rank and world_size of the same process group",
        )
    if group is None:
        group = _shared_group(distributed, rank, world_size)
    name, separator, order = group.rpartition("@")
    if not (separator and name and order.isdigit()):
        raise _error(
            f"group id does not say when it was drawn: group={group!r}",
            "draw it with weightd.new_group()",
        )
    return Group(group, int(order), rank, world_size)


def _shared_group(distributed: Any, rank: int, world_size: int) -> str:
    if world_size == 1:
        return new_group()
    if distributed is None or distributed.get_world_size() != world_size:
        size = distributed.get_world_size() if distributed else "not initialised"
        raise _error(
            f"ranks cannot share a group id: world_size={world_size}, torch.distributed={size}",
            "initialise torch.distributed, or pass group=weightd.new_group() drawn once",
        )
    box = [new_group() if distributed.get_rank() == 0 else ""]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def _distributed() -> Any:
    """Returns torch.distributed if it is initialised, else None."""
    try:
        import torch.distributed as distributed
    except ImportError:
        distributed = None
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise _error(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but torch.distributed is not initialised",
            "call torch.distributed.init_process_group() first, or pass rank, world_size and group",
        )
    return None


def _error(message: str, remedy: str) -> GroupError:
    return GroupError(message, code=INVALID_ARGUMENT, reason="WORLD_SIZE", remedy=remedy)
