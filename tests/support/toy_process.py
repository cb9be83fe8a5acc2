"""A process that holds ranks of the toy engine, whose layout is traced; see engine_process.py.

    python -m tests.support.toy_process ADDRESS
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from tests.support.engine_process import serve
from tests.support.llama_engine import first_difference
from tests.support.toy_engine import ARCHITECTURE, ToyEngine, ToyModel, expected
from weightd import EngineRank
from weightd.trace import module_sources, trace_loader
from weightd.traced import TracedLayout

_WAIT_SECONDS = 60.0


class ToyRanks:
    """The engine ranks of this process, by key."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._ranks: dict[str, tuple[EngineRank, ToyEngine]] = {}
        self.traces = 0

    def open(self, key: str, **options: Any) -> int:
        """Opens a rank whose layout is traced when it is needed; returns the traces so far.

        Args:
            key: of the rank.
            options: of EngineRank; ``dtype`` is torch's name, ``without`` leaves out a tensor of
                the trainer.
        """
        dtype = getattr(torch, options.pop("dtype"))
        without = options.pop("without", "")
        options.setdefault("architecture", ARCHITECTURE)
        engine = ToyEngine(options["tp_rank"], options["tp_size"], dtype)
        sources = [pair for pair in module_sources(ToyModel()) if pair[0] != without]

        def trace() -> TracedLayout:
            self.traces += 1
            return trace_loader(engine.load_weights, engine.named_parameters(), sources)

        rank = EngineRank(
            self._address, config={}, params=engine.named_parameters(), layout=trace, **options
        )
        self._ranks[key] = rank, engine
        return self.traces

    def check(self, key: str, version: int, source: str) -> list[str]:
        """Compares memory, bit by bit, with what the engine's own loader makes of ``source``."""
        rank, engine = self._ranks[key]
        rank.wait(version=version, timeout=_WAIT_SECONDS)
        dtype = engine.norm.dtype
        wanted = expected(torch.load(source), engine.rank, engine.size, dtype)
        return [
            f"{key} {name}: {difference}"
            for name, parameter in engine.named_parameters()
            if (difference := first_difference(parameter.data, wanted[name]))
        ]

    def untouched(self, key: str) -> bool:
        """True if every parameter still has the value with which the engine made it."""
        return all(bool((p == 77).all()) for p in self._ranks[key][1].parameters())

    def close(self, key: str) -> None:
        """Closes a rank."""
        self._ranks.pop(key)[0].close()

    def close_all(self) -> None:
        """Closes every rank."""
        for key in list(self._ranks):
            self.close(key)


if __name__ == "__main__":
    serve(ToyRanks(sys.argv[1]))
