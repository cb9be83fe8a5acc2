"""Engines whose parameters lie in memory that no worker can map, here NumPy's own.

They are received in a stage of shared memory, a few rows at a time, copied out by the engine's
client and compared with what was verified.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
from pathlib import Path
from typing import Any, Iterator, Mapping

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from tests.support.cluster import Cluster, EngineCaller, missing_binaries
from tests.support.gloo import run_ranks
from tests.support.llama_engine import (
    empty_params,
    expected_params,
    first_difference,
    source_shapes,
)
from tests.support.llama_trainer import MESHES, make_model, shard_model, train_step
from tests.support.staged_rank import StagedParams
from tests.support.unlendable import numpy_backed, unlendable_params
from tests.support.vllm_engine import llama_config
from weightd import Actor, EngineRank, _pull
from weightd.errors import EngineError, LayoutError, UnsupportedError
from weightd.traced import TracedLayout, TracedSource, TracedWrite

pytestmark = pytest.mark.skipif(bool(missing_binaries()), reason=missing_binaries() or "-")

CONFIG = llama_config(model_type="llama")
VERSIONS = (1, 2, 3)
STAGE_BYTES = 4096  # the embedding has 8 KiB and more
NORM = "model.norm.weight"
_WAIT_SECONDS = 60


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A daemon with the settings of the parameter."""
    with Cluster(getattr(request, "param", "")) as running:
        yield running


def _params(which: str = "some") -> dict[str, torch.Tensor]:
    return unlendable_params(empty_params(CONFIG, 0, 1, torch.bfloat16), which)


def _rank(
    cluster: Cluster, params: Mapping[str, torch.Tensor], engine: str = "e0", **more: Any
) -> EngineRank:
    return EngineRank(
        cluster.address,
        model="m",
        engine=engine,
        architecture="LlamaForCausalLM",
        config=CONFIG,
        params=params,
        **{"stage_bytes": STAGE_BYTES, **more},
    )


def _actor(cluster: Cluster) -> Actor:
    return Actor(cluster.address, model="m", rank=0, world_size=1)


def _source(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(shape) for name, shape in source_shapes(CONFIG).items()}


def _wrong(params: Mapping[str, torch.Tensor], seed: int) -> list[str]:
    expected = expected_params(CONFIG, _source(seed), 0, 1, torch.bfloat16)
    found = {name: first_difference(params[name], expected[name]) for name in expected}
    return [f"{name}: {difference}" for name, difference in found.items() if difference]


def _shown(address: str, *command: str) -> Any:
    line = [os.environ["WEIGHTCTL_BIN"], "--address", address, *command, "-o", "json"]
    done = subprocess.run(line, capture_output=True, timeout=20, check=False)
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout)


def _engine_shown(cluster: Cluster, engine: str = "e0") -> dict[str, Any]:
    engines = _shown(cluster.address, "engines")["models"][0]["engines"]
    return next(shown for shown in engines if shown["engine"] == engine)


# ---- real trainer ranks


def _train(
    rank: int,
    address: str,
    devices: tuple[str, ...],
    engines: list[tuple[EngineCaller, str]],
    folder: Path,
) -> list[str]:
    """One trainer rank: three versions, each compared in every engine. Returns what went wrong."""
    shape, names = MESHES["fsdp4"]
    model, whole = make_model(torch.float32), make_model(torch.float32)
    shard_model(model, init_device_mesh("cpu", shape, mesh_dim_names=names))
    problems: list[str] = []
    with Actor(address, model="m", device=devices[rank % len(devices)]) as actor:
        actor.register(model)
        for version in VERSIONS:
            train_step(model, version)
            train_step(whole, version)
            ack = actor.sync(version)
            if ack.verified != "memory":
                problems.append(f"verified {ack.verified}")
            moved = sum(ack.path_bytes.values())  # the padding of the vocabulary is not moved
            if not 0.9 * ack.bytes < moved <= ack.bytes or ack.path_bytes["pull"] == 0:
                problems.append(f"bytes by path: {ack.path_bytes} of {ack.bytes}")
            if rank == 0:
                source = folder / f"source-{version}.pt"
                torch.save({name: t.clone() for name, t in whole.state_dict().items()}, source)
                for process, key in engines:
                    problems += process.call("check", key=key, version=version, source=str(source))
            if rank == 0 and version < VERSIONS[-1]:  # the other ranks wait for this one
                plan = _shown(address, "plan", "show", "--model", "m")
                (folder / "plan.json").write_text(json.dumps(plan))
    return problems


@pytest.mark.parametrize(
    ("devices", "path", "paths"),
    [
        (("host",), "auto", {"shm", "pull"}),
        (("host", "host.1"), "wire", {"shm", "socket", "pull"}),
    ],
)
def test_three_versions_are_exact_in_memory_that_cannot_be_mapped(
    devices: tuple[str, ...], path: str, paths: set[str]
) -> None:
    settings = f'[worker]\ndevices = {json.dumps(devices)}\npath = "{path}"\n'
    with Cluster(settings) as cluster:
        process = cluster.start_engines("engines")
        engines = []
        ranks = (("a", 0, 2, "some"), ("a", 1, 2, "all"), ("b", 0, 1, ""))
        for engine, tp_rank, tp_size, which in ranks:
            key = f"{engine}/{tp_rank}"
            process.call(
                "open", key=key, pulled=which, model="m", engine=engine, dtype="bfloat16",
                architecture="LlamaForCausalLM", config=CONFIG, tp_rank=tp_rank, tp_size=tp_size,
                device=devices[tp_rank % len(devices)], stage_bytes=STAGE_BYTES,
            )  # fmt: skip
            engines.append((process.caller, key))
        try:
            found = run_ranks(4, _train, cluster.address, devices, engines, cluster.folder)
            pairs = json.loads((cluster.folder / "plan.json").read_text())["pairs"]
        except AssertionError as error:
            pytest.fail(f"{error}\n{cluster.logs()}")
    assert [problem for part in found for problem in part] == []
    assert {pair["path"] for pair in pairs} == paths
    of_all = [pair for pair in pairs if pair["target"] == "engine a dp 0 pp 0 tp 1"]
    assert {pair["path"] for pair in of_all} == {"pull"}
    carriers = paths - {"pull"}
    for pair in pairs:
        if pair["path"] == "pull":
            assert any(
                pair["reason"].startswith(f"memory cannot be mapped: staged by {carrier}, ")
                for carrier in carriers
            ), pair


# ---- memory


def test_stages_keep_their_bound_and_are_stated(cluster: Cluster) -> None:
    params = _params("all")
    total = sum(tensor.nbytes for tensor in params.values())
    with _rank(cluster, params) as engine, _actor(cluster) as actor:
        shown = _engine_shown(cluster)
        assert 0 < int(shown["staged_bytes"]) <= STAGE_BYTES
        assert shown["stages"] >= total / STAGE_BYTES
        ack = actor.sync(1, tensors=_source(1))
        plan = _shown(cluster.address, "plan", "show", "--model", "m")
        assert plan["stage_bytes"] == shown["staged_bytes"]
        assert ack.path_bytes.keys() == {"pull"}
        assert engine.version == 1 and _wrong(params, 1) == []


def test_strided_and_tied_parameters_are_pulled(cluster: Cluster) -> None:
    params = _params("all")
    norm = params[NORM]
    wide = numpy_backed(torch.zeros(norm.numel(), 3, dtype=norm.dtype))
    params[NORM] = wide[:, 1]
    tied = {**params, "tied.weight": params["lm_head.weight"]}
    with _rank(cluster, tied) as engine, _actor(cluster) as actor:
        for version in VERSIONS:
            actor.sync(version, tensors=_source(version))
            engine.wait(version=version, timeout=_WAIT_SECONDS)
            assert _wrong(params, version) == []
    assert wide[:, 0].count_nonzero() == wide[:, 2].count_nonzero() == 0


def test_an_engine_in_one_stage_catches_up_and_is_a_source(cluster: Cluster) -> None:
    first, second, plain = _params("some"), _params("all"), _params("")
    with _rank(cluster, first, stage_bytes=1 << 20), _actor(cluster) as actor:
        actor.sync(1, tensors=_source(1))
        with (
            _rank(cluster, second, "e1", stage_bytes=1 << 20) as pulls,
            _rank(cluster, plain, "e2") as lends,
        ):
            for rank in (pulls, lends):
                rank.wait(version=1, timeout=_WAIT_SECONDS)
            assert _wrong(first, 1) + _wrong(second, 1) + _wrong(plain, 1) == []


def test_an_engine_in_several_stages_says_why_it_waits_for_a_sync(cluster: Cluster) -> None:
    first, second = _params("all"), _params("all")
    with _rank(cluster, first), _actor(cluster) as actor:
        actor.sync(1, tensors=_source(1))
        with _rank(cluster, second, "e1") as late:
            assert late.state["idle"]["error"]["reason"] == "STAGED"
            assert "stage_bytes" in late.state["idle"]["error"]["remedy"]
            actor.sync(2, tensors=_source(2))
            late.wait(version=2, timeout=_WAIT_SECONDS)
            assert _wrong(first, 2) + _wrong(second, 2) == []


def test_parts_of_a_traced_layout_are_exact(cluster: Cluster) -> None:
    """A transposed block, one that starts in the middle of a part, stacked experts and zeros."""
    layout = TracedLayout(
        params=(("t", (70, 30)), ("e", (5, 6, 40))),
        sources=(
            TracedSource("a", (30, 40), True),
            TracedSource("b", (20, 30), True),
            *(TracedSource(f"x{i}", (6, 40), True) for i in range(5)),
        ),
        writes=(
            TracedWrite(0, 0, (0, 0), (40, 30), (0, 0), (1, 0)),
            TracedWrite(0, 1, (40, 0), (20, 30), (0, 0), (0, 1)),
            TracedWrite(0, -1, (60, 0), (10, 30), (), ()),
            *(TracedWrite(1, 2 + i, (i, 0, 0), (1, 6, 40), (0, 0), (-1, 0, 1)) for i in range(5)),
        ),
    )
    params = {name: numpy_backed(torch.full(shape, 7.0)) for name, shape in layout.params}
    with (
        EngineRank(
            cluster.address, model="m", engine="e0", architecture="NoRuleFile", config={},
            params=params, layout=layout, stage_bytes=2048,
        ) as engine,
        _actor(cluster) as actor,
    ):  # fmt: skip
        assert _engine_shown(cluster)["stages"] > 5
        for version in VERSIONS:
            torch.manual_seed(version)
            source = {s.name: torch.randn(s.shape) for s in layout.sources}
            actor.sync(version, tensors=source)
            engine.wait(version=version, timeout=_WAIT_SECONDS)
            whole = torch.cat([source["a"].t(), source["b"], torch.zeros(10, 30)])
            assert torch.equal(params["t"], whole)
            assert torch.equal(params["e"], torch.stack([source[f"x{i}"] for i in range(5)]))


# ---- beside callbacks and stages of the engine's own


def test_callbacks_see_what_was_pulled(cluster: Cluster) -> None:
    """Derived parameters are converted from where they were copied to, after the own stages."""
    params = StagedParams(CONFIG, 0, 1, torch.bfloat16)
    pulled = numpy_backed(params.lent[NORM])
    done: list[str] = []

    def commit() -> None:
        done.append("commit" if _wrong({**params.held(), NORM: pulled}, 1) == [] else "too early")

    options = params.options()
    options["params"] = {**params.lent, NORM: pulled}
    options["kinds"] = {**options["kinds"], NORM: "derived"}
    with (
        _rank(cluster, quiesce=lambda: done.append("quiesce"), commit=commit, **options),
        _actor(cluster) as actor,
    ):
        assert actor.sync(1, tensors=_source(1)).verified == "loadable"
    assert done == ["quiesce", "commit"] and params.converted == [1, 2, 3]


# ---- failures


def test_a_copy_that_does_not_hold_poisons_and_the_next_sync_heals(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = _params("all")
    compare, damaged = _pull.Pull._compare, ["lm_head.weight"]

    def damage_and_compare(pull: _pull.Pull, parts: Any) -> str:
        for part in parts:
            if part.name in damaged:
                part.target.view(torch.int16)[-1, -1] ^= 1
        return compare(pull, parts)

    monkeypatch.setattr(_pull.Pull, "_compare", damage_and_compare)
    with _rank(cluster, params) as engine, _actor(cluster) as actor:
        with pytest.raises(EngineError, match="differs from what was copied.*lm_head") as caught:
            actor.sync(1, tensors=_source(1))
        assert (caught.value.reason, caught.value.phase) == ("ENGINE_REFUSED", "commit")
        engine.wait(state="POISONED", timeout=_WAIT_SECONDS)
        damaged.clear()
        actor.sync(1, tensors=_source(1))
        engine.wait(version=1, timeout=_WAIT_SECONDS)
        assert _wrong(params, 1) == []


def test_a_sync_that_is_cancelled_between_stages_poisons(cluster: Cluster) -> None:
    """The engine has copied a stage, the next one does not come."""
    params = _params("all")
    stopped = []

    def convert_and_stop(stage: int) -> None:
        take(stage)
        if not stopped:
            stopped.append(stage)
            raise RuntimeError("the engine was told to stop")

    with _rank(cluster, params) as engine, _actor(cluster) as actor:
        take, engine._pull.take = engine._pull.take, convert_and_stop
        with pytest.raises(EngineError, match="told to stop"):
            actor.sync(1, tensors=_source(1))
        engine.wait(state="POISONED", timeout=_WAIT_SECONDS)
        actor.sync(2, tensors=_source(2))
        engine.wait(version=2, timeout=_WAIT_SECONDS)
        assert stopped == [1] and _wrong(params, 2) == []


# ---- refusals


def test_what_can_neither_be_lent_nor_pulled_is_refused_by_name(cluster: Cluster) -> None:
    params = _params("")
    norm = params[NORM]
    with open(cluster.folder / "weights", "w+b") as file:
        file.truncate(norm.nbytes)
        mapped = mmap.mmap(file.fileno(), norm.nbytes, access=mmap.ACCESS_READ)
        with pytest.warns(UserWarning):
            read_only = torch.from_numpy(np.frombuffer(mapped, dtype=np.int16)).view(norm.dtype)
        staged = {"kinds": {NORM: "derived"}, "stages": {NORM: 1}}
        refused: list[tuple[torch.Tensor, dict[str, Any], str]] = [
            (numpy_backed(norm), {"stage_bytes": 0}, "cannot be lent"),
            (read_only, {}, "cannot be written"),
            (numpy_backed(norm), staged, "in stages"),
        ]
        for tensor, more, message in refused:
            with pytest.raises(UnsupportedError, match=message) as caught:
                _rank(cluster, {**params, NORM: tensor}, **more)
            assert (caught.value.reason, caught.value.tensor) == ("MEMORY", NORM)
            assert caught.value.remedy
        del read_only, refused, tensor


def test_shapes_are_refused_as_for_memory_that_can_be_lent(cluster: Cluster) -> None:
    params = _params("all")
    params[NORM] = numpy_backed(torch.zeros(3, dtype=torch.bfloat16))
    with _rank(cluster, params), _actor(cluster) as actor, pytest.raises(LayoutError) as caught:
        actor.sync(1, tensors=_source(1))
    assert NORM in str(caught.value)
