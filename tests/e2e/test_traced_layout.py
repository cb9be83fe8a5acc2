"""A model that no rule file describes: its engine's own loader is traced, and four FSDP2 ranks sync
into it through the real daemon. The bytes must be those that the loader itself produces."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Iterator, Optional

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.support.cluster import Cluster, EngineCaller, EngineProcess, missing_binaries
from tests.support.gloo import run_ranks
from tests.support.toy_engine import ToyModel
from weightd import Actor, errors

pytestmark = pytest.mark.skipif(bool(missing_binaries()), reason=missing_binaries() or "-")

VERSIONS = (1, 2)
ENGINES = ((1, "float32"), (2, "bfloat16"), (4, "float32"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A daemon for all cases; each case has its own model key."""
    with Cluster() as running:
        yield running


@pytest.fixture(scope="module")
def process(cluster: Cluster) -> EngineProcess:
    """The process that holds the engine ranks."""
    return cluster.start_engines("toy", "tests.support.toy_process")


def _open(process: EngineProcess, model: str, **options: Any) -> list[str]:
    """Opens the engines of a case; returns the keys of their ranks."""
    keys = []
    for tp_size, dtype in ENGINES:
        for tp_rank in range(tp_size):
            keys.append(f"{model}/tp{tp_size}/{tp_rank}")
            where = {"tp_rank": tp_rank, "tp_size": tp_size, "dtype": dtype, **options}
            process.call("open", key=keys[-1], model=model, engine=f"tp{tp_size}", **where)
    return keys


def _train(
    rank: int,
    address: str,
    model_key: str,
    process: Optional[EngineCaller],
    keys: list[str],
    folder: Path,
) -> list[str]:
    torch.manual_seed(3)
    model: nn.Module = ToyModel()
    mesh = init_device_mesh("cpu", (4,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    problems = []
    with Actor(address, model=model_key) as actor:
        actor.register(model)
        for version in VERSIONS:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter._local_tensor.mul_(1.25)
            actor.sync(version)
            full = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
            if rank == 0:
                source = folder / f"{model_key}-{version}.pt"
                torch.save(full, source)
                for key in keys:
                    problems += process.call(
                        "check", key=key, version=version, source=str(source)
                    )
    return problems


def _weightctl(cluster: Cluster, *arguments: str) -> Any:
    run = subprocess.run(
        [os.environ["WEIGHTCTL_BIN"], "-a", cluster.address, "-o", "json", *arguments],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return json.loads(run.stdout)


def test_engines_hold_what_their_own_loader_produces(
    cluster: Cluster, process: EngineProcess
) -> None:
    keys = _open(process, "traced")
    try:
        problems = run_ranks(
            4, _train, cluster.address, "traced", process.caller, keys, cluster.folder
        )
    except AssertionError as error:
        pytest.fail(f"{error}\n{cluster.logs()}")
    assert [problem for part in problems for problem in part] == []
    if "WEIGHTCTL_BIN" in os.environ:
        [model] = _weightctl(cluster, "engines", "--model", "traced")["models"]
        assert {engine["loader"] for engine in model["engines"]} == {"traced"}
    for key in keys:
        process.call("close", key=key)


def _sync_once(rank: int, address: str, model_key: str) -> str:
    """One plain trainer rank; returns the error of its sync."""
    torch.manual_seed(4)
    with Actor(address, model=model_key) as actor:
        actor.register([(n, t.detach()) for n, t in ToyModel().state_dict().items()])
        try:
            actor.sync(1)
        except errors.LayoutError as error:
            return f"{error.reason} {error.tensor}"
    return ""


@pytest.mark.parametrize(
    ("without", "wanted"),
    [("unused.mask", "UNKNOWN_TENSOR unused.mask"), ("", "")],
)
def test_tensors_that_the_loader_never_saw_are_refused_before_a_byte_is_written(
    cluster: Cluster, process: EngineProcess, without: str, wanted: str
) -> None:
    model = f"without-{without or 'nothing'}"
    key = f"{model}/0"
    where = {"tp_rank": 0, "tp_size": 1, "dtype": "float32", "without": without}
    process.call("open", key=key, model=model, engine="e0", **where)
    assert run_ranks(1, _sync_once, cluster.address, model) == [wanted]
    assert process.call("untouched", key=key) == bool(wanted)
    process.call("close", key=key)


def test_a_rule_file_wins_unless_the_trace_is_preferred(
    cluster: Cluster, process: EngineProcess
) -> None:
    where = {"tp_rank": 0, "tp_size": 1, "dtype": "float32", "architecture": "LlamaForCausalLM"}
    before = process.call("open", key="r", model="rules", engine="e0", **where)
    assert run_ranks(1, _sync_once, cluster.address, "rules")[0].startswith("UNKNOWN_TENSOR")
    assert process.call("untouched", key="r")
    process.call("close", key="r")
    after = process.call(
        "open", key="p", model="preferred", engine="e0", prefer_layout=True, **where
    )
    assert after == before + 1
    assert run_ranks(1, _sync_once, cluster.address, "preferred") == [""]
    process.call("close", key="p")
