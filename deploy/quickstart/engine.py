"""An inference rank without vLLM: it holds parameters in vLLM's layout and lends them to weightd."""

from __future__ import annotations

from typing import Any

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
