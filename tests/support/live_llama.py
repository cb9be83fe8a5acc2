"""The quickstart's Llama as a trainer of one rank, and what it makes of a sequence."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from deploy.quickstart.trainer import config

# bfloat16 against float32; other weights differ by 1 and more, other keys and values by 0.5
TOLERANCE = 0.25
LIMIT_SECONDS = 5.0  # from a death to the error that names it
_STD = 0.06


def source_paths() -> list[str]:
    """Where the package, if it is not installed, and the tests lie."""
    root = Path(__file__).resolve().parents[2]
    sources = [] if "WEIGHTD_INSTALLED" in os.environ else [str(root / "client" / "python")]
    return [*sources, str(root)]


class LiveLlama:
    """Weights that a test changes in place, as training does.

    Attributes:
        model: in float32; its memory is what an actor lends.
    """

    def __init__(self) -> None:
        self.model = LlamaForCausalLM(config()).float().eval()
        self._kept: dict[int, dict[str, torch.Tensor]] = {}

    def train(self, version: int) -> None:
        """Draws the weights of a version: far from those of any other, so that mixtures show."""
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator) * _STD
                parameter.copy_(1.0 + noise if "norm" in name else noise)
        self._kept[version] = {
            name: tensor.to(torch.bfloat16).float() for name, tensor in self.full().items()
        }

    def full(self) -> dict[str, torch.Tensor]:
        """Full tensors under Hugging Face names."""
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    @torch.no_grad()
    def logprobs(self, version: int, tokens: list[int]) -> list[float]:
        """Log-probability of each token but the first under a version as engines hold it."""
        model = LlamaForCausalLM(config()).float().eval()
        model.load_state_dict(self._kept[version])
        batch = torch.tensor([tokens])
        scores = model(input_ids=batch).logits.log_softmax(-1)[0, :-1]
        return scores.gather(1, batch[0, 1:, None])[:, 0].tolist()
