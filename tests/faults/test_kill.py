"""The kill matrix: who is killed (kill -9), where, and what everybody else sees.

README.md beside this file has the table. Version 1 is committed before the fault, version 2 meets
it, version 3 is committed after the victim is back.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import missing_binaries
from tests.support.faults import SURVIVOR_SECONDS, Scene, poll
from weightd import new_group

pytestmark = pytest.mark.skipif(bool(missing_binaries()), reason=missing_binaries() or "-")

VICTIMS = ("actor", "engine", "worker", "daemon", "forked actor")
# Failpoint -> the phases in which survivors may be when the loss is noticed.
TORN = {
    "prepared": {"prepare", "transfer"},
    "window.0": {"transfer"},
    "window.1": {"transfer"},
    "before_verify": {"verify"},
    "worker.before_verify": {"verify"},
}
# Engines that receive derived parameters in stages: between the conversion of one and the transfer of the next.
BETWEEN = "between_rounds"
# From here on every byte is verified: only who has to take part in the publication can fail it.
VERIFIED = {"before_publish": {"commit"}, "before_ack": {"commit", "report"}}
# A client of a daemon that is gone names the phase that it last heard of.
HEARD = {"before_verify": {"transfer"}, "before_publish": {"verify"}, "before_ack": {"verify"}}
STOPS_WORKER = {"window.0", "window.1", "worker.before_verify"}
PEERS = {
    "actor": ("PEER_LOST", "actor 1"),
    "forked actor": ("PEER_LOST", "actor 1"),
    "engine": ("PEER_LOST", "engine e0 dp 0 pp 0 tp 1"),
    "worker": ("WORKER_LOST", "worker host"),
    "daemon": ("DAEMON_LOST", "daemon"),
}


def _kill(scene: Scene, victim: str, worker: int) -> float:
    """Kills the victim; returns when."""
    start = time.monotonic()
    if victim.endswith("actor"):
        scene.actors.pop(1).kill()
    elif victim == "engine":
        scene.engines.pop(("e0", 1)).kill()
    elif victim == "worker":
        os.kill(worker, signal.SIGKILL)
    else:
        scene.cluster.stop_daemon(signal.SIGKILL)
    return start


def _wait_until_noticed(scene: Scene, victim: str, registered: int) -> None:
    """The daemon knows of the loss, though a failpoint may hold the sync that must hear of it."""
    if victim.endswith("actor"):
        poll("actor is missed", lambda: scene.registered_actors() < registered)
    elif victim == "engine":
        poll("engine is missed", lambda: scene.engine_status()["registered"] < registered)
    elif victim == "worker":
        poll("worker is missed", lambda: int(scene.worker().get("restarts", 0)) > 0)


def _bring_back(scene: Scene, victim: str) -> None:
    """Starts what a user has to start; everything else comes back by itself."""
    if victim.endswith("actor"):
        for actor in scene.actors.values():
            actor.close()
        scene.start_actors()
    elif victim == "engine":
        scene.begin_engine(1).answer()
    elif victim == "daemon":
        _restart_daemon(scene)


def _restart_daemon(scene: Scene) -> None:
    """Starts the daemon anew and lets the engine's ranks come back by themselves."""
    scene.start_daemon()
    poll("engine has come back", lambda: scene.engine_status()["registered"] == 2)


def _check_answer(answer: dict[str, Any], victim: str, point: str, seconds: float) -> None:
    """What a surviving trainer rank got: its typed error, or the truth that all was verified."""
    assert seconds < SURVIVOR_SECONDS, answer
    if answer["ack"] is not None:
        assert point in VERIFIED, answer
        assert [replica["committed"] for replica in answer["ack"]] == [True], answer
        return
    reason, peer = PEERS[victim]
    assert (answer["kind"], answer["reason"]) == ("UnavailableError", reason), answer
    assert peer in answer["peer"], answer
    phases = {"commit", "transfer", "verify"} if point == BETWEEN else (TORN | VERIFIED)[point]
    if victim == "daemon":
        phases = phases | HEARD.get(point, {"build_plan", "prepare"})
    assert answer["phase"] in phases, answer
    assert answer["remedy"], answer


@pytest.mark.parametrize("point", [*TORN, *VERIFIED])
@pytest.mark.parametrize("victim", VICTIMS)
def test_survivors_of_a_kill_in_a_sync(tmp_path: Path, victim: str, point: str) -> None:
    with Scene(tmp_path) as scene:
        scene.start_actors()
        scene.start_engine()
        scene.sync_ok(1)
        before = scene.descriptors()
        worker = scene.worker_pid()
        children = [scene.actors[1].call("fork")] if victim == "forked actor" else []
        scene.points.arm(point)
        scene.begin_sync(2)
        scene.points.wait(point)
        killed = _kill(scene, victim, worker)
        if victim != "worker" or point not in STOPS_WORKER:
            _wait_until_noticed(scene, victim, 2)
        scene.points.release(point)
        try:
            for actor in scene.actors.values():
                answer = actor.answer(SURVIVOR_SECONDS)
                _check_answer(answer, victim, point, time.monotonic() - killed)
                acknowledged = answer["ack"] is not None
                assert acknowledged == (point in VERIFIED and victim not in _stops(point)), answer
            if victim != "daemon":
                scene.assert_truthful()
            _bring_back(scene, victim)
            scene.assert_truthful()
            scene.sync_ok(3)
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)
        scene.assert_descriptors(before)
        scene.assert_sockets()


@pytest.mark.parametrize("engines", ({"staged_engines": True}, {"pulled_engines": "some"}))
@pytest.mark.parametrize("victim", ("actor", "engine", "worker", "daemon"))
def test_survivors_of_a_kill_between_rounds(
    tmp_path: Path, victim: str, engines: dict[str, Any]
) -> None:
    """The engine has taken its first stage; the memory of that waits for the second."""
    with Scene(tmp_path, **engines) as scene:
        scene.start_actors()
        scene.start_engine()
        scene.sync_ok(1)
        scene.points.arm(BETWEEN)
        scene.begin_sync(2)
        scene.points.wait(BETWEEN)
        killed = _kill(scene, victim, scene.worker_pid())
        _wait_until_noticed(scene, victim, 2)
        scene.points.release(BETWEEN)
        for actor in scene.actors.values():
            answer = actor.answer(SURVIVOR_SECONDS)
            _check_answer(answer, victim, BETWEEN, time.monotonic() - killed)
            assert answer["ack"] is None
        if victim != "daemon":
            assert scene.engine_status()["state"] in ("POISONED", "GONE")
            scene.assert_truthful()
        _bring_back(scene, victim)
        scene.sync_ok(3)
        scene.assert_sockets()


def _stops(point: str) -> set[str]:
    """Who can still keep a verified version from being acknowledged."""
    return {"engine", "daemon"} if point == "before_publish" else {"daemon"}


@pytest.mark.parametrize("victim", ("actor", "engine", "worker", "daemon"))
def test_survivors_of_a_kill_at_registration(tmp_path: Path, victim: str) -> None:
    """The victim, or one whose daemon or worker is the victim, has just registered."""
    with Scene(tmp_path) as scene:
        group = new_group()
        scene.begin_actor(0, group).answer()
        scene.begin_engine(0).answer()
        if victim == "engine":
            scene.begin_actor(1, group).answer()
        else:
            scene.begin_engine(1).answer()
        worker = scene.worker_pid()
        scene.points.arm("registered")
        late = scene.begin_engine(1) if victim == "engine" else scene.begin_actor(1, group)
        scene.points.wait("registered")
        _kill(scene, victim, worker)
        if victim == "worker":
            _wait_until_noticed(scene, victim, 2)
            scene.worker_pid()
        scene.points.release("registered")
        if victim == "daemon":
            _restart_daemon(scene)
        if victim in ("worker", "daemon"):
            late.answer(2 * SURVIVOR_SECONDS)
        else:
            _wait_until_noticed(scene, victim, 2)
            _check_missing_rank(scene, victim)
            _bring_back(scene, victim)
        scene.assert_truthful()
        scene.sync_ok(1)
        scene.assert_sockets()


def _check_missing_rank(scene: Scene, victim: str) -> None:
    reason, peer = ("NO_ENGINE", "engine e0 dp 0") if victim == "engine" else PEERS[victim]
    scene.begin_sync(1)
    for actor in scene.actors.values():
        answer = actor.answer(SURVIVOR_SECONDS)
        assert answer["ack"] is None and answer["reason"] == reason, answer
        assert peer in answer["peer"] and answer["phase"] and answer["remedy"], answer
