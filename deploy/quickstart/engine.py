"""An inference rank without vLLM: it holds parameters in vLLM's layout and lends them to weightd."""

from __future__ import annotations

import os
import tempfile
from typing import Any, Sequence

import torch

import weightd
from deploy.quickstart.trainer import MODEL, config
from tests.support.llama_engine import empty_params, expected_params, first_difference


def engine_rank(tp_rank: int, tp_size: int, ready: Any, questions: Any, answers: Any) -> None:
    """Lends empty bf16 parameters and compares them, when asked, with what they must hold.

    Args:
        tp_rank: tensor-parallel rank, in [0, tp_size).
        tp_size: number of engine ranks.
        ready: queue that gets this rank once it is registered.
        questions: queue of (version, file with the trainer's full tensors); None ends the process.
        answers: queue of (tp_rank, number of parameters, differences).
    """
    torch.set_num_threads(1)
    model_config = config().to_dict()
    model_config.pop("dtype", None)
    params = empty_params(model_config, tp_rank, tp_size, torch.bfloat16)
    with weightd.EngineRank(
        model=MODEL,
        engine="engine0",
        architecture="LlamaForCausalLM",
        config=model_config,
        params=params,
        tp_rank=tp_rank,
        tp_size=tp_size,
    ) as rank:
        ready.put(tp_rank)
        while (question := questions.get()) is not None:
            version, path = question
            rank.wait(version=version, timeout=60)
            expected = expected_params(model_config, torch.load(path), tp_rank, tp_size, torch.bfloat16)
            differences = [
                f"{name}: {difference}"
                for name, tensor in expected.items()
                if (difference := first_difference(params[name], tensor))
            ]
            answers.put((tp_rank, len(params), differences))


class RankJudge:
    """Lets every engine rank compare its memory with the trainer's full tensors.

    Args:
        questions: one queue per engine rank.
        answers: the queue of their answers.
    """

    verdict = "every parameter of both engine ranks equals the trainer's bit for bit"

    def __init__(self, questions: Sequence[Any], answers: Any) -> None:
        self._questions = questions
        self._answers = answers

    def __call__(self, step: int, full: dict[str, torch.Tensor], logprobs: list[float]) -> None:
        """Raises SystemExit at the first difference."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "full.pt")
            torch.save(full, path)
            for question in self._questions:
                question.put((step, path))
            for _ in self._questions:
                tp_rank, params, differences = self._answers.get(timeout=120)
                if differences:
                    raise SystemExit(f"engine tp {tp_rank} differs: {differences}")
                print(f"  engine tp {tp_rank}: {params} parameters equal the trainer's, bit for bit", flush=True)
