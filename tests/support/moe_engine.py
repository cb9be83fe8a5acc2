"""Shapes of a Qwen3-MoE model: the trainer's, one tensor per expert, and those of a TP 1 vLLM rank."""

from __future__ import annotations

from typing import Any, Mapping

import torch

Shapes = dict[str, tuple[int, ...]]


def _attention(config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Hidden size, query rows, key rows and head size."""
    size = config["head_dim"]
    return (
        config["hidden_size"],
        config["num_attention_heads"] * size,
        config["num_key_value_heads"] * size,
        size,
    )


def moe_source_shapes(config: Mapping[str, Any]) -> Shapes:
    """Hugging Face names and shapes of a checkpoint."""
    hidden, queries, keys, size = _attention(config)
    inner, vocab = config["moe_intermediate_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attention = prefix + "self_attn."
        shapes[attention + "q_proj.weight"] = (queries, hidden)
        shapes[attention + "k_proj.weight"] = (keys, hidden)
        shapes[attention + "v_proj.weight"] = (keys, hidden)
        shapes[attention + "o_proj.weight"] = (hidden, queries)
        shapes[attention + "q_norm.weight"] = shapes[attention + "k_norm.weight"] = (size,)
        shapes[prefix + "mlp.gate.weight"] = (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            experts = f"{prefix}mlp.experts.{expert}."
            shapes[experts + "gate_proj.weight"] = shapes[experts + "up_proj.weight"] = (inner, hidden)
            shapes[experts + "down_proj.weight"] = (hidden, inner)
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def moe_params(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Parameters of the only rank under vLLM's names, in bfloat16, without memory."""
    hidden, queries, keys, _ = _attention(config)
    inner, experts = config["moe_intermediate_size"], config["num_experts"]
    shapes: Shapes = {}
    for name, shape in moe_source_shapes(config).items():
        if ".experts." in name or "k_proj" in name or "v_proj" in name:
            continue
        if name.endswith("q_proj.weight"):
            name, shape = name.replace("q_proj", "qkv_proj"), (queries + 2 * keys, hidden)
        shapes[name] = shape
        if name.endswith("mlp.gate.weight"):
            routed = name.replace("gate.weight", "experts.routed_experts.")
            shapes[routed + "w13_weight"] = (experts, 2 * inner, hidden)
            shapes[routed + "w2_weight"] = (experts, hidden, inner)
    return {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for name, shape in shapes.items()
    }
