"""Engines driven through a sync by the trainer's rank 0, with the real daemon and real engine ranks
behind scripted calls: the order of calls, when they begin, and what is reported."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Iterator

import pytest

from tests.support.cluster import Cluster, missing_binaries
from tests.support.drive_rig import AFTER_COMMIT, BEFORE_WRITING, CONFIG, Killed, Rig
from tests.support.scripted_engine import ScriptedEngine
from weightd import Ack, Actor, errors, new_group

pytestmark = pytest.mark.skipif(bool(missing_binaries()), reason=missing_binaries() or "-")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A daemon for all cases; each case has its own model key."""
    with Cluster() as running:
        yield running


@pytest.fixture
def rig(cluster: Cluster) -> Iterator[Rig]:
    """A trainer with engines of its own."""
    rig = Rig(cluster)
    try:
        yield rig
    finally:
        rig.close()


def test_every_call_in_order_and_resumes_with_the_version(rig: Rig) -> None:
    engine = rig.engine()
    actor = rig.open(pause_mode="keep")
    ack = actor.sync(1)
    assert engine.calls == [
        ("init_weight_transfer_engine", {}),
        ("pause", "keep"),
        ("start_weight_update",),
        ("update_weights", {"model": rig.model, "version": 1}),
        ("finish_weight_update", "1"),
        ("reset_caches",),
        ("resume",),
        ("served", 1),
    ]
    assert not rig.holds(engine)
    (drive,) = ack.engines
    assert (drive.engine, drive.resumed, drive.error) == ("e0", True, "")
    assert drive.caches_reset == ("prefix",)
    assert list(drive.calls) == [*BEFORE_WRITING, *AFTER_COMMIT]
    assert sum(drive.calls.values()) <= drive.pause == ack.pause < 5
    assert "paused" in repr(ack) and "prefix" in repr(ack)


def test_pause_lasts_from_the_call_of_pause_to_the_end_of_resume(rig: Rig) -> None:
    rig.engine(pause=lambda: time.sleep(0.2), resume=lambda: time.sleep(0.2))
    (drive,) = rig.open().sync(1).engines
    assert 0.4 <= drive.pause < 2
    assert drive.calls["pause"] >= 0.2 and drive.calls["resume"] >= 0.2


def test_caches_stay_if_told_so(rig: Rig) -> None:
    engine = rig.engine()
    (drive,) = rig.open(reset_caches=False).sync(1).engines
    assert "reset_caches" not in engine.names and drive.caches_reset == ()


def test_engine_is_not_paused_for_what_the_plan_refuses(rig: Rig) -> None:
    engine = rig.engine()
    del rig.source["model.norm.weight"]
    rig.open()
    assert rig.fails(1).reason == "MISSING_TENSOR"
    assert engine.names == ["init_weight_transfer_engine"]


def test_engine_is_paused_only_when_all_ranks_are_there(rig: Rig) -> None:
    engine = rig.engine()
    group = new_group()
    actors = [
        Actor(
            rig.cluster.address, model=rig.model, rank=rank, world_size=2, group=group,
            engines=rig.engines,
        )
        for rank in range(2)
    ]  # fmt: skip
    for actor in actors:
        actor.register(rig.source)
    with ThreadPoolExecutor() as pool:
        early = pool.submit(actors[0].sync, 1)
        time.sleep(0.3)
        assert "pause" not in engine.names
        late = pool.submit(actors[1].sync, 1)
        acks: list[Ack] = [early.result(), late.result()]
    assert engine.names.count("pause") == 1, "only rank 0 drives"
    assert [len(ack.engines) for ack in acks] == [1, 0]
    for actor in actors:
        actor.close()


def test_engine_of_another_model_is_told_so(rig: Rig) -> None:
    rig.engine()
    stranger = ScriptedEngine(rig.cluster.address, rig.model + "-other", "stranger", CONFIG)
    rig.engines.append(stranger)
    rig.open(engine_timeout=1.0)
    stranger.script["update_weights"] = lambda: stranger._answered.set()
    error = rig.fails(1)
    assert error.reason == "NO_ENGINE" and "stranger" in error.message and "e0" in error.message
    assert "resume" in rig.engines[0].names and "resume" not in stranger.names


def test_engines_can_be_replaced(rig: Rig) -> None:
    engine, refusing = rig.engine(), Killed()
    refusing.gone.set()
    actor = rig.open(engines=[])
    assert engine.names == []
    with pytest.raises(errors.EngineError, match="cannot be driven"):
        actor.drive([refusing])
    actor.drive({"e0": engine})
    assert actor.sync(1).engines[0].resumed
