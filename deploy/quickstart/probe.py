"""Looks into vLLM's workers for the quickstart; mixed into them by ``--worker-extension-cls``."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.llama_engine import expected_params, first_difference


class Probe:
    """Methods for ``/collective_rpc``; ``self`` is the worker."""

    model_runner: Any
    rank: int
    parallel_config: Any

    def quickstart_compare(self, path: str) -> dict[str, Any]:
        """Compares the worker's live parameters, bit by bit, with what they must hold.

        Args:
            path: the trainer's full tensors under Hugging Face names.

        Returns:
            ``equal``: parameters that are equal; ``packed``: those that this CPU's kernels hold in
            a private layout, which cannot be read; ``differences``: texts.
        """
        model = self.model_runner.model
        live = dict(model.named_parameters())
        expected = expected_params(
            self.model_runner.model_config.hf_config,
            torch.load(path),
            self.rank,
            self.parallel_config.tensor_parallel_size,
            self.model_runner.model_config.dtype,
        )
        differences = [f"only on one side: {name}" for name in live.keys() ^ expected.keys()]
        equal, packed = [], []
        for name in live.keys() & expected.keys():
            if live[name].shape != expected[name].shape:
                packed.append(name)
            elif difference := first_difference(live[name], expected[name]):
                differences.append(f"{name}: {difference}")
            else:
                equal.append(name)
        return {"equal": len(equal), "packed": len(packed), "differences": differences}
