"""What a real vLLM of two workers makes of failures: nobody raises on a single rank, nothing torn is
served, and who comes back catches up. Where vLLM's own processes end, it starts as a user starts it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Union

import pytest
import torch

from tests.support.cluster import Cluster, EngineProcess
from tests.support.llama_trainer import Update, make_model, train_step
from tests.support.vllm_engine import missing_parts, start_vllm
from tests.support.vllm_fork import ForkedEngine
from weightd import Ack, Actor, Error

pytestmark = pytest.mark.skipif(bool(missing_parts()), reason=missing_parts() or "-")

MODEL = "policy"
PROMPTS = [[5, 6, 7, 8]]
TP_SIZE = 2
_PATIENCE_SECONDS = 30.0
_GOOD_SYNCS = 10
_NOTICE_SECONDS = 1.0  # for the daemon to see a death before a stopped worker goes on
_Engine = Union[EngineProcess, ForkedEngine]


class Trainer:
    """One rank that holds the whole model; it syncs with or without a driver."""

    def __init__(self, cluster: Cluster) -> None:
        self._model = make_model(torch.float32)
        self._actor = Actor(cluster.address, model=MODEL, rank=0, world_size=1)
        self._actor.register(self._model)

    def sync(self, version: int, engine: Optional[_Engine] = None) -> Ack:
        """Changes the weights and syncs; ``engine`` is driven meanwhile."""
        train_step(self._model, 1)
        update = None if engine is None else Update(engine, MODEL, version)
        try:
            return self._actor.sync(version)
        finally:
            if update is not None:
                update.result()

    def sync_past_a_dead_engine(self, version: int, engine: _Engine) -> Ack:
        """As `sync`; what vLLM makes of its own death is not waited for."""
        train_step(self._model, 1)
        Update(engine, MODEL, version)
        return self._actor.sync(version)

    def save(self, folder: Path) -> str:
        """Writes the weights for `Probe.weightd_compare`."""
        path = folder / "full.pt"
        torch.save({name: t.clone() for name, t in self._model.state_dict().items()}, path)
        return str(path)

    def close(self) -> None:
        """Leaves."""
        self._actor.close()


class Failpoints:
    """Arms points at which the daemon's processes stop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def arm(self, name: str) -> None:
        """The next process that gets there waits."""
        (self.folder / f"{name}.arm").touch()

    def wait(self, name: str) -> int:
        """Waits until a process is there and returns its pid."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        hit = self.folder / f"{name}.hit"
        while not hit.exists() or not hit.read_text().strip():
            assert time.monotonic() < deadline, f"nobody came to {name}"
            time.sleep(0.01)
        return int(hit.read_text())

    def release(self, name: str) -> None:
        """Lets it go on, and disarms the point."""
        for suffix in ("arm", "hit"):
            (self.folder / f"{name}.{suffix}").unlink(missing_ok=True)


def _when(point: Failpoints, name: str, action: Callable[[int], None]) -> threading.Thread:
    """Runs the action on the process that comes to the point, then releases the point."""

    def act() -> None:
        action(point.wait(name))
        point.release(name)

    point.arm(name)
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def _states(engine: _Engine) -> list[dict[str, Any]]:
    return [worker["state"] for worker in engine.call("call", method="weightd_state")]


def _await_states(engine: _Engine, wanted: Callable[[dict[str, Any]], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not all(wanted(state) for state in _states(engine)):
        assert time.monotonic() < deadline, _states(engine)
        time.sleep(0.2)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A daemon with failpoints in ``tmp_path`` that keeps a copy for engines that come late."""
    monkeypatch.setenv("WEIGHTD_FAILPOINT_DIR", str(tmp_path))
    with Cluster('[catch_up]\nretain = "host"\n') as running:
        yield running


def _open(cluster: Cluster, name: str = "vllm", forked: bool = False) -> _Engine:
    path = cluster.folder / "checkpoint"
    make_model(torch.float32).save_pretrained(path)
    engine = (ForkedEngine if forked else start_vllm)(cluster, name, TP_SIZE)
    try:
        engine.call(
            "open",
            path=str(path),
            dtype="bfloat16",
            tensor_parallel_size=TP_SIZE,
            weightd={"model": MODEL, "engine": "e0", "quiesce_timeout": 6},
        )
    except BaseException:
        engine.close()
        raise
    return engine


def _train_once(address: str, version: int) -> None:
    with Actor(address, model=MODEL, rank=0, world_size=1) as actor:
        actor.register(make_model(torch.float32))
        actor.sync(version)


def _seconds_after_trainers_death(
    cluster: Cluster, engine: _Engine, point: Failpoints, version: int
) -> float:
    """Kills a trainer whose first window has been written; returns how long vLLM's calls went on."""
    context = multiprocessing.get_context("spawn")
    trainer = context.Process(target=_train_once, args=(cluster.address, version))

    def kill(_: int) -> None:
        trainer.kill()
        time.sleep(_NOTICE_SECONDS)

    thread = _when(point, "window.0", kill)
    trainer.start()
    update = Update(engine, MODEL, version)
    thread.join()
    begin = time.monotonic()
    update.result()
    trainer.join()
    assert trainer.exitcode == -signal.SIGKILL
    return time.monotonic() - begin


def test_failed_syncs_then_ten_good_ones(cluster: Cluster, tmp_path: Path) -> None:
    point = Failpoints(tmp_path)
    cluster.stop_daemon()
    engine = _open(cluster, forked=True)
    assert not any(state["connected"] for state in _states(engine))  # vLLM starts all the same
    cluster.start_daemon()
    trainer = Trainer(cluster)
    try:
        _await_states(engine, lambda state: state["registered"])
        # Nobody drives the engine: the error says what to do, and the engine serves on.
        with pytest.raises(Error, match=r"pass engines=\[\.\.\.\] to the Actor"):
            trainer.sync(1)
        _await_states(engine, lambda state: not state["dirty"])
        engine.call("generate", prompts=PROMPTS, count=2)

        # The worker process of weightd dies while it writes.
        thread = _when(point, "window.0", lambda pid: os.kill(pid, signal.SIGKILL))
        begin = time.monotonic()
        with pytest.raises(Error) as caught:
            trainer.sync(1, engine)
        thread.join()
        assert caught.value.reason == "WORKER_LOST"
        assert time.monotonic() - begin < 15
        assert [state["state"] for state in _states(engine)] == ["POISONED"] * TP_SIZE
        _await_states(engine, lambda state: state["registered"])

        for version in range(1, _GOOD_SYNCS + 1):
            ack = trainer.sync(version, engine)
            assert [replica.committed for replica in ack.replicas] == [True]
        differences = engine.call(
            "call", method="weightd_compare", path=trainer.save(cluster.folder)
        )
        assert differences == [[]] * TP_SIZE
        (answer,) = engine.call("generate", prompts=PROMPTS, count=2)
        assert set(answer["versions"]) == {str(_GOOD_SYNCS)}

        # The trainer dies while its weights are written; the next one heals the engine.
        trainer.close()
        assert _seconds_after_trainers_death(cluster, engine, point, _GOOD_SYNCS + 1) < 5
        assert [state["state"] for state in _states(engine)] == ["POISONED"] * TP_SIZE
        trainer = Trainer(cluster)
        assert trainer.sync(_GOOD_SYNCS + 1, engine).replicas[0].committed
    except BaseException:
        print(cluster.logs())
        raise
    finally:
        trainer.close()
        engine.close()


def test_killed_daemon_poisons_and_a_poisoned_engine_gives_no_tokens(
    cluster: Cluster, tmp_path: Path
) -> None:
    point = Failpoints(tmp_path)
    engine = _open(cluster)
    trainer = Trainer(cluster)
    try:
        trainer.sync(1, engine)
        thread = _when(point, "window.0", lambda _: cluster.stop_daemon(signal.SIGKILL))
        with pytest.raises(Error) as caught:
            trainer.sync(2, engine)
        thread.join()
        assert caught.value.reason == "DAEMON_LOST"
        assert [state["state"] for state in _states(engine)] == ["POISONED"] * TP_SIZE

        # A new daemon hears of it and a sync heals the engine.
        cluster.start_daemon()
        _await_states(engine, lambda state: state["registered"])
        trainer.sync(3, engine)
        (answer,) = engine.call("generate", prompts=PROMPTS, count=2)
        assert set(answer["versions"]) == {"3"}

        # A refused resume leaves the engine alive; a step would end it, but gives no tokens either.
        for refused in ("resume", "generate"):
            thread = _when(point, "window.0", lambda pid: os.kill(pid, signal.SIGKILL))
            with pytest.raises(Error):
                trainer.sync(4 if refused == "resume" else 5, engine)
            thread.join()
            arguments = {"prompts": PROMPTS, "count": 2} if refused == "generate" else {}
            with pytest.raises(AssertionError) as told:
                engine.call(refused, **arguments)
            text = str(told.value) if refused == "resume" else cluster.log("vllm")
            assert "may have torn the parameters" in text
            if refused == "resume":
                _await_states(engine, lambda state: state["registered"])
                trainer.sync(4, engine)
                engine.call("resume")
                assert engine.call("generate", prompts=PROMPTS, count=2)
    except BaseException:
        print(cluster.logs())
        raise
    finally:
        trainer.close()
        engine.close()


def test_killed_vllm_worker_is_named_and_a_restarted_vllm_catches_up(
    cluster: Cluster, tmp_path: Path
) -> None:
    point = Failpoints(tmp_path)
    engine = _open(cluster)
    trainer = Trainer(cluster)
    again: Optional[_Engine] = None
    try:
        trainer.sync(1, engine)
        source = trainer.save(cluster.folder)
        pids = [worker["pid"] for worker in engine.call("call", method="weightd_state")]
        thread = _when(point, "window.0", lambda _: os.kill(pids[1], signal.SIGKILL))
        with pytest.raises(Error) as caught:
            trainer.sync_past_a_dead_engine(2, engine)
        thread.join()
        assert caught.value.reason == "PEER_LOST" and "engine e0" in str(caught.value)
        engine.close()

        again = _open(cluster, "again", forked=True)
        states = _states(again)
        assert [(state["state"], state["version"]) for state in states] == [("SERVING", 1)] * 2
        (answer,) = again.call("generate", prompts=PROMPTS, count=2)
        assert set(answer["versions"]) == {"1"}
        differences = again.call("call", method="weightd_compare", path=source)
        assert differences == [[]] * TP_SIZE
        trainer.sync(3, again)
        (answer,) = again.call("generate", prompts=PROMPTS, count=2)
        assert set(answer["versions"]) == {"3"}
    except BaseException:
        print(cluster.logs())
        raise
    finally:
        trainer.close()
        engine.close()
        if again is not None:
            again.close()
