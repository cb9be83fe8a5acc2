"""kill -9 in the middle of a transfer over NCCL: who hears what, and that the next communicator works.

Two workers serve one GPU under two names (see test_nccl_sync.py): the trainer's only sends, the engine's only receives.
Every case holds one of them after its first turn, so that the other waits inside NCCL, and kills one process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator

import pytest

from tests.gpu.test_ipc_faults import HEALED_SECONDS, HEARD_SECONDS, SLACK_MIB, Scene, opened
from tests.gpu.test_ipc_sync import ENGINES, TRAINER
from tests.gpu.test_nccl_sync import wire_settings, worker_environment
from tests.support.gpu import disarm, usage_settled, used_mib, wait_until

# Slots of 8 MiB: a sync of the large model takes about 25 turns.
WIRE_BYTES = "24MiB"


@pytest.fixture(params=("sender stands still", "receiver stands still"))
def scene(
    gpu: str, failpoints: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Scene]:
    """See `opened`."""
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    stopped = f"{gpu}.1" if request.param.startswith("sender") else gpu
    made = Scene(
        gpu, failpoints, wire_settings((gpu, f"{gpu}.1"), WIRE_BYTES), worker_environment(1), f"wire.{stopped}.0"
    )
    with opened(made):
        yield made


# Leaves 300 MiB of the GPU free until its input ends.
HOG = """
import sys, torch
held = torch.empty(torch.cuda.mem_get_info()[0] - (300 << 20), dtype=torch.uint8, device="cuda")
print("holds", flush=True)
sys.stdin.read()
"""


def _truth(scene: Scene) -> tuple[str, int, bool]:
    state = scene.engine.call("state", key="e")
    return state["state"], state["version"], state["dirty"]


def test_too_little_memory_for_nccl_is_refused_before_anything_is_written(
    gpu: str, failpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    settings = wire_settings((gpu, f"{gpu}.1"), WIRE_BYTES)
    scene = Scene(gpu, failpoints, settings, worker_environment(1))
    try:
        scene.open_trainers(scene.trainers)
        scene.open_engine(scene.engine)
        before = _truth(scene)
        with subprocess.Popen(
            [sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as hog:
            assert hog.stdout is not None and hog.stdout.readline() == "holds\n"
            for trainer in scene.trainers:
                trainer.ask("sync", version=1)
            errors = [trainer.answer() for trainer in scene.trainers]
            hog.communicate()
        assert [error.get("reason") for error in errors] == ["GPU_MEMORY"] * 2, errors
        assert _truth(scene) == before
        scene.version = 1
        scene.sync(scene.trainers, scene.engine)
        assert "worker died" not in scene.cluster.logs()
    except AssertionError as error:
        pytest.fail(f"{error}\n{scene.cluster.logs()}")
    finally:
        scene.close()


def _hear(scene: Scene, killed: float, reason: str) -> None:
    """Every trainer rank that lives has its error in time."""
    errors = [trainer.answer() for trainer in scene.trainers]
    heard = time.monotonic() - killed
    assert heard < HEARD_SECONDS
    assert all(error.get("reason") == reason for error in errors), errors
    print(f"RESULT heard of {reason} after {heard:.2f} s")


def test_a_killed_engine_is_heard_and_workers_go_on(scene: Scene) -> None:
    before = usage_settled()
    scene.stop_in_transfer()
    scene.engine.kill()
    killed = time.monotonic()
    time.sleep(0.5)  # the other worker's kernels wait for the one that stands still
    disarm(scene.folder, scene.point)
    _hear(scene, killed, "PEER_LOST")
    wait_until(lambda: used_mib() < before - 300, HEARD_SECONDS)  # the engine's memory is back
    assert [trainer.call("usable") for trainer in scene.trainers] == [1024.0, 1024.0]
    again = scene.start("engine2", ENGINES)
    scene.open_engine(again)
    begin = time.monotonic()
    scene.sync(scene.trainers, again)
    assert time.monotonic() - begin < HEALED_SECONDS
    scene.sync(scene.trainers, again)
    assert abs(usage_settled() - before) <= SLACK_MIB
    assert "worker died" not in scene.cluster.logs()


def test_a_killed_trainer_is_heard_and_workers_go_on(scene: Scene) -> None:
    hit = scene.stop_in_transfer()
    scene.trainers[1].kill()
    killed = time.monotonic()
    time.sleep(0.5)
    disarm(scene.folder, scene.point)
    survivors, scene.trainers = scene.trainers, scene.trainers[:1]
    _hear(scene, killed, "PEER_LOST")
    wait_until(lambda: scene.engine.call("state", key="e")["state"] == "POISONED", HEARD_SECONDS)
    survivors[0].call("close_all")
    assert survivors[0].call("usable") == 1024.0
    scene.trainers = [survivors[0], scene.start("trainer3", TRAINER)]
    hit.unlink(missing_ok=True)
    scene.open_trainers(scene.trainers)
    scene.sync(scene.trainers, scene.engine)
    scene.sync(scene.trainers, scene.engine)
    assert "worker died" not in scene.cluster.logs()


@pytest.mark.parametrize("victim", ("the one that stands still", "the one that waits"))
def test_a_killed_worker_is_replaced_and_the_other_goes_on(
    scene: Scene, gpu: str, victim: str
) -> None:
    before = usage_settled()
    pids = scene.worker_pids((gpu, f"{gpu}.1"))
    hit = scene.stop_in_transfer()
    stopped = int(hit.read_text())
    waits = next(pid for pid in pids.values() if pid != stopped)
    dead, lives = (stopped, waits) if victim.endswith("still") else (waits, stopped)
    os.kill(dead, signal.SIGKILL)
    killed = time.monotonic()
    time.sleep(0.2)
    disarm(scene.folder, scene.point)
    _hear(scene, killed, "WORKER_LOST")
    state = scene.engine.call("state", key="e")
    assert state["state"] == "POISONED" and state["dirty"], state
    wait_until(lambda: dead not in scene.worker_pids((gpu, f"{gpu}.1")).values(), HEALED_SECONDS)
    wait_until(lambda: scene.engine.call("state", key="e")["registered"], HEALED_SECONDS)
    scene.sync(scene.trainers, scene.engine)
    scene.sync(scene.trainers, scene.engine)
    assert lives in scene.worker_pids((gpu, f"{gpu}.1")).values()
    assert abs(usage_settled() - before) <= SLACK_MIB
    assert [trainer.call("usable") for trainer in scene.trainers] == [1024.0, 1024.0]
