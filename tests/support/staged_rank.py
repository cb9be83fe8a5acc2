"""A Llama rank that receives its projections in stages and computes with their transposes.

All stages lie in one arena, as large as the largest of them: layer by layer, then the head. What a
stage has brought is overwritten as soon as it is converted, so that nobody can rely on it.
"""

from __future__ import annotations

from typing import Any, Mapping

import torch

from tests.support.llama_engine import empty_params, first_difference, poisoned

_ALIGNMENT = 64


def _stage(name: str, layers: int) -> int:
    if not name.endswith("weight") or "norm" in name or "embed" in name:
        return 0
    return int(name.split(".")[2]) + 1 if ".layers." in name else layers + 1


class StagedParams:
    """The parameters.

    Attributes:
        lent: by name, for `EngineRank`; those of different stages share memory.
        stages: of the derived ones, by name.
        converted: stages in the order in which they were converted.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tp_rank: int,
        tp_size: int,
        dtype: torch.dtype,
        device: str = "cpu",
    ) -> None:
        empty = empty_params(config, tp_rank, tp_size, dtype)
        self.lent = {name: tensor.to(device) for name, tensor in empty.items()}
        layers = config["num_hidden_layers"]
        numbers = {name: _stage(name, layers) for name in self.lent}
        self.stages = {name: stage for name, stage in numbers.items() if stage > 0}
        self.converted: list[int] = []
        self._computed = {
            name: poisoned(tuple(reversed(self.lent[name].shape)), dtype).to(device)
            for name in self.stages
        }
        self._place_in_arena(dtype, device)

    def _place_in_arena(self, dtype: torch.dtype, device: str) -> None:
        filled: dict[int, int] = {}
        places = {}
        for name, stage in self.stages.items():
            places[name] = filled.get(stage, 0)
            filled[stage] = places[name] + -(-self.lent[name].numel() // _ALIGNMENT) * _ALIGNMENT
        arena = poisoned((max(filled.values()),), dtype).to(device)
        for name, begin in places.items():
            shape = self.lent[name].shape
            self.lent[name] = arena[begin : begin + shape.numel()].view(shape)

    def options(self) -> dict[str, Any]:
        """Arguments of `EngineRank`."""
        return {
            "params": self.lent,
            "kinds": dict.fromkeys(self.stages, "derived"),
            "stages": self.stages,
            "convert": self.convert,
        }

    def convert(self, stage: int) -> None:
        """What a post-load step does."""
        self.converted.append(stage)
        for name, number in self.stages.items():
            if number == stage:
                self._computed[name].copy_(self.lent[name].t())
                self.lent[name].copy_(poisoned(self.lent[name].shape, self.lent[name].dtype))
        if next(iter(self.lent.values())).is_cuda:
            torch.cuda.current_stream().synchronize()

    def held(self) -> dict[str, torch.Tensor]:
        """What the engine computes with, in the layout in which it is received."""
        return {
            name: self._computed[name].t().contiguous() if name in self.stages else tensor
            for name, tensor in self.lent.items()
        }

    def differences(self, expected: Mapping[str, torch.Tensor]) -> list[str]:
        """Where that is not, bit by bit, what it must be."""
        found = {name: first_difference(t, expected[name]) for name, t in self.held().items()}
        return [f"{name}: {difference}" for name, difference in found.items() if difference]
