"""An engine that waits for an attempt learns that none is coming, and why."""

from __future__ import annotations

import time
from typing import Any, Iterator

import pytest
import torch

from tests.support.cluster import Cluster, missing_binaries
from tests.support.llama_engine import empty_params
from tests.support.trainer_ranks import open_ranks, register_all, sync_all
from weightd import EngineRank, Error

pytestmark = pytest.mark.skipif(bool(missing_binaries()), reason=missing_binaries() or "-")

_PATIENCE_SECONDS = 20.0
CONFIG = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A daemon."""
    with Cluster() as running:
        yield running


def _open(cluster: Cluster, tp_rank: int) -> EngineRank:
    return EngineRank(
        cluster.address,
        model="m",
        engine="e0",
        architecture="LlamaForCausalLM",
        config=CONFIG,
        params=empty_params(CONFIG, tp_rank, 2, torch.float32),
        tp_rank=tp_rank,
        tp_size=2,
    )


def _await_idle(rank: EngineRank, count: int) -> dict[str, Any]:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while rank.state["idle"]["count"] < count:
        assert time.monotonic() < deadline, rank.state
        time.sleep(0.02)
    return rank.state["idle"]


def test_engine_is_told_after_registration_and_after_a_sync_that_did_not_reach_it(
    cluster: Cluster,
) -> None:
    with _open(cluster, 0) as first:
        assert first.state["idle"]["count"] == 0  # the replica is not complete
        with _open(cluster, 1) as second:
            for rank in (first, second):
                assert _await_idle(rank, 1) == {"count": 1, "version": 0, "error": None}
            (actor,) = open_ranks(cluster.address, "m", 1)
            with actor:
                assert register_all([actor], [{"model.stray.weight": torch.zeros(4)}]) == []
                (refused,) = sync_all([actor], 7)
            assert isinstance(refused, Error)
            for rank in (first, second):
                idle = _await_idle(rank, 2)
                assert (idle["version"], idle["error"]["reason"]) == (7, refused.reason)
                assert not rank.state["dirty"]
