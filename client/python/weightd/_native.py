"""The C ABI of libweightd, by ctypes. Nothing is loaded before the first object is made."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from pathlib import Path
from typing import Optional

from weightd import errors
from weightd.ack import Ack

ABI_VERSION = 3
MAX_DIMS = 8
SPACE_CUDA = 1
WORKERS = ("daemon", "spawn")  # by the number of the C ABI
_FIELDS = ("reason", "message", "tensor", "rank", "phase", "peer", "remedy", "result")

Dims = ctypes.c_int64 * MAX_DIMS


class Memory(ctypes.Structure):
    """``weightd_memory``: where a block of elements lies."""

    _fields_ = [
        ("space", ctypes.c_int32),
        ("fd", ctypes.c_int32),
        ("fd_size", ctypes.c_uint64),
        ("offset_bytes", ctypes.c_uint64),
        ("address", ctypes.c_void_p),
        ("strides", Dims),
    ]


class Shard(ctypes.Structure):
    """``weightd_shard``: a box of a tensor, and where it lies."""

    _fields_ = [("origin", Dims), ("extent", Dims), ("memory", Memory)]


class Tensor(ctypes.Structure):
    """``weightd_tensor``: one tensor of the trainer."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int32),
        ("num_dims", ctypes.c_int32),
        ("shape", Dims),
        ("num_shards", ctypes.c_int32),
        ("shards", ctypes.POINTER(Shard)),
    ]


class ActorOptions(ctypes.Structure):
    """``weightd_actor_options``."""

    _fields_ = [
        ("address", ctypes.c_char_p),
        ("model", ctypes.c_char_p),
        ("group", ctypes.c_char_p),
        ("group_order", ctypes.c_uint64),
        ("rank", ctypes.c_int32),
        ("world_size", ctypes.c_int32),
        ("connect_timeout_ms", ctypes.c_int32),
        ("device", ctypes.c_char_p),
        ("worker", ctypes.c_int32),
        ("worker_binary", ctypes.c_char_p),
    ]


class Staged(ctypes.Structure):
    """``weightd_staged``: memory of a staged shard for one sync."""

    _fields_ = [
        ("tensor", ctypes.c_uint32),
        ("shard", ctypes.c_uint32),
        ("address", ctypes.c_void_p),
        ("strides", Dims),
    ]


class SyncOptions(ctypes.Structure):
    """``weightd_sync_options``."""

    _fields_ = [
        ("version", ctypes.c_uint64),
        ("require_replicas", ctypes.c_uint32),
        ("check_replicas", ctypes.c_int32),
        ("staged", ctypes.POINTER(Staged)),
        ("num_staged", ctypes.c_size_t),
        ("cuda_stream", ctypes.c_void_p),
        ("refuse_reason", ctypes.c_char_p),
        ("refuse_message", ctypes.c_char_p),
        ("refuse_tensor", ctypes.c_char_p),
        ("refuse_remedy", ctypes.c_char_p),
    ]


class EngineOptions(ctypes.Structure):
    """``weightd_engine_options``."""

    _fields_ = [
        ("address", ctypes.c_char_p),
        ("model", ctypes.c_char_p),
        ("engine", ctypes.c_char_p),
        ("tp_rank", ctypes.c_int32),
        ("tp_size", ctypes.c_int32),
        ("pp_rank", ctypes.c_int32),
        ("pp_size", ctypes.c_int32),
        ("ep_rank", ctypes.c_int32),
        ("ep_size", ctypes.c_int32),
        ("dp_rank", ctypes.c_int32),
        ("architecture", ctypes.c_char_p),
        ("profile", ctypes.c_char_p),
        ("config_json", ctypes.c_char_p),
        ("commit_mode", ctypes.c_char_p),
        ("auto_quiesce", ctypes.c_int32),
        ("connect_timeout_ms", ctypes.c_int32),
        ("device", ctypes.c_char_p),
        ("worker", ctypes.c_int32),
        ("worker_binary", ctypes.c_char_p),
    ]


class Param(ctypes.Structure):
    """``weightd_param``: one parameter of an engine rank."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int32),
        ("num_dims", ctypes.c_int32),
        ("shape", Dims),
        ("kind", ctypes.c_int32),
        ("stage", ctypes.c_uint32),
        ("pulled", ctypes.c_int32),
        ("stage_rows", ctypes.c_uint64),
        ("alias_of", ctypes.c_char_p),
        ("memory", Memory),
    ]


class TracedSource(ctypes.Structure):
    """``weightd_traced_source``: a tensor that the engine's loader was fed."""

    _fields_ = [("name", ctypes.c_char_p), ("num_dims", ctypes.c_int32), ("shape", Dims)]


class TracedWrite(ctypes.Structure):
    """``weightd_traced_write``: a block of a parameter and of the source that lands there."""

    _fields_ = [
        ("param", ctypes.c_uint32),
        ("source", ctypes.c_int32),
        ("target_origin", Dims),
        ("extent", Dims),
        ("source_origin", Dims),
        ("source_dim", ctypes.c_int8 * MAX_DIMS),
    ]


class Trace(ctypes.Structure):
    """``weightd_trace``: what an engine rank saw its loader do."""

    _fields_ = [
        ("sources", ctypes.POINTER(TracedSource)),
        ("num_sources", ctypes.c_size_t),
        ("writes", ctypes.POINTER(TracedWrite)),
        ("num_writes", ctypes.c_size_t),
        ("preferred", ctypes.c_int32),
    ]


_ERROR = ctypes.c_void_p
_HANDLE = ctypes.c_void_p
_PROTOTYPES: dict[str, tuple] = {
    "weightd_version": (ctypes.c_char_p,),
    "weightd_abi_version": (ctypes.c_int,),
    "weightd_gpu_check": (_ERROR, ctypes.c_void_p, ctypes.c_uint64),
    "weightd_gpu_allocate": (
        _ERROR,
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.POINTER(ctypes.c_void_p),
    ),
    "weightd_gpu_free": (None, ctypes.c_void_p),
    "weightd_error_code": (ctypes.c_int, _ERROR),
    "weightd_error_field": (ctypes.c_char_p, _ERROR, ctypes.c_char_p),
    "weightd_error_free": (None, _ERROR),
    "weightd_string_free": (None, ctypes.c_void_p),
    "weightd_actor_open": (_ERROR, ctypes.POINTER(ActorOptions), ctypes.POINTER(_HANDLE)),
    "weightd_actor_register": (_ERROR, _HANDLE, ctypes.POINTER(Tensor), ctypes.c_size_t),
    "weightd_actor_sync_begin": (_ERROR, _HANDLE, ctypes.POINTER(SyncOptions)),
    "weightd_actor_sync_wait": (
        ctypes.c_int,
        _HANDLE,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.POINTER(_ERROR),
    ),
    "weightd_actor_sync_cancel": (None, _HANDLE),
    "weightd_actor_state": (ctypes.c_void_p, _HANDLE),
    "weightd_actor_close": (None, _HANDLE),
    "weightd_engine_open": (_ERROR, ctypes.POINTER(EngineOptions), ctypes.POINTER(_HANDLE)),
    "weightd_engine_register": (_ERROR, _HANDLE, ctypes.POINTER(Param), ctypes.c_size_t),
    "weightd_engine_register_traced": (
        _ERROR,
        _HANDLE,
        ctypes.POINTER(Param),
        ctypes.c_size_t,
        ctypes.POINTER(Trace),
    ),
    "weightd_engine_state": (ctypes.c_void_p, _HANDLE),
    "weightd_engine_wait": (ctypes.c_uint64, _HANDLE, ctypes.c_uint64, ctypes.c_int),
    "weightd_engine_quiesced": (_ERROR, _HANDLE, ctypes.c_char_p),
    "weightd_engine_converted": (_ERROR, _HANDLE, ctypes.c_char_p),
    "weightd_engine_committed": (_ERROR, _HANDLE, ctypes.c_char_p, ctypes.c_char_p),
    "weightd_engine_close": (None, _HANDLE),
}


def library_path() -> Path:
    """Returns the library to load: ``$WEIGHTD_LIBRARY``, else the one bundled with the package.

    Raises:
        errors.Error: neither exists.
    """
    chosen = os.environ.get("WEIGHTD_LIBRARY")
    if chosen:
        path, origin = Path(chosen), "WEIGHTD_LIBRARY"
    else:
        path, origin = Path(__file__).parent / "_lib" / "libweightd.so", "the bundled library"
    if not path.is_file():
        raise errors.Error(
            f"{origin} does not exist: path={path}",
            reason="LIBRARY",
            remedy="install the weightd wheel, or set WEIGHTD_LIBRARY to a built libweightd.so",
        )
    return path


@functools.lru_cache(maxsize=None)
def library() -> ctypes.CDLL:
    """Loads the library once. Its calls release the GIL.

    Raises:
        errors.Error: it is missing, cannot be loaded, or has another ABI version.
    """
    path = library_path()
    try:
        lib = ctypes.CDLL(str(path))
        for name, (result, *arguments) in _PROTOTYPES.items():
            function = getattr(lib, name)
            function.restype = result
            function.argtypes = arguments
    except (OSError, AttributeError) as cause:
        raise errors.Error(
            f"libweightd cannot be loaded: {cause}",
            reason="LIBRARY",
            remedy="use the libweightd.so of the same release as this package",
        ) from cause
    found = lib.weightd_abi_version()
    if found != ABI_VERSION:
        raise errors.Error(
            f"libweightd has another ABI: library={found}, package={ABI_VERSION}, path={path}",
            reason="LIBRARY",
            remedy="use the libweightd.so of the same release as this package",
        )
    return lib


def take_error(pointer: Optional[int]) -> Optional[errors.Error]:
    """Turns a ``weightd_error*`` into a typed error and frees it; None for NULL."""
    if not pointer:
        return None
    lib = library()
    code = lib.weightd_error_code(pointer)
    fields = {
        name: (lib.weightd_error_field(pointer, name.encode()) or b"").decode("utf-8", "replace")
        for name in _FIELDS
    }
    lib.weightd_error_free(pointer)
    result_json = fields.pop("result")
    kind = errors.error_class(code, fields["reason"])
    return kind(
        fields.pop("message"),
        code=code,
        result=Ack.from_json(result_json) if result_json else None,
        **fields,
    )


def check(pointer: Optional[int]) -> None:
    """Raises the typed error behind a ``weightd_error*``, if it is one."""
    error = take_error(pointer)
    if error is not None:
        raise error


def take_string(pointer: Optional[int]) -> str:
    """Copies and frees a ``char*`` that the library handed out; empty for NULL."""
    if not pointer:
        return ""
    text = ctypes.string_at(pointer).decode("utf-8", "replace")
    library().weightd_string_free(pointer)
    return text


def close_handle(
    kind: str, handle: int, owner_pid: int, lock: threading.Lock, stop: Optional[threading.Event]
) -> None:
    """Closes an ``actor`` or ``engine`` in the process that opened it; a forked child does nothing.

    Runs as a finalizer, at exit too: threads that still use the handle are stopped first.
    """
    if os.getpid() != owner_pid:
        return
    lib = library()
    if stop is not None:
        stop.set()
    if kind == "actor":
        lib.weightd_actor_sync_cancel(handle)
    with lock:
        getattr(lib, f"weightd_{kind}_close")(handle)


def worker_number(worker: str) -> int:
    """WEIGHTD_WORKER_DAEMON or WEIGHTD_WORKER_SPAWN.

    Raises:
        errors.LayoutError: it is neither.
    """
    if worker not in WORKERS:
        raise errors.layout_error(
            f"unknown worker: {worker!r}", reason="CONFIG", remedy=f"one of {', '.join(WORKERS)}"
        )
    return WORKERS.index(worker)


def encode(text: Optional[str]) -> Optional[bytes]:
    """UTF-8 for the C ABI; None stays NULL."""
    return None if text is None else text.encode("utf-8")
