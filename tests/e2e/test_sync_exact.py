"""From real FSDP2 ranks into engines: after every sync each engine holds, bit for bit, the golden
layout of ``full_tensor()`` cast to the engine's dtype.

One sync serves four engines at once: TP 1 and 2, each in bfloat16 and float32. Memory is on one
device, or spread over three, so that several workers write into one engine rank; or the three
share no memory, and what one has for another is sent. Workers are the daemon's children, or those of
trainer and engine ranks (``spawn``).
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.support.cluster import Cluster, EngineCaller, EngineProcess, missing_binaries
from tests.support.gloo import run_ranks
from weightd import Actor

pytestmark = pytest.mark.skipif(bool(missing_binaries()), reason=missing_binaries() or "-")

VERSIONS = (1, 2, 3)
ONE_DEVICE = ("host",)
DEVICES = ("host", "host.1", "host.2")
TRAINERS = {
    "fsdp4": ((4,), ("dp",)),
    "hsdp2x2": ((2, 2), ("rep", "dp")),
    "fsdp2xtp2": ((2, 2), ("dp", "tp")),
}
ENGINES = tuple(itertools.product((1, 2), ("bfloat16", "float32")))
SIZES = {
    "hidden_size": 36,
    "intermediate_size": 46,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 32,
}
FAMILIES = {
    "LlamaForCausalLM": (LlamaForCausalLM, LlamaConfig, {"head_dim": 10}),
    "Qwen2ForCausalLM": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A daemon for all cases; each case has its own model key."""
    with Cluster(f"[worker]\ndevices = {list(DEVICES)}\n".replace("'", '"')) as running:
        yield running


@pytest.fixture(scope="module")
def wired_cluster() -> Iterator[Cluster]:
    """A daemon whose workers send to each other, in many small turns, and verify meanwhile."""
    settings = f"[worker]\ndevices = {list(DEVICES)}\n".replace("'", '"')
    wire = 'path = "wire"\nwire_bytes = "64KiB"\nverify = "beside"\n'
    with Cluster(settings + wire) as running:
        yield running


@pytest.fixture(scope="module")
def engine_processes(cluster: Cluster) -> list[EngineProcess]:
    """Two processes, so that the ranks of one engine never share one."""
    return [cluster.start_engines(f"engines{i}") for i in range(2)]


@pytest.fixture(params=("auto", "wire"))
def bare_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A daemon without a worker of its own."""
    with Cluster(f'[worker]\ndevices = []\npath = "{request.param}"\n') as running:
        yield running


def _model(family: str, dtype: torch.dtype) -> nn.Module:
    """The same weights in every process: distinct values, several of them not exact in bfloat16."""
    kind, config_kind, more = FAMILIES[family]
    torch.manual_seed(7)
    model = kind(config_kind(**SIZES, **more)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float32).to(dtype))
    return model


def _shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2 over the last data dimension, HSDP over ``rep``, tensor parallelism over ``tp``."""
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        column = ("q", "k", "v", "gate", "up")
        for layer in model.model.layers:
            plan = {f"self_attn.{p}_proj": ColwiseParallel() for p in "qkv"}
            plan |= {f"mlp.{p}_proj": ColwiseParallel() for p in column[3:]}
            plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
            parallelize_module(layer, mesh["tp"], plan)
        mesh = mesh["dp"]
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _step(model: nn.Module, version: int) -> None:
    """Changes every element; two roundings, alike on a shard and on the whole tensor."""
    with torch.no_grad():
        for parameter in model.parameters():
            local = getattr(parameter, "_local_tensor", parameter)
            local.mul_(1.0 + 0.125 * version)
            local.add_(0.001 * version)


def _train(
    rank: int,
    address: str,
    model_key: str,
    family: str,
    trainer: str,
    dtype: torch.dtype,
    devices: tuple[str, ...],
    engines: list[tuple[EngineCaller, str]],
    folder: Path,
    worker: str,
) -> list[str]:
    """One trainer rank: three versions, each checked in every engine. Returns what went wrong."""
    shape, names = TRAINERS[trainer]
    whole, model = _model(family, dtype), _model(family, dtype)
    _shard(model, init_device_mesh("cpu", shape, mesh_dim_names=names))
    problems: list[str] = []
    os.environ["XDG_RUNTIME_DIR"] = str(folder)  # of the sockets of spawned workers
    device = devices[rank % len(devices)]
    with Actor(address, model=model_key, device=device, worker=worker) as actor:
        actor.register(model)
        for version in VERSIONS:
            _step(model, version)
            _step(whole, version)
            ack = actor.sync(version)
            problems += _unexpected(ack, version)
            full = {
                name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                for name, tensor in model.state_dict().items()
            }
            if rank == 0:
                problems += [
                    f"full_tensor() of {name} is not the trained tensor"
                    for name, tensor in whole.state_dict().items()
                    if not torch.equal(full[name], tensor)
                ]
                source = folder / f"{model_key}-{version}.pt"
                torch.save({name: tensor.clone() for name, tensor in full.items()}, source)
                for process, key in engines:
                    problems += process.call("check", key=key, version=version, source=str(source))
                source.unlink()
    return problems


def _unexpected(ack: Any, version: int) -> list[str]:
    committed = [replica for replica in ack.replicas if replica.committed]
    found = (ack.version, len(committed), ack.verified, {r.version for r in committed})
    wanted = (version, len(ENGINES), "memory", {version})
    return [] if found == wanted else [f"acknowledged {found} instead of {wanted}: {ack!r}"]


def _open_engines(
    processes: list[EngineProcess],
    model_key: str,
    family: str,
    devices: tuple[str, ...],
    worker: str,
) -> list[tuple[EngineCaller, str]]:
    """Opens every engine of the case; ranks of one engine lie in different processes."""
    _, config_kind, more = FAMILIES[family]
    config = config_kind(**SIZES, **more).to_dict()
    config.pop("dtype", None)
    opened = []
    for number, (tp_size, dtype) in enumerate(ENGINES):
        for tp_rank in range(tp_size):
            process = processes[(number + tp_rank) % len(processes)]
            key = f"{model_key}/tp{tp_size}-{dtype}/{tp_rank}"
            process.call(
                "open",
                key=key,
                model=model_key,
                engine=f"tp{tp_size}-{dtype}",
                architecture=family,
                config=config,
                tp_rank=tp_rank,
                tp_size=tp_size,
                dtype=dtype,
                device=devices[(number + tp_rank) % len(devices)],
                worker=worker,
            )
            opened.append((process.caller, key))
    return opened


CASES = [
    ("LlamaForCausalLM", trainer, dtype, ONE_DEVICE)
    for trainer in TRAINERS
    for dtype in (torch.float32, torch.bfloat16)
] + [
    ("Qwen2ForCausalLM", "fsdp4", torch.float32, ONE_DEVICE),
    ("Qwen2ForCausalLM", "fsdp2xtp2", torch.bfloat16, ONE_DEVICE),
    ("LlamaForCausalLM", "fsdp4", torch.float32, DEVICES),
    ("LlamaForCausalLM", "hsdp2x2", torch.bfloat16, DEVICES),
    ("Qwen2ForCausalLM", "fsdp2xtp2", torch.float32, DEVICES),
]


def _case_id(value: object) -> str:
    return f"{len(value)}dev" if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(("family", "trainer", "dtype", "devices"), CASES, ids=_case_id)
def test_engines_hold_the_golden_layout_bit_for_bit(
    cluster: Cluster,
    engine_processes: list[EngineProcess],
    family: str,
    trainer: str,
    dtype: torch.dtype,
    devices: tuple[str, ...],
) -> None:
    _run_case(cluster, engine_processes, family, trainer, dtype, devices, "daemon")


@pytest.mark.parametrize("devices", (ONE_DEVICE, DEVICES), ids=_case_id)
def test_spawned_workers_are_as_exact_and_leave_nothing(
    bare_cluster: Cluster, devices: tuple[str, ...]
) -> None:
    """The daemon serves no device: each device's worker is the child of a rank."""
    environment = {"XDG_RUNTIME_DIR": str(bare_cluster.folder)}
    processes = [
        bare_cluster.start_engines(f"bare{len(devices)}-{i}", environment=environment)
        for i in range(2)
    ]
    family, trainer = "LlamaForCausalLM", "fsdp4"
    _run_case(bare_cluster, processes, family, trainer, torch.float32, devices, "spawn")
    for process in processes:
        process.close()
    assert [path.name for path in bare_cluster.folder.glob("weightd-worker-*")] == []


@pytest.mark.parametrize(
    ("family", "trainer", "dtype"),
    [case[:3] for case in CASES if case[3] == DEVICES],
    ids=_case_id,
)
def test_engines_hold_the_golden_layout_after_a_wire(
    wired_cluster: Cluster, family: str, trainer: str, dtype: torch.dtype
) -> None:
    processes = [wired_cluster.start_engines(f"engines-{trainer}-{i}") for i in range(2)]
    _run_case(wired_cluster, processes, family, trainer, dtype, DEVICES, "daemon")


def _run_case(
    cluster: Cluster,
    processes: list[EngineProcess],
    family: str,
    trainer: str,
    dtype: torch.dtype,
    devices: tuple[str, ...],
    worker: str,
) -> None:
    model_key = f"{family}-{trainer}-{str(dtype).removeprefix('torch.')}-{len(devices)}"
    engines = _open_engines(processes, model_key, family, devices, worker)
    try:
        problems = run_ranks(
            4,
            _train,
            cluster.address,
            model_key,
            family,
            trainer,
            dtype,
            devices,
            engines,
            cluster.folder,
            worker,
        )
    except AssertionError as error:
        pytest.fail(f"{error}\n{cluster.logs()}")
    finally:
        for process, key in engines:
            process.call("close", key=key)
    assert [problem for part in problems for problem in part] == []
