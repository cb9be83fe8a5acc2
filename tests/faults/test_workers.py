"""Several workers: each may be killed or frozen alone, and what it was doing is named.

Trainer ranks have their memory on host and host.1, engine ranks on host.1 and host.2: host's worker
only writes, that of host.2 only verifies, that of host.1 does both.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.cluster import missing_binaries
from tests.support.fault_roles import freeze
from tests.support.fault_steps import (
    DEADLINES,
    check_deadline,
    check_undisturbed,
    kill_each_idle_worker,
    ready,
    shown_plan,
    worker_pids,
)
from tests.support.faults import SURVIVOR_SECONDS, Scene, poll

pytestmark = pytest.mark.skipif(bool(missing_binaries()), reason=missing_binaries() or "-")

DEVICES = ("host", "host.1", "host.2")
# Where a worker is stopped in the middle of its part.
POINTS = {"host": "window.0", "host.1": "window.0", "host.2": "worker.before_verify"}
PHASES = {"window.0": "transfer", "worker.before_verify": "verify"}


def _ready(folder: Path, settings: str = "") -> Scene:
    return ready(folder, settings, DEVICES)


def _others(scene: Scene, device: str) -> dict[str, int]:
    return worker_pids(scene, (other for other in DEVICES if other != device))


def test_three_versions_over_three_devices_are_exact(tmp_path: Path) -> None:
    with _ready(tmp_path) as scene:
        for version in (2, 3):
            scene.sync_ok(version)
        # Engine ranks lend their memory to the workers of the trainer's devices and their own.
        check_undisturbed(scene, {"host": 3, "host.1": 3, "host.2": 1})
        pairs = shown_plan(scene)["pairs"]
        assert {(pair["path"], pair["reason"]) for pair in pairs} == {
            ("shm", "both in host memory of this host")
        }
        assert {(pair["source_device"], pair["target_device"]) for pair in pairs} == {
            (source, target) for source in DEVICES[:2] for target in DEVICES[1:]
        }
        scene.assert_sockets()


@pytest.mark.parametrize("device", DEVICES)
def test_killed_worker_is_named_and_takes_no_other_process_down(
    tmp_path: Path, device: str
) -> None:
    point = POINTS[device]
    with _ready(tmp_path) as scene:
        others = _others(scene, device)
        victim = scene.worker_pid(device)
        scene.points.arm(point)
        scene.begin_sync(2)
        scene.points.wait(point)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        poll("worker is missed", lambda: int(scene.worker(device).get("restarts", 0)) > 0)
        scene.points.release(point)
        for actor in scene.actors.values():
            answer = actor.answer(SURVIVOR_SECONDS)
            assert time.monotonic() - killed < SURVIVOR_SECONDS, answer
            assert (answer["ack"], answer["reason"]) == (None, "WORKER_LOST"), answer
            assert answer["peer"] == f"worker {device}" and device in answer["message"], answer
            assert answer["phase"] == PHASES[point] and answer["remedy"], answer
        scene.assert_truthful()
        assert scene.engine_status()["state"] == "POISONED"
        assert scene.worker_pid(device) != victim
        scene.sync_ok(3)
        assert _others(scene, device) == others
        scene.assert_sockets()


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_worker_is_named_and_replaced_alone(tmp_path: Path, device: str) -> None:
    with _ready(tmp_path, DEADLINES) as scene:
        others = _others(scene, device)
        frozen = scene.worker_pid(device)
        point = POINTS[device]
        scene.points.arm(point)
        began = time.monotonic()
        scene.begin_sync(2)
        scene.points.wait(point)
        freeze(frozen)
        scene.points.release(point)
        for actor in scene.actors.values():
            answer = actor.answer()
            check_deadline(answer, f"worker {device}", {PHASES[point]}, began)
            assert answer["peer"] == f"worker {device}", answer
        content = [player.call("content") for player in scene.engines.values()]
        poll("the frozen worker is gone", lambda: scene.worker_pid(device) != frozen)
        scene.assert_truthful()
        assert [player.call("content") for player in scene.engines.values()] == content
        scene.sync_ok(3)
        assert _others(scene, device) == others


def test_idle_worker_that_dies_is_replaced_and_everybody_attaches_again(tmp_path: Path) -> None:
    with _ready(tmp_path) as scene:
        kill_each_idle_worker(scene, first_version=2)


def test_engine_catches_up_from_a_peer_on_other_devices(tmp_path: Path) -> None:
    with _ready(tmp_path) as scene:
        for rank in [scene.begin_engine(tp_rank, "e1", "host") for tp_rank in range(2)]:
            rank.answer()
        scene.assert_serving(1, ("e0", "e1"))
        scene.sync_ok(2, ("e0", "e1"))


def test_engine_catches_up_from_the_copy_that_other_workers_kept(tmp_path: Path) -> None:
    with _ready(tmp_path, '[catch_up]\nretain = "host"\n') as scene:
        log = scene.cluster.folder / "daemon.log"
        poll("the copy is kept", lambda: b"a copy is kept" in log.read_bytes())
        for tp_rank in range(2):
            scene.engines.pop(("e0", tp_rank)).kill()
        poll("the engine is gone", lambda: scene.engine_status()["state"] == "GONE")
        for rank in [scene.begin_engine(tp_rank, "e1", "host") for tp_rank in range(2)]:
            rank.answer()
        scene.assert_serving(1, ("e1",))


def test_replicas_on_several_devices_are_compared_before_anything_is_written(
    tmp_path: Path,
) -> None:
    with Scene(tmp_path, devices=DEVICES) as scene:
        scene.start_actors()
        scene.start_engine()
        for rank, actor in scene.actors.items():  # both hold all of the vectors
            actor.begin("sync", version=1, content=rank + 1)
        for actor in scene.actors.values():
            answer = actor.answer()
            assert (answer["ack"], answer["reason"]) == (None, "REPLICAS_DIFFER"), answer
            assert (answer["rank"], answer["phase"]) == ("actor 1", "prepare"), answer
        assert scene.engine_status()["state"] == "REGISTERED"
        scene.sync_ok(1)


def test_device_that_no_worker_serves_is_refused_by_name(tmp_path: Path) -> None:
    with _ready(tmp_path) as scene:
        late = scene.begin_engine(0, "e1", "host.7")
        with pytest.raises(AssertionError, match=r"host\.7.*host, host\.1, host\.2"):
            late.answer()
        scene.sync_ok(2)
