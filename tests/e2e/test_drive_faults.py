"""Engines that fail while they are driven: every call fails and hangs in turn, engines die, daemon
and engine fail together, Ctrl-C; the error comes in time and names the cause."""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from pathlib import Path
from typing import Iterator

import pytest

from tests.support.cluster import Cluster, missing_binaries
from tests.support.drive_rig import (
    AFTER_COMMIT,
    BEFORE_WRITING,
    CONFIG,
    LIMIT_SECONDS,
    Killed,
    Rig,
    boom,
)
from weightd import errors

pytestmark = pytest.mark.skipif(bool(missing_binaries()), reason=missing_binaries() or "-")


@pytest.fixture(scope="module")
def failpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which a test stops the daemon at a named point."""
    return tmp_path_factory.mktemp("failpoints")


@pytest.fixture(scope="module")
def cluster(failpoints: Path) -> Iterator[Cluster]:
    """A daemon for all cases; each case has its own model key."""
    os.environ["WEIGHTD_FAILPOINT_DIR"] = str(failpoints)
    try:
        with Cluster() as running:
            yield running
    finally:
        del os.environ["WEIGHTD_FAILPOINT_DIR"]


@pytest.fixture
def rig(cluster: Cluster) -> Iterator[Rig]:
    """A trainer with engines of its own."""
    rig = Rig(cluster)
    try:
        yield rig
    finally:
        rig.close()


@pytest.mark.parametrize("call", BEFORE_WRITING)
def test_call_that_fails_before_writing_leaves_the_engine_as_it_was(rig: Rig, call: str) -> None:
    engine = rig.engine()
    rig.open().sync(1)
    engine.calls.clear()
    engine.script[call] = boom
    rig.source["model.norm.weight"] += 1
    error = rig.fails(2)
    assert isinstance(error, errors.EngineError) and error.reason == "ENGINE_CALL"
    assert f"call={call}" in error.message and "boom" in error.message
    assert error.peer == "engine e0" and error.remedy
    assert error.result is not None
    assert error.result.engines[0].error == f"{call}: RuntimeError: boom"
    assert "resume" not in engine.names and engine.paused == (call != "pause")
    assert engine.rank is not None
    assert engine.rank.wait(state="SERVING", timeout=LIMIT_SECONDS)["version"] == 1
    if call != "pause":
        assert engine.calls[-1] == ("finish_weight_update", None), "an update must not stay open"
    del engine.script[call]
    assert rig.actor.sync(2).engines[0].resumed and not rig.holds(engine)


@pytest.mark.parametrize("call", AFTER_COMMIT)
def test_call_that_fails_after_the_commit_is_told_and_healed_by_the_next_sync(
    rig: Rig, call: str
) -> None:
    engine = rig.engine(**{call: boom})
    rig.open()
    error = rig.fails(1)
    assert error.reason == "ENGINE_CALL" and f"call={call}" in error.message
    assert error.result is not None and error.result.replicas[0].committed
    assert "next sync" in error.remedy
    assert engine.paused
    del engine.script[call]
    ack = rig.actor.sync()
    assert ack.engines[0].resumed and engine.calls[-1] == ("served", 2)


def test_reset_that_resets_nothing_fails_the_sync(rig: Rig) -> None:
    engine = rig.engine()
    engine.script["no reset"] = lambda: None
    rig.open()
    error = rig.fails(1)
    assert "call=reset_caches" in error.message and "no cache was reset" in error.message
    assert "resume" not in engine.names


@pytest.mark.parametrize("call", [*BEFORE_WRITING, *AFTER_COMMIT])
def test_call_that_hangs_is_named_in_time(rig: Rig, call: str) -> None:
    release = threading.Event()
    engine = rig.engine(**{call: lambda: None if release.wait(20) else boom()})
    rig.open(engine_timeout=1.0)
    try:
        error = rig.fails(1)
        assert error.reason == "ENGINE_CALL" and error.code == errors.DEADLINE_EXCEEDED
        assert f"call={call}" in error.message and "within 1 s" in error.message
        assert call == "resume" or "resume" not in engine.names
        again = rig.fails(2)
        assert f"call={call}" in again.message and "earlier sync" in again.message
    finally:
        release.set()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and rig.actor._engines[0].busy:
        time.sleep(0.01)
    assert call == "resume" or "resume" not in engine.names, "nobody may resume it any more"
    engine.script.clear()
    assert rig.actor.sync(3).engines[0].resumed and not rig.holds(engine)


def test_default_limit_is_below_five_seconds(rig: Rig) -> None:
    release = threading.Event()
    rig.engine(update_weights=lambda: None if release.wait(20) else boom())
    rig.open()
    try:
        assert "call=update_weights" in rig.fails(1).message
    finally:
        release.set()


def test_draining_is_not_taken_for_a_hang(rig: Rig) -> None:
    engine = rig.engine(pause=lambda: time.sleep(1.0))
    assert rig.open(pause_mode="wait", engine_timeout=0.4).sync(1).engines[0].resumed
    assert engine.calls[1] == ("pause", "wait")


def test_daemon_error_wins_and_names_the_engine_error_as_its_cause(rig: Rig) -> None:
    def refuse() -> None:
        raise RuntimeError("steps are still running")

    engine = rig.engine(quiesce=refuse)
    rig.open()
    error = rig.fails(1)
    assert error.reason == "ENGINE_REFUSED" and "steps are still running" in str(error)
    assert engine.calls[-1] == ("finish_weight_update", None) and engine.paused

    def wait_and_fail() -> None:
        engine._asked.set()
        time.sleep(0.3)
        raise RuntimeError("worker failed")

    engine.script["update_weights"] = wait_and_fail
    error = rig.fails(1)
    assert error.reason == "ENGINE_REFUSED"
    assert isinstance(error.__cause__, errors.EngineError)
    assert "worker failed" in error.__cause__.message


def test_engine_that_tells_its_death_is_believed_at_once(rig: Rig) -> None:
    dead = threading.Event()
    release = threading.Event()

    def die() -> None:
        dead.set()
        release.wait(20)

    def check_alive() -> None:
        if dead.is_set():
            raise RuntimeError("the core is dead")

    engine = rig.engine(update_weights=die)
    engine.check_alive = check_alive  # type: ignore[attr-defined]
    rig.open()
    try:
        error = rig.fails(1)
        assert "call=update_weights" in error.message and "the core is dead" in error.message
    finally:
        release.set()


def test_other_engine_commits_and_serves_when_one_is_killed(rig: Rig, failpoints: Path) -> None:
    process = rig.cluster.start_engines("killed")
    process.call(
        "open", key="k", model=rig.model, engine="killed", architecture="LlamaForCausalLM",
        config=CONFIG, tp_rank=0, tp_size=1, dtype="bfloat16",
    )  # fmt: skip
    engine, killed = rig.engine(), Killed()
    rig.open(engines=[killed, engine])
    arm, hit = failpoints / "prepared.arm", failpoints / "prepared.hit"
    arm.touch()

    def kill() -> None:
        while not hit.exists():
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        killed.gone.set()
        arm.unlink()

    killer = threading.Thread(target=kill)
    killer.start()
    error = rig.fails(1)
    killer.join()
    assert error.reason == "PEER_LOST" and "killed" in str(error)
    assert error.result is not None
    drives = {drive.engine: drive for drive in error.result.engines}
    assert drives["e0"].resumed and engine.calls[-1] == ("served", 1) and not rig.holds(engine)
    assert not drives["killed"].resumed and "resume" not in killed.names
    assert rig.actor.sync(2, require=1).engines[1].resumed, "training goes on with the other"


def test_interrupted_sync_leaves_the_engine_closed_and_paused(rig: Rig) -> None:
    release = threading.Event()

    def interrupt() -> None:
        _thread.interrupt_main()
        release.wait(0.5)

    engine = rig.engine(update_weights=interrupt)
    rig.open()
    with pytest.raises(KeyboardInterrupt):
        rig.actor.sync(1)
    assert engine.calls[-1] == ("finish_weight_update", None) and engine.paused
    engine.script.clear()
    assert rig.actor.sync(1).engines[0].resumed


def test_engine_that_fails_does_not_cut_short_how_another_drains(rig: Rig) -> None:
    engine = rig.engine(pause=lambda: time.sleep(3.0))
    gone = Killed()  # refuses at once, and is registered nowhere
    rig.open(engines=[gone, engine], pause_mode="wait")
    gone.gone.set()
    error = rig.fails(1)
    assert error.reason == "ENGINE_CALL" and error.peer == "engine killed"
    assert error.result is not None and error.result.engines[1].resumed
    assert engine.calls[-1] == ("served", 1)
