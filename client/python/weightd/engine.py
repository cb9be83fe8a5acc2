"""A rank of an inference engine: lends its parameters and is then driven by the daemon."""

from __future__ import annotations

import ctypes
import json
import os
import threading
import time
import weakref
from types import TracebackType
from typing import Any, Iterable, Mapping, Optional, Union

from weightd import _memory, _native, _pull
from weightd._callbacks import Callbacks, Commit, Convert, Quiesce
from weightd._params import (
    OPAQUE,
    checked,
    config_json,
    kind_numbers,
    param_array,
    stage_numbers,
)
from weightd._registration import Layout, register
from weightd._source import named_pairs
from weightd.errors import (
    DEADLINE_EXCEEDED,
    FAILED_PRECONDITION,
    DeadlineError,
    PoisonedError,
    StateError,
    state_error,
)
from weightd.traced import TracedLayout

_SLICE_MS = 100


class EngineRank:
    """One rank of an engine that weightd writes into.

    Args:
        address: ``unix:/path`` or ``host:port``; None reads ``WEIGHTD_ADDRESS``, then the default.
        model: key of the model; the trainer uses the same.
        engine: instance name, shared by the ranks of one engine and kept over restarts.
        architecture: Hugging Face architecture, e.g. ``LlamaForCausalLM``.
        config: Hugging Face config, a mapping or an object with ``to_dict()``.
        params: (name, tensor) pairs or a mapping of this rank's parameters, in the engine's
            layout, all on the CPU or all on one GPU. CPU storages move into shared memory in place,
            GPU memory is lent where it lies. Names that share storage, offset and shape are
            registered as one parameter with aliases. References are kept.
        kinds: what the engine does with a parameter after loading, by name: ``"raw"`` (the
            default; it computes with these bytes), ``"derived"`` (these bytes are converted in
            ``commit`` or ``convert``; they are lent in loadable layout and, with at most one stage,
            must stay as they were transferred) or ``"opaque"`` (not weightd's: listed, not lent).
        stages: of derived parameters, by name, from 1 without gaps: a sync receives one stage
            after the other, so that parameters of different stages may lie in the same memory.
            With several this rank neither catches up from a peer nor serves one as a source.
        profile: naming and merging convention of the engine.
        layout: for a model that no rule file describes, what `weightd.trace.trace_loader` found,
            or a function that finds it. A rule file that describes (architecture, profile) wins; a
            function is only called where none does; in the background (``connect_timeout`` < 0),
            and with ``prefer_layout``, it is called at once.
        prefer_layout: use ``layout`` although a rule file describes the model.
        tp_rank, tp_size, pp_rank, pp_size, ep_rank, ep_size, dp_rank: coordinates of this rank.
        quiesce: called on a thread of this object before memory is written; returns when nobody
            reads the parameters any more. Raising leaves this replica untouched.
        commit: called on the same thread after verification; returns names of caches that were
            reset, or None. Raising poisons the replica. With neither callback both are answered
            at once, without Python.
        convert: called on the same thread with every stage in turn, once it is verified: converts
            what was received, whose memory is written again as soon as this returns. For the last
            stage it is called right before ``commit``. Raising poisons the replica.
        stage_bytes: most bytes of memory for parameters that no worker can map (sleep mode,
            ``cudaMallocAsync``, NumPy-backed, pinned): they are received there, in as many stages
            as it takes, copied and compared. Taken only if there are any; 0 refuses them.
        connect_timeout: seconds to wait for the daemon; negative goes on in the background.
        device: that holds this rank's parameters, by the daemon's name: ``host``, ``host.1`` or a
            GPU's UUID; None is ``host``.
        worker: ``daemon`` or ``spawn``: who starts the worker of that device, as for `Actor`.

    Raises:
        errors.UnavailableError: no daemon answers, or there is no program to spawn.
        errors.LayoutError: unknown architecture, profile or device, a parameter no rule covers,
            bad shapes, stages with a gap or that nobody converts.
        errors.UnsupportedError: memory that can neither be lent nor pulled.
        errors.SharedMemoryError, errors.ResourceError: /dev/shm, descriptors or GPU memory for the
            stages; nothing was written.
    """

    def __init__(
        self,
        address: Optional[str] = None,
        *,
        model: str,
        engine: str,
        architecture: str,
        config: Any,
        params: Union[Mapping[str, Any], Iterable[tuple[str, Any]]],
        kinds: Optional[Mapping[str, str]] = None,
        profile: str = "vllm-0.32",
        tp_rank: int = 0,
        tp_size: int = 1,
        pp_rank: int = 0,
        pp_size: int = 1,
        ep_rank: int = 0,
        ep_size: int = 1,
        dp_rank: int = 0,
        layout: Optional[Layout] = None,
        prefer_layout: bool = False,
        quiesce: Optional[Quiesce] = None,
        commit: Optional[Commit] = None,
        stages: Optional[Mapping[str, int]] = None,
        convert: Optional[Convert] = None,
        stage_bytes: int = _pull.STAGE_BYTES,
        connect_timeout: float = 10.0,
        device: Optional[str] = None,
        worker: str = "daemon",
    ) -> None:
        self._lib = _native.library()
        pairs = named_pairs(params)
        numbers = kind_numbers(pairs, kinds or {})
        places = stage_numbers(pairs, stages or {})
        callbacks = Callbacks(quiesce, commit, convert, max(places, default=0))
        callbacks.check()
        described = [
            checked(name, tensor, number) for (name, tensor), number in zip(pairs, numbers)
        ]
        if callable(layout) and (prefer_layout or connect_timeout < 0):
            layout = layout()
        lent = [i for i, kind in enumerate(numbers) if kind != OPAQUE]
        shared = _memory.share([pairs[i] for i in lent])
        self._pull = _pull.plan(pairs, lent, places, shared, stage_bytes)
        if self._pull is not None:
            shared |= _memory.share([("stages", self._pull.memory)])
            callbacks = _pull.callbacks_with(self._pull, callbacks)
        options = _native.EngineOptions(
            address=_native.encode(address),
            model=_native.encode(model),
            engine=_native.encode(engine),
            tp_rank=tp_rank,
            tp_size=tp_size,
            pp_rank=pp_rank,
            pp_size=pp_size,
            ep_rank=ep_rank,
            ep_size=ep_size,
            dp_rank=dp_rank,
            architecture=_native.encode(architecture),
            profile=_native.encode(profile),
            config_json=_native.encode(config_json(config)),
            auto_quiesce=int(not callbacks.any),
            connect_timeout_ms=_timeout_ms(connect_timeout),
            device=_native.encode(device),
            worker=_native.worker_number(worker),
        )
        handle = ctypes.c_void_p()
        _native.check(self._lib.weightd_engine_open(ctypes.byref(options), ctypes.byref(handle)))
        self._handle: int = handle.value or 0
        self._pid = os.getpid()
        self._params = pairs
        self._lock = threading.Lock()  # one native call at a time, except state
        self._changed = threading.Condition()
        self._changes = 0  # guarded by _changed
        self._stop = threading.Event()
        self._thread: Optional[threading.Thread] = None
        self._counter = 0
        self._close = weakref.finalize(
            self,
            _native.close_handle,
            "engine",
            self._handle,
            self._pid,
            self._lock,
            self._stop,
        )
        try:
            self._array = param_array(described, pairs, shared, numbers, places, self._pull)
            register(self._lib, self._handle, self._array, len(pairs), layout, prefer_layout)
        except BaseException:
            self._close()
            raise
        if callbacks.any:
            self._start_thread(callbacks)

    @property
    def state(self) -> dict[str, Any]:
        """Present state: connected, registered, state, version, dirty, attempt, pending, error."""
        self._check_usable()
        return json.loads(_native.take_string(self._lib.weightd_engine_state(self._handle)))

    @property
    def version(self) -> int:
        """The version that this rank's memory holds; 0 when none."""
        return int(self.state.get("version", 0))

    @property
    def ready(self) -> bool:
        """True if this rank holds exactly the published version and serves it."""
        state = self.state
        return state.get("state") == "SERVING" and not state.get("dirty", False)

    def check(self) -> None:
        """Call before every model step: refuses to run on memory that may be torn.

        Raises:
            errors.PoisonedError: a failed sync may have torn the parameters.
        """
        state = self.state
        if state.get("state") == "POISONED":
            raise PoisonedError(
                f"a failed sync may have torn the parameters: {_error_text(state)}",
                code=FAILED_PRECONDITION,
                reason="POISONED",
                remedy="sync a newer version, or the same one again, before the engine serves",
            )

    def wait(
        self,
        version: Optional[int] = None,
        state: Optional[str] = None,
        timeout: Optional[float] = None,
    ) -> dict[str, Any]:
        """Waits until the rank serves ``version`` or newer, or is in ``state``. Answers Ctrl-C.

        Args:
            version: wait until this version, or a newer one, is served.
            state: wait for this engine state, e.g. ``"REGISTERED"``; with neither, for ``SERVING``.
            timeout: seconds; None waits without limit.

        Returns:
            The state as in `state`.

        Raises:
            errors.DeadlineError: not reached in time; the message has the last state.
        """
        wanted = state if state is not None else "SERVING"
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            now = self.state
            if now.get("state") == wanted and (version is None or now.get("version", 0) >= version):
                return now
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise DeadlineError(
                    f"engine rank did not reach state={wanted}, version={version} within "
                    f"{timeout} s: state={now.get('state')}, version={now.get('version')}, "
                    f"error={_error_text(now)}",
                    code=DEADLINE_EXCEEDED,
                    reason="DEADLINE",
                    remedy="look at `weightctl status`; a trainer has to sync first",
                )
            self._wait_slice(_SLICE_MS if left is None else min(_SLICE_MS, int(left * 1000) + 1))

    def wait_change(self, since: int, timeout: float) -> int:
        """Waits until the state may have changed, or `wake` was called, since ``since`` was told.

        Args:
            since: what the last call returned; 0 at first.
            timeout: seconds.

        Returns:
            A counter for the next call.
        """
        if self._thread is None:
            self._wait_slice(max(1, int(timeout * 1000)))
        with self._changed:
            self._changed.wait_for(lambda: self._changes != since, timeout)
            return self._changes

    def wake(self) -> None:
        """Ends every `wait_change`."""
        with self._changed:
            self._changes += 1
            self._changed.notify_all()

    def register_layout(self, layout: TracedLayout, prefer: bool = False) -> None:
        """Registers again, with a trace. Waits for the daemon unless it is in the background.

        Args:
            layout: what `weightd.trace.trace_loader` found for this rank.
            prefer: use it although a rule file describes the model.

        Raises:
            errors.LayoutError: it is not a trace of these parameters.
        """
        with self._lock:
            self._check_usable()
            count = len(self._params)
            register(self._lib, self._handle, self._array, count, layout, prefer)

    def close(self) -> None:
        """Takes the parameters back and leaves. Idempotent."""
        if not self._close.alive or os.getpid() != self._pid:
            return
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._close()
        self._params = []
        self._pull = None

    def __enter__(self) -> EngineRank:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()

    def _start_thread(self, callbacks: Callbacks) -> None:
        """Answers the daemon on a thread that keeps no reference to this object while it waits."""
        self._thread = threading.Thread(
            target=_serve_callbacks,
            args=(weakref.ref(self), callbacks),
            name="weightd-engine",
            daemon=True,
        )
        self._thread.start()

    def _wait_slice(self, timeout_ms: int) -> None:
        """Waits for a change of state, or for the timeout."""
        if self._thread is not None and self._thread is not threading.current_thread():
            with self._changed:
                self._changed.wait(timeout_ms / 1000)
            return
        with self._lock:
            self._check_usable()
            before = self._counter
            self._counter = self._lib.weightd_engine_wait(self._handle, before, timeout_ms)
        if self._counter != before:
            self.wake()

    def _answer(self, callbacks: Callbacks) -> None:
        """Runs the callback that the daemon waits for, if it waits for one, and reports."""
        with self._lock:
            state = self.state
        pending = state.get("pending", "")
        if pending == "prepare":
            self._tell(self._lib.weightd_engine_quiesced, callbacks.stop())
        elif pending == "convert":
            failure = callbacks.take(state["stage"])
            self._tell(self._lib.weightd_engine_converted, failure)
        elif pending == "commit":
            caches, failure = callbacks.finish()
            names = ",".join(caches or ()) or None
            self._tell(self._lib.weightd_engine_committed, names, failure)

    def _tell(self, function: Any, *texts: Optional[str]) -> None:
        """Answers the daemon; that it has stopped waiting meanwhile is no error."""
        with self._lock:
            self._check_usable()
            _native.take_error(function(self._handle, *map(_native.encode, texts)))

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise state_error(
                "the engine rank was made before fork()",
                reason="FORKED",
                remedy="make the EngineRank in the process that holds the parameters",
            )
        if not self._close.alive:
            raise state_error(
                "the engine rank is closed", reason="CLOSED", remedy="make a new EngineRank"
            )


def _serve_callbacks(engine_ref: weakref.ref[EngineRank], callbacks: Callbacks) -> None:
    while True:
        engine = engine_ref()
        if engine is None or engine._stop.is_set():
            return
        try:
            engine._wait_slice(_SLICE_MS)
            engine._answer(callbacks)
        except StateError:  # closed meanwhile
            return
        del engine


def _error_text(state: Mapping[str, Any]) -> str:
    error = state.get("error") or "none"
    return error.get("message", "") if isinstance(error, Mapping) else str(error)


def _timeout_ms(seconds: float) -> int:
    return -1 if seconds < 0 else max(1, int(seconds * 1000))
