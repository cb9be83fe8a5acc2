"""From described tensors to the arrays of the C ABI."""

from __future__ import annotations

import ctypes
from typing import Any, Mapping, Optional, Sequence

from weightd import _native
from weightd._layout import LocalTensor
from weightd._memory import SharedStorage, is_cuda, storage_key


def fill_memory(memory: _native.Memory, tensor: Any, shared: Mapping[int, SharedStorage]) -> None:
    """Describes where a plain tensor lies; without a shared storage only its address is given."""
    strides = tensor.stride()
    memory.strides[: len(strides)] = strides
    memory.address = tensor.data_ptr()
    if is_cuda(tensor):
        memory.space = _native.SPACE_CUDA
        memory.fd = -1
        return
    lent = shared.get(storage_key(tensor))
    if lent is None:
        memory.fd = -1
        return
    memory.fd = lent.fd
    memory.fd_size = lent.size_bytes
    memory.offset_bytes = tensor.storage_offset() * tensor.element_size()


def tensor_array(
    layout: Sequence[LocalTensor], shared: Optional[Mapping[int, SharedStorage]]
) -> ctypes.Array:
    """Builds ``weightd_tensor[]``; the answer keeps everything alive that it points to.

    Args:
        layout: what this rank holds.
        shared: storages to lend by `storage_key`; None if memory is only known at sync time.
    """
    array = (_native.Tensor * max(1, len(layout)))()
    shards = (_native.Shard * max(1, sum(len(t.shards) for t in layout)))()
    stride_bytes = ctypes.sizeof(_native.Shard)
    base = ctypes.addressof(shards)
    position = 0
    for target, local in zip(array, layout):
        num_dims = len(local.shape)
        target.name = local.name.encode("utf-8")
        target.dtype = local.dtype
        target.num_dims = num_dims
        target.shape[:num_dims] = local.shape
        target.num_shards = len(local.shards)
        target.shards = ctypes.cast(base + position * stride_bytes, ctypes.POINTER(_native.Shard))
        for box, tensor in local.shards:
            shard = shards[position]
            position += 1
            shard.origin[:num_dims] = box.origin
            shard.extent[:num_dims] = box.extent
            if shared is None:
                shard.memory.fd = -1
            else:
                fill_memory(shard.memory, tensor, shared)
    array.keep_alive = shards  # type: ignore[attr-defined]
    return array


def staged_array(layout: Sequence[LocalTensor]) -> tuple[ctypes.Array, int]:
    """Builds ``weightd_staged[]`` with the present address of every shard, and its length."""
    places = [
        (index, shard, tensor)
        for index, local in enumerate(layout)
        for shard, (_, tensor) in enumerate(local.shards)
    ]
    array = (_native.Staged * max(1, len(places)))()
    for target, (index, shard, tensor) in zip(array, places):
        strides = tensor.stride()
        target.tensor = index
        target.shard = shard
        target.address = tensor.data_ptr()
        target.strides[: len(strides)] = strides
    return array, len(places)
