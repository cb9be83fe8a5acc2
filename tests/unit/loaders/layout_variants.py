"""Which cases `make_layout_cases` makes: golden cases with other sizes and options."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping

_SHARED = Path(os.environ.get("WEIGHTD_SHARED", Path(__file__).resolve().parents[4] / "shared"))
_FOLDER = _SHARED / "golden-layouts-vllm032"


@dataclass(frozen=True)
class Variant:
    """A golden case with other numbers.

    Attributes:
        base: name of the golden case whose config is changed.
        changes: fields of the config.
        tp_sizes: tensor-parallel sizes; every rank of each is run.
        expert_parallel: the same ranks hold whole experts.
        names: ``state_dict`` or ``checkpoint``, see the golden folder.
        extra: more source tensors, name to shape, that the engine is expected to drop.
        refused: source tensors that vLLM's loader must not be fed.
    """

    base: str
    changes: Mapping[str, Any]
    tp_sizes: tuple[int, ...] = (3,)
    expert_parallel: bool = False
    names: str = "state_dict"
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    refused: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        """Hugging Face architecture."""
        return self._golden["architecture"]

    @property
    def config(self) -> dict[str, Any]:
        """Hugging Face config."""
        return {**self._golden["config"], **self.changes}

    @property
    def _golden(self) -> dict[str, Any]:
        return json.loads(gzip.decompress((_FOLDER / f"{self.base}.json.gz").read_bytes()))


_HEADS = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 131}
_DENSE = {**_HEADS, "intermediate_size": 36}
_BIAS = {"attention_bias": True}
_MOE = {**_DENSE, "moe_intermediate_size": 12}
_MLA = {
    **_MOE,
    "num_key_value_heads": 6,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
_DELTA = {
    **_MOE,
    "head_dim": 8,
    "shared_expert_intermediate_size": 30,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
}
_FALCON = {"hidden_size": 24, "num_attention_heads": 6, "vocab_size": 131, "ffn_hidden_size": 96}
_OPT = {"hidden_size": 24, "num_attention_heads": 6, "ffn_dim": 45, "vocab_size": 131}


def _bias(part: str, size: int, layer: int = 1) -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{layer}.{part}.bias": (size,)}


def _experts(count: int) -> dict[str, int]:
    return {"num_experts": count, "num_local_experts": count}


VARIANTS: dict[str, Variant] = {
    "llama-all-biases": Variant(
        "llama-tie-false", {**_DENSE, **_BIAS, "head_dim": 4, "mlp_bias": True}, (1, 3)
    ),
    "llama-more-ranks-than-kv-heads": Variant(
        "llama-tie-true", {**_DENSE, "head_dim": None, "num_key_value_heads": 2}, (6,)
    ),
    "llama-extra-biases": Variant(
        "llama-tie-false",
        {**_DENSE, "head_dim": 4},
        extra={**_bias("self_attn.q_proj", 24), **_bias("mlp.down_proj", 24, 0)},
    ),
    "mistral-window": Variant("mistral", {**_DENSE, "head_dim": 12, "sliding_window": 8}),
    "qwen2-window": Variant(
        "qwen2-tie-true", {**_DENSE, "use_sliding_window": True, "sliding_window": 8}
    ),
    "qwen3-attention_bias": Variant("qwen3-tie-false", {**_DENSE, **_BIAS, "head_dim": 6}),
    "gemma-untied": Variant("gemma-mqa", {**_DENSE, "head_dim": 6, "tie_word_embeddings": False}),
    "gemma-attention_bias": Variant("gemma-mqa", {**_DENSE, **_BIAS, "head_dim": 6}),
    "gemma2-attention_bias": Variant(
        "gemma2", {**_DENSE, **_BIAS, "head_dim": 6}, refused=("lm_head.weight",)
    ),
    "gemma3-attention_bias-untied": Variant(
        "gemma3", {**_DENSE, **_BIAS, "head_dim": 6, "tie_word_embeddings": False}
    ),
    "phi3-sizes": Variant("phi3", _DENSE, extra=_bias("self_attn.qkv_proj", 48)),
    "granite-all-biases": Variant("granite", {**_DENSE, **_BIAS, "mlp_bias": True}),
    "glm4-attention_bias": Variant("glm4", {**_DENSE, **_BIAS, "head_dim": 8}),
    "cohere2-attention_bias-untied": Variant(
        "cohere2", {**_DENSE, **_BIAS, "tie_word_embeddings": False}
    ),
    "gpt2-untied": Variant(
        "gpt2", {"n_embd": 24, "n_head": 6, "n_inner": 60, "vocab_size": 131, "tie_word_embeddings": False}
    ),  # fmt: skip
    "gpt_bigcode-untied": Variant("gpt_bigcode-mqa", {"tie_word_embeddings": False}, (2,)),
    "starcoder2-no-bias": Variant("starcoder2-tie-true", {**_DENSE, "use_bias": False}),
    "smollm3-all-biases": Variant("smollm3", {**_DENSE, **_BIAS, "mlp_bias": True}),
    "seed_oss-out-bias": Variant(
        "seed_oss", {**_DENSE, "head_dim": 6, "attention_out_bias": True, "mlp_bias": True}
    ),
    "olmo2-attention_bias": Variant("olmo2", {**_DENSE, **_BIAS}),
    "opt-projected": Variant("opt", {**_OPT, "word_embed_proj_dim": 12}),
    "opt-no-bias": Variant("opt", {**_OPT, "enable_bias": False}),
    "falcon-new-sizes": Variant("falcon-new-arch", {**_FALCON, "num_kv_heads": 3}),
    "falcon-mqa-bias": Variant("falcon-7b-mqa", {**_FALCON, "bias": True}),
    "mixtral-ep-uneven": Variant(
        "mixtral-disk", {**_DENSE, "num_local_experts": 5}, expert_parallel=True, names="checkpoint"
    ),
    "qwen2_moe-dense-layer": Variant(
        "qwen2_moe-disk",
        {**_MOE, **_experts(6), "shared_expert_intermediate_size": 30, "mlp_only_layers": [0]},
    ),
    "qwen3_moe-attention_bias": Variant(
        "qwen3_moe-disk", {**_MOE, **_BIAS, **_experts(7), "head_dim": 4}, names="checkpoint"
    ),
    "olmoe-attention_bias": Variant(
        "olmoe-disk", {**_DENSE, **_BIAS, **_experts(5), "intermediate_size": 12}
    ),
    "glm4_moe-options": Variant(
        "glm4_moe-disk",
        {**_MOE, **_BIAS, "head_dim": 8, "n_routed_experts": 6, "num_local_experts": 6,
         "use_qk_norm": True, "first_k_dense_replace": 0, "n_shared_experts": 2},
    ),  # fmt: skip
    "deepseek_v2-attention_bias": Variant(
        "deepseek_v2-q_lora-true-disk",
        {**_MLA, **_BIAS, "q_lora_rank": 14, "n_routed_experts": 6, "num_local_experts": 6},
        names="checkpoint",
    ),
    "deepseek_v3-no-dense-layer": Variant(
        "deepseek_v3-disk",
        {**_MLA, "q_lora_rank": None, "first_k_dense_replace": 0, "n_shared_experts": 3,
         "n_routed_experts": 6, "num_local_experts": 6},
    ),  # fmt: skip
    "minimax_m2-more-ranks-than-kv-heads": Variant(
        "minimax_m2-disk",
        {**_HEADS, "head_dim": 4, "intermediate_size": 12, "num_local_experts": 6},
        (6,),
    ),
    "gpt_oss-sizes": Variant(
        "gpt_oss", {**_DENSE, "head_dim": 4, "num_local_experts": 6}, expert_parallel=True
    ),
    "llama4-ep-uneven": Variant(
        "llama4",
        {**_HEADS, "head_dim": 8, "intermediate_size": 12, "intermediate_size_mlp": 36,
         "num_local_experts": 5},
        expert_parallel=True,
    ),  # fmt: skip
    "qwen3_next-attention_bias": Variant(
        "qwen3_next-disk", {**_DELTA, **_BIAS, **_experts(6)}, names="checkpoint"
    ),
}
