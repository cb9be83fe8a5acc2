"""vLLM's trainer interface on weightd, and what weightd adds to workers, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Iterator, Optional

import pytest
import torch
from torch import nn

from tests.support.fake_library import FakeLibrary
from weightd import errors

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.distributed.weight_transfer import (  # noqa: E402
    ModuleSource,
    ParamMeta,
    WeightSource,
    WeightTransferTrainerFactory,
)

from weightd.vllm import worker_calls  # noqa: E402
from weightd.vllm.trainer import WeightdTrainerEngine, WeightdTrainerInitInfo  # noqa: E402


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """A libweightd in Python that the package uses instead of the native one."""
    fake = FakeLibrary()
    monkeypatch.setattr("weightd._native.library", lambda: fake)
    return fake


class _Client:
    """vLLM's four calls; records them."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append(("init", init_info))

    def start_weight_update(self) -> None:
        self.calls.append(("start",))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.calls.append(("update", update_info))

    def finish_weight_update(self, weight_version: Optional[str] = None) -> None:
        self.calls.append(("finish", weight_version))


class _Pairs(WeightSource):
    """A source of its own kind."""

    def __init__(self, held: Optional[list[str]] = None) -> None:
        self.held = held
        self.tensor = torch.ones(3)

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta("w", torch.float32, (3,))]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "w", self.tensor

    def held_names(self) -> Optional[list[str]]:
        return self.held


def _sender(source: Optional[WeightSource], client: _Client, **options: Any) -> Any:
    info = WeightdTrainerInitInfo("policy", world_size=1, rank=0, **options)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)


def _commit(library: FakeLibrary) -> None:
    """Lets every sync commit in one replica."""
    original = library.weightd_actor_sync_wait

    def wait(handle: int, timeout: int, result: Any, error: Any) -> int:
        ended = original(handle, timeout, result, error)
        if ended and result._obj.value:
            replicas = [{"engine": "e", "committed": True}]
            answer = {"version": library.syncs[-1]["version"], "replicas": replicas}
            result._obj.value = library._string(answer)
        return ended

    library.weightd_actor_sync_wait = wait  # type: ignore[method-assign]


def test_factory_finds_the_backend_and_registers_the_module(library: FakeLibrary) -> None:
    _commit(library)
    client, module = _Client(), nn.Linear(2, 3)
    sender = _sender(ModuleSource(module), client, first_version=5)
    assert isinstance(sender, WeightdTrainerEngine) and sender.is_sender
    assert [tensor["name"] for tensor in library.tensors] == ["weight", "bias"]
    assert library.tensors[0]["shards"][0]["address"] == module.weight.data_ptr()
    for version in (5, 6):
        client.calls.clear()
        sender.send_weights()
        assert client.calls == [
            ("start",),
            ("update", {"model": "policy", "version": version}),
            ("finish", str(version)),
        ]
        assert sender.ack is not None and sender.ack.engines[0].resumed
    sender.shutdown()
    assert library.calls[-1] == "close"


def test_other_sources_are_staged_every_round(library: FakeLibrary) -> None:
    _commit(library)
    source = _Pairs()
    sender = _sender(source, _Client())
    for _ in range(2):
        sender.send_weights()
        assert [staged[2] for staged in library.syncs[-1]["staged"]] == [source.tensor.data_ptr()]
    sender.shutdown()


def test_failed_round_is_raised_and_its_version_tried_again(library: FakeLibrary) -> None:
    sender = _sender(ModuleSource(nn.Linear(2, 3)), _Client())
    library.outcome = {"code": 14, "reason": "PEER_LOST", "message": "actor 1 is gone"}
    with pytest.raises(errors.UnavailableError):
        sender.send_weights()
    library.outcome = None
    _commit(library)
    sender.send_weights()
    assert [sync["version"] for sync in library.syncs] == [1, 1]
    sender.shutdown()


def test_what_cannot_be_sent_is_refused(library: FakeLibrary) -> None:
    with pytest.raises(errors.LayoutError, match="WeightSource"):
        _sender(None, _Client())
    with pytest.raises(errors.UnsupportedError, match="other parameters on each rank"):
        _sender(_Pairs(held=["w"]), _Client())
    assert library.calls == []


class _Worker:
    """The part of vLLM's worker that keeps track of an update."""

    def __init__(self, backend: Optional[str]) -> None:
        transfer = backend and SimpleNamespace(backend=backend)
        self.vllm_config = SimpleNamespace(weight_transfer_config=transfer)
        self._weight_update_active = False

    def start_weight_update(self) -> None:
        if self._weight_update_active:
            raise RuntimeError("already active")
        self._weight_update_active = True

    def finish_weight_update(self) -> None:
        if not self._weight_update_active:
            raise RuntimeError("without a matching start")
        self._weight_update_active = False


def test_worker_takes_a_second_start_and_a_finish_without_one() -> None:
    start = worker_calls._start_anew(_Worker.start_weight_update)
    finish = worker_calls._finish_if_open(_Worker.finish_weight_update)
    ours = _Worker("weightd")
    for _ in range(2):
        start(ours)
        assert ours._weight_update_active
    for _ in range(2):
        finish(ours)
        assert not ours._weight_update_active
    for backend in ("nccl", None):
        other = _Worker(backend)
        start(other)
        with pytest.raises(RuntimeError, match="already active"):
            start(other)
        finish(other)
        with pytest.raises(RuntimeError, match="without a matching start"):
            finish(other)
