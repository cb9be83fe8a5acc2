"""From torch's meshes and placements to explicit boxes; torch objects are only looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional, Sequence

from weightd.errors import layout_error

MAX_DIMS = 8

_DTYPES: dict[str, int] = {
    "torch.float32": 1,
    "torch.float16": 2,
    "torch.bfloat16": 3,
    "torch.float64": 4,
    "torch.int8": 5,
    "torch.uint8": 6,
    "torch.int16": 7,
    "torch.int32": 8,
    "torch.int64": 9,
    "torch.bool": 10,
    "torch.float8_e4m3fn": 11,
    "torch.float8_e5m2": 12,
}


@dataclass(frozen=True)
class Box:
    """Half-open box ``[origin, origin + extent)`` of a tensor, in elements, outermost first."""

    origin: tuple[int, ...]
    extent: tuple[int, ...]

    @property
    def empty(self) -> bool:
        """True if it holds no element. A box without dimensions (a scalar) holds one."""
        return 0 in self.extent


@dataclass(frozen=True)
class Split:
    """One mesh dimension that cuts tensor dimension ``dim`` into ``parts``; ours is ``index``.

    ``factor`` is the number of pieces that mesh dimensions further right had made before this one
    was applied: 1 for ``Shard``, ``split_factor`` for ``_StridedShard``.
    """

    mesh_dim: int
    dim: int
    parts: int
    index: int
    factor: int = 1


@dataclass(frozen=True)
class LocalTensor:
    """What this rank holds of one tensor.

    ``shards`` pairs each non-empty box with the plain torch tensor that has its shape.
    """

    name: str
    shape: tuple[int, ...]
    dtype: int
    shards: tuple[tuple[Box, Any], ...]


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """Returns (begin, length) of piece ``index``: ceil(size / parts) each until nothing is left."""
    step = -(-size // parts)
    begin = min(index * step, size)
    return begin, min(step, size - begin)


def physical_order(splits: Sequence[Split]) -> Optional[list[Split]]:
    """Sorts splits of ONE tensor dimension, given left to right, into the order of application.

    A split with ``factor`` f is applied after splits on its right that make f pieces together.
    Returns None if no order produces the factors.
    """
    order: list[Split] = []
    for split in reversed(splits):
        pieces, position = 1, 0
        while pieces != split.factor and position < len(order):
            pieces *= order[position].parts
            position += 1
        if pieces != split.factor:
            return None
        order.insert(position, split)
    return order


def local_box(shape: Sequence[int], splits: Sequence[Split]) -> Box:
    """Applies splits, already in physical order per tensor dimension, to a global shape."""
    origin = [0] * len(shape)
    extent = list(shape)
    for split in splits:
        begin, length = chunk(extent[split.dim], split.parts, split.index)
        origin[split.dim] += begin
        extent[split.dim] = length
    return Box(tuple(origin), tuple(extent))


def dtype_number(name: str, tensor: Any) -> int:
    """Returns the wire number of the tensor's dtype.

    Raises:
        errors.LayoutError: weightd has no such element type.
    """
    number = _DTYPES.get(str(tensor.dtype))
    if number is None:
        raise layout_error(
            f"dtype is not supported: {tensor.dtype}",
            reason="DTYPE",
            tensor=name,
            remedy=f"use one of {', '.join(_DTYPES)}",
        )
    return number


def is_dtensor(tensor: Any) -> bool:
    """True for torch's DTensor."""
    return hasattr(tensor, "_local_tensor") and hasattr(tensor, "placements")


def describe(name: str, tensor: Any) -> LocalTensor:
    """Returns what this rank holds of a plain tensor (all of it) or of a DTensor (its box).

    Raises:
        errors.LayoutError: Partial or unknown placement, local shape that does not follow from the
            placements, more than 8 dimensions, or unsupported dtype.
    """
    shape = tuple(int(n) for n in tensor.shape)
    if len(shape) > MAX_DIMS:
        raise layout_error(
            f"too many dimensions: {len(shape)}, at most {MAX_DIMS}",
            reason="SHAPE",
            tensor=name,
            remedy="reshape the tensor before it is registered",
        )
    dtype = dtype_number(name, tensor)
    if is_dtensor(tensor):
        local = _local_tensor(tensor)
        box = dtensor_box(name, tensor, tuple(int(n) for n in local.shape))
    else:
        local, box = tensor, Box((0,) * len(shape), shape)
    return LocalTensor(name, shape, dtype, () if box.empty else ((box, local),))


def dtensor_box(name: str, tensor: Any, local_shape: tuple[int, ...]) -> Box:
    """Returns the box of this rank, compared with the shape that torch really holds.

    Raises:
        errors.LayoutError: see `describe`.
    """
    shape = tuple(int(n) for n in tensor.shape)
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return Box((0,) * len(shape), (0,) * max(1, len(shape)))
    splits = _splits(name, tensor, coordinate)
    box = local_box(shape, splits)
    if box.extent != local_shape and not (box.empty and 0 in local_shape):
        raise layout_error(
            "local shape does not follow from mesh and placements: "
            f"expected={list(box.extent)}, actual={list(local_shape)}, global={list(shape)}, "
            f"mesh={tuple(tensor.device_mesh.shape)}, placements={tuple(tensor.placements)}",
            reason="SHAPE",
            tensor=name,
            remedy="give even splits, or pass the gathered tensor to sync(tensors=...)",
        )
    return box


def _local_tensor(tensor: Any) -> Any:
    local = tensor._local_tensor
    return local.wait() if hasattr(local, "wait") and hasattr(local, "trigger_wait") else local


def _splits(name: str, tensor: Any, coordinate: Sequence[int]) -> list[Split]:
    """Returns the cuts of a DTensor in the order in which they were applied."""
    mesh_shape = tuple(int(n) for n in tensor.device_mesh.shape)
    by_dim: dict[int, list[Split]] = {}
    strided = False
    for mesh_dim, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise _partial(name, placement)
        if placement.is_replicate():
            continue
        kind = type(placement).__name__
        if kind not in ("Shard", "_StridedShard"):
            raise layout_error(
                f"placement is not supported: {placement}",
                reason="SHAPE",
                tensor=name,
                remedy="use Shard, Replicate or _StridedShard, or sync(tensors=...)",
            )
        factor = int(placement.split_factor) if kind == "_StridedShard" else 1
        strided = strided or factor != 1
        dim = placement.dim % len(tensor.shape)
        cut = Split(mesh_dim, dim, mesh_shape[mesh_dim], int(coordinate[mesh_dim]), factor)
        by_dim.setdefault(dim, []).append(cut)
    if strided:
        return [cut for cuts in by_dim.values() for cut in _strided_order(name, tensor, cuts)]
    return [cut for dim, cuts in by_dim.items() for cut in _declared_order(tensor, dim, cuts)]


def _strided_order(name: str, tensor: Any, cuts: list[Split]) -> list[Split]:
    order = physical_order(cuts)
    if order is None:
        raise layout_error(
            f"split factors fit no order of the mesh dimensions: {tuple(tensor.placements)}, "
            f"mesh={tuple(tensor.device_mesh.shape)}",
            reason="SHAPE",
            tensor=name,
            remedy="pass the gathered tensor to sync(tensors=...)",
        )
    return order


def _declared_order(tensor: Any, dim: int, cuts: list[Split]) -> list[Split]:
    """Left to right, unless the DTensor's spec declares another order for this dimension."""
    for entry in getattr(getattr(tensor, "_spec", None), "shard_order", None) or ():
        if entry.tensor_dim == dim:
            rank_of = {mesh_dim: place for place, mesh_dim in enumerate(entry.mesh_dims)}
            return sorted(cuts, key=lambda cut: rank_of.get(cut.mesh_dim, len(rank_of)))
    return cuts


def _partial(name: str, placement: Any) -> Exception:
    return layout_error(
        f"tensor has a pending reduction: {placement}",
        reason="PARTIAL",
        tensor=name,
        remedy="redistribute it to Replicate() or Shard(dim) before it is registered",
    )
