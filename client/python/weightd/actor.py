"""A trainer rank: registers its shards once and syncs versions into the engines."""

from __future__ import annotations

import ctypes
import json
import os
import threading
import weakref
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Iterable, Iterator, Mapping, Optional, Sequence, Union

from weightd import _adapters, _group, _marshal, _memory, _native
from weightd._copies import Copies
from weightd._drive import Drive, DrivenEngine, DriveSettings
from weightd._run import run_sync
from weightd._source import NameMap, Source, module_pairs, named_pairs
from weightd.ack import Ack
from weightd.engine_client import PAUSE_MODES, PauseMode
from weightd.errors import Error, layout_error, state_error

NamedTensors = Union[Mapping[str, Any], Iterable[tuple[str, Any]]]


class Actor:
    """One rank of a trainer.

    Every rank makes one and calls `register` and `sync` alike; no call takes part in a collective
    of the trainer, except that the constructor shares a group id through torch.distributed.

    Args:
        address: ``unix:/path`` or ``host:port``; None reads ``WEIGHTD_ADDRESS``, then the default.
        model: key of the model; engines use the same.
        rank: this rank; None asks torch.distributed, or is 0 where that is not initialised.
        world_size: ranks of the trainer; None as for ``rank``.
        group: id from `weightd.new_group`, equal on all ranks; None shares one.
        engines: engines to pause, fill and resume in every `sync`, a sequence or a mapping from
            instance name: a vLLM ``LLM`` or ``AsyncLLM``, the URL of a ``vllm serve`` that runs
            with ``VLLM_SERVER_DEV_MODE=1``, a Ray handle of either, or an `EngineClient`. Only rank
            0 drives; other ranks may pass the same and ignore it.
        pause_mode: requests in flight: ``abort`` ends, ``wait`` drains (bounded by the daemon's
            ``deadlines.prepare``), ``keep`` freezes and goes on with them.
        reset_caches: drop what engines computed with older weights before they resume.
        engine_timeout: seconds that a call to an engine may take before the sync fails.
        copy_bytes: most bytes of GPU memory for copies of tensors that no worker can map (sleep
            mode, ``cudaMallocAsync``), which are copied on the current stream at every sync; with
            the default such tensors are refused.
        connect_timeout: seconds to wait for the daemon.
        device: that holds this rank's tensors, by the daemon's name: ``host``, ``host.1`` or a
            GPU's UUID; None is ``host``. `register` raises `errors.LayoutError` for a device that
            no worker serves.
        worker: who starts the worker of that device if the daemon does not serve it itself:
            ``daemon`` (nobody: such a device is refused) or ``spawn`` (this process, as its child,
            unless another client has).

    Raises:
        errors.UnavailableError: no daemon answers, or there is no program to spawn.
        errors.EngineError: an engine cannot be driven; names it.
        errors.UnsupportedError: an engine is of no known kind, or lives in another rank than 0.
        errors.GroupError: rank, world size and group do not fit together.
        errors.ProtocolError: daemon and library are of different generations.
    """

    def __init__(
        self,
        address: Optional[str] = None,
        *,
        model: str,
        rank: Optional[int] = None,
        world_size: Optional[int] = None,
        group: Optional[str] = None,
        engines: Union[Sequence[Any], Mapping[str, Any]] = (),
        pause_mode: PauseMode = "abort",
        reset_caches: bool = True,
        engine_timeout: float = 4.0,
        copy_bytes: int = 0,
        connect_timeout: float = 10.0,
        device: Optional[str] = None,
        worker: str = "daemon",
    ) -> None:
        if pause_mode not in PAUSE_MODES:
            raise layout_error(
                f"unknown pause mode: {pause_mode!r}",
                reason="CONFIG",
                remedy=f"one of {', '.join(PAUSE_MODES)}",
            )
        lib = _native.library()
        self.group = _group.resolve(group, rank, world_size)
        options = _native.ActorOptions(
            _native.encode(address),
            _native.encode(model),
            _native.encode(self.group.id),
            self.group.order,
            self.group.rank,
            self.group.world_size,
            max(1, int(connect_timeout * 1000)),
            _native.encode(device),
            _native.worker_number(worker),
        )
        handle = ctypes.c_void_p()
        _native.check(lib.weightd_actor_open(ctypes.byref(options), ctypes.byref(handle)))
        self.model = model
        self._lib = lib
        self._handle: int = handle.value or 0
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._source: Optional[Source] = None  # what register() was given
        self._described: Optional[Source] = None  # what the daemon knows now
        self._staged: Optional[Source] = None  # keeps tensors of sync(tensors=) alive
        self._copy_bytes = copy_bytes
        self._copies: Optional[Copies] = None
        self._version = 0
        self._replicas_checked = False
        self._drive_settings = DriveSettings(pause_mode, reset_caches, engine_timeout)
        self._engines: list[DrivenEngine] = []
        self._close = weakref.finalize(
            self, _native.close_handle, "actor", self._handle, self._pid, self._lock, None
        )
        try:
            self.drive(engines)
        except BaseException:
            self._close()
            raise

    def drive(self, engines: Union[Sequence[Any], Mapping[str, Any]]) -> None:
        """Replaces the engines that `sync` drives, e.g. after one was started anew.

        Args:
            engines: as in the constructor; a server that restarts at the same URL needs no call.

        Raises:
            errors.EngineError, errors.UnsupportedError: as the constructor; nothing is replaced.
        """
        with self._exclusive():
            self._engines = _adapters.take_over(
                engines, self.group.rank, self._drive_settings.timeout
            )

    def register(
        self, tensors: Union[Any, NamedTensors], name_map: Optional[NameMap] = None
    ) -> None:
        """Describes this rank's shards and lends their memory; replaces an earlier registration.

        Args:
            tensors: a module (its ``state_dict()`` is read, FSDP2 modules are resharded), a mapping
                or (name, tensor) pairs. A DTensor is this rank's box; a plain tensor is all of it,
                held alike by every rank. References are kept until `close` or the next `register`.
            name_map: dict or callable from stripped name to engine-side source name; None as a
                value leaves the tensor out.

        Raises:
            errors.LayoutError: names, placements, shapes or dtypes; names the tensor.
            errors.SharedMemoryError, errors.ResourceError: /dev/shm or descriptors; nothing moved.
            errors.UnsupportedError: a tensor is neither in host memory nor on a GPU, or lies in GPU
                memory that no worker can map, and its copy is more than ``copy_bytes``.
        """
        with self._exclusive():
            module = tensors if hasattr(tensors, "state_dict") else None
            pairs = (
                module_pairs(module, name_map)
                if module is not None
                else named_pairs(tensors, name_map)
            )
            source = Source(pairs, module)
            self._source = self._described = None
            self._lend(source)
            self._source = source

    def sync(
        self,
        version: Optional[int] = None,
        *,
        tensors: Optional[NamedTensors] = None,
        require: Union[str, int] = "all",
        check_replicas: Optional[bool] = None,
    ) -> Ack:
        """Moves one version into the engines. Every rank calls it alike. Blocks; answers Ctrl-C.

        Args:
            version: > every version consumed so far; None is one more than the last acknowledged.
            tensors: the complete set of tensors of this version, for what exists only now (merged
                LoRA, FSDP1, exported weights). CPU tensors are staged; CUDA tensors are lent, and
                kept alive until the next sync. None syncs what was registered.
            require: ``"all"`` or how many replicas must commit.
            check_replicas: compare replicated shards first; None does so until the first success.

        Returns:
            The acknowledgement: verified in all committed replicas and published there.

        Raises:
            errors.Error: one class per kind of failure, with the outcome of every replica in
                ``result``. KeyboardInterrupt cancels the sync on all ranks and is raised again.
        """
        with self._exclusive():
            number = self._next_version(version)
            options = _native.SyncOptions(
                version=number,
                require_replicas=_require(require),
                check_replicas=int(
                    not self._replicas_checked if check_replicas is None else check_replicas
                ),
            )
            try:
                for engine in self._engines:
                    engine.check_caller()
                refusal = self._prepare(tensors, options)
            except Error as error:
                if self._described is None:
                    raise
                refusal = error
            drive = None
            if self._engines and refusal is None:
                drive = Drive(self._engines, self._drive_settings, self.model, number)
            try:
                ack = self._run(options, refusal, drive)
            except Error as error:
                if error.result is not None and any(r.committed for r in error.result.replicas):
                    self._version = max(self._version, number)
                if refusal is None or error.reason == refusal.reason:
                    raise
                raise refusal from error
            if refusal is not None:
                raise refusal
            self._version = number
            self._replicas_checked = self._replicas_checked or bool(options.check_replicas)
            return ack

    @property
    def state(self) -> dict[str, Any]:
        """The connection and the sync in progress: connected, registered, phase, bytes_done, ..."""
        self._check_usable()
        return json.loads(_native.take_string(self._lib.weightd_actor_state(self._handle)))

    def cancel(self) -> None:
        """Asks the daemon to stop the running sync, which raises CancelledError. Any thread."""
        self._check_usable()
        self._lib.weightd_actor_sync_cancel(self._handle)

    def close(self) -> None:
        """Takes the lent memory back and leaves. A running sync is cancelled first. Idempotent."""
        if not self._close.alive or os.getpid() != self._pid:
            return
        self._close()
        self._source = self._described = self._staged = self._copies = None

    def __enter__(self) -> Actor:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()

    def _prepare(
        self, tensors: Optional[NamedTensors], options: _native.SyncOptions
    ) -> Optional[Error]:
        """Makes what the daemon knows fit this sync; returns why this rank refuses, if it does."""
        if tensors is not None:
            source = Source(named_pairs(tensors))
            if source.cuda_device is not None:
                self._lend(source)
                self._staged = source
                options.cuda_stream = _current_stream(source)
                return self._refresh_copies()
            if self._described is None or self._described.layout_key != source.layout_key:
                self._described = None
                array = _marshal.tensor_array(source.layout, None)
                self._register_native(array, len(source.layout))
            self._described = self._staged = source
            staged, count = _marshal.staged_array(source.layout)
            options.staged = ctypes.cast(staged, ctypes.POINTER(_native.Staged))
            options.num_staged = count
            return None
        if self._source is None:
            raise state_error(
                "nothing is registered",
                reason="NOT_REGISTERED",
                remedy="call register() first, or pass tensors= to sync()",
            )
        options.cuda_stream = _current_stream(self._source)
        refusal = self._source.moved()
        if refusal is None and self._described is not self._source:
            self._lend(self._source)
        return refusal or self._refresh_copies()

    def _refresh_copies(self) -> Optional[Error]:
        return None if self._copies is None else self._copies.refresh()

    def _lend(self, source: Source) -> None:
        """Shares the memory of a source in place and registers it."""
        locals_ = [(local.name, tensor) for local in source.layout for _, tensor in local.shards]
        shared = _memory.share(locals_)
        source.refresh()
        copies = Copies(source.layout, self._copy_bytes)
        array = _marshal.tensor_array(copies.lent(source.layout), shared)
        self._described = None
        self._register_native(array, len(source.layout))
        self._described = source
        self._copies = copies if copies.size_bytes > 0 else None

    def _register_native(self, array: ctypes.Array, count: int) -> None:
        _native.check(self._lib.weightd_actor_register(self._handle, array, count))

    def _run(
        self, options: _native.SyncOptions, refusal: Optional[Error], drive: Optional[Drive]
    ) -> Ack:
        """Runs one sync to its end, as one that this rank refuses if there is a refusal."""
        if refusal is not None:
            options.staged, options.num_staged = None, 0
            options.refuse_reason = _native.encode(refusal.reason)
            options.refuse_message = _native.encode(refusal.message)
            options.refuse_tensor = _native.encode(refusal.tensor)
            options.refuse_remedy = _native.encode(refusal.remedy)
        return run_sync(self._lib, self._handle, options, drive)

    def _next_version(self, version: Optional[int]) -> int:
        if version is None:
            return self._version + 1
        if isinstance(version, bool) or not isinstance(version, int) or not 0 < version < 2**64:
            raise layout_error(
                f"version is not a positive 64-bit integer: {version!r}",
                reason="STALE_VERSION",
                remedy="count versions from 1, or leave version out",
            )
        return version

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        self._check_usable()
        if not self._lock.acquire(blocking=False):
            raise state_error(
                "another call on this actor is running",
                reason="BUSY",
                remedy="use one thread per actor, or wait for the call to return",
            )
        try:
            self._check_usable()
            yield
        finally:
            self._lock.release()

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise state_error(
                "the actor was made before fork()",
                reason="FORKED",
                remedy="make the Actor in the process that uses it",
            )
        if not self._close.alive:
            raise state_error("the actor is closed", reason="CLOSED", remedy="make a new Actor")


def _current_stream(source: Source) -> Optional[int]:
    """The stream on which the caller's work of this thread runs; None for host memory."""
    device = source.cuda_device
    if device is None:
        return None
    import torch

    return torch.cuda.current_stream(device).cuda_stream


def _require(require: Union[str, int]) -> int:
    if require == "all":
        return 0
    if isinstance(require, int) and not isinstance(require, bool) and 0 < require < 2**32:
        return require
    raise layout_error(
        f"require is neither 'all' nor a positive number: {require!r}",
        reason="CONFIG",
        remedy='use require="all" or the number of replicas that must commit',
    )
