"""A frozen peer (SIGSTOP) is an error at the phase deadline, and is fenced when it wakes (SIGCONT).

Version 1 is committed before; version 2 meets the frozen peer; version 3 is committed after it woke.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.cluster import missing_binaries
from tests.support.fault_roles import freeze
from tests.support.fault_steps import DEADLINES, check_deadline, ready
from tests.support.faults import poll

pytestmark = pytest.mark.skipif(bool(missing_binaries()), reason=missing_binaries() or "-")


def test_frozen_actor_fails_the_sync_and_takes_no_part_when_it_wakes(tmp_path: Path) -> None:
    with ready(tmp_path, DEADLINES) as scene:
        content = [player.call("content") for player in scene.engines.values()]
        scene.actors[1].freeze()
        began = time.monotonic()
        scene.begin_sync(2)
        check_deadline(scene.actors[0].answer(), "actor 1", {"admit"}, began)
        scene.assert_serving(1)
        scene.actors[1].thaw()
        late = scene.actors[1].answer()  # its own sync() finds nobody
        check_deadline(late, "actor 0", {"admit"}, began)
        assert [player.call("content") for player in scene.engines.values()] == content
        scene.assert_truthful()
        scene.sync_ok(3)


def test_frozen_engine_rank_fails_its_replica_untouched(tmp_path: Path) -> None:
    with ready(tmp_path, DEADLINES) as scene:
        frozen = scene.engines["e0", 1]
        content = [player.call("content") for player in scene.engines.values()]
        frozen.freeze()
        began = time.monotonic()
        for answer in scene.sync(2):
            check_deadline(answer, "engine e0 dp 0 pp 0 tp 1", {"prepare"}, began)
        frozen.thaw()
        frozen.call("wait", state="SERVING")
        assert [player.call("content") for player in scene.engines.values()] == content
        scene.assert_truthful()
        scene.assert_serving(1)
        scene.sync_ok(3)


def test_engine_rank_that_freezes_before_the_publication_does_not_serve(tmp_path: Path) -> None:
    with ready(tmp_path, DEADLINES) as scene:
        scene.points.arm("before_publish")
        began = time.monotonic()
        scene.begin_sync(2)
        scene.points.wait("before_publish")
        frozen = scene.engines["e0", 1]
        frozen.freeze()
        scene.points.release("before_publish")
        for actor in scene.actors.values():
            check_deadline(actor.answer(), "engine e0 dp 0 pp 0 tp 1", {"commit"}, began)
        assert scene.engine_status()["ready"] is False
        frozen.thaw()
        for player in scene.engines.values():
            player.call("wait", state="POISONED")
        scene.assert_truthful()
        scene.sync_ok(3)


def test_frozen_worker_is_killed_and_replaced(tmp_path: Path) -> None:
    with ready(tmp_path, DEADLINES) as scene:
        worker = scene.worker_pid()
        freeze(worker)
        began = time.monotonic()
        for answer in scene.sync(2):
            check_deadline(answer, "worker", {"build_plan", "prepare", "transfer"}, began)
        scene.assert_truthful()
        # It wrote nothing, or was killed before anybody was told: it may wake now.
        content = [player.call("content") for player in scene.engines.values()]
        try:
            os.kill(worker, signal.SIGCONT)
        except ProcessLookupError:
            pass
        scene.sync_ok(3)
        assert content != [player.call("content") for player in scene.engines.values()]


def test_frozen_worker_writes_nothing_after_the_error(tmp_path: Path) -> None:
    with ready(tmp_path, DEADLINES) as scene:
        worker = scene.worker_pid()
        scene.points.arm("window.0")
        began = time.monotonic()
        scene.begin_sync(2)
        scene.points.wait("window.0")
        freeze(worker)
        scene.points.release("window.0")
        for actor in scene.actors.values():
            check_deadline(actor.answer(), "worker", {"transfer"}, began)
        content = [player.call("content") for player in scene.engines.values()]
        poll("the frozen worker is gone", lambda: scene.worker_pid() != worker)
        scene.assert_truthful()
        assert scene.engine_status()["state"] == "POISONED"
        assert [player.call("content") for player in scene.engines.values()] == content
        scene.sync_ok(3)
        scene.assert_sockets()
