"""Proves, after every step, that a vLLM server computes with the trainer's weights."""

from __future__ import annotations

import os
import tempfile

import torch

from deploy.quickstart.serve import VllmClient
from deploy.quickstart.trainer import SEQUENCE

# The server computes in bfloat16 and the trainer in float32: largest difference of one log-probability.
TOLERANCE = 0.05


class VllmJudge:
    """Compares memory and log-probabilities of a server with the trainer's.

    Args:
        url: of the server.
    """

    verdict = (
        "every parameter of vLLM that can be read equals the trainer's bit for bit, what its kernels have packed was "
        f"verified before it was packed, and log-probabilities agree within {TOLERANCE}"
    )

    def __init__(self, url: str) -> None:
        self._client = VllmClient(url)
        self._before = self._client.logprobs(SEQUENCE)

    def __call__(self, step: int, full: dict[str, torch.Tensor], logprobs: list[float]) -> None:
        """Raises SystemExit if vLLM does not serve what the trainer has."""
        self._compare_memory(full)
        version = self._client.weight_version()
        if version != str(step):
            raise SystemExit(f"vLLM serves version {version} instead of {step}")
        found = self._client.logprobs(SEQUENCE)
        distance = max(abs(a - b) for a, b in zip(found, logprobs))
        moved = max(abs(a - b) for a, b in zip(found, self._before))
        print(f"  log-probabilities of {len(found)} tokens; vLLM says version {version}:")
        print("    trainer " + " ".join(f"{value:8.3f}" for value in logprobs))
        print("    vLLM    " + " ".join(f"{value:8.3f}" for value in found))
        print(
            f"    largest difference {distance:.4f} (limit {TOLERANCE}); largest change since the step before {moved:.3f}",
            flush=True,
        )
        if distance > TOLERANCE:
            raise SystemExit("vLLM does not follow the trainer")
        if moved < 2 * TOLERANCE:
            raise SystemExit("the step changed too little to tell old weights from new ones")
        self._before = found

    def _compare_memory(self, full: dict[str, torch.Tensor]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "full.pt")
            torch.save(full, path)
            for rank, found in enumerate(self._client.ask_workers("quickstart_compare", path)):
                if found["differences"]:
                    raise SystemExit(f"vLLM tp {rank} differs: {found['differences']}")
                packed = f", {found['packed']} packed by this CPU's kernels" if found["packed"] else ""
                print(
                    f"  vLLM tp {rank}: {found['equal']} parameters equal the trainer's, bit for bit{packed}",
                    flush=True,
                )
