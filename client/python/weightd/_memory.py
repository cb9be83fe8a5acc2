"""Lending memory without a copy: CPU storages move into shared memory, GPU memory stays as it is.

The descriptor of a shared storage belongs to the storage: torch closes it when the storage dies,
the C library works on a duplicate, and nothing here ever closes one. For GPU memory the C library
finds the allocation behind an address and asks the driver for handles of it.
"""

from __future__ import annotations

import fcntl
import os
import resource
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Iterator, Sequence

from weightd import errors

SHM_DIR = "/dev/shm"
_PAGE_BYTES = 4096
_SPARE_FDS = 64


@dataclass(frozen=True)
class SharedStorage:
    """A storage in shared memory: the descriptor that it owns and its size in bytes."""

    fd: int
    size_bytes: int


def storage_key(tensor: Any) -> int:
    """Identity of the storage behind a tensor; views of one storage have the same."""
    return tensor.untyped_storage()._cdata


def is_cuda(tensor: Any) -> bool:
    """True if the tensor lies in the memory of an NVIDIA GPU."""
    return tensor.device.type == "cuda"


def span_bytes(tensor: Any) -> int:
    """Bytes from the first to the last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()


def is_writable(tensor: Any) -> bool:
    """True if the host memory of a tensor may be written; a mapped file may be read-only."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + span_bytes(tensor)
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        for line in maps:
            where, rights = line.split(" ", 2)[:2]
            low, high = (int(address, 16) for address in where.split("-"))
            if low < end and begin < high and "w" not in rights:
                return False
    return True


def check_tensor(name: str, tensor: Any) -> None:
    """Refuses what no data plane can read in place.

    Raises:
        errors.UnsupportedError: in memory of another kind, or not strided.
    """
    if tensor.device.type == "meta":
        raise errors.UnsupportedError(
            "tensor has no memory: device=meta",
            code=errors.UNIMPLEMENTED,
            reason="DEVICE",
            tensor=name,
            remedy="materialise the module (to_empty and initialise) before it is registered",
        )
    if tensor.device.type not in ("cpu", "cuda"):
        raise errors.UnsupportedError(
            f"tensor is neither in host memory nor on an NVIDIA GPU: device={tensor.device}",
            code=errors.UNIMPLEMENTED,
            reason="DEVICE",
            tensor=name,
            remedy="pass CPU or CUDA tensors, e.g. sync(tensors=[(name, tensor.cpu()), ...])",
        )
    if str(tensor.layout) != "torch.strided" or tensor.is_quantized:
        raise errors.UnsupportedError(
            f"tensor is not dense: layout={tensor.layout}, dtype={tensor.dtype}",
            code=errors.UNIMPLEMENTED,
            reason="DEVICE",
            tensor=name,
            remedy="pass a dense tensor, e.g. tensor.to_dense() or tensor.dequantize()",
        )


def share(tensors: Sequence[tuple[str, Any]]) -> dict[int, SharedStorage]:
    """Moves the storages of plain CPU tensors into shared memory, in place.

    GPU tensors are lent as they lie and are missing from the answer. Storages that must not move (pinned, NumPy-backed, mapped files, foreign shared memory) are left
    alone and missing from the answer.

    Args:
        tensors: (name, tensor) pairs; several may share a storage.

    Returns:
        Shared storages by `storage_key`.

    Raises:
        errors.SharedMemoryError: /dev/shm has not enough room; nothing was moved.
        errors.ResourceError: too few file descriptors; nothing was moved.
    """
    storages: dict[int, tuple[str, Any]] = {}
    for name, tensor in tensors:
        if is_cuda(tensor):
            continue
        storage = tensor.untyped_storage()
        if storage.nbytes() > 0:
            storages.setdefault(storage._cdata, (name, storage))
    mappings = _unlinked_mappings() if any(s.is_shared() for _, s in storages.values()) else []
    shared: dict[int, SharedStorage] = {}
    fresh = []
    for key, (name, storage) in storages.items():
        if storage.is_shared():
            if storage.filename is None and _contains(mappings, storage.data_ptr()):
                shared[key] = SharedStorage(*storage._share_fd_cpu_())
        elif storage.resizable() and not _is_pinned(storage):
            fresh.append((key, name, storage))
    if fresh:
        _raise_descriptor_limit(len(fresh) + len(storages))
        with _shm_lock():
            _check_free_bytes(fresh)
            for key, _, storage in fresh:
                shared[key] = SharedStorage(*storage._share_fd_cpu_())
    return shared


def _check_free_bytes(fresh: Sequence[tuple[int, str, Any]]) -> None:
    needed = sum(-(-s.nbytes() // _PAGE_BYTES) * _PAGE_BYTES for _, _, s in fresh)
    stat = os.statvfs(SHM_DIR)
    free = stat.f_bavail * stat.f_frsize
    if needed > free:
        raise errors.SharedMemoryError(
            f"{SHM_DIR} cannot hold the tensors to lend: needed_bytes={needed}, free_bytes={free}",
            code=errors.RESOURCE_EXHAUSTED,
            reason="SHARED_MEMORY",
            tensor=fresh[0][1],
            remedy=f"enlarge it (mount -o remount,size={needed + free} {SHM_DIR}; in a container "
            "--shm-size), or use sync(tensors=...), which stages",
        )


def _raise_descriptor_limit(more: int) -> None:
    """Raises the soft limit of open files so that `more` fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + more + _SPARE_FDS
    if needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise errors.ResourceError(
            f"too few file descriptors to lend the tensors: needed={needed}, hard_limit={hard}",
            code=errors.RESOURCE_EXHAUSTED,
            reason="FILE_DESCRIPTORS",
            remedy=f"raise the limit (ulimit -Hn {needed}; systemd LimitNOFILE={needed}), or use "
            "sync(tensors=...), which stages",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@contextmanager
def _shm_lock() -> Iterator[None]:
    """Lets one process at a time check the free space and take it. Leaves no file behind."""
    directory = os.open(SHM_DIR, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _unlinked_mappings() -> list[tuple[int, int]]:
    """Address ranges of mappings whose file is gone, as torch's descriptor-backed storages are."""
    ranges = []
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        for line in maps:
            if SHM_DIR in line and line.rstrip().endswith("(deleted)"):
                begin, end = line.split(" ", 1)[0].split("-")
                ranges.append((int(begin, 16), int(end, 16)))
    return ranges


def _contains(ranges: Sequence[tuple[int, int]], address: int) -> bool:
    return any(begin <= address < end for begin, end in ranges)


def _is_pinned(storage: Any) -> bool:
    """True for page-locked memory, which only exists once a device context does."""
    import torch

    return torch.cuda.is_initialized() and storage.is_pinned()
