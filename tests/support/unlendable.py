"""Memory that no worker can map: NumPy's own on the host, a sleep-mode allocator's on a GPU."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any, Mapping

import torch

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def numpy_backed(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory that belongs to NumPy."""
    kind = _INTEGERS[tensor.element_size()]
    return torch.from_numpy(tensor.view(kind).numpy().copy()).view(tensor.dtype)


@functools.cache
def sleep_pool() -> Any:
    """A `torch.cuda.MemPool` whose memory can sleep, and its library (pool_sleep, pool_wake)."""
    library = Path(os.environ["WEIGHTD_BIN"]).parent / "libsleep_pool.so"  # tests/gpu/pull
    allocator = torch.cuda.memory.CUDAPluggableAllocator(str(library), "pool_malloc", "pool_free")
    return torch.cuda.MemPool(allocator.allocator()), ctypes.CDLL(str(library)), allocator


def unlendable(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory of the tensor's device that no worker can map."""
    if tensor.device.type != "cuda":
        return numpy_backed(tensor)
    with torch.cuda.use_mem_pool(sleep_pool()[0]):
        return tensor.clone()


def unlendable_params(params: Mapping[str, torch.Tensor], which: str) -> dict[str, torch.Tensor]:
    """Parameters of which none, every second (``some``) or every one (``all``) is unlendable."""
    step = {"": 0, "some": 2, "all": 1}[which]
    return {
        name: unlendable(tensor) if step and position % step == 0 else tensor
        for position, (name, tensor) in enumerate(params.items())
    }
