"""An engine with the protocol of `weightd.EngineClient` on a real engine rank, that does as told.

It behaves as vLLM with weightd's plug-in: its rank becomes quiescent inside of ``update_weights``,
which returns with the daemon's outcome, whatever that is.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Callable, Mapping, Optional, Sequence

import torch

from tests.support.llama_engine import empty_params
from weightd import EngineRank

_PREPARE_SECONDS = 5.0
_OUTCOME_SECONDS = 30.0
_STEP_SECONDS = 0.005
_MOVING = ("STAGING", "COMMITTING", "CATCHING_UP")

Script = Mapping[str, Callable[[], None]]


class ScriptedEngine:
    """One engine of one rank in this process.

    Attributes:
        calls: what was called, with arguments, in order; ``served`` after a successful resume.
        params: the rank's parameters.
        rank: the rank itself; None once it was closed by `die`.
    """

    def __init__(
        self, address: str, model: str, engine: str, config: Any, script: Optional[Script] = None
    ) -> None:
        """Registers the rank.

        Args:
            address: of the daemon.
            model: key.
            engine: instance name.
            config: Hugging Face config of a Llama.
            script: what to do at the start of a call, by its name: raise, sleep, wait, ...
        """
        self.engine = engine
        self.calls: list[tuple] = []
        self.script: dict[str, Callable[[], None]] = dict(script or {})
        self.paused = False
        self._asked = threading.Event()
        self._answered = threading.Event()
        self.params = empty_params(config, 0, 1, torch.bfloat16)
        self.rank: Optional[EngineRank] = EngineRank(
            address,
            model=model,
            engine=engine,
            architecture="LlamaForCausalLM",
            config=config,
            params=self.params,
            quiesce=self._quiesce,
        )

    @property
    def names(self) -> list[str]:
        """Names of the calls so far."""
        return [call[0] for call in self.calls]

    def close(self) -> None:
        """Takes the rank away from the daemon."""
        if self.rank is not None:
            self.rank.close()
            self.rank = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Part of the protocol."""
        self._note("init_weight_transfer_engine", init_info)

    def pause(self, mode: str) -> None:
        """Part of the protocol."""
        self._note("pause", mode)
        self.paused = True

    def start_weight_update(self) -> None:
        """Part of the protocol."""
        self._answered.clear()
        self._note("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Lets the rank become quiescent; returns with the daemon's outcome."""
        self._note("update_weights", update_info)
        assert self.paused, "the daemon may write only while the engine is paused"
        self._asked.set()
        try:
            self._await_outcome(update_info["version"])
        finally:
            self._asked.clear()

    def finish_weight_update(self, weight_version: Optional[str] = None) -> None:
        """Part of the protocol."""
        self._note("finish_weight_update", weight_version)

    def reset_caches(self) -> Sequence[str]:
        """Part of the protocol."""
        self._note("reset_caches")
        return () if "no reset" in self.script else ("prefix",)

    def resume(self) -> None:
        """Part of the protocol."""
        self._note("resume")
        assert self.rank is not None
        self.rank.check()
        self.paused = False
        self.calls.append(("served", self.rank.version))

    def _note(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        self.script.get(name, lambda: None)()

    def _quiesce(self) -> None:
        """The daemon's Prepare: answered once ``update_weights`` was called."""
        try:
            while not self._asked.wait(_STEP_SECONDS):
                if self.rank is None or self.rank.state.get("pending") != "prepare":
                    raise RuntimeError("the attempt ended before update_weights was called")
            self.script.get("quiesce", lambda: None)()
        finally:
            self._answered.set()

    def _await_outcome(self, version: int) -> None:
        assert self.rank is not None
        if self._holds(version):
            return
        if not self._answered.wait(_PREPARE_SECONDS):
            return
        deadline = time.monotonic() + _OUTCOME_SECONDS
        while time.monotonic() < deadline and self.rank is not None:
            state = self.rank.state
            if state.get("state") not in _MOVING and not state.get("pending"):
                return
            time.sleep(_STEP_SECONDS)

    def _holds(self, version: int) -> bool:
        state = self.rank.state if self.rank is not None else {}
        return state.get("state") == "SERVING" and state.get("version") == version
