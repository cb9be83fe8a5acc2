"""vLLM as an `EngineClient`, however the user holds it. Only this file names vLLM's own calls.

Nothing here imports vLLM or Ray before a call needs them, and none of it runs in an engine.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from typing import Any, Callable, Coroutine, Optional, Sequence
from urllib.parse import urlencode, urlsplit

from weightd.engine_client import PauseMode
from weightd.errors import FAILED_PRECONDITION, EngineError, StateError, layout_error

BACKEND = "weightd"
# A method that weightd's plug-in adds to vLLM's workers.
_ENGINE_METHOD = "weightd_engine"
_PREFIX, _MULTIMODAL, _ENCODER = "prefix", "multimodal", "encoder"
_NOT_RESET = "vLLM did not reset its prefix cache: blocks are still held, e.g. by a KV connector"
_MOST_ERROR_TEXT = 500
# A server whose host is gone is noticed within these: idle, interval (seconds), count.
_KEEPALIVE = (5, 2, 3)


def check_config(vllm_config: Any) -> None:
    """Checks that an engine of this process was started for weightd.

    Raises:
        errors.EngineError: it has another weight-transfer backend, or none.
    """
    transfer = getattr(vllm_config, "weight_transfer_config", None)
    backend = getattr(transfer, "backend", None)
    if backend != BACKEND:
        raise EngineError(
            f"engine has another weight-transfer backend: backend={backend or 'none'}",
            code=FAILED_PRECONDITION,
            reason="ENGINE_REFUSED",
            remedy=f'start it with weight_transfer_config={{"backend": "{BACKEND}"}}',
        )


def _instance_name(vllm_config: Any) -> str:
    from weightd.vllm.settings import settings_of

    return settings_of(vllm_config).engine


def _is_multimodal(vllm_config: Any) -> bool:
    return bool(getattr(vllm_config.model_config, "is_multimodal_model", False))


class InProcessEngine:
    """A vLLM ``LLM``. Nobody may generate on another thread during a sync."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._config = llm.llm_engine.vllm_config
        self.engine = _instance_name(self._config)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Checks the configuration; needs no call to the engine."""
        check_config(self._config)

    def pause(self, mode: PauseMode) -> None:
        """Stops scheduling; level 0 leaves all memory where it is."""
        self._llm.sleep(level=0, mode=mode)

    def start_weight_update(self) -> None:
        """Opens an update."""
        self._llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Blocks until the daemon's outcome."""
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: Optional[str] = None) -> None:
        """Closes the update."""
        self._llm.finish_weight_update(weight_version)

    def reset_caches(self) -> Sequence[str]:
        """Resets what the engine has; running requests are computed anew."""
        if not self._llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True):
            raise RuntimeError(_NOT_RESET)
        if not _is_multimodal(self._config):
            return (_PREFIX,)
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()
        return (_PREFIX, _MULTIMODAL, _ENCODER)

    def resume(self) -> None:
        """Lets the scheduler go on."""
        self._llm.wake_up(tags=["scheduling"])

    def check_alive(self) -> None:
        """Raises if the engine's core process is dead: its calls then never return."""
        resources = getattr(self._llm.llm_engine.engine_core, "resources", None)
        if resources is not None and resources.engine_dead:
            raise RuntimeError("vLLM's engine core is dead")


class AsyncEngine:
    """A vLLM ``AsyncLLM`` of this process, called on its own event loop.

    Raises:
        errors.Error: its loop is not known yet.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._loop = _loop_of(llm)
        self.engine = _instance_name(llm.vllm_config)

    def check_caller(self) -> None:
        """Refuses a sync that would block the loop on which the engine has to answer."""
        if _running_loop() is self._loop:
            raise StateError(
                "sync() would block the event loop of the AsyncLLM that it drives",
                code=FAILED_PRECONDITION,
                reason="BUSY",
                remedy="call it as `await asyncio.to_thread(actor.sync)`",
            )

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Checks the configuration; needs no call to the engine."""
        check_config(self._llm.vllm_config)

    def pause(self, mode: PauseMode) -> None:
        """Stops generation; caches are reset after the commit."""
        self._run(lambda: self._llm.pause_generation(mode=mode, clear_cache=False))

    def start_weight_update(self) -> None:
        """Opens an update."""
        self._run(self._llm.start_weight_update)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Blocks until the daemon's outcome."""
        request = _update_request(update_info)
        self._run(lambda: self._llm.update_weights(request))

    def finish_weight_update(self, weight_version: Optional[str] = None) -> None:
        """Closes the update."""
        self._run(lambda: self._llm.finish_weight_update(weight_version))

    def reset_caches(self) -> Sequence[str]:
        """Resets what the engine has; running requests are computed anew."""
        return self._run(self._reset)

    def resume(self) -> None:
        """Lets generation go on."""
        self._run(self._llm.resume_generation)

    def check_alive(self) -> None:
        """Raises if the engine's core process is dead: its calls then never return."""
        if self._llm.errored:
            raise RuntimeError("vLLM's engine core is dead")

    async def _reset(self) -> Sequence[str]:
        if not await self._llm.reset_prefix_cache(
            reset_running_requests=True, reset_connector=True
        ):
            raise RuntimeError(_NOT_RESET)
        if not _is_multimodal(self._llm.vllm_config):
            return (_PREFIX,)
        await self._llm.reset_mm_cache()
        await self._llm.reset_encoder_cache()
        return (_PREFIX, _MULTIMODAL, _ENCODER)

    def _run(self, call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        if not self._loop.is_running():
            raise RuntimeError("the event loop of the AsyncLLM is not running")
        return asyncio.run_coroutine_threadsafe(call(), self._loop).result()


class HttpEngine:
    """A ``vllm serve`` with ``VLLM_SERVER_DEV_MODE=1``, by URL. One connection per call."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise layout_error(
                f"engine URL is not http://HOST:PORT: {url!r}",
                reason="CONFIG",
                remedy="pass the address of `vllm serve`, e.g. http://127.0.0.1:8000",
            )
        self.engine = ""
        self._secure = parts.scheme == "https"
        self._host = parts.netloc.rpartition("@")[2]
        self._path = parts.path.rstrip("/")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Checks that the server answers, has these routes and a weight-transfer engine."""
        self._post("init_weight_transfer_engine", body={"init_info": init_info})

    def identify(self) -> None:
        """Asks the workers who they are: the server may have been started anew."""
        answer = self._post("collective_rpc", body={"method": _ENGINE_METHOD})
        self.engine = _one_name(answer.get("results"))

    def pause(self, mode: PauseMode) -> None:
        """Stops generation; caches are reset after the commit."""
        self._post("pause", mode=mode, clear_cache="false")

    def start_weight_update(self) -> None:
        """Opens an update."""
        self._post("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Blocks until the daemon's outcome."""
        self._post("update_weights", body={"update_info": update_info})

    def finish_weight_update(self, weight_version: Optional[str] = None) -> None:
        """Closes the update."""
        body = None if weight_version is None else {"weight_version": weight_version}
        self._post("finish_weight_update", body=body)

    def reset_caches(self) -> Sequence[str]:
        """Resets every cache; names only the one whose reset the server confirms."""
        answer = self._post(
            "reset_prefix_cache", reset_running_requests="true", reset_external="true"
        )
        if not answer.get("success"):
            raise RuntimeError(_NOT_RESET)
        self._post("reset_mm_cache")
        self._post("reset_encoder_cache")
        return (_PREFIX,)

    def resume(self) -> None:
        """Lets generation go on."""
        self._post("resume")

    def _post(self, route: str, body: Optional[dict[str, Any]] = None, **query: str) -> dict:
        """Makes one request.

        Raises:
            errors.EngineError: the server does not have the route.
            RuntimeError: it answered with another failure; the message has its text.
            OSError, http.client.HTTPException: it is not there, or went away.
        """
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host)
        path = f"{self._path}/{route}" + (f"?{urlencode(query)}" if query else "")
        content = b"" if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            connection.connect()
            _keep_alive(connection.sock)
            connection.request("POST", path, content, headers)
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
        finally:
            connection.close()
        if response.status == 404:
            raise EngineError(
                f"server has no route POST {path}: host={self._host}",
                code=FAILED_PRECONDITION,
                reason="ENGINE_REFUSED",
                remedy="start `vllm serve` with VLLM_SERVER_DEV_MODE=1 in its environment",
            )
        if response.status != 200:
            raise RuntimeError(f"POST {path}: {response.status} {text[:_MOST_ERROR_TEXT]}")
        return _object(text)


class RayEngine:
    """A Ray handle of an actor that has the methods of ``AsyncLLM`` or of ``LLM``."""

    def __init__(self, handle: Any) -> None:
        self.engine = ""
        self._handle = handle
        self._asynchronous = hasattr(handle, "pause_generation")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Checks that the actor answers and has a weight-transfer engine."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self._get("init_weight_transfer_engine", WeightTransferInitRequest(init_info=init_info))

    def identify(self) -> None:
        """Asks the workers who they are: the actor may have been started anew."""
        self.engine = _one_name(self._get("collective_rpc", _ENGINE_METHOD))

    def pause(self, mode: PauseMode) -> None:
        """Stops generation; caches are reset after the commit."""
        if self._asynchronous:
            self._get("pause_generation", mode=mode, clear_cache=False)
        else:
            self._get("sleep", level=0, mode=mode)

    def start_weight_update(self) -> None:
        """Opens an update."""
        self._get("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Blocks until the daemon's outcome."""
        self._get("update_weights", _update_request(update_info))

    def finish_weight_update(self, weight_version: Optional[str] = None) -> None:
        """Closes the update."""
        self._get("finish_weight_update", weight_version)

    def reset_caches(self) -> Sequence[str]:
        """Resets every cache; names only the one whose reset the engine confirms."""
        if not self._get("reset_prefix_cache", True, True):
            raise RuntimeError(_NOT_RESET)
        for name in ("reset_mm_cache", "reset_encoder_cache"):
            if hasattr(self._handle, name):
                self._get(name)
        return (_PREFIX,)

    def resume(self) -> None:
        """Lets generation go on."""
        if self._asynchronous:
            self._get("resume_generation")
        else:
            self._get("wake_up", tags=["scheduling"])

    def _get(self, method: str, *args: Any, **kwargs: Any) -> Any:
        import ray

        return ray.get(getattr(self._handle, method).remote(*args, **kwargs))


def _one_name(names: Any) -> str:
    """The instance name that every rank of an engine gives; empty if they do not."""
    different = set(names) if isinstance(names, list) else set()
    return str(different.pop()) if len(different) == 1 else ""


def _update_request(update_info: dict[str, Any]) -> Any:
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    return WeightTransferUpdateRequest(update_info=update_info)


def _running_loop() -> Optional[asyncio.AbstractEventLoop]:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _loop_of(llm: Any) -> asyncio.AbstractEventLoop:
    """The loop on which an AsyncLLM lives: that of its output task, else the one running here."""
    handler = getattr(llm, "output_handler", None)
    loop = handler.get_loop() if handler is not None else _running_loop()
    if loop is None:
        raise StateError(
            "the event loop of the AsyncLLM is not known: it has not started on one yet",
            code=FAILED_PRECONDITION,
            reason="BUSY",
            remedy="make the AsyncLLM, or the Actor, inside of its event loop",
        )
    return loop


def _keep_alive(connection: socket.socket) -> None:
    idle, interval, count = _KEEPALIVE
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, count)


def _object(text: str) -> dict:
    try:
        value = json.loads(text) if text else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
