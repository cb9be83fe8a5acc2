"""Ranks of one trainer share a group id through torch.distributed."""

from __future__ import annotations

import torch.distributed as dist

from tests.support.gloo import run_ranks
from weightd import errors
from weightd._group import Group, resolve


def _resolve(rank: int) -> tuple[Group, Group, str]:
    first, second = resolve(None, None, None), resolve(None, None, None)
    dist.barrier()
    try:
        resolve(None, 0, 3)
    except errors.GroupError as error:
        return first, second, str(error)
    return first, second, ""


def test_group_is_drawn_by_rank_0_and_is_new_at_every_start() -> None:
    answers = run_ranks(2, _resolve)
    assert len({first.id for first, _, _ in answers}) == 1
    assert len({first.order for first, _, _ in answers}) == 1
    assert [(first.rank, first.world_size) for first, _, _ in answers] == [(0, 2), (1, 2)]
    assert all(second.id != first.id for first, second, _ in answers)
    assert all(second.order > first.order for first, second, _ in answers)


def test_other_world_size_than_the_process_group_is_refused() -> None:
    assert all("new_group" in text for _, _, text in run_ranks(2, _resolve))
