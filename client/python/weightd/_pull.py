"""Parameters in memory that no worker can map: received in a stage, copied from there, compared.

Sleep-mode allocators and ``cudaMallocAsync`` make such GPU memory; pinned, NumPy-backed and memory-
mapped tensors lie in such host memory. A stage is memory of this process that a worker can map. It
has a bound: what is pulled comes in as many stages as that takes, a large parameter in parts of so
many rows. Every stage has been verified when it is copied, and what has arrived in the parameter is
compared with it, bit by bit and where it lies, before the daemon is answered.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Iterable, Iterator, Mapping, NamedTuple, Optional, Sequence

from weightd import _memory, _native
from weightd._callbacks import Callbacks
from weightd.errors import UNIMPLEMENTED, Error, UnsupportedError, VerifyError, layout_error

STAGE_BYTES = 256 << 20
_ALIGNMENT = 256
_PIECE_ELEMENTS = 4 << 20  # compared at a time; takes as many bytes


class Place(NamedTuple):
    """Where a parameter is received.

    Attributes:
        stage: of it, or of its first part.
        begin: in the stage's memory, in bytes.
        rows: of a part; 0 if it comes whole.
    """

    stage: int
    begin: int
    rows: int


@dataclass
class _Part:
    """What one stage brings of one parameter."""

    name: str
    target: Any
    source: Any
    pieces: list[tuple[Any, Any]]  # of both, as integers


class Pull:
    """The parameters of a rank that are pulled.

    Attributes:
        places: by position in the rank's list of parameters; aliases have that of the first name.
        lent: by position, the tensor to register instead of the parameter.
        size_bytes: of the memory of the stages.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[str, Any]],
        positions: Sequence[int],
        first_stage: int,
        stage_bytes: int,
    ) -> None:
        """Allocates the stages.

        Args:
            pairs: all parameters of the rank.
            positions: of those that are pulled, on one device.
            first_stage: number of the first stage.
            stage_bytes: most bytes of a stage; one row of a parameter if that has more.

        Raises:
            errors.ResourceError: the GPU has no room for the stages.
        """
        tensors = {position: pairs[position][1].detach() for position in positions}
        first_of: dict[tuple, int] = {}
        for position, tensor in tensors.items():
            first_of.setdefault(_identity(tensor), position)
        owners = {p: first_of[_identity(tensor)] for p, tensor in tensors.items()}
        distinct = [tensors[position] for position in first_of.values()]
        placed, self.size_bytes = place(distinct, first_stage, stage_bytes)
        of_owner = dict(zip(first_of.values(), placed))
        self.places = {position: of_owner[owner] for position, owner in owners.items()}
        self.first_stage = first_stage
        self._tensors = [(pairs[p][0], tensors[p]) for p in of_owner]
        self._device = distinct[0].device
        self.memory = allocate(distinct[0], self.size_bytes)
        views = {p: view(self.memory, tensors[p], at) for p, at in of_owner.items()}
        self.lent = {position: views[owner] for position, owner in owners.items()}
        self._stages: dict[int, list[_Part]] = {}
        for position, at in of_owner.items():
            for stage, part in _parts(pairs[position][0], tensors[position], views[position], at):
                self._stages.setdefault(stage, []).append(part)
        self._stream: Any = None
        self._prepare_compare()

    def check_awake(self) -> None:
        """Looks whether the parameters have memory now.

        Raises:
            errors.Error: one has none: the engine sleeps, or has freed it.
        """
        if self._device.type != "cuda":
            return
        library = _native.library()
        for name, tensor in self._tensors:
            if _native.take_error(library.weightd_gpu_check(tensor.data_ptr(), 0)) is not None:
                raise UnsupportedError(
                    f"parameter has no memory now: {name}",
                    code=UNIMPLEMENTED,
                    reason="MEMORY",
                    tensor=name,
                    remedy="wake the engine's weights before a sync, and register again after "
                    "parameters were freed",
                )

    def take(self, stage: int) -> None:
        """Copies a stage into its parameters and compares both. Waits for its own stream only.

        Raises:
            errors.VerifyError: a parameter differs from what was copied into it.
        """
        import torch

        parts = self._stages.get(stage, [])
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self._stream is not None:
                stack.enter_context(torch.cuda.device(self._device))
                stack.enter_context(torch.cuda.stream(self._stream))
            for part in parts:
                part.target.copy_(part.source)
            wrong = self._compare(parts)
        if wrong:
            raise VerifyError(
                f"parameter differs from what was copied into it: {wrong}",
                reason="VERIFY_MISMATCH",
                tensor=wrong,
                remedy="let nobody write the parameters during a sync, then sync again",
            )

    def _prepare_compare(self) -> None:
        """Allocates what a comparison on the GPU needs, so that no sync allocates."""
        import torch

        if self._device.type != "cuda":
            return
        most = max(sum(len(part.pieces) for part in parts) for parts in self._stages.values())
        largest = max(
            a.numel() for parts in self._stages.values() for part in parts for a, _ in part.pieces
        )
        self._stream = torch.cuda.Stream(self._device)
        self._flags = torch.empty(largest, dtype=torch.bool, device=self._device)
        self._differs = torch.empty(most, dtype=torch.bool, device=self._device)

    def _compare(self, parts: Sequence[_Part]) -> str:
        """The name of the first parameter that differs from its stage; empty if none does."""
        import torch

        owners = [part.name for part in parts for _ in part.pieces]
        pieces = [piece for part in parts for piece in part.pieces]
        if self._stream is None:
            differs = [not torch.equal(a, b) for a, b in pieces]
            return owners[differs.index(True)] if any(differs) else ""
        for index, (a, b) in enumerate(pieces):
            flags = self._flags[: a.numel()].view(a.shape)
            torch.ne(a, b, out=flags)
            torch.any(flags.view(-1), 0, out=self._differs[index])
        differs = self._differs[: len(pieces)].tolist()  # waits for this stream
        return owners[differs.index(True)] if any(differs) else ""


def plan(
    pairs: Sequence[tuple[str, Any]],
    lent: Iterable[int],
    stages: Sequence[int],
    shared: Mapping[int, _memory.SharedStorage],
    stage_bytes: int,
) -> Optional[Pull]:
    """Finds the parameters that cannot be lent, and gives them stages after those of the rank.

    Args:
        pairs: all parameters of the rank.
        lent: positions of those that weightd is to write.
        stages: of all.
        shared: storages in shared memory, by `storage_key`.
        stage_bytes: most bytes of a stage; 0 refuses what would be pulled.

    Returns:
        None if everything can be lent.

    Raises:
        errors.UnsupportedError: one cannot be lent and may not be pulled; says why and the remedy.
        errors.LayoutError: they lie on several devices.
        errors.Error: a GPU tensor has no memory.
    """
    found = []
    for position in lent:
        name, tensor = pairs[position]
        refusal = _refusal(name, tensor, shared)
        if refusal is None:
            continue
        if stage_bytes <= 0:
            raise refusal
        if stages[position] > 0:
            raise UnsupportedError(
                f"parameter is received in stages, in memory that cannot be lent: {refusal}",
                code=UNIMPLEMENTED,
                reason="MEMORY",
                tensor=name,
                remedy="receive it in memory of torch's default allocator",
            )
        if found and tensor.device != pairs[found[0]][1].device:
            raise layout_error(
                f"rank has tensors on several devices: {tensor.device} and "
                f"{pairs[found[0]][1].device}",
                reason="DEVICE",
                tensor=name,
                remedy="keep all tensors of one rank on one device",
            )
        found.append(position)
    return Pull(pairs, found, max(stages, default=0) + 1, stage_bytes) if found else None


def place(tensors: Sequence[Any], first_stage: int, limit: int) -> tuple[list[Place], int]:
    """Gives tensors stages, in order; each is filled up to a limit.

    Returns:
        One place per tensor, and the bytes of the largest stage.
    """
    places: list[Place] = []
    limit = max(limit // _ALIGNMENT, 1) * _ALIGNMENT
    stage, filled, most = first_stage, 0, 0
    for tensor in tensors:
        size = _padded(tensor.nbytes)
        if filled > 0 and filled + size > limit:
            stage, filled = stage + 1, 0
        rows = tensor.shape[0] if tensor.dim() else 1
        part = rows if size <= limit else max(1, limit // (tensor.nbytes // rows))
        if part < rows:
            places.append(Place(stage, 0, part))
            most = max(most, _padded(tensor.nbytes // rows * part))
            stage += -(-rows // part) - 1
            filled = _padded(tensor.nbytes // rows * (rows - (rows - 1) // part * part))
        else:
            places.append(Place(stage, filled, 0))
            filled += size
        most = max(most, filled)
    return places, most


def callbacks_with(pull: Pull, user: Callbacks) -> Callbacks:
    """The callbacks of a rank that pulls: the user's, and the pull's own part of them."""

    def quiesce() -> None:
        if user.quiesce is not None:
            user.quiesce()
        pull.check_awake()

    def convert(stage: int) -> None:
        if stage >= pull.first_stage:
            pull.take(stage)
        elif user.convert is not None:
            user.convert(stage)

    return Callbacks(quiesce, user.commit, convert, max(pull._stages))


def _refusal(
    name: str, tensor: Any, shared: Mapping[int, _memory.SharedStorage]
) -> Optional[Error]:
    """Why a worker cannot map a parameter; None if it can."""
    if tensor.numel() == 0:
        return None
    if _memory.is_cuda(tensor):
        return gpu_refusal(name, tensor)
    if _memory.storage_key(tensor) in shared:
        return None
    remedy = "make the engine's parameter a plain CPU tensor, e.g. tensor.clone()"
    what = "parameter lies in memory that cannot be lent (pinned, NumPy-backed or mapped)"
    refusal = UnsupportedError(
        what, code=UNIMPLEMENTED, reason="MEMORY", tensor=name, remedy=remedy
    )
    if not _memory.is_writable(tensor):
        raise UnsupportedError(
            "parameter lies in memory that cannot be written",
            code=UNIMPLEMENTED,
            reason="MEMORY",
            tensor=name,
            remedy=remedy,
        )
    return refusal


def gpu_refusal(name: str, tensor: Any) -> Optional[Error]:
    """Why a worker cannot map a GPU tensor; None if it can, or if it is none.

    Raises:
        errors.Error: it has no memory.
    """
    if not _memory.is_cuda(tensor) or tensor.numel() == 0:
        return None
    span = _memory.span_bytes(tensor)
    error = _native.take_error(_native.library().weightd_gpu_check(tensor.data_ptr(), span))
    if error is not None:
        error.tensor = name
        if error.reason != "MEMORY":
            raise error
    return error


def _identity(tensor: Any) -> tuple:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class _GpuBuffer:
    """GPU memory that a worker can map, whatever torch allocates; freed with the last tensor."""

    def __init__(self, like: int, size_bytes: int) -> None:
        address = ctypes.c_void_p()
        library = _native.library()
        _native.check(library.weightd_gpu_allocate(like, size_bytes, ctypes.byref(address)))
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address.value, False),
            "version": 3,
        }
        weakref.finalize(self, _free, library, address.value, os.getpid())


def _free(library: Any, address: int, owner_pid: int) -> None:
    """Frees GPU memory in the process that allocated it; a forked child does nothing."""
    if os.getpid() == owner_pid:
        library.weightd_gpu_free(address)


def allocate(like: Any, size_bytes: int) -> Any:
    """Bytes that can be lent, on the device of a tensor; on a GPU beside torch's allocator.

    Raises:
        errors.ResourceError: the GPU has no room.
    """
    import torch

    if like.device.type != "cuda":
        return torch.zeros(size_bytes, dtype=torch.uint8)
    return torch.as_tensor(_GpuBuffer(like.data_ptr(), size_bytes), device=like.device)


def view(memory: Any, tensor: Any, at: Place) -> Any:
    """A row-major tensor of a parameter's shape, or of a part's, in the memory of the stages."""
    shape = (at.rows, *tensor.shape[1:]) if at.rows else tuple(tensor.shape)
    size = tensor.nbytes // tensor.shape[0] * at.rows if at.rows else tensor.nbytes
    return memory[at.begin : at.begin + size].view(tensor.dtype).view(shape)


def _parts(name: str, target: Any, source: Any, at: Place) -> Iterator[tuple[int, _Part]]:
    """What comes of a parameter, by stage."""
    if not at.rows:
        yield at.stage, _Part(name, target, source, list(_pieces(target, source)))
        return
    for index, begin in enumerate(range(0, target.shape[0], at.rows)):
        rows = min(at.rows, target.shape[0] - begin)
        part, received = target[begin : begin + rows], source[:rows]
        yield at.stage + index, _Part(name, part, received, list(_pieces(part, received)))


def _pieces(a: Any, b: Any) -> Iterator[tuple[Any, Any]]:
    """Two tensors of one shape and dtype, as integers, in pieces that are compared at once."""
    import torch

    wide = a.is_contiguous() and a.nbytes % 8 == 0 and a.data_ptr() % 8 == 0
    if wide and a.storage_offset() * a.element_size() % 8 == 0:
        a, b = (t.reshape(-1).view(torch.uint8).view(torch.int64) for t in (a, b))
    else:
        kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        a, b = a.view(kind), b.view(kind)
    yield from _halves(a, b)


def _halves(a: Any, b: Any) -> Iterator[tuple[Any, Any]]:
    if a.numel() <= _PIECE_ELEMENTS:
        yield a, b
        return
    dim = next(d for d in range(a.dim()) if a.shape[d] > 1)
    half = a.shape[dim] // 2
    for begin, size in ((0, half), (half, a.shape[dim] - half)):
        yield from _halves(a.narrow(dim, begin, size), b.narrow(dim, begin, size))
