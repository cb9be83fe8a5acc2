"""What the fault tests have in common: short deadlines, a scene that is ready, looks at its workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Iterable

from tests.support.faults import SURVIVOR_SECONDS, Scene, poll, weightctl

DEADLINE_SECONDS = 2.0
FENCE_SECONDS = 3.0  # how long a worker may take to let go before it is killed
DEADLINES = "[deadlines]\n" + "".join(
    f'{phase} = "2s"\n' for phase in ("admit", "prepare", "transfer", "verify", "commit")
)


def ready(folder: Path, settings: str = "", devices: tuple[str, ...] = ("host",)) -> Scene:
    """A trainer and an engine that hold version 1; arguments as those of `Scene`."""
    scene = Scene(folder, settings, devices)
    scene.start_actors()
    scene.start_engine()
    scene.sync_ok(1)
    return scene


def check_deadline(answer: dict[str, Any], peer: str, phases: set[str], began: float) -> None:
    """The answer names a peer that did not answer in one of the phases, and came in time.

    Args:
        began: when the sync began, on the monotonic clock.
    """
    taken = time.monotonic() - began
    assert answer["ack"] is None and answer["reason"] == "DEADLINE", answer
    assert peer in answer["peer"] and answer["phase"] in phases and answer["remedy"], answer
    assert taken < DEADLINE_SECONDS + FENCE_SECONDS + SURVIVOR_SECONDS, (taken, answer)


def worker_pids(scene: Scene, devices: Iterable[str]) -> dict[str, int]:
    """Process ids of the workers of these devices."""
    return {device: scene.worker_pid(device) for device in devices}


def shown_plan(scene: Scene) -> dict[str, Any]:
    """What `weightctl plan show` says."""
    command = [weightctl(), "--address", scene.cluster.address]
    command += ["plan", "show", "--model", scene.model, "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_undisturbed(scene: Scene, members: dict[str, int]) -> None:
    """Every worker is attached, was never started again, and has that many members."""
    for device in members:
        worker = scene.worker(device)
        assert worker["attached"] and int(worker["restarts"]) == 0, worker
    found = {device: scene.worker(device)["members"] for device in members}
    assert found == members, found


def kill_each_idle_worker(scene: Scene, first_version: int) -> None:
    """Kills the workers one after the other, with a sync after each that must succeed."""
    for version, device in enumerate(scene.devices, start=first_version):
        os.kill(scene.worker_pid(device), signal.SIGKILL)
        poll("worker is missed", lambda: int(scene.worker(device).get("restarts", 0)) > 0)
        scene.worker_pid(device)
        scene.sync_ok(version)
