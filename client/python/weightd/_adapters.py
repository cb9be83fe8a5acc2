"""Turns what the user passes as ``engines`` into engines that can be driven."""

from __future__ import annotations

import inspect
import threading
from typing import Any, Callable, Mapping, Sequence, Union

from weightd import _vllm_clients
from weightd._drive import DrivenEngine
from weightd.engine_client import EngineClient
from weightd.errors import (
    DEADLINE_EXCEEDED,
    UNAVAILABLE,
    UNIMPLEMENTED,
    EngineError,
    Error,
    UnsupportedError,
    layout_error,
)

Engines = Union[Sequence[Any], Mapping[str, Any]]


def take_over(engines: Engines, rank: int, timeout: float) -> list[DrivenEngine]:
    """Finds how each engine is driven and checks, on rank 0, that it can be.

    Args:
        engines: engines, or a mapping from the instance name of each.
        rank: of this trainer process; only rank 0 drives.
        timeout: seconds that the check of one engine may take.

    Raises:
        errors.LayoutError: ``engines`` is no list or mapping, or a URL is malformed.
        errors.UnsupportedError: an engine of no known kind, or in the process of another rank.
        errors.EngineError: an engine refuses, or does not answer.
    """
    if isinstance(engines, (str, bytes)) or not isinstance(engines, (Mapping, Sequence)):
        raise layout_error(
            f"engines is neither a list nor a mapping: {type(engines).__name__}",
            reason="CONFIG",
            remedy="pass engines=[engine], also for a single one",
        )
    pairs = list(engines.items()) if isinstance(engines, Mapping) else [("", e) for e in engines]
    if rank != 0:
        for _, engine in pairs:
            _check_elsewhere(engine, rank)
        return []
    driven = [_adapt(name, engine) for name, engine in pairs]
    for engine in driven:
        _check(engine, timeout)
    return driven


def _adapt(name: str, engine: Any) -> DrivenEngine:
    if isinstance(engine, str):
        client: EngineClient = _vllm_clients.HttpEngine(engine)
        label = engine
    elif _is_ray_handle(engine):
        client, label = _vllm_clients.RayEngine(engine), "Ray actor"
    elif isinstance(engine, EngineClient):
        client, label = engine, type(engine).__name__
    elif _is_async_llm(engine):
        client, label = _vllm_clients.AsyncEngine(engine), "AsyncLLM"
    elif _is_llm(engine):
        client, label = _vllm_clients.InProcessEngine(engine), "LLM"
    else:
        raise UnsupportedError(
            f"engine is of no known kind: {type(engine).__name__}",
            code=UNIMPLEMENTED,
            reason="DRIVER",
            remedy="pass a vLLM LLM or AsyncLLM, the URL of a `vllm serve`, a Ray handle, or an "
            "object with the methods of weightd.EngineClient",
        )
    known = name or str(getattr(client, "engine", None) or "")
    return DrivenEngine(client, known or label, name)


def _check(engine: DrivenEngine, timeout: float) -> None:
    try:
        _bounded(lambda: engine.client.init_weight_transfer_engine({}), timeout)
    except Error as error:
        error.peer = error.peer or f"engine {engine.label}"
        raise
    except Exception as cause:  # whatever the client makes of an engine that does not answer
        hung = isinstance(cause, TimeoutError)
        raise EngineError(
            f"engine cannot be driven: engine={engine.label}: {type(cause).__name__}: {cause}",
            code=DEADLINE_EXCEEDED if hung else UNAVAILABLE,
            reason="ENGINE_CALL",
            peer=f"engine {engine.label}",
            remedy="start the engine with weight-transfer backend weightd before the trainer, and "
            "look at its log",
        ) from cause


def _bounded(call: Callable[[], None], timeout: float) -> None:
    """Calls on a thread of its own, so that an engine that hangs does not hang the trainer."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # raised again by the caller
            failure.append(error)

    thread = threading.Thread(target=run, name="weightd-check", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise TimeoutError(f"init_weight_transfer_engine did not return within {timeout:g} s")
    if failure:
        raise failure[0]


def _check_elsewhere(engine: Any, rank: int) -> None:
    """Refuses an engine that nobody would drive: it lives in the process of another rank."""
    if _is_ray_handle(engine) or not (_is_async_llm(engine) or _is_llm(engine)):
        return
    raise UnsupportedError(
        f"only rank 0 drives engines, but this one lives in another: rank={rank}, "
        f"engine={type(engine).__name__}",
        code=UNIMPLEMENTED,
        reason="DRIVER",
        remedy="make it in the process of rank 0, or serve it and pass its URL",
    )


def _is_ray_handle(engine: Any) -> bool:
    return hasattr(getattr(engine, "start_weight_update", None), "remote")


def _is_async_llm(engine: Any) -> bool:
    return inspect.iscoroutinefunction(getattr(engine, "start_weight_update", None)) and hasattr(
        engine, "pause_generation"
    )


def _is_llm(engine: Any) -> bool:
    return hasattr(engine, "llm_engine") and hasattr(engine, "start_weight_update")
