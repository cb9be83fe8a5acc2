"""A trainer of one rank and scripted engines that it drives, beside a real daemon."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any, Callable

import pytest
import torch

from tests.support.cluster import Cluster
from tests.support.llama_engine import expected_params, first_difference, source_shapes
from tests.support.scripted_engine import ScriptedEngine
from weightd import Actor, EngineClient, errors

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 70,
    "tie_word_embeddings": False,
}
BEFORE_WRITING = ("pause", "start_weight_update", "update_weights")
AFTER_COMMIT = ("finish_weight_update", "reset_caches", "resume")
LIMIT_SECONDS = 5.0
UPDATE = {"model": "m", "version": 7}
_models = itertools.count()


def drive_client(client: EngineClient, mode: str = "abort") -> tuple[str, ...]:
    """Makes all calls of a sync that commits `UPDATE`; returns the caches that were reset."""
    getattr(client, "identify", lambda: None)()
    client.pause(mode)  # type: ignore[arg-type]
    client.start_weight_update()
    client.update_weights(dict(UPDATE))
    client.finish_weight_update("7")
    caches = tuple(client.reset_caches())
    client.resume()
    return caches


def boom() -> None:
    """Fails a call."""
    raise RuntimeError("boom")


class Rig:
    """A trainer of one rank and the engines that it drives."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.model = f"drive-{next(_models)}"
        self.engines: list[ScriptedEngine] = []
        torch.manual_seed(5)
        self.source = {name: torch.randn(shape) for name, shape in source_shapes(CONFIG).items()}
        self.actor: Actor

    def engine(self, name: str = "e0", **script: Callable[[], None]) -> ScriptedEngine:
        """Adds an engine."""
        engine = ScriptedEngine(self.cluster.address, self.model, name, CONFIG, script)
        self.engines.append(engine)
        return engine

    def open(self, **options: Any) -> Actor:
        """Makes the trainer, which drives all engines added so far unless told otherwise."""
        options = {"engines": self.engines, "rank": 0, "world_size": 1, **options}
        self.actor = Actor(self.cluster.address, model=self.model, **options)
        self.actor.register(self.source)
        return self.actor

    def holds(self, engine: ScriptedEngine) -> list[str]:
        """How the engine's memory differs from the trainer's."""
        expected = expected_params(CONFIG, self.source, 0, 1, torch.bfloat16)
        return [
            f"{name}: {difference}"
            for name, tensor in expected.items()
            if (difference := first_difference(engine.params[name], tensor))
        ]

    def fails(self, version: int, **options: Any) -> errors.Error:
        """Syncs, expects an error in time, and returns it."""
        start = time.monotonic()
        with pytest.raises(errors.Error) as caught:
            self.actor.sync(version, **options)
        assert time.monotonic() - start < LIMIT_SECONDS
        return caught.value

    def close(self) -> None:
        """Closes engines and trainer."""
        for engine in self.engines:
            engine.close()
        if hasattr(self, "actor"):
            self.actor.close()


class Killed:
    """Calls to an engine whose ranks live in a process that a test kills."""

    engine = "killed"

    def __init__(self) -> None:
        self.names: list[str] = []
        self.gone = threading.Event()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name in ("identify", "check_alive", "check_caller"):
            raise AttributeError(name)

        def call(*arguments: Any) -> None:
            self.names.append(name)
            if name == "update_weights":
                self.gone.wait(20)
            if self.gone.is_set():
                raise ConnectionResetError("the engine is gone")

        return call
