"""A process that holds engine ranks: reads requests, one JSON object a line, and answers alike.

    python -m tests.support.engine_process ADDRESS

Operations: open, check, state, capture, replay, close; see the functions of the same names. Ends
with its input.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any, Callable

import torch

from tests.support.llama_engine import empty_params, expected_params, first_difference
from tests.support.staged_rank import StagedParams
from tests.support.unlendable import sleep_pool, unlendable_params
from weightd import EngineRank

_WAIT_SECONDS = 60.0

_Held = Callable[[], dict[str, torch.Tensor]]  # what a rank's memory holds, by name


class Ranks:
    """The engine ranks of this process, by key."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._ranks: dict[str, tuple[EngineRank, dict[str, Any], _Held]] = {}
        self._graphs: dict[str, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._hogged: Any = None

    def open(
        self,
        key: str,
        memory: str = "cpu",
        staged: bool = False,
        pulled: str = "",
        leave_bytes: int = 0,
        **options: Any,
    ) -> dict[str, Any]:
        """Opens a rank with poisoned parameters.

        ``memory`` is the torch device that they are on, ``dtype`` torch's name of their type;
        ``staged`` receives projections in stages; ``pulled``: ``some`` or ``all`` of them lie in
        memory that no worker can map. ``leave_bytes``: see `hog`, once they are made.
        """
        dtype = getattr(torch, options.pop("dtype"))
        config, tp_rank, tp_size = options["config"], options["tp_rank"], options["tp_size"]
        options_of_rank = {**options, "dtype": dtype}
        if staged:
            stages = StagedParams(config, tp_rank, tp_size, dtype, memory)
            rank = EngineRank(self._address, **stages.options(), **options)
            self._ranks[key] = (rank, options_of_rank, stages.held)
            return rank.state
        params = empty_params(config, tp_rank, tp_size, dtype)
        params = {name: tensor.to(memory) for name, tensor in params.items()}
        params = unlendable_params(params, pulled)
        if leave_bytes:
            self.hog(leave_bytes)
        rank = EngineRank(self._address, params=params, **options)
        self._ranks[key] = (rank, options_of_rank, lambda: params)
        return rank.state

    def check(self, key: str, version: int, source: str) -> list[str]:
        """Compares memory, bit by bit, with what ``version`` must be; returns the differences.

        Args:
            key: of the rank.
            version: to wait for.
            source: file with the full tensors of that version under Hugging Face names.
        """
        rank, options, held = self._ranks[key]
        state = rank.wait(version=version, timeout=_WAIT_SECONDS)
        differences = [] if state["version"] == version else [f"serves {state['version']}"]
        expected = expected_params(
            options["config"],
            torch.load(source),
            options["tp_rank"],
            options["tp_size"],
            options["dtype"],
        )
        params = held()
        if expected.keys() != params.keys():
            differences.append(f"names: {sorted(expected.keys() ^ params.keys())}")
        for name, tensor in expected.items():
            difference = first_difference(params[name].cpu(), tensor)
            if difference:
                differences.append(f"{key} {name}: {difference}")
        return differences

    def capture(self, key: str) -> None:
        """Captures a CUDA graph that reads every parameter of a rank where it lies now."""
        params = list(self._ranks[key][2]().values())
        result = torch.zeros(len(params), dtype=torch.int64, device=params[0].device)

        def read() -> None:
            for place, tensor in enumerate(params):
                words = tensor.view(torch.int16).flatten().to(torch.int64)
                result[place] = (words * torch.arange(1, len(words) + 1, device=words.device)).sum()

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            read()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            read()
        self._graphs[key] = (graph, result)

    def replay(self, key: str) -> list[int]:
        """Replays the captured graph: one position-dependent sum of bits per parameter."""
        graph, result = self._graphs[key]
        graph.replay()
        return result.tolist()

    def hog(self, leave_bytes: int) -> None:
        """Takes the GPU's free memory but for so much; 0 gives it back."""
        self._hogged = None
        torch.cuda.empty_cache()
        if leave_bytes:
            size = torch.cuda.mem_get_info()[0] - leave_bytes
            self._hogged = torch.empty(size, dtype=torch.uint8, device="cuda")

    def sleep(self) -> None:
        """Takes the pages of unlendable GPU memory away."""
        torch.cuda.synchronize()
        sleep_pool()[1].pool_sleep()

    def wake(self) -> None:
        """Brings pages back, under the same addresses and without their content."""
        sleep_pool()[1].pool_wake()

    def state(self, key: str) -> dict[str, Any]:
        """Returns the state of a rank."""
        return self._ranks[key][0].state

    def close(self, key: str) -> None:
        """Closes a rank."""
        self._graphs.pop(key, None)
        self._ranks.pop(key)[0].close()

    def close_all(self) -> None:
        """Closes every rank."""
        for key in list(self._ranks):
            self.close(key)


def serve(ranks: Any) -> None:
    """Answers requests with the methods of ``ranks`` until the input ends, then closes all."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        operation: Callable[..., Any] = getattr(ranks, request.pop("operation"))
        try:
            answer = {"value": operation(**request)}
        except Exception:  # the caller shows it
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)
    ranks.close_all()


if __name__ == "__main__":
    serve(Ranks(sys.argv[1]))
