"""catch_up.retain = "host": an engine that comes when nobody serves gets the host copy."""

from __future__ import annotations

import pytest
import torch

from tests.support.cluster import Cluster, missing_binaries
from tests.support.llama_engine import (
    empty_params,
    expected_params,
    first_difference,
    source_shapes,
)
from weightd import Actor, EngineRank

pytestmark = pytest.mark.skipif(bool(missing_binaries()), reason=missing_binaries() or "-")

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 70,
    "tie_word_embeddings": False,
}
TP_SIZE = 2
_WAIT_SECONDS = 60


def _start(cluster: Cluster, engine: str) -> list[EngineRank]:
    return [
        EngineRank(
            cluster.address,
            model="m",
            engine=engine,
            architecture="LlamaForCausalLM",
            config=CONFIG,
            params=empty_params(CONFIG, rank, TP_SIZE, torch.bfloat16),
            tp_rank=rank,
            tp_size=TP_SIZE,
        )
        for rank in range(TP_SIZE)
    ]


@pytest.mark.parametrize("retain", ("host", "none"))
def test_engine_that_comes_alone(retain: str) -> None:
    """Filled from the copy, bit for bit, without the trainer; without a copy it stays not ready."""
    torch.manual_seed(1)
    with Cluster(f'[catch_up]\nretain = "{retain}"\n') as cluster:
        first = _start(cluster, "e0")
        with Actor(cluster.address, model="m", rank=0, world_size=1) as actor:
            for version in (1, 2):
                source = {n: torch.randn(s) for n, s in source_shapes(CONFIG).items()}
                actor.sync(version, tensors=source)
        # The copy is made after the acknowledgement: a later engine waits for it in the queue.
        late = _start(cluster, "e1")
        for rank in late:
            rank.wait(version=2, timeout=_WAIT_SECONDS)
        for rank in (*first, *late):
            rank.close()
        alone = _start(cluster, "e2")
        for tp_rank, rank in enumerate(alone):
            if retain == "none":
                assert rank.state["state"] == "REGISTERED" and not rank.ready
                continue
            rank.wait(version=2, timeout=_WAIT_SECONDS)
            wanted = expected_params(CONFIG, source, tp_rank, TP_SIZE, torch.bfloat16)
            for name, tensor in rank._params:
                assert not first_difference(tensor, wanted[name]), name
        for rank in alone:
            rank.close()
