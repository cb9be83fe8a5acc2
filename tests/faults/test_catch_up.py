"""Engines that come late, restarts of the daemon, and replicas that fare differently in one sync."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.cluster import missing_binaries
from tests.support.faults import Scene, poll

pytestmark = pytest.mark.skipif(bool(missing_binaries()), reason=missing_binaries() or "-")


def test_late_engine_catches_up_from_its_peer_without_the_trainer(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        scene.start_actors()
        scene.start_engine()
        scene.sync_ok(1)
        for actor in scene.actors.values():
            actor.close()
        scene.start_engine("e1")
        scene.assert_serving(1, ("e0", "e1"))


def test_serving_engines_stay_serving_over_a_restart_of_the_daemon(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        scene.start_actors()
        scene.start_engine()
        scene.sync_ok(1)
        scene.cluster.stop_daemon(signal.SIGKILL)
        for player in scene.engines.values():
            state = player.call("state")
            assert (state["state"], state["version"]) == ("SERVING", 1), state
            assert player.call("differences", version=1) == []
        scene.start_daemon()
        poll("engines have come back", lambda: scene.engine_status()["registered"] == 2)
        scene.assert_serving(1)
        poll("actors have come back", lambda: scene.registered_actors() == 2)
        stale = scene.sync(1)
        assert {answer["reason"] for answer in stale} == {"REUSED_VERSION"}, stale
        scene.sync_ok(2)


def test_one_of_two_engines_is_killed_and_the_other_commits(tmp_path: Path) -> None:
    with Scene(tmp_path) as scene:
        scene.start_actors()
        scene.start_engine("e0")
        scene.start_engine("e1")
        scene.sync_ok(1, ("e0", "e1"))
        scene.points.arm("window.0")
        scene.begin_sync(2, require=1)
        scene.points.wait("window.0")
        scene.engines.pop(("e1", 1)).kill()
        poll("the engine is missed", lambda: scene.engine_status("e1")["registered"] < 2)
        scene.points.release("window.0")
        for actor in scene.actors.values():
            answer = actor.answer()
            assert answer["ack"] is not None, answer
            fates = {replica["engine"]: replica for replica in answer["ack"]}
            assert fates["e0"]["committed"] and not fates["e1"]["committed"], fates
            assert "engine e1" in fates["e1"]["error"], fates
        scene.assert_truthful()
        scene.assert_serving(2, ("e0",))
        assert not scene.engine_status("e1")["ready"]


@pytest.mark.parametrize("content", (2, 5))
def test_same_version_again_for_the_replica_that_failed(tmp_path: Path, content: int) -> None:
    """With the same bytes it is filled; with other bytes (content 5) it is refused."""
    with Scene(tmp_path, "[catch_up]\nenabled = false\n") as scene:
        scene.start_actors()
        scene.start_engine("e0")
        scene.start_engine("e1")
        scene.sync_ok(1, ("e0", "e1"))
        scene.points.arm("window.0")
        scene.begin_sync(2)
        scene.points.wait("window.0")
        scene.engines.pop(("e1", 1)).kill()
        poll("the engine is missed", lambda: scene.engine_status("e1")["registered"] < 2)
        scene.points.release("window.0")
        for actor in scene.actors.values():
            answer = actor.answer()
            assert answer["ack"] is None and answer["reason"] == "PEER_LOST", answer
            assert "engine e1" in answer["peer"], answer
            assert {r["engine"] for r in answer["replicas"] if r["committed"]} == {"e0"}, answer
        scene.assert_serving(2, ("e0",))
        scene.begin_engine(1, "e1").answer()
        poll("e1 is complete", lambda: scene.engine_status("e1")["registered"] == 2)
        again = scene.sync(2, content=content)
        if content == 2:
            assert all(answer["ack"] is not None for answer in again), again
            scene.assert_serving(2, ("e0", "e1"))
        else:
            assert {answer["reason"] for answer in again} == {"REUSED_VERSION"}, again
            assert not scene.engine_status("e1")["ready"]
            scene.assert_truthful()
            scene.assert_serving(2, ("e0",))
        scene.sync_ok(3, ("e0", "e1"))
