"""Real vLLM engines whose layout is traced: from four FSDP2 ranks, what each worker holds is what
vLLM's own loader makes of the same tensors.

Bloom has no rule file (its loader takes the fused, per-head query_key_value apart); Llama has one,
and is traced because the engine asks for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.support.cluster import Cluster, EngineCaller
from tests.support.gloo import run_ranks
from tests.support.llama_trainer import Update, train_step
from tests.support.vllm_engine import llama_config, missing_parts
from tests.support.vllm_fork import ForkedEngine
from weightd import Actor
from weightd.trace_hf import tied_names

pytestmark = pytest.mark.skipif(bool(missing_parts()), reason=missing_parts() or "-")

BLOOM = BloomConfig(
    hidden_size=128, n_layer=2, n_head=4, vocab_size=300, bos_token_id=0, eos_token_id=1
)
CASES: dict[str, tuple[type[nn.Module], Any, str]] = {
    "bloom": (BloomForCausalLM, BLOOM, "auto"),
    "llama": (LlamaForCausalLM, LlamaConfig(**llama_config()), "trace"),
}
VERSIONS = (1, 2)


def _model(case: str) -> nn.Module:
    kind, config, _ = CASES[case]
    torch.manual_seed(13)
    return kind(config)


def _train(
    rank: int, address: str, case: str, engine: EngineCaller, folder: Path
) -> list[str]:
    """One trainer rank; rank 0 drives vLLM and compares. Returns what went wrong."""
    model, whole = _model(case), _model(case)
    mesh = init_device_mesh("cpu", (4,))
    for layer in model.transformer.h if case == "bloom" else model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    problems: list[str] = []
    with Actor(address, model=case) as actor:
        actor.register(model)
        for version in VERSIONS:
            train_step(model, version)
            train_step(whole, version)
            update = Update(engine, case, version) if rank == 0 else None
            ack = actor.sync(version)
            if update is None:
                continue
            update.result()
            if [replica.committed for replica in ack.replicas] != [True]:
                problems.append(f"version {version}: {ack!r}")
            source = folder / f"{version}.pt"
            tied = tied_names(whole)  # vLLM's loader of Bloom does not know them
            saved = {n: t.clone() for n, t in whole.state_dict().items() if n not in tied}
            torch.save(saved, source)
            found = engine.call("call", method="weightd_compare", path=str(source))
            problems += [f"version {version}: {text}" for part in found for text in part]
    return problems


@pytest.mark.parametrize("case", CASES)
def test_a_traced_engine_holds_what_its_own_loader_produces(case: str) -> None:
    with Cluster() as cluster:
        path = str(cluster.folder / "checkpoint")
        _model(case).save_pretrained(path)
        engine = ForkedEngine(cluster, "engine", 2)
        try:
            engine.call(
                "open",
                path=path,
                weightd={"model": case, "layout": CASES[case][2]},
                dtype="bfloat16",
                tensor_parallel_size=2,
            )
            problems = run_ranks(4, _train, cluster.address, case, engine.caller, cluster.folder)
            assert [text for part in problems for text in part] == []
            assert "traced vLLM's own loader" in (cluster.folder / "engine.log").read_text()
            assert engine.call("call", method="weightd_content_size")[0] > 0
        except BaseException:
            print(cluster.logs())
            raise
        finally:
            engine.close()
