"""Workers that ranks start: one is killed in mid-transfer, or its owner, or the daemon.

The daemon serves no device. The rank that registers first owns the worker of `host`, all others use
it; whoever is killed, the next sync succeeds and nothing is left in the end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Iterator

import pytest

from tests.support.cluster import missing_binaries
from tests.support.fault_roles import freeze
from tests.support.fault_steps import DEADLINE_SECONDS, DEADLINES, FENCE_SECONDS
from tests.support.faults import SURVIVOR_SECONDS, Scene, poll, weightctl
from weightd import new_group

pytestmark = pytest.mark.skipif(bool(missing_binaries()), reason=missing_binaries() or "-")



@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """A trainer whose rank 0 owns the worker, and an engine; version 1 is committed."""
    with _ready(tmp_path) as ready:
        yield ready


def _ready(folder: Path, settings: str = "") -> Scene:
    scene = Scene(folder, settings, worker="spawn")
    group = new_group()
    for rank in range(2):
        scene.begin_actor(rank, group).answer()
    scene.start_engine()
    scene.sync_ok(1)
    assert _owner(scene).startswith("actor 0 (pid "), scene.status()
    return scene


def _owner(scene: Scene) -> str:
    return str(scene.worker().get("owner", ""))


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def _answers(scene: Scene, killed: float) -> list[dict[str, Any]]:
    """What the surviving trainer ranks got, each within the limit."""
    answers = []
    for actor in scene.actors.values():
        answers.append(actor.answer(SURVIVOR_SECONDS))
        assert time.monotonic() - killed < SURVIVOR_SECONDS, answers
    return answers


def test_the_worker_is_a_child_of_its_owner_and_shows_it(scene: Scene) -> None:
    worker = scene.worker_pid()
    owner = scene.actors[0].pid
    assert _parent(worker) == owner
    assert os.getsid(worker) == worker and os.getsid(owner) != worker
    assert f"(pid {owner} " in _owner(scene)
    assert os.readlink(f"/proc/{worker}/fd/0") == "/dev/null"
    assert scene.worker()["members"] == 4
    # Nothing of the owner is open in it: its lent memory comes by the worker's own socket.
    connections = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{owner}/fd")]
    held = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{worker}/fd")]
    assert not set(connections) & {link for link in held if link.startswith("socket:")}
    command = [weightctl(), "--address", scene.cluster.address]
    shown = subprocess.run([*command, "status"], capture_output=True, text=True, check=True).stdout
    assert "STARTED BY" in shown and "actor 0 (pid " in shown, shown
    health = subprocess.run([*command, "health"], capture_output=True, text=True, check=True)
    assert "host (started by actor 0 " in health.stdout, health.stdout


def test_killed_worker_is_started_again_by_its_owner(scene: Scene) -> None:
    worker = scene.worker_pid()
    scene.points.arm("window.1")
    scene.begin_sync(2)
    scene.points.wait("window.1")
    killed = time.monotonic()
    os.kill(worker, signal.SIGKILL)
    scene.points.release("window.1")
    for answer in _answers(scene, killed):
        assert (answer["reason"], answer["phase"]) == ("WORKER_LOST", "transfer"), answer
    scene.assert_truthful()
    scene.sync_ok(3)
    assert _parent(scene.worker_pid()) == scene.actors[0].pid
    shown = scene.worker()
    assert (int(shown["restarts"]), shown["last_exit"]) == (1, "signal 9"), shown


def test_killed_owner_is_followed_by_another_client(scene: Scene) -> None:
    scene.points.arm("window.1")
    scene.begin_sync(2)
    scene.points.wait("window.1")
    killed = time.monotonic()
    scene.actors.pop(0).kill()
    scene.points.release("window.1")
    for answer in _answers(scene, killed):
        assert answer["reason"] in ("PEER_LOST", "WORKER_LOST"), answer
        assert answer["phase"] == "transfer", answer
    poll("another client owns the worker", lambda: _owner(scene).startswith("actor 1 "))
    for actor in scene.actors.values():
        actor.close()
    poll("an engine rank owns the worker", lambda: _owner(scene).startswith("engine e0 "))
    scene.start_actors()
    scene.sync_ok(3)
    scene.assert_truthful()


def test_owner_that_closes_hands_over(scene: Scene) -> None:
    worker = scene.worker_pid()
    scene.actors.pop(0).close()
    poll("another client owns the worker", lambda: _owner(scene).startswith("actor 1 "))
    assert scene.worker_pid() != worker
    for actor in scene.actors.values():
        actor.close()
    scene.start_actors()
    scene.sync_ok(2)


def test_killed_daemon_takes_the_worker_down_and_the_next_asks_for_a_new_one(
    scene: Scene,
) -> None:
    worker = scene.worker_pid()
    scene.points.arm("window.1")
    scene.begin_sync(2)
    scene.points.wait("window.1")
    killed = time.monotonic()
    scene.cluster.stop_daemon(signal.SIGKILL)
    scene.points.release("window.1")
    for answer in _answers(scene, killed):
        assert answer["reason"] == "DAEMON_LOST", answer
    poll("worker has ended", lambda: not Path(f"/proc/{worker}").exists())
    scene.start_daemon()
    poll("engine has come back", lambda: scene.engine_status()["registered"] == 2)
    scene.sync_ok(3)
    scene.assert_truthful()


def test_frozen_worker_is_killed_by_its_owner(tmp_path: Path) -> None:
    """The fence of last resort reaches a worker that is not the daemon's child."""
    with _ready(tmp_path, DEADLINES) as scene:
        worker = scene.worker_pid()
        scene.points.arm("window.1")
        scene.begin_sync(2)
        scene.points.wait("window.1")
        freeze(worker)
        scene.points.release("window.1")
        for actor in scene.actors.values():
            answer = actor.answer(DEADLINE_SECONDS + FENCE_SECONDS + SURVIVOR_SECONDS)
            assert (answer["reason"], answer["phase"]) == ("DEADLINE", "transfer"), answer
        poll("worker was killed", lambda: not Path(f"/proc/{worker}").exists())
        scene.sync_ok(3)


def test_ctrl_c_in_the_terminal_does_not_reach_the_worker(scene: Scene) -> None:
    """SIGINT goes to the process group of the trainer, of which the worker is no part."""
    worker = scene.worker_pid()
    assert os.getpgid(worker) == worker
    os.kill(worker, signal.SIGINT)
    scene.sync_ok(2)
    assert scene.worker_pid() == worker
