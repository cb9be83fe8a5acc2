"""Small models of many architectures that a real vLLM 0.32 runs on a CPU.

Sizes obey what its CPU kernels ask for: head_dim of 32 or more, MLA with 512 + 64, expert widths in
multiples of 32, a vocabulary whose padding is cut over two ranks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping

import torch
from torch import nn

_SEED = 7
_STD = 0.05
_BASE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GPT: dict[str, Any] = {
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 256,
    "n_positions": 128,
    "vocab_size": 300,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_LLAMA = {**_BASE, "head_dim": 32}
_MLA = {
    **_BASE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}


@dataclass(frozen=True)
class TinyModel:
    """One model.

    Attributes:
        architecture: transformers' class, as the trainer holds it.
        options: of its configuration.
        served_as: architecture in the checkpoint's config.json, if another name.
        founding: one of those that verl's DTensor loaders knew.
        experts: has expert layers, which expert parallelism can spread.
        refused: what vLLM 0.32 says instead of running it, by TP size, as a regular expression.
        unstable: its tokens differ between two fresh starts: bytes only.
    """

    architecture: str
    options: Mapping[str, Any]
    served_as: str = ""
    founding: bool = False
    experts: bool = False
    refused: Mapping[int, str] = field(default_factory=dict)
    unstable: bool = False

    @property
    def engine_architecture(self) -> str:
        """The name that vLLM and the daemon are told."""
        return self.served_as or self.architecture


_GONE = "was supported in vLLM until"
# Without and with AMX.
_MULTIPLIED = r"mat1 and mat2 shapes cannot be multiplied|CHECK_EQ\(mat1\.size"
MODELS: dict[str, TinyModel] = {
    # The fourteen founding architectures.
    "gpt2": TinyModel("GPT2LMHeadModel", _GPT, founding=True),
    "llama": TinyModel("LlamaForCausalLM", _LLAMA, founding=True),
    "llama-alias": TinyModel("LlamaForCausalLM", _LLAMA, "LLaMAForCausalLM", founding=True),
    "mistral": TinyModel("MistralForCausalLM", _LLAMA, founding=True),
    "internlm": TinyModel(
        "LlamaForCausalLM", _LLAMA, "InternLMForCausalLM", True, refused={1: _GONE, 2: _GONE}
    ),
    "aquila": TinyModel(
        "LlamaForCausalLM", _LLAMA, "AquilaModel", True, refused={1: _GONE, 2: _GONE}
    ),
    "aquila2": TinyModel(
        "LlamaForCausalLM", _LLAMA, "AquilaForCausalLM", True, refused={1: _GONE, 2: _GONE}
    ),
    "phi3": TinyModel("Phi3ForCausalLM", _BASE, founding=True),
    "gemma": TinyModel(
        "GemmaForCausalLM",
        {**_LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True},
        founding=True,
    ),
    "gemma2": TinyModel(
        "Gemma2ForCausalLM", {**_LLAMA, **_SLIDING, "tie_word_embeddings": True}, founding=True
    ),
    "gpt_bigcode": TinyModel(
        "GPTBigCodeForCausalLM", {**_GPT, "multi_query": True}, founding=True
    ),
    "gpt_bigcode-mha": TinyModel(
        "GPTBigCodeForCausalLM",
        {**_GPT, "multi_query": False},
        founding=True,
        refused={2: _MULTIPLIED},
    ),
    "starcoder2": TinyModel(
        "Starcoder2ForCausalLM", {**_BASE, "tie_word_embeddings": True}, founding=True
    ),
    "qwen2": TinyModel("Qwen2ForCausalLM", _BASE, founding=True),
    "deepseek_v2": TinyModel(
        "DeepseekV2ForCausalLM", {**_MLA, "q_lora_rank": None}, founding=True, experts=True
    ),
    "deepseek_v2-q_lora": TinyModel(
        "DeepseekV2ForCausalLM", {**_MLA, "q_lora_rank": 64}, founding=True, experts=True
    ),
    # Experts that vLLM repacks.
    "qwen3_moe": TinyModel(
        "Qwen3MoeForCausalLM",
        {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        experts=True,
    ),
    "deepseek_v3": TinyModel(
        "DeepseekV3ForCausalLM",
        {
            **_MLA,
            "q_lora_rank": 64,
            "n_group": 2,
            "topk_group": 1,
            "topk_method": "noaux_tc",  # transformers does not write it of itself
        },
        experts=True,
    ),
    # Others of today.
    "qwen3": TinyModel("Qwen3ForCausalLM", _LLAMA),
    "gemma3": TinyModel("Gemma3ForCausalLM", {**_LLAMA, **_SLIDING, "tie_word_embeddings": True}),
    "mixtral": TinyModel(
        "MixtralForCausalLM",
        {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
        experts=True,
    ),
    "olmoe": TinyModel(
        "OlmoeForCausalLM",
        {**_BASE, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
        experts=True,
    ),
    "glm4_moe": TinyModel(
        "Glm4MoeForCausalLM",
        {
            **_LLAMA,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "use_qk_norm": True,
        },
        experts=True,
    ),
    "gpt_oss": TinyModel(
        "GptOssForCausalLM",
        {
            **_LLAMA,
            **_SLIDING,
            "intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        experts=True,
    ),
    "opt": TinyModel(
        "OPTForCausalLM",
        {
            "hidden_size": 128,
            "word_embed_proj_dim": 128,
            "ffn_dim": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 300,
            "max_position_embeddings": 128,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "falcon": TinyModel(
        "FalconForCausalLM",
        {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "vocab_size": 300,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
}


def make_model(name: str) -> nn.Module:
    """The same model in every process: float32, every parameter and stored buffer random."""
    import transformers

    tiny = MODELS[name]
    kind = getattr(transformers, tiny.architecture)
    torch.manual_seed(_SEED)
    model = kind(kind.config_class(**tiny.options)).float()
    with torch.no_grad():
        for tensor in stored(model):
            tensor.add_(torch.randn(tensor.shape) * _STD)
    return model


def stored(model: nn.Module) -> list[torch.Tensor]:
    """Its parameters and stored buffers of floating point, tied ones once; of a shard its part."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    local = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors.values()]
    return [tensor for tensor in local if tensor.is_floating_point()]


class Steps:
    """Sets a model, whole or sharded, to one of several contents; the same number, the same bits."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = stored(model)
        with torch.no_grad():
            self._first = [tensor.detach().clone() for tensor in self._tensors]

    def set(self, number: int) -> None:
        """Changes every element, with two roundings that are alike on a shard and on the whole."""
        with torch.no_grad():
            for tensor, first in zip(self._tensors, self._first):
                tensor.copy_(first)
                tensor.mul_(1.0 + 0.0625 * number)
                tensor.add_(0.001 * number)


def layers(model: nn.Module) -> list[nn.Module]:
    """Its decoder layers."""
    return list(next(part for part in model.modules() if isinstance(part, nn.ModuleList)))


def save(name: str, model: nn.Module, folder: Path) -> str:
    """Writes a checkpoint under the architecture that vLLM is to see; returns its path."""
    model.save_pretrained(folder)
    tiny = MODELS[name]
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["architectures"] = [tiny.engine_architecture]
    path.write_text(json.dumps(config), encoding="utf-8")
    return str(folder)
