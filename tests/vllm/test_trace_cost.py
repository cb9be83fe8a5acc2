"""Tracing a model of real size costs an engine's start little: at most 10 s and 1 GB for an 8B
Llama.

Parameters and sources have no memory, so that this runs anywhere.
"""

from __future__ import annotations

import resource
import time

import pytest
from transformers import LlamaConfig

from tests.support.vllm_models import missing_vllm, vllm_model
from weightd.trace_hf import meta_model, trace_model

pytestmark = pytest.mark.skipif(bool(missing_vllm()), reason=missing_vllm() or "-")

MOST_SECONDS, MOST_BYTES = 10.0, 1 << 30
LLAMA_8B = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_an_8b_llama_is_traced_within_its_bounds() -> None:
    config = LLAMA_8B.to_dict()
    with vllm_model("LlamaForCausalLM", config, tp_size=2, tp_rank=1, device="meta") as engine:
        before, start = _peak_bytes(), time.perf_counter()
        layout = trace_model(engine.load_weights, engine.named_parameters(), meta_model(LLAMA_8B))
        seconds, grown = time.perf_counter() - start, _peak_bytes() - before
    print(f"traced {len(layout.sources)} tensors in {seconds:.2f} s, {grown >> 20} MiB")
    elements = sum(
        write.extent[0] * (write.extent[1] if len(write.extent) > 1 else 1)
        for write in layout.writes
    )
    assert elements > 4e9
    assert seconds <= MOST_SECONDS and grown <= MOST_BYTES
