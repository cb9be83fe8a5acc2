"""Drives engines through a sync: pause, start, update, finish, reset caches, resume.

Each engine has a thread of its own during a sync, since its calls block. The thread of ``sync()``
follows the daemon, tells the engines' threads when to begin and how the sync ended, and never waits
for a call without limit. No engine is paused before the daemon has proved the plan.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Optional, Sequence

from weightd.ack import Ack, EngineDrive
from weightd.engine_client import EngineClient, PauseMode
from weightd.errors import DEADLINE_EXCEEDED, NOT_FOUND, UNAVAILABLE, EngineError, Error

_PREPARE = "prepare"
_BEGUN = frozenset({_PREPARE, "transfer", "verify", "commit", "report"})
# The daemon learns of a dead engine by itself and then names it, or goes on without it.
_GRACE_SECONDS = 2.0
_ALIVE_SECONDS = 0.05
_WAIT_SLICE_SECONDS = 0.05
# How long the error of an engine that failed already is held back to close its update.
_CLOSE_SECONDS = 0.5


class DrivenEngine:
    """An engine over many syncs.

    Attributes:
        client: the calls.
        label: for messages: instance name, URL or type.
        busy: name of a call of an earlier sync that has not returned; empty if there is none.
    """

    def __init__(self, client: EngineClient, label: str, name: str = "") -> None:
        self.client = client
        self.label = label
        self.busy = ""
        self._name = name

    @property
    def name(self) -> str:
        """Instance name under which the engine is registered; empty if it is not known."""
        return self._name or str(getattr(self.client, "engine", None) or "")

    def owns(self, engine: str) -> bool:
        """Whether a replica's instance name is this engine's; vLLM marks data-parallel ones."""
        name = self.name
        return not name or engine == name or engine.startswith(f"{name}_dp")

    def check_caller(self) -> None:
        """Raises if a sync on this thread would keep the engine from answering."""
        check = getattr(self.client, "check_caller", None)
        if check is not None:
            check()

    def check_alive(self) -> None:
        """Returns at once; raises if the client can tell that the engine is dead."""
        check = getattr(self.client, "check_alive", None)
        if check is not None:
            check()


@dataclass(frozen=True)
class DriveSettings:
    """How engines are driven.

    Attributes:
        pause_mode: what happens to requests in flight.
        reset_caches: drop what was computed with older weights before the engine resumes.
        timeout: seconds that a call may take, and ranks to become quiescent; draining by pause mode
            ``wait`` and the transfer itself are bounded by the daemon's deadlines instead.
    """

    pause_mode: PauseMode = "abort"
    reset_caches: bool = True
    timeout: float = 4.0


@dataclass
class _Failure:
    call: str
    text: str
    at: float
    phase: str
    hung: bool
    cause: Optional[BaseException]


@dataclass
class _Run:
    """One engine in one sync. Guarded by the drive's condition."""

    engine: DrivenEngine
    call: str = ""  # running now
    since: float = 0.0
    calls: dict[str, float] = field(default_factory=dict)
    failure: Optional[_Failure] = None
    paused_at: float = 0.0
    pause: float = 0.0
    caches: tuple[str, ...] = ()
    resumed: bool = False
    abandoned: bool = False  # nobody waits for the running call any more
    done: bool = False


class Drive:
    """One sync of all driven engines.

    Thread safety: `watch`, `conclude` and `give_up` are for the thread of ``sync()``.
    """

    def __init__(
        self, engines: Sequence[DrivenEngine], settings: DriveSettings, model: str, version: int
    ) -> None:
        self._settings = settings
        self._model = model
        self._version = version
        self._changed = threading.Condition()
        self._phase = ""
        self._begun = False
        self._ended = False
        self._result: Optional[Ack] = None
        self._blame: Optional[_Run] = None
        self._next_alive = 0.0
        self._runs = [_Run(engine) for engine in engines]
        for run in self._runs:
            with self._changed:
                if run.engine.busy:
                    self._fail(run, run.engine.busy, "the call of an earlier sync has not returned")
                    run.done = True
                    continue
            threading.Thread(
                target=self._thread, args=(run,), name=f"weightd-{run.engine.label}", daemon=True
            ).start()

    @property
    def begun(self) -> bool:
        """True once the engines' threads were told to begin."""
        return self._begun

    def watch(self, phase: str) -> bool:
        """Takes notice of the daemon's phase and of engines that fail or hang.

        Returns:
            True, once, if the sync has to be cancelled: the daemon waits for an engine in vain.
        """
        with self._changed:
            self._phase = phase
            if phase in _BEGUN and not self._begun:
                self._begun = True
                self._changed.notify_all()
            self._find_hung()
            if phase != _PREPARE or self._blame is not None:
                return False
            self._blame = self._find_blame()
            return self._blame is not None

    def _find_blame(self) -> Optional[_Run]:
        """The engine for which the daemon waits in vain, if there is one. Needs the condition."""
        failed = [run for run in self._runs if run.failure is not None]
        hung = [run for run in failed if run.failure is not None and run.failure.hung]
        if hung or not failed:
            return hung[0] if hung else None
        others = [run for run in self._runs if run.failure is None]
        if any(run.call != "update_weights" for run in others):
            return None  # the daemon waits for these, whether or not it does for the failed one
        quiet = max([run.since for run in others], default=0.0)
        first = failed[0]
        assert first.failure is not None
        waited = time.monotonic() - max(first.failure.at, quiet)
        return first if waited > _GRACE_SECONDS else None

    def conclude(self, ack: Optional[Ack], error: Optional[Error], require_all: bool) -> Ack:
        """Lets the engines finish after the daemon's answer, and joins both outcomes.

        Returns:
            The acknowledgement with what was done to every engine.

        Raises:
            errors.Error: the daemon's error, which wins, or the engine's for which the sync was
                cancelled, or the one of an engine that committed and does not serve.
        """
        result = ack if error is None else error.result
        self._end(result, begin=error is None)
        with self._changed:
            drives = tuple(self._report(run) for run in self._runs)
            failed = [run for run in self._runs if run.failure is not None]
            if result is not None:
                result = replace(result, engines=drives)
            if error is not None:
                if result is not None:
                    error.result = result
                if self._blame is not None and error.reason == "CANCELLED":
                    raise self._error(self._blame, result) from error
                if failed:
                    raise error from self._error(failed[0], result)
                raise error
            assert result is not None
            for run in self._runs:
                if not run.resumed and (require_all or self._committed(run)):
                    raise self._error(run, result)
            return result

    def give_up(self, result: Optional[Ack]) -> None:
        """Lets the engines finish after an interrupted sync; what failed there is not told."""
        self._end(result, begin=False)

    def _end(self, result: Optional[Ack], begin: bool) -> None:
        """Tells the outcome and waits until every engine has finished or is given up."""
        with self._changed:
            self._ended, self._result = True, result
            self._begun = self._begun or begin
            self._changed.notify_all()
            now = time.monotonic()
            for run in self._runs:  # what was bounded by the daemon is bounded from here on
                if not self._limited(run.call, ended=False):
                    run.since = now
            while not all(run.done or run.abandoned for run in self._runs):
                self._changed.wait(_WAIT_SLICE_SECONDS)
                self._find_hung()

    def _thread(self, run: _Run) -> None:
        try:
            self._sequence(run)
        finally:
            with self._changed:
                run.done = True
                run.engine.busy = ""
                self._changed.notify_all()

    def _sequence(self, run: _Run) -> None:
        """All calls to one engine. After a failure an open update is closed and nothing resumes."""
        client = run.engine.client
        identify = getattr(client, "identify", None)
        if identify is not None and not self._call(run, "identify", identify):
            return
        with self._changed:
            self._changed.wait_for(lambda: self._begun or self._ended)
            if not self._begun:
                return
            run.paused_at = time.monotonic()
        if not self._call(run, "pause", client.pause, self._settings.pause_mode):
            return
        with self._changed:
            if self._ended and not self._committed(run):
                return
        if self._call(run, "start_weight_update", client.start_weight_update):
            info = {"model": self._model, "version": self._version}
            self._call(run, "update_weights", client.update_weights, info)
        with self._changed:
            self._changed.wait_for(lambda: self._ended or run.failure is not None)
            serves = run.failure is None and self._committed(run)
        # Also after a failure: an update that stays open would refuse the next start.
        version = str(self._version) if serves else None
        self._call(run, "finish_weight_update", client.finish_weight_update, version)
        if not serves or run.failure is not None:
            return
        if self._settings.reset_caches and not self._call(run, "reset_caches", self._reset, run):
            return
        if self._call(run, "resume", client.resume):
            with self._changed:
                run.resumed = True
                run.pause = time.monotonic() - run.paused_at

    def _reset(self, run: _Run) -> None:
        names = tuple(run.engine.client.reset_caches())
        if not names:
            raise RuntimeError("no cache was reset although reset_caches was asked for")
        run.caches = names

    def _call(self, run: _Run, name: str, function: Callable[..., Any], *args: Any) -> bool:
        """Makes one call. Returns whether all has gone well so far."""
        with self._changed:
            run.call, run.since = name, time.monotonic()
            run.engine.busy = name
            start = run.since
        failure: Optional[BaseException] = None
        try:
            function(*args)
        except BaseException as error:  # the thread has to close the update
            failure = error
        with self._changed:
            run.calls[name] = time.monotonic() - start
            run.call = ""
            if failure is not None and run.failure is None:
                self._fail(run, name, f"{type(failure).__name__}: {failure}", cause=failure)
            self._changed.notify_all()
            return run.failure is None

    def _find_hung(self) -> None:
        """Marks calls that take too long and engines that are dead. Needs the condition."""
        now = time.monotonic()
        for run in self._runs:
            if run.done or run.abandoned or not run.call:
                continue
            limit = self._settings.timeout if run.failure is None else _CLOSE_SECONDS
            if self._limited(run.call, self._ended) and now - run.since > limit:
                self._fail(run, run.call, f"did not return within {limit:g} s", hung=True)
                run.abandoned = True
        if now >= self._next_alive:
            self._next_alive = now + _ALIVE_SECONDS
            self._find_dead()
        waiting = [run for run in self._runs if run.failure is None and not run.done]
        if self._phase != _PREPARE or self._ended or not waiting:
            return
        limit = self._settings.timeout
        if all(run.call == "update_weights" and now - run.since > limit for run in waiting):
            for run in waiting:
                text = f"its ranks did not become quiescent within {limit:g} s"
                self._fail(run, run.call, text, hung=True)

    def _find_dead(self) -> None:
        for run in self._runs:
            if run.done or run.abandoned or not run.call:
                continue
            try:
                run.engine.check_alive()
            except Exception as error:  # whatever the client makes of a dead engine
                self._fail(run, run.call, f"{type(error).__name__}: {error}", cause=error)
                run.abandoned = True

    def _limited(self, call: str, ended: bool) -> bool:
        """Whether the driver bounds a call; while a sync runs the daemon bounds some of them."""
        draining = call == "pause" and self._settings.pause_mode == "wait"
        return ended or not (draining or call == "update_weights")

    def _fail(
        self,
        run: _Run,
        call: str,
        text: str,
        hung: bool = False,
        cause: Optional[BaseException] = None,
    ) -> None:
        """Notes the first failure of an engine. Needs the condition."""
        if run.failure is None:
            run.failure = _Failure(call, text, time.monotonic(), self._phase, hung, cause)
            self._changed.notify_all()

    def _committed(self, run: _Run) -> bool:
        """Whether every replica of an engine holds the version; all replicas, if it has no name."""
        if self._result is None:
            return False
        replicas = [r for r in self._result.replicas if run.engine.owns(r.engine)]
        return bool(replicas) and all(replica.committed for replica in replicas)

    def _report(self, run: _Run) -> EngineDrive:
        failure = run.failure
        error = "" if failure is None else f"{failure.call}: {failure.text}"
        if not error and not run.resumed:
            error = "its replica did not commit"
        pause = run.pause
        if not run.resumed and run.paused_at:
            pause = time.monotonic() - run.paused_at
        return EngineDrive(
            engine=run.engine.label,
            pause=pause,
            resumed=run.resumed,
            caches_reset=run.caches,
            calls=dict(run.calls),
            error=error,
        )

    def _error(self, run: _Run, result: Optional[Ack]) -> EngineError:
        failure = run.failure
        if failure is None:
            return self._absent(run, result)
        holds = self._committed(run)
        error = EngineError(
            f"engine call failed: engine={run.engine.label}, call={failure.call}, "
            f"version={self._version}: {failure.text}",
            code=DEADLINE_EXCEEDED if failure.hung else UNAVAILABLE,
            reason="ENGINE_CALL",
            phase=failure.phase,
            peer=f"engine {run.engine.label}",
            remedy="look at the engine's log; "
            + ("it holds the version but " if holds else "it ")
            + "stays paused until the next sync of it succeeds",
            result=result,
        )
        error.__cause__ = failure.cause
        return error

    def _absent(self, run: _Run, result: Optional[Ack]) -> EngineError:
        """The error for an engine that was driven and has no replica in a sync that succeeded."""
        known = sorted({replica.engine for replica in result.replicas}) if result else []
        return EngineError(
            f"driven engine has no replica of the model: engine={run.engine.label}, "
            f"model={self._model}, registered={', '.join(known) or 'none'}",
            code=NOT_FOUND,
            reason="NO_ENGINE",
            peer=f"engine {run.engine.label}",
            remedy="start the engine with the same model key and daemon address",
            result=result,
        )
