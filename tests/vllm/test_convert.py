"""Derived parameters in vLLM's own model classes, without an engine: what is received in loadable
layout and converted equals what vLLM makes of the same checkpoint.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.vllm_engine import llama_config, missing_parts
from tests.support.vllm_probe import content, same_bits

pytestmark = pytest.mark.skipif(bool(missing_parts()), reason=missing_parts() or "-")

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LATENT = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "q_lora_rank": None,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}
CASES = {
    "llama-bf16": ("llama", "bfloat16", {}),
    "llama-f32": ("llama", "float32", {}),
    "llama-tied-f32": ("llama", "float32", {"tie_word_embeddings": True}),
    "qwen2-biases-bf16": ("qwen2", "bfloat16", {}),  # float32 biases beside AMX kernels
    "qwen2-biases-f32": ("qwen2", "float32", {}),
    "qwen3_moe-bf16": ("qwen3_moe", "bfloat16", _EXPERTS),
    "qwen3_moe-f32": ("qwen3_moe", "float32", _EXPERTS),
    "deepseek_v2-bf16": ("deepseek_v2", "bfloat16", _LATENT),
}


@pytest.fixture(scope="module", autouse=True)
def _world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's process groups, of one rank."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    store = f"file://{tmp_path_factory.mktemp('store')}/store"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, store, 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def _checkpoint(folder: Path, family: str, more: dict[str, Any], seed: int) -> str:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **llama_config(**more)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    path = folder / f"{family}-{seed}"
    model.to(torch.bfloat16).save_pretrained(path)
    return str(path)


def _load(path: str, dtype: str) -> tuple[torch.nn.Module, Any]:
    """The model as a worker loads it, with our backend chosen; and vLLM's configuration."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    from weightd.vllm import register

    register()
    arguments = EngineArgs(
        model=path,
        dtype=dtype,
        max_model_len=64,
        enforce_eager=True,
        skip_tokenizer_init=True,
        weight_transfer_config={"backend": "weightd"},
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        return get_model(vllm_config=config), config


@contextlib.contextmanager
def _without_post_load(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from vllm.model_executor.model_loader import base_loader

    with monkeypatch.context() as patch:
        patch.setattr(base_loader, "process_weights_after_loading", lambda *_: None)
        yield


@pytest.mark.parametrize("case", CASES)
def test_converted_parameters_equal_those_of_a_fresh_load(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from vllm.config import set_current_vllm_config

    from weightd.vllm.model_facts import parameters_of
    from weightd.vllm.post_load import own_parameters

    family, dtype, more = CASES[case]
    paths = [_checkpoint(tmp_path, family, more, seed) for seed in (1, 2)]
    model, config = _load(paths[0], dtype)
    parameters = parameters_of(model)
    with capsys.disabled():
        print(f"\n{case}: {parameters.counts()}", flush=True)
    with _without_post_load(monkeypatch):
        loadable = dict(own_parameters(_load(paths[1], dtype)[0]))
    addresses = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    lent = [pair for pair in parameters.pairs if parameters.kinds.get(pair[0]) != "opaque"]
    assert {name for name, _ in lent} == set(loadable)
    fresh, _ = _load(paths[1], dtype)
    expected = dict(content(fresh))
    for _ in range(3):  # a conversion leaves all ready for the next, which copies less
        with torch.no_grad():
            for name, tensor in lent:
                assert tensor.shape == loadable[name].shape, name
                tensor.copy_(loadable[name])
        with set_current_vllm_config(config):
            parameters.convert(config.model_config)
        found = dict(content(model))
        assert found.keys() == expected.keys()
        assert [name for name in found if not same_bits(found[name], expected[name])] == []
    assert {n: t.data_ptr() for n, t in model.named_parameters()} == addresses
    for name, tensor in lent:  # what was received stays, for engines that catch up
        assert same_bits(tensor, loadable[name]), name
