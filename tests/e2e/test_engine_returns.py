"""An engine that leaves in order and comes back under its name is synced as a new one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.cluster import Cluster, missing_binaries
from tests.support.llama_engine import (
    empty_params,
    expected_params,
    first_difference,
    source_shapes,
)
from tests.support.trainer_ranks import open_ranks, register_all, sync_all
from weightd import Ack, EngineRank

pytestmark = pytest.mark.skipif(bool(missing_binaries()), reason=missing_binaries() or "-")

TP_SIZE = 2
CONFIG = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 70,
    "tie_word_embeddings": False,
}


def _open(cluster: Cluster, tp_rank: int) -> tuple[EngineRank, dict[str, Any]]:
    params = empty_params(CONFIG, tp_rank, TP_SIZE, torch.float32)
    rank = EngineRank(
        cluster.address,
        model="m",
        engine="e0",
        architecture="LlamaForCausalLM",
        config=CONFIG,
        params=params,
        tp_rank=tp_rank,
        tp_size=TP_SIZE,
    )
    return rank, params


def test_engine_that_returns_is_not_met_with_the_plan_of_its_past() -> None:
    torch.manual_seed(3)
    source = {name: torch.randn(shape) for name, shape in source_shapes(CONFIG).items()}
    with Cluster() as cluster:
        (actor,) = open_ranks(cluster.address, "m", 1)
        with actor:
            assert register_all([actor], [source]) == []
            for version in (1, 2, 3):
                ranks = [_open(cluster, tp_rank) for tp_rank in range(TP_SIZE)]
                (ack,) = sync_all([actor], version)
                assert isinstance(ack, Ack), f"{ack}\n{cluster.logs()}"
                for tp_rank, (rank, params) in enumerate(ranks):
                    rank.wait(version=version, timeout=20)
                    wanted = expected_params(CONFIG, source, tp_rank, TP_SIZE, torch.float32)
                    for name, tensor in wanted.items():
                        assert first_difference(params[name], tensor) == ""
                    rank.close()
