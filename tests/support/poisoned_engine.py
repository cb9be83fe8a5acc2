"""An engine for tests: all of its ranks in this process, memory that shows every write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.checkpoints import load_model
from tests.support.llama_engine import empty_params, expected_params, first_difference
from weightd import EngineRank


class PoisonedEngine:
    """All ranks of one engine, in this process, with poisoned memory."""

    def __init__(
        self,
        address: str,
        model: str,
        config: dict[str, Any],
        tp_size: int = 2,
        dtype: torch.dtype = torch.bfloat16,
        architecture: str = "LlamaForCausalLM",
        engine: str = "e0",
        **options: Any,
    ) -> None:
        self._config, self._dtype, self._tp = config, dtype, tp_size
        self.params = [empty_params(config, rank, tp_size, dtype) for rank in range(tp_size)]
        self.ranks = [
            EngineRank(
                address,
                model=model,
                engine=engine,
                architecture=architecture,
                config=config,
                params=self.params[rank],
                tp_rank=rank,
                tp_size=tp_size,
                **options,
            )
            for rank in range(tp_size)
        ]

    def __enter__(self) -> PoisonedEngine:
        return self

    def __exit__(self, *unused: Any) -> None:
        for rank in self.ranks:
            rank.close()

    def assert_holds(self, folder: Path, version: int) -> None:
        """Every rank holds the golden layout of a checkpoint, bit by bit."""
        source = load_model(folder)
        for index, rank in enumerate(self.ranks):
            assert rank.wait(version=version, timeout=60)["version"] == version
            wanted = expected_params(self._config, source, index, self._tp, self._dtype)
            assert wanted.keys() == self.params[index].keys()
            for name, tensor in wanted.items():
                difference = first_difference(self.params[index][name], tensor)
                assert not difference, f"rank {index} {name}: {difference}"

    def assert_untouched(self) -> None:
        """No byte was written, and no version is served."""
        for index, rank in enumerate(self.ranks):
            assert rank.version == 0 and not rank.state["dirty"]
            for name, poison in empty_params(self._config, index, self._tp, self._dtype).items():
                assert not first_difference(self.params[index][name], poison), name
