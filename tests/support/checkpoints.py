"""Checkpoint directories for tests of `weightctl push`, and a runner of the command."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from pathlib import Path
from typing import Any, Callable, Mapping

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.cluster import missing_binaries

INDEX = "model.safetensors.index.json"
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 32,
}
LLAMA = {"model_type": "llama", "head_dim": 6, **SIZES}
QWEN2 = {"model_type": "qwen2", "tie_word_embeddings": True, **SIZES}


def missing_weightctl() -> str:
    """Returns why `push` cannot be tested here; empty if it can."""
    return missing_binaries() or (
        "" if os.environ.get("WEIGHTCTL_BIN") else "WEIGHTCTL_BIN is not set"
    )


def save_model(config: Mapping[str, Any], folder: Path, shard_size: str, seed: int = 3) -> None:
    """Writes a model with random weights as transformers does, sharded into several files.

    Args:
        config: Hugging Face config, with `model_type`.
        folder: to write to.
        shard_size: largest file, e.g. "8KB".
        seed: of the weights.
    """
    torch.manual_seed(seed)
    values = dict(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(folder, max_shard_size=shard_size)


def load_model(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a checkpoint, as the safetensors package reads them."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def file_of(folder: Path, tensor: str) -> Path:
    """Returns the file of a sharded checkpoint that holds a tensor."""
    return folder / json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"][tensor]


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites a JSON file after `change` has altered its object."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites the header of a safetensors file after `change` has altered it; keeps the data."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def push(address: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `weightctl push` and returns how it ended, with its output."""
    return subprocess.run(
        push_command(address, folder, *arguments), capture_output=True, text=True, timeout=120
    )


def push_command(address: str, folder: Path, *arguments: str) -> list[str]:
    """The command line of `push`."""
    return [os.environ["WEIGHTCTL_BIN"], "--address", address, "push", str(folder), *arguments]
