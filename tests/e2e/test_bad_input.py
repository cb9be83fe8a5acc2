"""What the daemon answers to bad input: at once, on every rank, with what, where and the remedy;
and no byte of any engine is written."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import pytest
import torch

from tests.support.cluster import Cluster, missing_binaries
from tests.support.fixtures import cluster, model  # noqa: F401
from tests.support.llama_engine import empty_params, first_difference, source_shapes
from tests.support.trainer_ranks import open_ranks, register_all, row_shard, sync_all
from weightd import Ack, Actor, EngineRank, Error, errors, new_group

pytestmark = pytest.mark.skipif(bool(missing_binaries()), reason=missing_binaries() or "-")

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 70,
    "tie_word_embeddings": False,
}
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
AT_ONCE_SECONDS = 8.0  # far below the deadlines of the phases, which are the defaults (15 s)

Source = dict[str, Any]


def _source() -> Source:
    torch.manual_seed(5)
    return {name: torch.randn(shape) for name, shape in source_shapes(CONFIG).items()}


class _Engine:
    """One engine rank whose memory must stay poison."""

    def __init__(self, cluster: Cluster, model: str, **options: Any) -> None:
        self.params = empty_params(CONFIG, 0, 1, torch.bfloat16)
        self.params.update(options.pop("extra", {}))
        options = {"architecture": "LlamaForCausalLM", "config": CONFIG, **options}
        self.rank = EngineRank(
            cluster.address, model=model, engine="e0", params=self.params, **options
        )

    def __enter__(self) -> _Engine:
        return self

    def __exit__(self, *unused: Any) -> None:
        self.rank.close()

    def assert_untouched(self) -> None:
        """No byte was written."""
        for name, poison in empty_params(CONFIG, 0, 1, torch.bfloat16).items():
            assert not first_difference(self.params[name], poison), name
        assert self.rank.version == 0


@contextmanager
def at_once() -> Iterator[None]:
    """What is inside must not wait for a deadline."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < AT_ONCE_SECONDS


def _missing(sources: list[Source]) -> None:
    for source in sources:
        del source[NORM]


def _unknown(sources: list[Source]) -> None:
    for source in sources:
        source["model.layers.0.extra.weight"] = torch.zeros(3)


def _wrong_shape(sources: list[Source]) -> None:
    for source in sources:
        source[NORM] = torch.zeros(9)


def _wrong_dtype(sources: list[Source]) -> None:
    for source in sources:
        source[NORM] = torch.zeros(8, dtype=torch.int64)


def _gap(sources: list[Source]) -> None:
    for source in sources:
        source[HEAD] = row_shard(source[HEAD], 2, 0)


def _overlap(sources: list[Source]) -> None:
    whole = sources[0][HEAD]
    for index, source in enumerate(sources):
        source[HEAD] = row_shard(whole, 3 - index, 1)


def _tables_differ(sources: list[Source]) -> None:
    sources[1][NORM] = torch.zeros(9)


def _replicas_differ(sources: list[Source]) -> None:
    sources[1][NORM][3] += 1


BAD_SOURCES: dict[str, tuple[Callable[[list[Source]], None], set[str], str]] = {
    "missing": (_missing, {"MISSING_TENSOR"}, NORM),
    "unknown": (_unknown, {"UNKNOWN_TENSOR"}, "model.layers.0.extra.weight"),
    "shape": (_wrong_shape, {"SHAPE"}, NORM),
    "dtype": (_wrong_dtype, {"DTYPE"}, NORM),
    "gap": (_gap, {"GAP"}, HEAD),
    "overlap": (_overlap, {"OVERLAP", "GAP"}, HEAD),
    "tables": (_tables_differ, {"TABLE_MISMATCH"}, NORM),
    "replicas": (_replicas_differ, {"REPLICAS_DIFFER"}, NORM),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_source_is_refused_on_every_rank(cluster: Cluster, model: str, case: str) -> None:
    spoil, reasons, tensor = BAD_SOURCES[case]
    sources = [_source(), _source()]
    spoil(sources)
    with _Engine(cluster, model) as engine:
        actors = open_ranks(cluster.address, model, 2)
        try:
            with at_once():
                found = register_all(actors, sources)
            if not found:
                with at_once():
                    outcomes = sync_all(actors, 1)
                assert all(isinstance(outcome, Error) for outcome in outcomes), outcomes
                found = outcomes
        finally:
            for actor in actors:
                actor.close()
        for error in found:
            assert error.reason in reasons and error.tensor == tensor, str(error)
            assert error.remedy, str(error)
        engine.assert_untouched()


def test_moved_memory_fails_every_rank_and_names_the_one(cluster: Cluster, model: str) -> None:
    sources = [_source(), _source()]
    with _Engine(cluster, model) as engine:
        actors = open_ranks(cluster.address, model, 2)
        assert register_all(actors, sources) == []
        sources[1][NORM].data = torch.zeros(8)
        for error in sync_all(actors, 1):
            assert isinstance(error, errors.MemoryMovedError), error
            assert (error.tensor, error.rank) == (NORM, "actor 1")
            assert "register()" in error.remedy
        engine.assert_untouched()
        assert register_all(actors[1:], sources[1:]) == []
        sources[0][NORM].zero_()
        assert all(isinstance(outcome, Ack) for outcome in sync_all(actors, 1))
        for actor in actors:
            actor.close()


@pytest.mark.parametrize("how", ("freed", "swapped"))
def test_freed_memory_fails_the_sync(cluster: Cluster, model: str, how: str) -> None:
    source = _source()
    with _Engine(cluster, model) as engine, Actor(
        cluster.address, model=model, rank=0, world_size=1
    ) as actor:
        actor.register(source)
        if how == "freed":
            source[NORM].data = torch.empty(0)
        else:
            source[NORM].data = source[NORM].clone()
        with at_once(), pytest.raises(errors.MemoryMovedError) as caught:
            actor.sync(1)
        assert (caught.value.tensor, caught.value.reason) == (NORM, "MEMORY_MOVED")
        assert "register()" in caught.value.remedy
        engine.assert_untouched()


def test_truncated_memory_fails_the_sync(cluster: Cluster, model: str) -> None:
    """Another process, or the trainer itself, cuts off what was lent."""
    source = _source()
    with _Engine(cluster, model) as engine, Actor(
        cluster.address, model=model, rank=0, world_size=1
    ) as actor:
        actor.register(source)
        descriptor, _ = source[HEAD].untyped_storage()._share_fd_cpu_()
        os.ftruncate(descriptor, 0)
        with at_once(), pytest.raises(Error) as caught:
            actor.sync(1)
        assert caught.value.reason == "MEMORY_MOVED" and caught.value.remedy, str(caught.value)
        assert "actor 0" in str(caught.value)
        engine.assert_untouched()


class _Partial:
    """A pending reduction, as torch's placement of that name."""

    def is_partial(self) -> bool:
        """Always."""
        return True


def test_pending_reduction_is_refused(cluster: Cluster, model: str) -> None:
    source = _source()
    source[NORM] = SimpleNamespace(
        shape=source[NORM].shape,
        dtype=source[NORM].dtype,
        device_mesh=SimpleNamespace(shape=(2,), get_coordinate=lambda: [0]),
        placements=(_Partial(),),
        _local_tensor=source[NORM],
    )
    with _Engine(cluster, model) as engine, Actor(
        cluster.address, model=model, rank=0, world_size=1
    ) as actor:
        with at_once(), pytest.raises(errors.LayoutError) as caught:
            actor.register(source)
        assert (caught.value.reason, caught.value.tensor) == ("PARTIAL", NORM)
        assert "Replicate()" in caught.value.remedy
        engine.assert_untouched()


def test_tensor_that_is_given_twice_is_refused(cluster: Cluster, model: str) -> None:
    source = _source()
    with _Engine(cluster, model) as engine, Actor(
        cluster.address, model=model, rank=0, world_size=1
    ) as actor:
        with at_once(), pytest.raises(errors.LayoutError) as caught:
            actor.register([*source.items(), (NORM, source[NORM])])
        assert (caught.value.reason, caught.value.tensor) == ("DUPLICATE_TENSOR", NORM)
        assert caught.value.remedy
        engine.assert_untouched()


def test_name_that_is_too_long_is_refused(cluster: Cluster, model: str) -> None:
    source = {**_source(), "x" * 5000: torch.zeros(1)}
    with _Engine(cluster, model) as engine, Actor(
        cluster.address, model=model, rank=0, world_size=1
    ) as actor:
        with at_once(), pytest.raises(errors.LayoutError) as caught:
            actor.register(source)
        assert "4096" in caught.value.remedy
        engine.assert_untouched()


def test_ranks_that_ask_for_different_syncs_are_refused(cluster: Cluster, model: str) -> None:
    with _Engine(cluster, model) as engine:
        actors = open_ranks(cluster.address, model, 2)
        assert register_all(actors, [_source(), _source()]) == []
        with at_once():
            outcomes = sync_all(actors, [1, 2])
        for error in outcomes:
            assert isinstance(error, Error) and error.reason == "PLAN_MISMATCH", outcomes
            assert "same arguments" in error.remedy and error.rank, str(error)
        engine.assert_untouched()
        for actor in actors:
            actor.close()


def test_versions_never_go_back(cluster: Cluster, model: str) -> None:
    source = _source()
    with _Engine(cluster, model) as engine, Actor(
        cluster.address, model=model, rank=0, world_size=1
    ) as actor:
        actor.register(source)
        actor.sync(5)
        served = engine.params[NORM].clone()
        source[NORM].add_(1)
        for version, reason in ((4, "STALE_VERSION"), (5, "REUSED_VERSION")):
            with at_once(), pytest.raises(errors.VersionError) as caught:
                actor.sync(version)
            assert caught.value.reason == reason and "above 5" in caught.value.remedy
            assert not first_difference(engine.params[NORM], served)
            assert engine.rank.version == 5
        assert actor.sync(6).version == 6


def test_ranks_of_one_group_must_agree(cluster: Cluster, model: str) -> None:
    group = new_group()
    with _Engine(cluster, model) as engine, Actor(
        cluster.address, model=model, rank=0, world_size=2, group=group
    ):
        with pytest.raises(errors.GroupError) as caught:
            Actor(cluster.address, model=model, rank=1, world_size=3, group=group)
        assert caught.value.reason == "WORLD_SIZE" and caught.value.remedy
        with pytest.raises(errors.GroupError) as caught:
            Actor(cluster.address, model=model, rank=0, world_size=2, group=group)
        assert caught.value.reason == "DUPLICATE_RANK" and caught.value.remedy
        with pytest.raises(errors.GroupError) as caught:
            Actor(cluster.address, model=model, rank=0, world_size=2**31 - 1, group=new_group())
        assert caught.value.reason == "WORLD_SIZE" and "max_sessions" in caught.value.remedy
        engine.assert_untouched()


def test_newer_trainer_fences_the_older(cluster: Cluster, model: str) -> None:
    with _Engine(cluster, model):
        old = Actor(cluster.address, model=model, rank=0, world_size=1)
        old.register(_source())
        new = Actor(cluster.address, model=model, rank=0, world_size=1)
        new.register(_source())
        assert new.sync(1).version == 1
        with pytest.raises(errors.FencedError) as caught:
            old.sync(2)
        assert caught.value.remedy
        old.close()
        new.close()


def test_unknown_architecture_names_the_nearest(cluster: Cluster, model: str) -> None:
    with pytest.raises(errors.LayoutError, match="LlamaForCausalLM") as caught:
        _Engine(cluster, model, architecture="LlamaForCausalLN")
    assert caught.value.reason == "UNKNOWN_ARCHITECTURE"
    assert "nearest" in str(caught.value) and caught.value.remedy


def test_names_of_another_profile_are_refused_with_the_one_that_fits(
    cluster: Cluster, model: str
) -> None:
    name = "model.layers.0.self_attn.fused_qkv_a_proj.weight"
    options = {"architecture": "DeepseekV2ForCausalLM", "profile": "vllm-0.6.3", "config": {}}
    with pytest.raises(errors.LayoutError) as caught:
        EngineRank(
            cluster.address, model=model, engine="e0", params={name: torch.zeros(4)}, **options
        )
    assert (caught.value.reason, caught.value.tensor) == ("UNKNOWN_PROFILE", name)
    assert "vllm-0.32" in caught.value.remedy


def test_parameter_without_a_rule_is_refused(cluster: Cluster, model: str) -> None:
    extra = {"model.layers.0.mystery.weight": torch.zeros(4, dtype=torch.bfloat16)}
    with _Engine(cluster, model, extra=extra) as engine, Actor(
        cluster.address, model=model, rank=0, world_size=1
    ) as actor:
        actor.register(_source())
        with at_once(), pytest.raises(errors.LayoutError) as caught:
            actor.sync(1)
        engine.assert_untouched()
    assert caught.value.reason == "UNCOVERED_PARAMETER" and "rule" in caught.value.remedy
    assert caught.value.tensor == "model.layers.0.mystery.weight"


def test_sync_without_an_engine_says_so(cluster: Cluster, model: str) -> None:
    with Actor(cluster.address, model=model, rank=0, world_size=1) as actor:
        actor.register(_source())
        with pytest.raises(errors.EngineError) as caught:
            actor.sync(1)
        assert caught.value.reason == "NO_ENGINE" and caught.value.remedy


def test_staged_tensors_arrive_like_lent_ones(cluster: Cluster, model: str) -> None:
    source = _source()
    with _Engine(cluster, model) as engine, Actor(
        cluster.address, model=model, rank=0, world_size=1
    ) as actor:
        for version in (1, 2):
            source = {name: tensor + version for name, tensor in source.items()}
            actor.sync(version, tensors=source)
            assert engine.rank.wait(version=version, timeout=60)["version"] == version
            expected = source[NORM].to(torch.bfloat16)
            assert not first_difference(engine.params[NORM], expected)


def test_descriptors_do_not_leak_over_registrations(cluster: Cluster, model: str) -> None:
    source = _source()
    with _Engine(cluster, model):
        with Actor(cluster.address, model=model, rank=0, world_size=1) as actor:
            counts = []
            for version in range(1, 5):
                actor.register(source)
                actor.sync(version)
                counts.append(len(os.listdir("/proc/self/fd")))
            # What earlier tests left to the garbage collector may go meanwhile; nothing may come.
            assert counts[1:] == sorted(counts[1:], reverse=True), counts
