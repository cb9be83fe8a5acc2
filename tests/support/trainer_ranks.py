"""Trainer ranks as threads of one process: enough to see what a daemon answers to bad input."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, Mapping, Sequence, Union

import torch

from weightd import Ack, Actor, Error, new_group

Outcome = Union[Ack, Error]


def open_ranks(address: str, model: str, world_size: int, group: str = "") -> list[Actor]:
    """Opens every rank of one start of a trainer."""
    group = group or new_group()
    return [
        Actor(address, model=model, rank=rank, world_size=world_size, group=group)
        for rank in range(world_size)
    ]


def register_all(actors: Sequence[Actor], sources: Sequence[Mapping[str, Any]]) -> list[Error]:
    """Registers one source per rank; returns the errors."""
    found = []
    for actor, source in zip(actors, sources):
        try:
            actor.register(source)
        except Error as error:
            found.append(error)
    return found


def sync_all(
    actors: Sequence[Actor], version: Union[int, Sequence[int]], **options: Any
) -> list[Outcome]:
    """Syncs on all ranks at once; returns each rank's acknowledgement or error.

    Args:
        version: of all ranks, or one for each.
    """
    versions = [version] * len(actors) if isinstance(version, int) else version
    with ThreadPoolExecutor(len(actors)) as pool:
        calls = zip(actors, versions)
        return list(pool.map(lambda call: _sync(call[0], call[1], options), calls))


def _sync(actor: Actor, version: int, options: dict[str, Any]) -> Outcome:
    try:
        return actor.sync(version, **options)
    except Error as error:
        return error


class Shard:
    """One of equal parts along `dim`, as torch's placement of that name says it."""

    def __init__(self, dim: int = 0) -> None:
        self.dim = dim

    def is_partial(self) -> bool:
        """Never: nothing is pending."""
        return False

    def is_replicate(self) -> bool:
        """Never: the rows are cut."""
        return False


def row_shard(tensor: torch.Tensor, parts: int, index: int, dim: int = 0) -> Any:
    """Returns what looks like a DTensor that holds one part of a tensor's rows, or of `dim`.

    Unlike torch's own it can be given to ranks so that they overlap or leave gaps.
    """
    step = -(-tensor.shape[dim] // parts)
    begin = min(index * step, tensor.shape[dim])
    local = tensor.narrow(dim, begin, min(step, tensor.shape[dim] - begin)).clone()
    mesh = SimpleNamespace(shape=(parts,), get_coordinate=lambda: [index])
    return SimpleNamespace(
        shape=tensor.shape,
        dtype=tensor.dtype,
        device_mesh=mesh,
        placements=(Shard(dim),),
        _local_tensor=local,
    )
