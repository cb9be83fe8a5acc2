"""Derived parameters that are received one layer at a time, in memory that the layers share.

The engine converts them (it computes with transposes) and destroys what it received, so that what it
holds can only be right if every stage was converted after it had come and before the next one did.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from tests.support.cluster import Cluster, EngineCaller, missing_binaries
from tests.support.gloo import run_ranks
from tests.support.llama_engine import empty_params, expected_params, source_shapes
from tests.support.llama_trainer import MESHES, make_model, shard_model, train_step
from tests.support.staged_rank import StagedParams
from tests.support.vllm_engine import llama_config
from weightd import Actor, EngineRank
from weightd.errors import EngineError, LayoutError

pytestmark = pytest.mark.skipif(bool(missing_binaries()), reason=missing_binaries() or "-")

CONFIG = llama_config(model_type="llama")
STAGES = [1, 2, 3]  # two layers and the head
VERSIONS = (1, 2, 3)
_WAIT_SECONDS = 60


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A daemon with the settings of the parameter."""
    with Cluster(getattr(request, "param", "")) as running:
        yield running


def _rank(cluster: Cluster, staged: StagedParams, engine: str = "e0", **more: Any) -> EngineRank:
    return EngineRank(
        cluster.address,
        model="m",
        engine=engine,
        architecture="LlamaForCausalLM",
        config=CONFIG,
        **{**staged.options(), **more},
    )


def _source(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(shape) for name, shape in source_shapes(CONFIG).items()}


def _wrong(params: StagedParams, source: dict[str, torch.Tensor]) -> list[str]:
    return params.differences(expected_params(CONFIG, source, 0, 1, torch.bfloat16))


# ---- real trainer ranks


def _train(
    rank: int,
    address: str,
    mesh: str,
    devices: tuple[str, ...],
    engines: list[tuple[EngineCaller, str]],
    folder: Path,
) -> list[str]:
    """One trainer rank: three versions, each compared in every engine. Returns what went wrong."""
    shape, names = MESHES[mesh]
    model, whole = make_model(torch.float32), make_model(torch.float32)
    shard_model(model, init_device_mesh("cpu", shape, mesh_dim_names=names))
    problems: list[str] = []
    with Actor(address, model="m", device=devices[rank % len(devices)]) as actor:
        actor.register(model)
        for version in VERSIONS:
            train_step(model, version)
            train_step(whole, version)
            ack = actor.sync(version)
            verified = {replica.engine: replica.verified for replica in ack.replicas}
            if verified != {"staged": "loadable", "plain": "memory"}:
                problems.append(f"verified {verified}")
            if rank == 0:
                source = folder / f"source-{version}.pt"
                torch.save({name: t.clone() for name, t in whole.state_dict().items()}, source)
                for process, key in engines:
                    problems += process.call("check", key=key, version=version, source=str(source))
    return problems


@pytest.mark.parametrize(
    ("mesh", "devices", "path", "verify"),
    [
        ("hsdp2x2", ("host",), "auto", "after"),
        ("fsdp4", ("host", "host.1", "host.2"), "auto", "beside"),
        ("fsdp4", ("host", "host.1", "host.2"), "wire", "after"),
        ("hsdp2x2", ("host", "host.1", "host.2"), "wire", "beside"),
    ],
)
def test_every_stage_is_converted_bit_for_bit(
    mesh: str, devices: tuple[str, ...], path: str, verify: str
) -> None:
    """An engine of two ranks in stages beside one that takes everything in place."""
    settings = f'[worker]\ndevices = {json.dumps(devices)}\npath = "{path}"\nverify = "{verify}"\n'
    with Cluster(settings) as cluster:
        process = cluster.start_engines("engines")
        engines = []
        for engine, tp_rank, tp_size in (("staged", 0, 2), ("staged", 1, 2), ("plain", 0, 1)):
            key = f"{engine}/{tp_rank}"
            process.call(
                "open",
                key=key,
                staged=engine == "staged",
                model="m",
                engine=engine,
                architecture="LlamaForCausalLM",
                config=CONFIG,
                tp_rank=tp_rank,
                tp_size=tp_size,
                dtype="bfloat16",
                device=devices[(1 + tp_rank) % len(devices)],
            )
            engines.append((process.caller, key))
        arguments = (cluster.address, mesh, devices, engines, cluster.folder)
        try:
            problems = run_ranks(4, _train, *arguments)
        except AssertionError as error:
            pytest.fail(f"{error}\n{cluster.logs()}")
    assert [problem for part in problems for problem in part] == []


# ---- failures


def test_a_conversion_that_fails_poisons_and_the_next_sync_heals(cluster: Cluster) -> None:
    params = StagedParams(CONFIG, 0, 1, torch.bfloat16)
    failing = True

    def convert(stage: int) -> None:
        if failing and stage == 2:
            raise RuntimeError("no room to repack")
        params.convert(stage)

    with (
        _rank(cluster, params, convert=convert) as engine,
        Actor(cluster.address, model="m", rank=0, world_size=1) as actor,
    ):
        with pytest.raises(EngineError, match="no room to repack") as caught:
            actor.sync(1, tensors=_source(1))
        assert (caught.value.reason, caught.value.phase) == ("ENGINE_REFUSED", "commit")
        assert "engine e0" in caught.value.rank
        engine.wait(state="POISONED", timeout=_WAIT_SECONDS)
        assert params.converted == [1]
        failing = False
        actor.sync(1, tensors=_source(1))
        engine.wait(version=1, timeout=_WAIT_SECONDS)
        assert params.converted == [1, *STAGES]
        assert _wrong(params, _source(1)) == []


@pytest.mark.parametrize("cluster", ['[catch_up]\nretain = "host"\n'], indirect=True)
def test_late_engines_say_why_they_wait_for_a_sync(cluster: Cluster) -> None:
    """Neither a peer's memory nor a copy of it holds the model; the next sync brings it."""
    first, second = (StagedParams(CONFIG, 0, 1, torch.bfloat16) for _ in range(2))
    plain = empty_params(CONFIG, 0, 1, torch.bfloat16)
    with Actor(cluster.address, model="m", rank=0, world_size=1) as actor:
        with _rank(cluster, first):
            actor.sync(1, tensors=_source(1))
            with (
                _rank(cluster, second, "e1") as late,
                _rank(cluster, first, "e2", params=plain, kinds={}, stages={}) as other,
            ):
                for rank, reason in ((late, "STAGED"), (other, "")):
                    state = rank.state
                    assert state["state"] == "REGISTERED" and state["idle"]["count"] == 1
                    assert (state["idle"]["error"] or {"reason": ""})["reason"] == reason
                shown = {e["engine"]: e for e in _engines(cluster)}
                assert shown["e1"]["error"]["reason"] == "STAGED"
                assert "stage_bytes" in shown["e1"]["error"]["remedy"]
                assert "error" not in shown["e2"]
                actor.sync(2, tensors=_source(2))
                for rank in (late, other):
                    rank.wait(version=2, timeout=_WAIT_SECONDS)
                assert _wrong(first, _source(2)) + _wrong(second, _source(2)) == []
                assert all("error" not in engine for engine in _engines(cluster))


def _engines(cluster: Cluster) -> list[dict[str, Any]]:
    command = [os.environ["WEIGHTCTL_BIN"], "--address", cluster.address, "engines", "-o", "json"]
    done = subprocess.run(command, capture_output=True, timeout=20, check=False)
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout)["models"][0]["engines"]


# ---- refusals


def test_one_stage_is_a_sync_as_any_other(cluster: Cluster) -> None:
    params = StagedParams(CONFIG, 0, 1, torch.bfloat16)
    lent = {name: tensor.clone() for name, tensor in params.lent.items()}
    done: list[str] = []
    options = {
        "params": lent,
        "stages": dict.fromkeys(params.stages, 1),
        "convert": lambda stage: done.append(f"convert {stage}"),
        "commit": lambda: done.append("commit"),
    }
    with (
        _rank(cluster, params, **options),
        Actor(cluster.address, model="m", rank=0, world_size=1) as actor,
    ):
        actor.sync(1, tensors=_source(1))
    assert done == ["convert 1", "commit"]
    wanted = expected_params(CONFIG, _source(1), 0, 1, torch.bfloat16)
    assert all(torch.equal(lent[name], wanted[name]) for name in wanted)


def test_stages_that_cannot_be_are_refused_before_anything_is_lent(cluster: Cluster) -> None:
    params = StagedParams(CONFIG, 0, 1, torch.bfloat16)
    head = "lm_head.weight"
    refused: list[tuple[dict[str, Any], str, str]] = [
        ({"stages": {**params.stages, head: 7}}, "CONFIG", head),
        ({"stages": {**params.stages, head: 0}}, "CONFIG", head),
        ({"stages": {**params.stages, "nowhere": 1}}, "UNKNOWN_TENSOR", "nowhere"),
        ({"kinds": {**params.options()["kinds"], head: "raw"}}, "CONFIG", head),
        ({"stages": {**params.stages, head: 1}}, "OVERLAP", ""),
        ({"convert": None}, "CONFIG", ""),
    ]
    for change, reason, tensor in refused:
        with pytest.raises(LayoutError) as caught:
            _rank(cluster, params, **change)
        assert caught.value.reason == reason, (change, caught.value)
        assert caught.value.remedy and (not tensor or caught.value.tensor == tensor), change
