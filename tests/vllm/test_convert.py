"""Derived parameters in vLLM's own model classes, without an engine: what is received in loadable
layout and converted equals what vLLM makes of the same checkpoint, in one stage and in many.
"""

from __future__ import annotations

import collections
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
    "num_hidden_layers": 3,
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
    with _without_post_load(monkeypatch):
        loadables = [dict(own_parameters(_load(path, dtype)[0])) for path in reversed(paths)]
    expected = [dict(content(_load(paths[1], dtype)[0])), dict(content(model))]
    addresses = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    for stage_bytes in (1 << 28, 1):
        parameters = parameters_of(model, stage_bytes)
        _check_stages(parameters, stage_bytes)
        with capsys.disabled():
            counts = (parameters.counts(), parameters.num_stages, parameters.arena_bytes())
            print(f"\n{case}: {counts}", flush=True)
        for index in (0, 0, 1):  # a conversion leaves all ready for the next, which copies less
            loadable, wanted = loadables[index], expected[index]
            with set_current_vllm_config(config):
                _receive(parameters, config.model_config, loadable)
            found = dict(content(model))
            assert found.keys() == wanted.keys()
            assert [name for name in found if not same_bits(found[name], wanted[name])] == []
            assert {n: t.data_ptr() for n, t in model.named_parameters()} == addresses


def _receive(parameters: Any, model_config: Any, loadable: dict[str, torch.Tensor]) -> None:
    """Fills what is lent and converts it, as a sync does."""
    lent = {n: t for n, t in parameters.pairs if parameters.kinds.get(n) != "opaque"}
    assert lent.keys() == loadable.keys()

    def fill(stages: tuple[int, ...]) -> None:
        for name, tensor in lent.items():
            if parameters.stages.get(name, 0) in stages:
                assert tensor.shape == loadable[name].shape, name
                tensor.copy_(loadable[name])

    with torch.no_grad():
        fill((0, 1))
        for stage in range(1, parameters.num_stages + 1):
            if stage > 1:
                fill((stage,))
            parameters.convert(model_config, stage)
        parameters.finish(model_config)
    if parameters.num_stages <= 1:  # what was received stays, for engines that catch up
        assert [name for name in lent if not same_bits(lent[name], loadable[name])] == []


def _check_stages(parameters: Any, stage_bytes: int) -> None:
    """Everything at once, or no more than the largest module has; without overlaps."""
    buffers = {name: tensor for name, tensor in parameters.pairs if name in parameters.stages}
    assert set(parameters.stages.values()) == set(range(1, parameters.num_stages + 1))
    of_module: collections.Counter[str] = collections.Counter()
    for name, tensor in buffers.items():
        of_module[name.rpartition(".")[0]] += -(-tensor.nbytes // 256) * 256
    if stage_bytes == 1 and buffers:
        assert parameters.num_stages > 1
        assert parameters.arena_bytes() == max(of_module.values())
    else:
        assert parameters.num_stages == min(1, len(buffers))
        assert parameters.arena_bytes() >= parameters.staged_bytes()
    ends: dict[int, int] = {}
    for name, tensor in sorted(buffers.items(), key=lambda item: item[1].data_ptr()):
        stage = parameters.stages[name]
        assert tensor.data_ptr() >= ends.get(stage, 0), name
        ends[stage] = tensor.data_ptr() + tensor.nbytes
