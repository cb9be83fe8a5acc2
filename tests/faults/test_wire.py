"""Workers that share no memory: what is sent between them is exact, and whoever dies in the middle is named.

Trainer ranks have their memory on host and host.1, engine ranks on host.1 and host.2, and ``worker.path`` is "wire":
host's worker only sends, that of host.2 only receives, that of host.1 does both. The wire is the stand-in for NCCL
(unix sockets), which like NCCL tells nobody that a peer is dead.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.cluster import missing_binaries
from tests.support.fault_roles import freeze
from tests.support.faults import SURVIVOR_SECONDS, Scene, poll, weightctl

pytestmark = pytest.mark.skipif(bool(missing_binaries()), reason=missing_binaries() or "-")

DEVICES = ("host", "host.1", "host.2")
WIRE = 'path = "wire"\nwire_bytes = "64KiB"\n\n'
DEADLINES = "[deadlines]\n" + "".join(
    f'{phase} = "2s"\n' for phase in ("admit", "prepare", "transfer", "verify", "commit")
)
DEADLINE_SECONDS = 2.0
FENCE_SECONDS = 3.0


def _ready(folder: Path, settings: str = "") -> Scene:
    scene = Scene(folder, WIRE + settings, DEVICES)
    scene.start_actors()
    scene.start_engine()
    scene.sync_ok(1)
    return scene


def _assert_named(scene: Scene, killed: float, reason: str, peer: str) -> None:
    """Every trainer rank that lives has its error in time, and it names the victim."""
    for actor in scene.actors.values():
        answer = actor.answer(SURVIVOR_SECONDS)
        assert time.monotonic() - killed < SURVIVOR_SECONDS, answer
        assert (answer["ack"], answer["reason"]) == (None, reason), answer
        assert peer in answer["peer"] and answer["phase"] == "transfer", answer
        assert answer["remedy"], answer


def test_three_versions_over_the_wire_are_exact(tmp_path: Path) -> None:
    with _ready(tmp_path) as scene:
        for version in (2, 3):
            scene.sync_ok(version)
        for device in DEVICES:
            worker = scene.worker(device)
            assert worker["attached"] and int(worker["restarts"]) == 0, worker
        # Nobody lends to another worker than that of his own device.
        members = {device: scene.worker(device)["members"] for device in DEVICES}
        assert members == {"host": 1, "host.1": 2, "host.2": 1}, members
        command = [weightctl(), "--address", scene.cluster.address]
        command += ["plan", "show", "--model", scene.model, "-o", "json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        assert int(json.loads(done.stdout)["staging_bytes"]) == 64 << 10
        paths = {
            (pair["source_device"], pair["target_device"]): (pair["path"], pair["reason"])
            for pair in json.loads(done.stdout)["pairs"]
        }
        wire = ("socket", 'worker.path is "wire"')
        assert paths == {
            ("host", "host.1"): wire,
            ("host", "host.2"): wire,
            ("host.1", "host.2"): wire,
            ("host.1", "host.1"): ("shm", "both in host memory of this host"),
        }


@pytest.mark.parametrize("device", DEVICES)
def test_killed_worker_is_named_and_the_next_wire_works(tmp_path: Path, device: str) -> None:
    point = f"wire.{device}.0"
    with _ready(tmp_path) as scene:
        others = {other: scene.worker_pid(other) for other in DEVICES if other != device}
        victim = scene.worker_pid(device)
        scene.points.arm(point)
        scene.begin_sync(2)
        scene.points.wait(point)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        _assert_named(scene, killed, "WORKER_LOST", f"worker {device}")
        scene.points.release(point)
        scene.assert_truthful()
        assert scene.engine_status()["state"] == "POISONED"
        poll("worker is replaced", lambda: scene.worker_pid(device) != victim)
        scene.sync_ok(3)
        scene.sync_ok(4)
        assert {other: scene.worker_pid(other) for other in others} == others
        scene.assert_sockets()


def test_idle_worker_that_dies_costs_one_wire(tmp_path: Path) -> None:
    with _ready(tmp_path) as scene:
        for version, device in enumerate(DEVICES, start=2):
            os.kill(scene.worker_pid(device), signal.SIGKILL)
            poll("worker is missed", lambda: int(scene.worker(device).get("restarts", 0)) > 0)
            scene.worker_pid(device)
            scene.sync_ok(version)


@pytest.mark.parametrize("victim", ("actor", "engine"))
@pytest.mark.parametrize("stopped", DEVICES)
def test_killed_client_ends_the_wire_on_all_workers(
    tmp_path: Path, victim: str, stopped: str
) -> None:
    """One worker is held after its first turn, so that the others wait for it when a client dies."""
    point = f"wire.{stopped}.0"
    with _ready(tmp_path) as scene:
        workers = {device: scene.worker_pid(device) for device in DEVICES}
        scene.points.arm(point)
        scene.begin_sync(2)
        scene.points.wait(point)
        killed = time.monotonic()
        if victim == "actor":
            scene.actors.pop(1).kill()
            poll("actor is missed", lambda: scene.registered_actors() < 2)
            peer = "actor 1"
        else:
            scene.engines.pop(("e0", 1)).kill()
            poll("engine is missed", lambda: scene.engine_status()["registered"] < 2)
            peer = "engine e0 dp 0 pp 0 tp 1"
        scene.points.release(point)
        _assert_named(scene, killed, "PEER_LOST", peer)
        scene.assert_truthful()
        if victim == "actor":
            for actor in scene.actors.values():
                actor.close()
            scene.start_actors()
        else:
            scene.begin_engine(1).answer()
        scene.sync_ok(3)
        assert {device: scene.worker_pid(device) for device in DEVICES} == workers


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_worker_is_named_and_replaced_alone(tmp_path: Path, device: str) -> None:
    point = f"wire.{device}.0"
    with _ready(tmp_path, DEADLINES) as scene:
        others = {other: scene.worker_pid(other) for other in DEVICES if other != device}
        frozen = scene.worker_pid(device)
        scene.points.arm(point)
        began = time.monotonic()
        scene.begin_sync(2)
        scene.points.wait(point)
        freeze(frozen)
        scene.points.release(point)
        for actor in scene.actors.values():
            answer = actor.answer()
            taken = time.monotonic() - began
            assert (answer["ack"], answer["reason"]) == (None, "DEADLINE"), answer
            assert device in answer["peer"] and answer["phase"] == "transfer", answer
            assert taken < DEADLINE_SECONDS + FENCE_SECONDS + SURVIVOR_SECONDS, (taken, answer)
        poll("the frozen worker is gone", lambda: scene.worker_pid(device) != frozen)
        scene.assert_truthful()
        scene.sync_ok(3)
        assert {other: scene.worker_pid(other) for other in others} == others


def test_two_replicas_have_a_wire_each(tmp_path: Path) -> None:
    with _ready(tmp_path) as scene:
        scene.start_engine("e1")
        scene.sync_ok(2, ("e0", "e1"))
        scene.sync_ok(3, ("e0", "e1"))
