"""What the user passes as ``engines``: which calls each kind of vLLM gets, and what is refused."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any, Iterator, Optional

import pytest

from tests.support.drive_rig import UPDATE, drive_client
from tests.support.fake_library import FakeLibrary
from weightd import Actor, errors
from weightd._adapters import take_over

def _config(backend: Optional[str] = "weightd", multimodal: bool = False) -> Any:
    return SimpleNamespace(
        weight_transfer_config=backend and SimpleNamespace(backend=backend),
        model_config=SimpleNamespace(is_multimodal_model=multimodal, served_model_name="m"),
        additional_config={"weightd": {"engine": "e7"}},
        instance_id="abcde",
    )


class FakeLLM:
    """The methods of `vllm.LLM` that weightd uses; records the calls."""

    def __init__(self, **config: Any) -> None:
        self.calls: list[tuple] = []
        self.reset = True
        self.resources = SimpleNamespace(engine_dead=False)
        self.llm_engine = SimpleNamespace(
            vllm_config=_config(**config),
            engine_core=SimpleNamespace(resources=self.resources),
            reset_encoder_cache=lambda: self.calls.append(("reset_encoder_cache",)),
        )

    def start_weight_update(self) -> None:
        self.calls.append(("start_weight_update",))

    def reset_prefix_cache(self, **options: bool) -> bool:
        self.calls.append(("reset_prefix_cache", options))
        return self.reset

    def __getattr__(self, name: str) -> Any:
        known = "sleep", "update_weights", "finish_weight_update", "wake_up", "reset_mm_cache"
        if name not in known:
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> None:
            self.calls.append((name, *args, *([kwargs] if kwargs else [])))

        return call


def test_llm_in_process_gets_its_own_calls() -> None:
    llm = FakeLLM()
    (engine,) = take_over([llm], 0, 1.0)
    assert llm.calls == [] and engine.label == "e7"
    assert drive_client(engine.client, "keep") == ("prefix",)
    assert llm.calls == [
        ("sleep", {"level": 0, "mode": "keep"}),
        ("start_weight_update",),
        ("update_weights", {"update_info": UPDATE}),
        ("finish_weight_update", "7"),
        ("reset_prefix_cache", {"reset_running_requests": True, "reset_connector": True}),
        ("wake_up", {"tags": ["scheduling"]}),
    ]
    engine.check_alive()
    llm.resources.engine_dead = True
    with pytest.raises(RuntimeError, match="dead"):
        engine.check_alive()


def test_caches_of_a_multimodal_model_are_reset_and_named() -> None:
    llm = FakeLLM(multimodal=True)
    (engine,) = take_over([llm], 0, 1.0)
    assert engine.client.reset_caches() == ("prefix", "multimodal", "encoder")
    assert [call[0] for call in llm.calls] == [
        "reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache",
    ]  # fmt: skip
    llm.reset = False
    with pytest.raises(RuntimeError, match="did not reset"):
        engine.client.reset_caches()


@pytest.mark.parametrize("backend", [None, "nccl"])
def test_llm_with_another_backend_is_refused_before_any_call(backend: Optional[str]) -> None:
    llm = FakeLLM(backend=backend)
    with pytest.raises(errors.EngineError, match=f"backend={backend or 'none'}") as caught:
        take_over([llm], 0, 1.0)
    assert caught.value.reason == "ENGINE_REFUSED" and '"backend": "weightd"' in caught.value.remedy
    assert llm.calls == []


class FakeAsyncLLM:
    """The methods of vLLM's ``AsyncLLM`` that weightd uses."""

    def __init__(self, loop: Optional[asyncio.AbstractEventLoop]) -> None:
        self.calls: list[tuple] = []
        self.errored = False
        self.vllm_config = _config()
        self.output_handler = SimpleNamespace(get_loop=lambda: loop) if loop else None

    async def _call(self, *call: Any) -> bool:
        await asyncio.sleep(0)
        self.calls.append(call)
        return True

    async def start_weight_update(self) -> None:
        await self._call("start_weight_update")

    async def update_weights(self, request: Any) -> None:
        await self._call("update_weights", request.update_info)

    async def finish_weight_update(self, version: Optional[str]) -> None:
        await self._call("finish_weight_update", version)

    async def pause_generation(self, **options: Any) -> None:
        await self._call("pause_generation", options)

    async def resume_generation(self) -> None:
        await self._call("resume_generation")

    async def reset_prefix_cache(self, **options: Any) -> bool:
        return await self._call("reset_prefix_cache", options)


@pytest.fixture
def vllm_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's request classes, without vLLM; tests/vllm has the real ones."""
    base = "vllm.distributed.weight_transfer.base"
    for depth in range(1, base.count(".") + 1):
        monkeypatch.setitem(sys.modules, ".".join(base.split(".")[:depth]), SimpleNamespace())
    requests = SimpleNamespace(
        WeightTransferUpdateRequest=SimpleNamespace, WeightTransferInitRequest=SimpleNamespace
    )
    monkeypatch.setitem(sys.modules, base, requests)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs on a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.usefixtures("vllm_requests")
def test_async_llm_is_called_on_its_own_loop(loop: asyncio.AbstractEventLoop) -> None:
    llm = FakeAsyncLLM(loop)
    (engine,) = take_over([llm], 0, 1.0)
    assert drive_client(engine.client, "wait") == ("prefix",)
    assert llm.calls == [
        ("pause_generation", {"mode": "wait", "clear_cache": False}),
        ("start_weight_update",),
        ("update_weights", UPDATE),
        ("finish_weight_update", "7"),
        ("reset_prefix_cache", {"reset_running_requests": True, "reset_connector": True}),
        ("resume_generation",),
    ]
    llm.errored = True
    with pytest.raises(RuntimeError, match="dead"):
        engine.check_alive()


def test_async_llm_without_a_loop_is_refused() -> None:
    with pytest.raises(errors.StateError, match="event loop") as caught:
        take_over([FakeAsyncLLM(None)], 0, 1.0)
    assert "inside of its event loop" in caught.value.remedy


def test_sync_on_the_loop_of_the_engine_is_refused(library: FakeLibrary) -> None:
    async def main() -> None:
        llm = FakeAsyncLLM(asyncio.get_running_loop())
        with Actor(model="m", rank=0, world_size=1, engines=[llm]) as actor:
            actor.register({})
            with pytest.raises(errors.StateError, match="would block the event loop") as caught:
                actor.sync()
            assert "to_thread" in caught.value.remedy
            assert library.syncs[-1]["refuse"] == "BUSY", "the other ranks have to hear of it"

    asyncio.run(main())


class _Handle:
    """A Ray handle: methods with ``remote``, only those that the actor has."""

    def __init__(self, *methods: str) -> None:
        self.calls: list[tuple] = []
        for name in methods:
            setattr(self, name, SimpleNamespace(remote=self._method(name)))

    def _method(self, name: str) -> Any:
        def remote(*args: Any, **kwargs: Any) -> tuple:
            plain = [getattr(a, "update_info", getattr(a, "init_info", a)) for a in args]
            self.calls.append((name, *plain, *([kwargs] if kwargs else [])))
            return ("ref", ["e7"] if name == "collective_rpc" else True)

        return remote


_UPDATES = (
    "init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update",
    "reset_prefix_cache", "collective_rpc",
)  # fmt: skip


@pytest.mark.usefixtures("vllm_requests")
@pytest.mark.parametrize(
    ("methods", "pause", "resume"),
    [
        (
            ("pause_generation", "resume_generation", "reset_mm_cache"),
            ("pause_generation", {"mode": "keep", "clear_cache": False}),
            [("reset_mm_cache",), ("resume_generation",)],
        ),
        (
            ("sleep", "wake_up"),
            ("sleep", {"level": 0, "mode": "keep"}),
            [("wake_up", {"tags": ["scheduling"]})],
        ),
    ],
)
def test_ray_handle_gets_the_calls_of_its_class(
    monkeypatch: pytest.MonkeyPatch, methods: tuple, pause: tuple, resume: list
) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda ref: ref[1]))
    handle = _Handle(*_UPDATES, *methods)
    (engine,) = take_over([handle], 0, 5.0)
    assert handle.calls == [("init_weight_transfer_engine", {})]
    assert drive_client(engine.client, "keep") == ("prefix",)
    assert handle.calls[1:] == [
        ("collective_rpc", "weightd_engine"),
        pause,
        ("start_weight_update",),
        ("update_weights", UPDATE),
        ("finish_weight_update", "7"),
        ("reset_prefix_cache", True, True),
        *resume,
    ]
    assert engine.name == "e7"


def test_engine_that_does_not_answer_is_given_up() -> None:
    class Slow:
        def __getattr__(self, name: str) -> Any:
            if name in ("engine", "identify", "check_alive", "check_caller"):
                raise AttributeError(name)
            return lambda *arguments: time.sleep(3)

    with pytest.raises(errors.EngineError, match="within 0.1 s") as caught:
        take_over({"slow": Slow()}, 0, 0.1)
    assert caught.value.code == errors.DEADLINE_EXCEEDED and caught.value.peer == "engine slow"


def test_what_is_no_engine_is_refused_with_what_would_be_one() -> None:
    with pytest.raises(errors.UnsupportedError, match="no known kind: object") as caught:
        take_over([object()], 0, 1.0)
    assert "weightd.EngineClient" in caught.value.remedy
    with pytest.raises(errors.LayoutError, match="neither a list nor a mapping") as refused:
        take_over("http://127.0.0.1:8000", 0, 1.0)
    assert "engines=[engine]" in refused.value.remedy


def test_other_ranks_ignore_what_rank_0_drives_but_not_engines_of_their_own() -> None:
    assert take_over(["http://127.0.0.1:9", _Handle(*_UPDATES)], 3, 1.0) == []
    for engine in (FakeLLM(), FakeAsyncLLM(None)):
        with pytest.raises(errors.UnsupportedError, match="rank=3") as caught:
            take_over([engine], 3, 1.0)
        assert "rank 0" in caught.value.remedy


def test_actor_checks_its_options_before_it_connects(library: FakeLibrary) -> None:
    with pytest.raises(errors.LayoutError, match="unknown pause mode") as caught:
        Actor(model="m", rank=0, world_size=1, pause_mode="stop")  # type: ignore[arg-type]
    assert "abort, wait, keep" in caught.value.remedy
    assert library.calls == []


def test_actor_is_closed_again_if_an_engine_refuses(library: FakeLibrary) -> None:
    with pytest.raises(errors.UnsupportedError):
        Actor(model="m", rank=0, world_size=1, engines=[object()])
    assert library.calls[-1] == "close"
