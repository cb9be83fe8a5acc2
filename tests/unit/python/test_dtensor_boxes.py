"""Boxes of real DTensors: local values are those of the box in the global tensor."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement

from tests.support.gloo import run_ranks
from weightd._layout import Box, describe, is_dtensor
from weightd._source import module_pairs

SIZES = (1, 2, 3, 5, 8, 9, 17)


def _values(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def _slice(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(o, o + e) for o, e in zip(box.origin, box.extent))]


def _check(name: str, tensor: torch.Tensor, full: torch.Tensor) -> list[Box]:
    """Compares this rank's part with ``full``; returns its boxes."""
    local = describe(name, tensor)
    assert local.shape == tuple(full.shape)
    for box, part in local.shards:
        assert torch.equal(part, _slice(full, box)), (name, box)
    if is_dtensor(tensor) and not local.shards:
        assert tensor._local_tensor.numel() == 0, name
    return [box for box, _ in local.shards]


def _coverage(shape: tuple[int, ...], boxes: list[Box]) -> tuple[int, int]:
    """How often the least and the most covered element of a tensor is held."""
    count = torch.zeros(shape, dtype=torch.int32)
    for box in boxes:
        _slice(count, box).add_(1)
    return int(count.min()), int(count.max())


def _gathered(found: dict[str, list[Box]]) -> dict[str, list[Box]]:
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return {name: [box for part in everyone for box in part[name]] for name in found}


def _cut(full: torch.Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
    """Every rank cuts its own part: nothing is sent, so that many cases stay cheap."""
    return distribute_tensor(full, mesh, list(placements), src_data_rank=None)


def _distributed(rank: int, mesh_shape: tuple[int, ...], choices: list) -> int:
    mesh = init_device_mesh("cpu", mesh_shape)
    shapes, found, copies = {}, {}, {}
    for size, placements in itertools.product(SIZES, choices):
        shape = (size, 6, 5)
        name = f"{size}-{placements}"
        full = _values(shape)
        found[name] = _check(name, _cut(full, mesh, placements), full)
        shapes[name] = shape
        copies[name] = 1
        for parts, placement in zip(mesh_shape, placements):
            copies[name] *= parts if placement.is_replicate() else 1
    for name, boxes in _gathered(found).items():
        assert _coverage(shapes[name], boxes) == (copies[name],) * 2, name
    return len(found)


@pytest.mark.parametrize("mesh_shape", [(4,), (2, 2), (3, 2), (2, 2, 2)], ids=str)
def test_distributed_tensors_tile(mesh_shape: tuple[int, ...]) -> None:
    kinds = (Replicate(), Shard(0), Shard(1))
    choices = list(itertools.product(kinds, repeat=len(mesh_shape)))
    world = torch.Size(mesh_shape).numel()
    counts = run_ranks(world, _distributed, mesh_shape, choices)
    assert counts == [len(SIZES) * len(choices)] * world


class _Block(nn.Module):
    """A column-parallel and a row-parallel layer and a norm, sizes in elements."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, inner)
        self.down = nn.Linear(inner, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))


def _sharded(
    rank: int, mesh_shape: tuple[int, ...], names: tuple[str, ...], tensor_parallel: bool
) -> int:
    checked = 0
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    for inner, hidden in itertools.product((2, 6, 7, 9, 17), (4, 5)):
        block = _Block(hidden, inner)
        full = {}
        with torch.no_grad():
            for name, tensor in block.state_dict().items():
                tensor.copy_(_values(tuple(tensor.shape)))
                full[name] = tensor.clone()
        if tensor_parallel:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh["tp"], plan, src_data_rank=None)
        fully_shard(block, mesh=mesh[names[:-1]] if tensor_parallel else mesh)
        found = {name: _check(name, tensor, full[name]) for name, tensor in module_pairs(block)}
        assert found.keys() == full.keys()
        for name, boxes in _gathered(found).items():
            least, most = _coverage(tuple(full[name].shape), boxes)
            assert least == most >= 1, (name, inner, hidden)
        checked += len(found)
    return checked


CASES = {
    "fsdp4": ((4,), ("dp",), False),
    "hsdp2x2": ((2, 2), ("rep", "dp"), False),
    "fsdp2xtp2": ((2, 2), ("dp", "tp"), True),
    "fsdp4xtp2": ((4, 2), ("dp", "tp"), True),
    "hsdp2x2xtp2": ((2, 2, 2), ("rep", "dp", "tp"), True),
}


@pytest.mark.parametrize("case", CASES)
def test_fsdp2_modules_tile(case: str) -> None:
    mesh_shape, names, tensor_parallel = CASES[case]
    counts = run_ranks(torch.Size(mesh_shape).numel(), _sharded, mesh_shape, names, tensor_parallel)
    assert set(counts) == {5 * 2 * 6}


def _strided_trap(rank: int) -> list[tuple[int, int]]:
    """N=9 over FSDP 4 x TP 2: physically rank (3, 0) is empty and (3, 1) holds row 8."""
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
    block = _Block(4, 9)
    with torch.no_grad():
        block.up.weight.copy_(_values((9, 4)))
    parallelize_module(block, mesh["tp"], {"up": ColwiseParallel()}, src_data_rank=None)
    fully_shard(block, mesh=mesh["dp"])
    weight = dict(module_pairs(block))["up.weight"]
    assert isinstance(weight, DTensor)
    return [(box.origin[0], box.extent[0]) for box in _check("up.weight", weight, _values((9, 4)))]


def test_uneven_strided_shards_follow_the_physical_order() -> None:
    rows = run_ranks(8, _strided_trap)
    assert rows[2 * 3 + 0] == []
    assert rows[2 * 3 + 1] == [(8, 1)]
    held = sorted(piece for part in rows for piece in part)
    assert held == [(0, 2), (2, 2), (4, 1), (5, 1), (6, 1), (7, 1), (8, 1)]
