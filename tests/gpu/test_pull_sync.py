"""Engines whose parameters lie in GPU memory that no worker can map, and derived ones in stages.

The memory is that of a sleep-mode allocator (tests/gpu/pull/sleep_pool.cc), or of cudaMallocAsync.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Iterator

import pytest

from tests.gpu.test_ipc_faults import HEARD_SECONDS, LARGE, SLACK_MIB, Scene, opened
from tests.gpu.test_ipc_sync import CONFIG, ENGINES, EXPANDABLE, TRAINER, VERSIONS, save_source
from tests.support.cluster import Cluster
from tests.support.gpu import disarm, usage_settled, used_mib, wait_until
from tests.support.peer import Peer, ask_all
from weightd import new_group

STAGE_BYTES = 64 << 10  # the embedding has 99 KiB, all parameters 1.0 MiB
LARGE_STAGE = 32 << 20


class Rig:
    """A daemon with a worker for one GPU, two trainer ranks and two engine processes."""

    def __init__(self, gpu: str, environment: dict[str, str]) -> None:
        self.cluster = Cluster(f'[worker]\ndevices = ["{gpu}"]\n')
        self.peers: list[Peer] = []
        self.trainers = [self.start(f"trainer{i}", TRAINER, environment) for i in range(2)]
        self.engines = [self.start(f"engines{i}", ENGINES, {}) for i in range(2)]

    def start(self, name: str, module: str, environment: dict[str, str]) -> Peer:
        """Starts a process that ends with the rig."""
        self.peers.append(Peer(self.cluster, name, module, environment))
        return self.peers[-1]

    def open_trainers(self, model: str, dtype: str = "float32", **more: Any) -> None:
        """A new start of the trainer."""
        group = new_group()
        for rank, trainer in enumerate(self.trainers):
            trainer.ask(
                "open", model=model, group=group, rank=rank, world_size=2, config=CONFIG,
                dtype=dtype, **more,
            )  # fmt: skip
        for trainer in self.trainers:
            trainer.answer()

    def sync(self, version: int, folder: Path, busy: bool = False) -> tuple[dict[str, Any], Path]:
        """A step and a sync; rank 0's answer and the file of what was synced."""
        ask_all(self.trainers, "step", version=version, busy=busy)
        acks = ask_all(self.trainers, "sync", version=version)
        return acks[0], save_source(self.trainers, folder)

    def plan(self, model: str) -> dict[str, Any]:
        """What weightctl would show; empty where it is not built."""
        weightctl = os.environ.get("WEIGHTCTL_BIN", "")
        if not Path(weightctl).is_file():
            return {}
        line = [weightctl, "--address", self.cluster.address, "-o", "json", "plan", "show"]
        return json.loads(subprocess.run([*line, "--model", model], capture_output=True).stdout)

    def close(self) -> None:
        """Ends all of it."""
        for peer in self.peers:
            peer.close()
        self.cluster.close()


@pytest.fixture(scope="module", params=("cudaMalloc", "expandable_segments"))
def rig(gpu: str, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """One per kind of the trainer's allocator."""
    made = Rig(gpu, EXPANDABLE if request.param == "expandable_segments" else {})
    yield made
    made.close()


def _open(process: Peer, key: str, model: str, **more: Any) -> dict[str, Any]:
    options = {
        "tp_rank": 0, "tp_size": 1, "stage_bytes": STAGE_BYTES, "config": CONFIG, "engine": "e0",
        **more,
    }  # fmt: skip
    return process.call(
        "open", key=key, memory="cuda", model=model, dtype="bfloat16",
        architecture="LlamaForCausalLM", **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tp_size", "dtype", "stage_bytes"),
    [(1, "float32", STAGE_BYTES), (2, "bfloat16", STAGE_BYTES), (2, "float32", 1 << 30)],
)
def test_memory_that_cannot_be_mapped_is_pulled_bit_for_bit(
    rig: Rig, tmp_path: Path, tp_size: int, dtype: str, stage_bytes: int
) -> None:
    model = f"pull-{dtype}-{tp_size}-{stage_bytes}"
    ranks = [(rig.engines[rank], f"{model}/{rank}") for rank in range(tp_size)]
    which = ("some", "all")
    try:
        for rank, (process, key) in enumerate(ranks):
            _open(
                process, key, model, pulled=which[rank], tp_rank=rank, tp_size=tp_size,
                stage_bytes=stage_bytes,
            )  # fmt: skip
            process.call("capture", key=key)
        before = [process.call("replay", key=key) for process, key in ranks]
        rig.open_trainers(model, dtype)
        for version in VERSIONS:
            ack, source = rig.sync(version, tmp_path)
            assert ack.get("committed") == 1, ack
            assert ack["verified"] == "memory"
            assert ack["path_bytes"].keys() == {"ipc", "pull"}
            assert 0.4 < ack["path_bytes"]["pull"] / ack["bytes"] < 0.95, ack
            for process, key in ranks:
                assert process.call("check", key=key, version=version, source=str(source)) == []
        # The graph was captured before the first sync: it reads the same addresses.
        after = [process.call("replay", key=key) for process, key in ranks]
        for process, key in ranks:
            process.call("capture", key=key)
        assert after == [process.call("replay", key=key) for process, key in ranks]
        assert all(x != y for old, new in zip(before, after) for x, y in zip(old, new))
        for pair in rig.plan(model).get("pairs", []):
            staged = pair["reason"] == "memory cannot be mapped: staged by ipc, same GPU"
            assert (pair["path"] == "pull") == staged, pair
    except AssertionError as error:
        pytest.fail(f"{error}\n{rig.cluster.logs()}")
    finally:
        for process, key in ranks:
            process.call("close", key=key)
        ask_all(rig.trainers, "close_all")


def test_derived_parameters_come_in_stages_over_ipc(rig: Rig, tmp_path: Path) -> None:
    """Several rounds of the same plan in memory that stages share, replayed for every version."""
    process, key = rig.engines[0], "staged/0"
    try:
        _open(process, key, "staged", staged=True)
        rig.open_trainers("staged")
        for version in VERSIONS:
            ack, source = rig.sync(version, tmp_path)
            assert (ack.get("committed"), ack.get("verified")) == (1, "loadable"), ack
            assert process.call("check", key=key, version=version, source=str(source)) == []
    except AssertionError as error:
        pytest.fail(f"{error}\n{rig.cluster.logs()}")
    finally:
        process.call("close", key=key)
        ask_all(rig.trainers, "close_all")


def test_an_engine_that_sleeps_is_refused_untouched_and_synced_awake(
    rig: Rig, tmp_path: Path
) -> None:
    process, key, model = rig.engines[0], "sleeps/0", "sleeps"
    try:
        _open(process, key, model, pulled="all")
        rig.open_trainers(model)
        ack, _ = rig.sync(1, tmp_path)
        assert ack.get("committed") == 1, ack
        process.call("sleep")
        refused, _ = rig.sync(2, tmp_path)
        assert refused["reason"] == "ENGINE_REFUSED" and "has no memory now" in refused["message"]
        state = process.call("state", key=key)
        assert (state["state"], state["version"], state["dirty"]) == ("SERVING", 1, False)
        process.call("wake")
        ack, source = rig.sync(3, tmp_path)
        assert ack.get("committed") == 1, ack
        assert process.call("check", key=key, version=3, source=str(source)) == []
    except AssertionError as error:
        pytest.fail(f"{error}\n{rig.cluster.logs()}")
    finally:
        process.call("close", key=key)
        ask_all(rig.trainers, "close_all")


def test_memory_of_cuda_malloc_async_is_pulled(rig: Rig, tmp_path: Path) -> None:
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}
    process, key, model = rig.start("async", ENGINES, environment), "async/0", "async"
    try:
        _open(process, key, model)
        rig.open_trainers(model)
        for version in VERSIONS:
            ack, source = rig.sync(version, tmp_path)
            assert ack.get("committed") == 1 and ack["path_bytes"].keys() == {"pull"}, ack
            assert process.call("check", key=key, version=version, source=str(source)) == []
    except AssertionError as error:
        pytest.fail(f"{error}\n{rig.cluster.logs()}")
    finally:
        process.close()
        ask_all(rig.trainers, "close_all")


def test_stages_that_do_not_fit_are_refused_before_anything_is_written(rig: Rig) -> None:
    process = rig.engines[1]
    large = {"config": LARGE, "pulled": "all"}  # some 200 MiB
    try:
        with pytest.raises(AssertionError, match="GPU has no room.*needed_bytes=.*free_bytes="):
            _open(process, "e", "none", stage_bytes=1 << 40, leave_bytes=LARGE_STAGE, **large)
    finally:
        process.call("hog", leave_bytes=0)
    with pytest.raises(AssertionError, match="cannot be lent"):
        _open(process, "e", "none", stage_bytes=0, **large)
    _open(process, "e", "none", stage_bytes=1 << 40, **large)
    process.call("close", key="e")


def test_a_trainers_memory_that_cannot_be_mapped_is_refused_or_copied(
    rig: Rig, tmp_path: Path
) -> None:
    """Trainer ranks have half of it in sleep-mode memory; the last step runs on during sync."""
    process, key, model = rig.engines[0], "copied/0", "copied"
    try:
        for copy_bytes in (0, 1 << 10):
            with pytest.raises(AssertionError, match="cannot be lent.*Actor\\(copy_bytes"):
                rig.trainers[0].call(
                    "open", model="refused", group=new_group(), rank=0, world_size=1, config=CONFIG,
                    dtype="float32", pulled="some", copy_bytes=copy_bytes,
                )  # fmt: skip
        _open(process, key, model, pulled="some")
        rig.open_trainers(model, pulled="some", copy_bytes=8 << 20)
        for version in VERSIONS:
            ack, source = rig.sync(version, tmp_path, busy=version == VERSIONS[-1])
            assert ack.get("committed") == 1, ack
            assert process.call("check", key=key, version=version, source=str(source)) == []
        rig.trainers[1].call("sleep")
        refused = ask_all(rig.trainers, "sync", version=VERSIONS[-1] + 1)
        assert {answer["reason"] for answer in refused} == {"MEMORY_MOVED"}, refused
        state = process.call("state", key=key)
        assert (state["state"], state["version"]) == ("SERVING", VERSIONS[-1])
    except AssertionError as error:
        pytest.fail(f"{error}\n{rig.cluster.logs()}")
    finally:
        process.call("close", key=key)
        ask_all(rig.trainers, "close_all")


@pytest.mark.parametrize("victim", ("engine", "worker"))
def test_a_kill_between_rounds_leaves_no_memory_and_the_next_sync_heals(
    gpu: str, failpoints: Path, victim: str
) -> None:
    """A stage has been copied, the next is to come."""
    options = {"pulled": "some", "stage_bytes": LARGE_STAGE}
    made = Scene(gpu, failpoints, point="between_rounds", engine_options=options)
    with opened(made) as scene:
        before = usage_settled()
        scene.stop_in_transfer()
        if victim == "engine":
            scene.engine.kill()
        else:
            os.kill(scene.worker_pids((gpu,))[gpu], signal.SIGKILL)
        killed = time.monotonic()
        disarm(scene.folder, scene.point)
        errors = [trainer.answer() for trainer in scene.trainers]
        assert time.monotonic() - killed < HEARD_SECONDS
        lost = "PEER_LOST" if victim == "engine" else "WORKER_LOST"
        assert [error["reason"] for error in errors] == [lost] * 2, errors
        if victim == "engine":
            wait_until(lambda: used_mib() < before - 300, HEARD_SECONDS)
            scene.engine = scene.start("engine2", ENGINES)
            scene.open_engine(scene.engine)
        else:
            assert scene.engine.call("state", key="e")["state"] == "POISONED"
            wait_until(lambda: scene.engine.call("state", key="e")["registered"], 10)
        scene.sync(scene.trainers, scene.engine)
        assert abs(usage_settled() - before) <= SLACK_MIB
        assert [trainer.call("usable") for trainer in scene.trainers] == [1024.0, 1024.0]
