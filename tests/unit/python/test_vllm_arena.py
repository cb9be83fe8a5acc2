"""Which derived parameters come together, and where they are received."""

from __future__ import annotations

import pytest
import torch

from weightd.vllm.arena import Arena, number_stages, units_of
from weightd.vllm.post_load import TensorMark

A, B, C, D = "ABCD"


def _mark(
    address: int, *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> TensorMark:
    like = torch.empty(shape, dtype=dtype, device="meta")
    return TensorMark(address, shape, like.stride(), dtype, torch.device(device), b"")


def test_modules_that_hold_the_same_tensor_come_together() -> None:
    a, b, c = _mark(1, 10), _mark(2, 10), _mark(3, 10)
    units = units_of([(A, [a, a]), (B, [b]), (C, [c, a]), (D, [])])
    assert [(unit.owners, unit.marks) for unit in units] == [([A, C], [a, c]), ([B], [b])]
    units = units_of([(A, [a]), (B, [b]), (C, [a, b])])
    assert [(unit.owners, unit.marks) for unit in units] == [([A, B, C], [a, b])]


def test_tensors_without_elements_tie_nobody() -> None:
    empty = _mark(0, 0)
    units = units_of([(A, [empty, _mark(1, 3)]), (B, [empty])])
    assert [unit.owners for unit in units] == [[A], [B]]


@pytest.mark.parametrize(
    ("limit", "stages"),
    [
        (0, [1, 2, 2, 3]),  # as the largest alone
        (1024, [1, 2, 2, 3]),
        (1792, [1, 1, 1, 2]),
        (1 << 20, [1, 1, 1, 1]),
    ],
)
def test_stages_are_filled_in_order(limit: int, stages: list[int]) -> None:
    units = units_of([(i, [_mark(i, size)]) for i, size in enumerate((256, 64, 100, 192), 1)])
    assert [unit.size_bytes() for unit in units] == [1024, 256, 512, 768]
    assert number_stages(units, limit) == max(stages)
    assert [unit.stage for unit in units] == stages


def test_nothing_needs_no_stage() -> None:
    assert number_stages([], 5) == 0
    assert Arena([]).size_bytes() == 0


def test_stages_share_memory_and_tensors_of_one_do_not() -> None:
    marks = [_mark(1, 10, 3), _mark(2, 7, dtype=torch.bfloat16), _mark(3, 5, dtype=torch.int8)]
    units = units_of([(A, marks[:2]), (B, marks[2:])])
    number_stages(units, 0)
    arena = Arena(units)
    buffers = dict(arena.buffers())
    assert arena.size_bytes() == 512
    assert all((buffers[m].shape, buffers[m].dtype) == (m.shape, m.dtype) for m in marks)
    first, second, third = (buffers[mark] for mark in marks)
    assert first.data_ptr() == third.data_ptr() == second.data_ptr() - 256
    assert first.untyped_storage()._cdata == third.untyped_storage()._cdata
    first.fill_(1)
    second.fill_(2)
    assert bool((first == 1).all())


def test_strides_are_kept() -> None:
    turned = TensorMark(1, (4, 6), (1, 4), torch.float32, torch.device("cpu"), b"")
    units = units_of([(A, [turned, _mark(2, 1)])])
    number_stages(units, 0)
    buffers = dict(Arena(units).buffers())
    assert buffers[turned].stride() == (1, 4)
    assert Arena(units).size_bytes() == 512
