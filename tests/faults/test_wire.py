"""Workers that share no memory: what is sent between them is exact, and whoever dies in the middle is named.

Trainer ranks have their memory on host and host.1, engine ranks on host.1 and host.2, and ``worker.path`` is "wire":
host's worker only sends, that of host.2 only receives, that of host.1 does both. The wire is the stand-in for NCCL
(unix sockets), which like NCCL tells nobody that a peer is dead.
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
WIRE = 'path = "wire"\nwire_bytes = "64KiB"\nverify = "beside"\n\n'


def _ready(folder: Path, settings: str = "") -> Scene:
    return ready(folder, WIRE + settings, DEVICES)


def _others(scene: Scene, device: str) -> dict[str, int]:
    return worker_pids(scene, (other for other in DEVICES if other != device))


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
        # Nobody lends to another worker than that of his own device.
        check_undisturbed(scene, {"host": 1, "host.1": 2, "host.2": 1})
        plan = shown_plan(scene)
        assert int(plan["staging_bytes"]) == 64 << 10
        paths = {
            (pair["source_device"], pair["target_device"]): (pair["path"], pair["reason"])
            for pair in plan["pairs"]
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
        others = _others(scene, device)
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
        assert _others(scene, device) == others
        scene.assert_sockets()


def test_idle_worker_that_dies_costs_one_wire(tmp_path: Path) -> None:
    with _ready(tmp_path) as scene:
        kill_each_idle_worker(scene, first_version=2)


@pytest.mark.parametrize("victim", ("actor", "engine"))
@pytest.mark.parametrize("stopped", DEVICES)
def test_killed_client_ends_the_wire_on_all_workers(
    tmp_path: Path, victim: str, stopped: str
) -> None:
    """One worker is held after its first turn, so that the others wait for it when a client dies."""
    point = f"wire.{stopped}.0"
    with _ready(tmp_path) as scene:
        workers = worker_pids(scene, DEVICES)
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
        assert worker_pids(scene, DEVICES) == workers


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_worker_is_named_and_replaced_alone(tmp_path: Path, device: str) -> None:
    point = f"wire.{device}.0"
    with _ready(tmp_path, DEADLINES) as scene:
        others = _others(scene, device)
        frozen = scene.worker_pid(device)
        scene.points.arm(point)
        began = time.monotonic()
        scene.begin_sync(2)
        scene.points.wait(point)
        freeze(frozen)
        scene.points.release(point)
        for actor in scene.actors.values():
            check_deadline(actor.answer(), device, {"transfer"}, began)
        poll("the frozen worker is gone", lambda: scene.worker_pid(device) != frozen)
        scene.assert_truthful()
        scene.sync_ok(3)
        assert _others(scene, device) == others


def test_two_replicas_have_a_wire_each(tmp_path: Path) -> None:
    with _ready(tmp_path) as scene:
        scene.start_engine("e1")
        scene.sync_ok(2, ("e0", "e1"))
        scene.sync_ok(3, ("e0", "e1"))
