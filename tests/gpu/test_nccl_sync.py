"""The nccl path, bit for bit.

On one GPU two workers serve it under two names, so that bytes between them go through NCCL, which takes the two for
machines of their own and talks over TCP: this shows that what arrives is right, not how fast. Where there are two GPUs,
also between them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterator, Sequence

import pytest

from tests.gpu.test_ipc_sync import CONFIG, ENGINES, TRAINER, VERSIONS, save_source
from tests.support.cluster import Cluster
from tests.support.gpu import gpu_uuids, usage_settled
from tests.support.peer import Peer, ask_all
from weightd import new_group

# Where trainer ranks and engine ranks have their memory: 0 is the first worker's, 1 the second's.
PLACES = {
    "apart": ((1, 1), (0, 0)),  # one worker only sends, the other only receives
    "crossed": ((0, 1), (0, 1)),  # both do both, and store directly on their own side
}
GPUS = {"one GPU": 1, "two GPUs": 2}
# Slots of 1.3 MiB, or 0.7 MiB for a worker that does both: many turns.
WIRE_BYTES = "4MiB"


def worker_environment(number: int) -> dict[str, str]:
    """Of a client that lends its memory to the second worker, or to the first."""
    return {"WEIGHTD_TEST_GPU_WORKER": str(number)} if number else {}


def wire_settings(devices: Sequence[str], wire_bytes: str = WIRE_BYTES) -> str:
    """A daemon whose workers send to each other."""
    listed = json.dumps(list(devices))
    return f'[worker]\ndevices = {listed}\npath = "wire"\nwire_bytes = "{wire_bytes}"\n'


@pytest.fixture(scope="module", params=[(gpus, places) for gpus in GPUS for places in PLACES], ids="-".join)
def peers(request: pytest.FixtureRequest) -> Iterator[tuple[Cluster, list[Peer], list[Peer]]]:
    """A daemon with two workers, two trainer processes and two engine processes."""
    gpus, places = request.param
    uuids = gpu_uuids()
    if len(uuids) < GPUS[gpus]:
        pytest.skip(f"needs {GPUS[gpus]} GPUs, has {len(uuids)}")
    two = GPUS[gpus] == 2
    with pytest.MonkeyPatch.context() as patch:
        if not two:
            patch.setenv("NCCL_SOCKET_IFNAME", "lo")
        cluster = Cluster(wire_settings(uuids[:2] if two else (uuids[0], f"{uuids[0]}.1")))
    started: list[Peer] = []
    try:
        for module, numbers in zip((TRAINER, ENGINES), PLACES[places]):
            for rank, number in enumerate(numbers):
                name = f"{module.rsplit('.', 1)[1]}{rank}"
                environment = {"CUDA_VISIBLE_DEVICES": str(number)} if two else worker_environment(number)
                started.append(Peer(cluster, name, module, environment))
        yield cluster, started[:2], started[2:]
    finally:
        for peer in started:
            peer.close()
        cluster.close()


@pytest.mark.parametrize("tp_size", (1, 2))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_engines_hold_the_golden_layout_after_nccl(
    peers: tuple[Cluster, list[Peer], list[Peer]], tmp_path: Path, dtype: str, tp_size: int
) -> None:
    cluster, trainers, engines = peers
    model = f"nccl-{dtype}-tp{tp_size}"
    group = new_group()
    try:
        for rank in range(tp_size):
            engines[rank].call(
                "open", key=model, memory="cuda", model=model, engine="e0", dtype="bfloat16",
                architecture="LlamaForCausalLM", config=CONFIG, tp_rank=rank, tp_size=tp_size,
            )  # fmt: skip
            engines[rank].call("capture", key=model)
        before: list[Any] = [engines[rank].call("replay", key=model) for rank in range(tp_size)]
        for rank, trainer in enumerate(trainers):
            trainer.ask(
                "open", model=model, group=group, rank=rank, world_size=2, config=CONFIG, dtype=dtype
            )
        assert [trainer.answer()["registered"] for trainer in trainers] == [True, True]
        for version in VERSIONS:
            ask_all(trainers, "step", version=version, busy=version == VERSIONS[-1])
            acks = ask_all(trainers, "sync", version=version)
            assert [ack.get("committed") for ack in acks] == [1, 1], acks
            source = save_source(trainers, tmp_path)
            for rank in range(tp_size):
                found = engines[rank].call("check", key=model, version=version, source=str(source))
                assert found == []
        # The graph was captured before the first sync: it reads the same addresses.
        after = [engines[rank].call("replay", key=model) for rank in range(tp_size)]
        assert all(x != y for old, new in zip(before, after) for x, y in zip(old, new))
        print(f"RESULT {model}: seconds of the last sync {acks[0]['seconds']:.3f}, used {usage_settled()} MiB")
    except AssertionError as error:
        pytest.fail(f"{error}\n{cluster.logs()}")
    finally:
        for rank in range(tp_size):
            engines[rank].call("close", key=model)
        ask_all(trainers, "close_all")
