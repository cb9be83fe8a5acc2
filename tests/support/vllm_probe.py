"""What tests ask of a vLLM worker; mixed into it by ``worker_extension_cls``."""

from __future__ import annotations

import os
import signal
from typing import Any, Iterator

import torch

_SEED = 11


class Probe:
    """Methods for `collective_rpc`; ``self`` is the worker."""

    model_runner: Any
    weight_transfer_engine: Any

    def weightd_state(self) -> dict[str, Any]:
        """State of the worker's engine rank, kinds of its parameters, its process."""
        engine = self.weight_transfer_engine
        return {
            "state": engine.rank.state,
            "kinds": engine.parameters.kinds,
            "counts": engine.parameters.counts(),
            "pid": os.getpid(),
        }

    def weightd_compare(self, path: str) -> list[str]:
        """Compares the worker's weights, bit by bit, with what vLLM itself makes of a file.

        vLLM's own ``reload_weights`` loads the file into this worker after its present content was
        kept. Packed weights, which cannot be read, are compared through what the layers compute.

        Args:
            path: full tensors under Hugging Face names.

        Returns:
            The differences.
        """
        mine = dict(content(self.model_runner.model))
        source = torch.load(path)
        self.model_runner.reload_weights(weights_iterator=iter(source.items()))
        theirs = dict(content(self.model_runner.model))
        differences = [f"only on one side: {name}" for name in mine.keys() ^ theirs.keys()]
        for name in mine.keys() & theirs.keys():
            if not same_bits(mine[name], theirs[name]):
                differences.append(f"{name}: differs from vLLM's own load")
        return differences

    def weightd_content_size(self) -> int:
        """How many tensors and outputs `weightd_compare` compares."""
        return sum(1 for _ in content(self.model_runner.model))

    def weightd_kill(self, rank: int) -> None:
        """Kills the worker of that rank."""
        if self.rank == rank:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGKILL)


def content(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Copies of all parameters, and outputs of all layers with a weight of two dimensions."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter.detach().clone()
    with torch.inference_mode():
        for name, module in model.named_modules():
            width = _input_width(module)
            if width:
                inputs = _inputs(width, module.weight.dtype)
                yield f"{name}(...)", module.quant_method.apply(module, inputs, None).clone()


def _input_width(module: torch.nn.Module) -> int:
    """Input features of a linear layer or head; 0 for other modules."""
    if not hasattr(module, "quant_method") or not hasattr(module, "weight"):
        return 0
    width = getattr(module, "input_size_per_partition", getattr(module, "embedding_dim", 0))
    return int(width)


def _inputs(width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn((5, width), generator=generator).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if shape, type and every bit are equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*flat)
