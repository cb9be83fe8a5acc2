"""kill -9 in the middle of a transfer on the GPU: who hears what, and what memory is left behind.

Every case stops the worker after its first window, kills one process, and lets the worker go on.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path
from typing import Any, Iterator, Optional

import pytest

from tests.gpu.test_ipc_sync import CONFIG, ENGINES, TRAINER, save_source
from tests.support.cluster import Cluster
from tests.support.gpu import armed, disarm, usage_settled, used_mib, wait_until
from tests.support.peer import Peer, ask_all
from weightd import new_group

MODEL = "faults"
HEARD_SECONDS = 5.0
HEALED_SECONDS = 10.0
# What the driver itself keeps or gives back late, beside the gigabytes that a leak would be.
SLACK_MIB = 16
# Large enough to see in nvidia-smi: 400 MB of float32 in the trainers.
LARGE = {**CONFIG, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "head_dim": 256}


class Scene:
    """Two trainer ranks, a TP 1 engine, and a daemon with failpoints.

    Args:
        gpu: its UUID.
        folder: of the failpoints.
        settings: the daemon's, whole sections; None is one worker for the GPU.
        trainer_environment: of the trainer ranks' processes.
        point: failpoint at which `stop_in_transfer` stops a worker.
        engine_options: of every engine that is opened, beside those of the model.
    """

    def __init__(
        self,
        gpu: str,
        folder: Path,
        settings: Optional[str] = None,
        trainer_environment: Optional[dict[str, str]] = None,
        point: str = "window.0",
        engine_options: Optional[dict[str, Any]] = None,
    ) -> None:
        self.folder = folder
        self.point = point
        self._engine_options = engine_options or {}
        self._trainer_environment = trainer_environment
        self.cluster = Cluster(settings or f'[worker]\ndevices = ["{gpu}"]\n')
        self.peers: list[Peer] = []
        self.trainers = [self.start(f"trainer{i}", TRAINER) for i in range(2)]
        self.engine = self.start("engine", ENGINES)
        self.version = 0

    def start(self, name: str, module: str) -> Peer:
        """Starts a process that ends with the scene."""
        environment = self._trainer_environment if module == TRAINER else None
        self.peers.append(Peer(self.cluster, name, module, environment))
        return self.peers[-1]

    def close(self) -> None:
        """Ends all of it."""
        for peer in self.peers:
            peer.close()
        self.cluster.close()

    def open_trainers(self, trainers: list[Peer]) -> None:
        """A new start of the trainer."""
        group = new_group()
        for rank, trainer in enumerate(trainers):
            trainer.ask(
                "open", model=MODEL, group=group, rank=rank, world_size=2, config=LARGE,
                dtype="float32",
            )  # fmt: skip
        for trainer in trainers:
            trainer.answer()

    def open_engine(self, engine: Peer) -> None:
        """A new start of the engine."""
        engine.call(
            "open", key="e", memory="cuda", model=MODEL, engine="e0", dtype="bfloat16",
            architecture="LlamaForCausalLM", config=LARGE, tp_rank=0, tp_size=1,
            **self._engine_options,
        )  # fmt: skip

    def sync(self, trainers: list[Peer], engine: Peer) -> None:
        """A sync that must succeed, exactly."""
        self.version += 1
        ask_all(trainers, "step", version=self.version)
        acks = ask_all(trainers, "sync", version=self.version)
        assert [ack.get("committed") for ack in acks] == [1, 1], acks
        source = save_source(trainers, self.folder)
        assert engine.call("check", key="e", version=self.version, source=str(source)) == []

    def worker_pids(self, devices: tuple[str, ...]) -> dict[str, int]:
        """Process ids of the workers that the daemon started last, by device."""
        log = (self.cluster.folder / "daemon.log").read_text(errors="replace")
        found = re.findall(r"worker started: device=(\S+) pid=(\d+)", log)
        return {device: int(pid) for device, pid in found if device in devices}

    def stop_in_transfer(self) -> Path:
        """Begins a sync and waits until the worker stands still after its first window."""
        hit = armed(self.folder, self.point)
        hit.unlink(missing_ok=True)
        self.version += 1
        for trainer in self.trainers:
            trainer.ask("sync", version=self.version)
        wait_until(hit.exists, 20)
        return hit


@contextlib.contextmanager
def opened(made: Scene) -> Iterator[Scene]:
    """Opened, and synced once; ended afterwards."""
    try:
        made.open_trainers(made.trainers)
        made.open_engine(made.engine)
        made.sync(made.trainers, made.engine)
        yield made
    except AssertionError as error:
        pytest.fail(f"{error}\n{made.cluster.logs()}")
    finally:
        disarm(made.folder, made.point)
        made.close()


@pytest.fixture()
def scene(gpu: str, failpoints: Path) -> Iterator[Scene]:
    """See `opened`."""
    with opened(Scene(gpu, failpoints)) as made:
        yield made


def test_a_killed_engine_is_heard_and_leaves_no_memory(scene: Scene) -> None:
    scene.engine.call("close", key="e")
    scene.engine.close()
    without = usage_settled()
    engine = scene.start("engine2", ENGINES)
    scene.open_engine(engine)
    assert used_mib() > without + 300  # its context and parameters
    scene.stop_in_transfer()
    engine.kill()
    killed = time.monotonic()
    disarm(scene.folder, "window.0")
    errors = [trainer.answer() for trainer in scene.trainers]
    assert time.monotonic() - killed < HEARD_SECONDS
    assert [error["reason"] for error in errors] == ["PEER_LOST"] * 2, errors
    wait_until(lambda: used_mib() <= without + SLACK_MIB, HEARD_SECONDS)
    assert [trainer.call("usable") for trainer in scene.trainers] == [1024.0, 1024.0]
    third = scene.start("engine3", ENGINES)
    scene.open_engine(third)
    scene.sync(scene.trainers, third)


def test_a_killed_trainer_is_heard_and_leaves_no_memory(scene: Scene) -> None:
    hit = scene.stop_in_transfer()
    with_both = used_mib()
    scene.trainers[1].kill()
    killed = time.monotonic()
    disarm(scene.folder, "window.0")
    error = scene.trainers[0].answer()
    assert time.monotonic() - killed < HEARD_SECONDS
    assert error["reason"] == "PEER_LOST", error
    wait_until(lambda: used_mib() < with_both - 300, HEARD_SECONDS)
    wait_until(lambda: scene.engine.call("state", key="e")["state"] == "POISONED", HEARD_SECONDS)
    scene.trainers[0].call("close_all")
    assert scene.trainers[0].call("usable") == 1024.0
    scene.trainers = [scene.trainers[0], scene.start("trainer3", TRAINER)]
    hit.unlink(missing_ok=True)
    scene.open_trainers(scene.trainers)
    scene.sync(scene.trainers, scene.engine)


def test_a_killed_worker_is_replaced_and_memory_is_as_before(scene: Scene) -> None:
    before = usage_settled()
    hit = scene.stop_in_transfer()
    os.kill(int(hit.read_text()), signal.SIGKILL)
    killed = time.monotonic()
    disarm(scene.folder, "window.0")
    errors = [trainer.answer() for trainer in scene.trainers]
    assert time.monotonic() - killed < HEARD_SECONDS
    assert all(e["reason"] == "WORKER_LOST" for e in errors), errors
    state = scene.engine.call("state", key="e")
    assert state["state"] == "POISONED" and state["dirty"], state
    wait_until(lambda: scene.engine.call("state", key="e")["registered"], HEALED_SECONDS)
    scene.sync(scene.trainers, scene.engine)
    assert abs(usage_settled() - before) <= SLACK_MIB
    assert [trainer.call("usable") for trainer in scene.trainers] == [1024.0, 1024.0]


def test_killing_everyone_leaves_the_gpu_as_it_was(gpu: str, failpoints: Path) -> None:
    before = usage_settled()
    made = Scene(gpu, failpoints)
    try:
        made.open_trainers(made.trainers)
        made.open_engine(made.engine)
        made.stop_in_transfer()
        assert used_mib() > before + 1000
        for peer in (*made.trainers, made.engine):
            peer.kill()
    finally:
        disarm(failpoints, "window.0")
        made.close()
    wait_until(lambda: used_mib() <= before + SLACK_MIB, HEARD_SECONDS)
