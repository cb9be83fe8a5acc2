"""The pure part of the layout: chunks, physical order of strided splits, refusals."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weightd import errors
from weightd._layout import Box, Split, chunk, describe, local_box, physical_order


def _rows(size: int, splits: list[Split]) -> set[int]:
    order = physical_order(splits)
    assert order is not None
    box = local_box((size,), order)
    return set(range(box.origin[0], box.origin[0] + box.extent[0]))


@pytest.mark.parametrize("size", range(0, 25))
@pytest.mark.parametrize("parts", (1, 2, 3, 4, 7, 8))
def test_chunks_are_those_of_torch(size: int, parts: int) -> None:
    pieces = [piece.tolist() for piece in torch.arange(size).chunk(parts)] if size else []
    pieces += [[]] * (parts - len(pieces))
    for index, piece in enumerate(pieces):
        begin, length = chunk(size, parts, index)
        assert list(range(begin, begin + length)) == piece


@pytest.mark.parametrize(
    ("size", "data", "tensor", "place", "rows"),
    [
        (11008, 4, 2, (2, 1), range(8256, 9632)),
        (7, 2, 2, (0, 1), range(4, 6)),
        (7, 2, 2, (1, 1), range(6, 7)),
        (10, 4, 2, (2, 0), range(4, 5)),
        (10, 4, 2, (3, 1), range(0)),
        (9, 4, 2, (3, 0), range(0)),
        (9, 4, 2, (3, 1), range(8, 9)),
        (50257, 6, 2, (5, 1), range(46069, 50257)),
    ],
)
def test_strided_rows_of_worked_examples(
    size: int, data: int, tensor: int, place: tuple[int, int], rows: range
) -> None:
    splits = [Split(0, 0, data, place[0], tensor), Split(1, 0, tensor, place[1])]
    assert _rows(size, splits) == set(rows)


@pytest.mark.parametrize("mesh", [(2, 3), (4, 2), (3, 2, 2), (2, 2, 3)])
def test_strided_pieces_tile_every_size(mesh: tuple[int, ...]) -> None:
    for size in range(0, 30):
        held: list[int] = []
        for place in itertools.product(*map(range, mesh)):
            splits = []
            for mesh_dim, (parts, index) in enumerate(zip(mesh, place)):
                right = torch.Size(mesh[mesh_dim + 1 :]).numel()
                splits.append(Split(mesh_dim, 0, parts, index, right))
            held += sorted(_rows(size, splits))
        assert sorted(held) == list(range(size))


def test_split_factor_decides_between_two_orders() -> None:
    last, middle, first = (Split(m, 0, p, 0, f) for m, p, f in ((2, 2, 1), (1, 3, 2), (0, 4, 2)))
    assert physical_order([first, middle, last]) == [last, first, middle]
    late = Split(0, 0, 4, 0, 6)
    assert physical_order([late, middle, last]) == [last, middle, late]


def test_impossible_split_factor_has_no_order() -> None:
    assert physical_order([Split(0, 0, 2, 0, 5), Split(1, 0, 2, 0)]) is None


class Shard:
    """Looks like torch's placement; the reader goes by what a placement says of itself."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def is_partial(self) -> bool:
        return False

    def is_replicate(self) -> bool:
        return False


class Partial(Shard):
    """A pending sum."""

    def is_partial(self) -> bool:
        return True


def _dtensor(placement: Any, local: torch.Tensor, shape: tuple[int, ...]) -> Any:
    mesh = SimpleNamespace(shape=(2,), get_coordinate=lambda: [1])
    return SimpleNamespace(
        shape=shape,
        dtype=local.dtype,
        device_mesh=mesh,
        placements=(placement,),
        _local_tensor=local,
    )


def test_partial_is_refused_with_tensor_and_remedy() -> None:
    with pytest.raises(errors.LayoutError, match="redistribute") as caught:
        describe("lm_head.weight", _dtensor(Partial(0), torch.zeros(4), (4,)))
    assert (caught.value.reason, caught.value.tensor) == ("PARTIAL", "lm_head.weight")


def test_local_shape_that_does_not_follow_is_refused_with_both_shapes() -> None:
    with pytest.raises(errors.LayoutError, match=r"expected=\[2\], actual=\[3\]") as caught:
        describe("w", _dtensor(Shard(0), torch.zeros(3), (5,)))
    assert (caught.value.reason, caught.value.tensor) == ("SHAPE", "w")


def test_negative_shard_dimension_counts_from_the_end() -> None:
    local = describe("w", _dtensor(Shard(-1), torch.zeros(3, 2), (3, 5)))
    assert [box for box, _ in local.shards] == [Box((0, 3), (3, 2))]


def test_plain_tensor_is_held_whole() -> None:
    local = describe("w", torch.zeros(3, 2, dtype=torch.bfloat16))
    assert local.dtype == 3
    assert [box for box, _ in local.shards] == [Box((0, 0), (3, 2))]


def test_scalar_is_one_element_and_empty_tensor_is_no_shard() -> None:
    assert [box for box, _ in describe("s", torch.tensor(1.0)).shards] == [Box((), ())]
    assert describe("e", torch.zeros(0, 4)).shards == ()


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(errors.LayoutError, match="complex64"):
        describe("w", torch.zeros(2, dtype=torch.complex64))
