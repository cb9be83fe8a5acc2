"""vLLM's side of backend ``weightd``: one worker lends its parameters and is driven by the daemon.

Life of a sync as one worker sees it: vLLM calls `start_weight_update` and `update_weights` on every
worker; from then on nobody reads the parameters, and the worker's `weightd.EngineRank` answers the
daemon's Prepare. The daemon's worker process writes the parameters, derived ones stage by stage; the
thread that waits in `update_weights` converts each stage before the next one is written, and the last
at Commit; the daemon's outcome ends `update_weights`.

vLLM's ``collective_rpc`` raises at the first rank that fails and leaves the other replies queued, so
that no method here raises: the outcome travels through the daemon. A worker whose memory may be torn
refuses to run the model.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any, Callable, Optional

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from weightd.engine import EngineRank
from weightd.errors import Error
from weightd.vllm import guard
from weightd.vllm.convert import Parameters
from weightd.vllm.model_facts import check_supported, coordinates, parameters_of, profile
from weightd.vllm.rank_state import code, error_text, reason, refusal, summary
from weightd.vllm.settings import settings_of
from weightd.vllm.shadow import traced_layout

logger = logging.getLogger("vllm.weightd")

_SLICE_SECONDS = 0.1
_LOST_SECONDS = 3.0
# google.rpc codes of a registration that will be refused again, whatever is waited for
_FINAL_CODES = (3, 5, 12)
_NO_RULE_FILE = ("UNKNOWN_ARCHITECTURE", "UNKNOWN_PROFILE")
_TRACE_SECONDS = 10.0  # for the daemon to take a traced registration


@dataclass
class WeightdInitInfo(WeightTransferInitInfo):
    """Nothing is agreed on at the start: address and model come from the engine's own settings."""


@dataclass
class WeightdUpdateInfo(WeightTransferUpdateInfo):
    """What the driver says with ``update_weights``: the model's key and the version."""

    model: str = ""
    version: int = 0


@dataclass
class _Job:
    """A conversion that the thread of the session has to run."""

    work: Callable[[], None]
    done: bool = False
    error: Optional[Exception] = None


@dataclass
class _Session:
    """A time in which nobody reads the parameters."""

    version: int = 0
    starting: bool = False  # vLLM has not begun to serve
    attempt: str = ""  # that was let in; "" until then
    offered: int = 0  # its version
    job: Optional[_Job] = None


class WeightdTransferEngine(WeightTransferEngine[WeightdInitInfo, WeightdUpdateInfo]):
    """Registered with vLLM's `WeightTransferEngineFactory` as ``weightd``; one per worker."""

    init_info_cls = WeightdInitInfo
    update_info_cls = WeightdUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        """Registers the worker's parameters and catches up, while vLLM starts.

        Args:
            config, vllm_config, device, model: as vLLM gives them.

        Raises:
            errors.Error: weightd cannot serve such an engine; vLLM's start fails.
        """
        super().__init__(config, vllm_config, device, model)
        check_supported(vllm_config)
        self._settings = settings_of(vllm_config)
        self._cv = threading.Condition()
        self._session: Optional[_Session] = None
        self._closing = False
        self._idle_seen = 0
        self._torn = ""
        self.parameters: Parameters = parameters_of(model, self._settings.stage_bytes)
        self._log_parameters()
        asked = self._settings.layout == "trace"
        self.rank = EngineRank(
            self._settings.address,
            model=self._settings.model,
            engine=self._settings.engine,
            architecture=self.model_config.hf_config.architectures[0],
            config=self.model_config.hf_config,
            params=self.parameters.pairs,
            kinds=self.parameters.kinds,
            stages=self.parameters.stages,
            convert=self._convert,
            stage_bytes=self._settings.stage_bytes,
            profile=profile(),
            layout=traced_layout(vllm_config) if asked else None,
            prefer_layout=asked,
            quiesce=self._quiesce,
            commit=self._commit,
            connect_timeout=-1.0,
            worker=self._settings.worker,
            **coordinates(vllm_config),
        )
        guard.install_in_worker()
        self._start()

    # ---- vLLM's calls; none of them raises

    def init_transfer_engine(self, init_info: WeightdInitInfo) -> None:
        """Nothing to do: the worker is registered since its model was loaded."""

    def start_weight_update(self) -> None:
        """Nothing to do: memory is given only in `update_weights`."""

    def finish_weight_update(self) -> None:
        """Nothing to do: derived parameters were converted at commit, before the acknowledgement."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Lends the parameters to the sync of one version until its outcome is known.

        Args:
            update_info: ``{"model": str, "version": int}``.
        """
        version, complaint = self._read(update_info)
        if complaint:
            logger.error("weightd: update_weights: %s", complaint)
        else:
            self._synchronize()  # kernels of the last step may still read
            self._run(_Session(version))
        self._agree()

    def receive_weights(self, update_info: WeightdUpdateInfo) -> None:
        """Not called: `update_weights` is overridden."""
        self.update_weights({"model": update_info.model, "version": update_info.version})

    def shutdown(self) -> None:
        """Takes the parameters back and leaves."""
        with self._cv:
            self._closing = True
            self._cv.notify_all()
        self.rank.close()

    # ---- the guard

    def refusal(self) -> str:
        """Why the model must not run: a failed sync may have torn its parameters; "" if it may."""
        return self._torn

    # ---- sessions, on vLLM's thread

    def _start(self) -> None:
        """Waits, before vLLM serves, for the registration to be taken and for a catch-up."""
        self._run(_Session(starting=True))
        self._trace_if_needed()
        self._agree()
        state = self.rank.state
        if state["registered"]:
            logger.info("weightd: %s", summary(self._settings, state))
        elif code(state) in _FINAL_CODES:
            self.rank.close()
            raise refusal(state["error"])
        else:
            logger.warning(
                "weightd: not registered yet, goes on in the background: %s", error_text(state)
            )

    def _trace_if_needed(self) -> None:
        """Registers again with a trace of vLLM's own loader if no rule file describes the model.

        Raises:
            errors.LayoutError: the loader cannot be traced; vLLM's start fails.
        """
        if self._settings.layout != "auto" or reason(self.rank.state) not in _NO_RULE_FILE:
            return
        try:
            layout = traced_layout(self.vllm_config)
        except Error:
            self.rank.close()
            raise
        self.rank.register_layout(layout)
        deadline = time.monotonic() + _TRACE_SECONDS
        while True:
            self._run(_Session(starting=True))
            # Until the daemon has answered, the state is the refusal of the registration before.
            if reason(self.rank.state) not in _NO_RULE_FILE or time.monotonic() > deadline:
                return
            time.sleep(_SLICE_SECONDS)

    def _run(self, session: _Session) -> None:
        """Keeps the parameters quiet until the session is over; converts when asked to."""
        begin = time.monotonic()
        with self._cv:
            self._session = session
            self._cv.notify_all()
        seen = 0
        try:
            while True:
                self._work(session)
                attempt = session.attempt
                why = self._over(session, attempt, time.monotonic() - begin)
                if why is not None and self._end(session, attempt):
                    break
                seen = self.rank.wait_change(seen, _SLICE_SECONDS)
        finally:
            with self._cv:
                self._session = None
                self._cv.notify_all()
        state = self.rank.state
        self._idle_seen = state["idle"]["count"]
        if session.attempt:
            self._torn = error_text(state) if state["dirty"] else ""
        if why:
            logger.warning("weightd: %s", why)

    def _end(self, session: _Session, attempt: str) -> bool:
        """Lets no attempt in any more, unless one was since ``attempt`` was looked at."""
        with self._cv:
            if session.attempt != attempt:
                return False
            self._session = None
            self._cv.notify_all()
            return True

    def _over(self, session: _Session, attempt: str, seconds: float) -> Optional[str]:
        """None while the session goes on; "" or why it brought no weights when it is over."""
        state = self.rank.state
        if attempt:
            if state["offered"]:
                return None
            brought = not state["dirty"] and state["version"] == session.offered
            return "" if brought else f"the sync brought no weights: {error_text(state)}"
        if session.starting:
            return self._start_over(state, seconds)
        idle = state["idle"]
        if idle["count"] > self._idle_seen and idle["version"] == session.version:
            return "" if not idle["error"] else f"no weights came: {idle['error']['message']}"
        if not state["connected"] and seconds > _LOST_SECONDS:
            return f"the daemon is gone: {error_text(state)}"
        if seconds > self._settings.update_timeout:
            return f"no sync of version {session.version} reached this engine in {seconds:.0f} s"
        return None

    def _start_over(self, state: dict[str, Any], seconds: float) -> Optional[str]:
        if state["pending"] or state["offered"]:
            return None
        if state["registered"] and state["idle"]["count"] > 0:
            return ""
        if code(state) in _FINAL_CODES:
            return ""
        limit = self._settings.start_timeout
        if not state["connected"]:
            limit = self._settings.connect_timeout
        return "" if seconds > limit else None

    def _work(self, session: _Session) -> None:
        """Runs the conversion that `_convert` or `_commit` waits for, if one does."""
        with self._cv:
            job = session.job
        if job is None or job.done:
            return
        try:
            with set_current_vllm_config(self.vllm_config):
                job.work()
            self._synchronize()
        except Exception as error:  # becomes the outcome of this replica
            logger.exception("weightd: cannot convert derived parameters")
            job.error = error
        with self._cv:
            job.done = True
            self._cv.notify_all()

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def _agree(self) -> None:
        """Makes all ranks of the replica refuse the model if one of them has to."""
        torn = guard.agree(bool(self._torn))
        if torn and not self._torn:
            self._torn = "another rank of this engine may hold torn parameters"

    def _read(self, update_info: Any) -> tuple[int, str]:
        """Version of an update, or what is wrong with it."""
        if not isinstance(update_info, dict) or not isinstance(update_info.get("version"), int):
            return 0, f'expected {{"model": str, "version": int}}, got {update_info!r}'
        model = update_info.get("model", self._settings.model)
        if model != self._settings.model:
            return 0, f"the sync is of model {model!r}, this engine is {self._settings.model!r}"
        return update_info["version"], ""

    # ---- the daemon's questions, on the thread of the EngineRank

    def _quiesce(self) -> None:
        """Returns when nobody reads the parameters any more.

        Raises:
            RuntimeError: vLLM did not call `update_weights` for this version.
        """
        state = self.rank.state
        attempt, version = state["attempt"], state["offered"]
        deadline = time.monotonic() + self._settings.quiesce_timeout
        with self._cv:
            while True:
                session = self._session
                if session is not None and (session.starting or session.version == version):
                    session.attempt, session.offered = attempt, version
                    return
                if self._closing:
                    raise RuntimeError("this vLLM is shutting down")
                if state["state"] == "CATCHING_UP":
                    raise RuntimeError("this vLLM serves already: it joins the next sync")
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"nobody called update_weights for version {version} within "
                        f"{self._settings.quiesce_timeout:g} s: pass engines=[...] to the Actor"
                    )
                self._cv.wait(_SLICE_SECONDS)
                now = self.rank.state
                if now["attempt"] != attempt or now["pending"] != "prepare":
                    raise RuntimeError("the sync ended before this engine was quiet")

    def _convert(self, stage: int) -> None:
        """Has a stage converted; returns when its buffers may be written again.

        Raises:
            Exception: what vLLM's post-load step raised.
        """
        self._have_done(lambda: self.parameters.convert(self.model_config, stage))

    def _commit(self) -> None:
        """Has the rest converted; returns when the engine would compute with the new weights.

        Raises:
            Exception: what vLLM's post-load step raised.
        """
        if self.parameters.finishes:
            self._have_done(lambda: self.parameters.finish(self.model_config))

    def _have_done(self, work: Callable[[], None]) -> None:
        """Has the thread of the session work on the parameters."""
        job = _Job(work)
        with self._cv:
            session = self._session
            if session is None:
                raise RuntimeError("update_weights ended before the commit")
            session.job = job
        self.rank.wake()
        with self._cv:
            self._cv.wait_for(lambda: job.done or self._session is not session)
        if job.error is not None:
            raise job.error
        if not job.done:
            raise RuntimeError("update_weights ended before derived parameters were converted")

    def _log_parameters(self) -> None:
        counts = self.parameters.counts()
        opaque = sorted(name for name, kind in self.parameters.kinds.items() if kind == "opaque")
        logger.info(
            "weightd: parameters: %d raw, %d derived (%.1f MB received in loadable layout, in %d "
            "stages through %.1f MB), %d opaque%s",
            counts["raw"],
            counts["derived"],
            self.parameters.staged_bytes() / 1e6,
            self.parameters.num_stages,
            self.parameters.arena_bytes() / 1e6,
            counts["opaque"],
            f" ({', '.join(opaque)})" if opaque else "",
        )
