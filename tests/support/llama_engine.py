"""What a vLLM rank holds of a Llama or Qwen2 model: empty parameters, and their expected content.

Written from the layout tables alone, with plain slicing, so that it can judge the planner. Shapes
in elements, ``[out, in]``; `Config` values are those of the Hugging Face config.
"""

from __future__ import annotations

from typing import Any, Iterator, Mapping

import torch

_VOCAB_PADDING = 64
_POISON = 0x7F


def _get(config: Any, name: str, default: Any = None) -> Any:
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return default if value is None else value


def _heads(config: Any) -> tuple[int, int, int]:
    """Query heads, key/value heads and elements per head."""
    heads = _get(config, "num_attention_heads")
    kv_heads = _get(config, "num_key_value_heads", heads)
    return heads, kv_heads, _get(config, "head_dim", _get(config, "hidden_size") // heads)


def _part(tensor: torch.Tensor, rank: int, parts: int, dim: int = 0) -> torch.Tensor:
    size = tensor.shape[dim] // parts
    assert size * parts == tensor.shape[dim], "the test model must divide evenly over tp"
    return tensor.narrow(dim, rank * size, size)


def _vocab_part(tensor: torch.Tensor, rank: int, parts: int) -> torch.Tensor:
    """Rows of one rank after the vocabulary was padded with zero rows to a multiple of 64."""
    rows = -(-tensor.shape[0] // _VOCAB_PADDING) * _VOCAB_PADDING
    padded = tensor.new_zeros((rows, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    return _part(padded, rank, parts)


def _qkv(parts: list[torch.Tensor], config: Any, rank: int, tp: int) -> torch.Tensor:
    """Query, key and value rows of one rank; key/value heads are repeated where tp exceeds them."""
    _, kv_heads, size = _heads(config)
    repeat = max(1, tp // kv_heads)
    query = _part(parts[0], rank, tp)
    rest = []
    for part in parts[1:]:
        heads = part.reshape(kv_heads, size, *part.shape[1:]).repeat_interleave(repeat, dim=0)
        rest.append(_part(heads.reshape(-1, *part.shape[1:]), rank, tp))
    return torch.cat([query, *rest])


def expected_params(
    config: Any, source: Mapping[str, torch.Tensor], tp_rank: int, tp_size: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Returns the parameters of one rank after a sync of ``source``.

    Args:
        config: Hugging Face config (mapping or object).
        source: full tensors under Hugging Face names, any float dtype.
        tp_rank, tp_size: tensor-parallel coordinates.
        dtype: of the engine; each source is cast to it, to the nearest, ties to even.

    Returns:
        Contiguous tensors under vLLM's names, in the order in which vLLM lists them.
    """
    cast = {name: tensor.to(dtype) for name, tensor in source.items()}
    params = dict(_arranged(config, cast, tp_rank, tp_size))
    return {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in params.items()
    }


def _arranged(
    config: Any, source: Mapping[str, torch.Tensor], rank: int, tp: int
) -> Iterator[tuple[str, torch.Tensor]]:
    yield "model.embed_tokens.weight", _vocab_part(source["model.embed_tokens.weight"], rank, tp)
    for layer in range(_get(config, "num_hidden_layers")):
        prefix = f"model.layers.{layer}."
        attention = prefix + "self_attn."
        for kind in ("weight", "bias"):
            names = [f"{attention}{part}_proj.{kind}" for part in "qkv"]
            if names[0] in source:
                merged = _qkv([source[name] for name in names], config, rank, tp)
                yield f"{attention}qkv_proj.{kind}", merged
        yield attention + "o_proj.weight", _part(source[attention + "o_proj.weight"], rank, tp, 1)
        if attention + "o_proj.bias" in source:
            yield attention + "o_proj.bias", source[attention + "o_proj.bias"]
        yield from _mlp(prefix + "mlp.", source, rank, tp)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", source[f"{prefix}{norm}.weight"]
    yield "model.norm.weight", source["model.norm.weight"]
    if not _get(config, "tie_word_embeddings", False):
        yield "lm_head.weight", _vocab_part(source["lm_head.weight"], rank, tp)


def _mlp(
    prefix: str, source: Mapping[str, torch.Tensor], rank: int, tp: int
) -> Iterator[tuple[str, torch.Tensor]]:
    for kind in ("weight", "bias"):
        names = [f"{prefix}{part}_proj.{kind}" for part in ("gate", "up")]
        if names[0] in source:
            merged = torch.cat([_part(source[name], rank, tp) for name in names])
            yield f"{prefix}gate_up_proj.{kind}", merged
    yield prefix + "down_proj.weight", _part(source[prefix + "down_proj.weight"], rank, tp, 1)
    if prefix + "down_proj.bias" in source:
        yield prefix + "down_proj.bias", source[prefix + "down_proj.bias"]


def source_shapes(config: Any, biases: tuple[str, ...] = ()) -> dict[str, tuple[int, ...]]:
    """Returns the Hugging Face names and shapes of a model.

    Args:
        config: Hugging Face config.
        biases: projections with a bias, e.g. ``("q", "k", "v")`` for Qwen2.
    """
    heads, kv_heads, size = _heads(config)
    hidden, inner = _get(config, "hidden_size"), _get(config, "intermediate_size")
    vocab = _get(config, "vocab_size")
    sides = {
        "self_attn.q": (heads * size, hidden),
        "self_attn.k": (kv_heads * size, hidden),
        "self_attn.v": (kv_heads * size, hidden),
        "self_attn.o": (hidden, heads * size),
        "mlp.gate": (inner, hidden),
        "mlp.up": (inner, hidden),
        "mlp.down": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(_get(config, "num_hidden_layers")):
        prefix = f"model.layers.{layer}."
        for name, shape in sides.items():
            shapes[f"{prefix}{name}_proj.weight"] = shape
            if name.rsplit(".", 1)[1] in biases:
                shapes[f"{prefix}{name}_proj.bias"] = shape[:1]
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def empty_params(
    config: Any,
    tp_rank: int,
    tp_size: int,
    dtype: torch.dtype,
    biases: tuple[str, ...] | None = None,
) -> dict[str, torch.Tensor]:
    """Returns the parameters of one rank as an engine allocates them, every byte set to a poison.

    Args:
        config: Hugging Face config.
        tp_rank, tp_size: tensor-parallel coordinates.
        dtype: of the engine.
        biases: see `source_shapes`; None follows the config (Qwen2 has q, k, v biases).
    """
    if biases is None:
        biases = config_biases(config)
    shapes = source_shapes(config, biases)
    source = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    params = dict(_arranged(config, source, tp_rank, tp_size))
    return {name: poisoned(tuple(tensor.shape), dtype) for name, tensor in params.items()}


def config_biases(config: Any) -> tuple[str, ...]:
    """Which projections have a bias according to the config."""
    biases: tuple[str, ...] = ()
    if _get(config, "model_type") == "qwen2":
        biases += ("q", "k", "v")
    elif _get(config, "attention_bias", _get(config, "bias", False)):
        biases += ("q", "k", "v", "o")
    if _get(config, "mlp_bias", False):
        biases += ("gate", "up", "down")
    return biases


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Returns a tensor whose every byte has a value that no test weight has."""
    tensor = torch.empty(shape, dtype=dtype)
    tensor.reshape(-1).view(torch.uint8).fill_(_POISON)
    return tensor


def first_difference(actual: torch.Tensor, expected: torch.Tensor) -> str:
    """Says where two tensors differ bit by bit; empty if nowhere."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return (
            f"{tuple(actual.shape)} {actual.dtype} instead of "
            f"{tuple(expected.shape)} {expected.dtype}"
        )
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    different = (actual.contiguous().view(width) != expected.contiguous().view(width)).flatten()
    if not different.any():
        return ""
    place = int(different.nonzero()[0])
    return (
        f"{int(different.sum())} of {different.numel()} elements, first at {place}: "
        f"{actual.flatten()[place].item()} instead of {expected.flatten()[place].item()}"
    )
