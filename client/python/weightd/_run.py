"""One sync of an actor in the native library, to its end, with the engines that it drives."""

from __future__ import annotations

import ctypes
import json
from typing import Any, Optional

from weightd import _native
from weightd._drive import Drive
from weightd.ack import Ack
from weightd.errors import Error

_SLICE_MS = 100
_ADMIT_SLICE_MS = 2  # how late engines learn that the daemon waits for them
_CANCEL_SLICES = 100


def run_sync(lib: Any, handle: int, options: _native.SyncOptions, drive: Optional[Drive]) -> Ack:
    """Runs one sync to its end. Leaves no sync running, whatever happens. Answers Ctrl-C.

    Args:
        lib: the native library.
        handle: of the actor.
        options: of the sync.
        drive: of the engines that this rank drives, or None.

    Raises:
        errors.Error: the sync failed, or a driven engine did.
    """
    ack: Optional[Ack] = None
    failure: Optional[Error] = None
    try:
        _native.check(lib.weightd_actor_sync_begin(handle, ctypes.byref(options)))
        while ack is None:
            begun = drive is None or drive.begun
            ack = _wait_slice(lib, handle, _SLICE_MS if begun else _ADMIT_SLICE_MS)
            if ack is None and drive is not None and drive.watch(_phase(lib, handle)):
                lib.weightd_actor_sync_cancel(handle)
    except Error as error:
        failure = error
    except BaseException:
        result = _cancel_and_drain(lib, handle)
        if drive is not None:
            drive.give_up(result)
        raise
    if drive is not None:
        return drive.conclude(ack, failure, require_all=options.require_replicas == 0)
    if failure is not None:
        raise failure
    assert ack is not None
    return ack


def _phase(lib: Any, handle: int) -> str:
    """The phase that the daemon last told, or an empty text."""
    state = json.loads(_native.take_string(lib.weightd_actor_state(handle)))
    return str(state.get("phase", ""))


def _wait_slice(lib: Any, handle: int, timeout_ms: int) -> Optional[Ack]:
    """Waits one slice, so that signals are answered; None while the sync runs."""
    result, error = ctypes.c_void_p(), ctypes.c_void_p()
    ended = lib.weightd_actor_sync_wait(
        handle, timeout_ms, ctypes.byref(result), ctypes.byref(error)
    )
    if not ended:
        return None
    text = _native.take_string(result.value)
    _native.check(error.value)
    return Ack.from_json(text)


def _cancel_and_drain(lib: Any, handle: int) -> Optional[Ack]:
    """Cancels the running sync and waits, for at most ten seconds, until it has ended."""
    lib.weightd_actor_sync_cancel(handle)
    for _ in range(_CANCEL_SLICES):
        try:
            ack = _wait_slice(lib, handle, _SLICE_MS)
        except Error as error:
            return error.result
        if ack is not None:
            return ack
    return None
