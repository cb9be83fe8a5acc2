"""vLLM engines that weightd cannot serve are refused by name, before anything is registered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from weightd import errors
from weightd.vllm.model_facts import check_supported, parameters_of


def _config(**changes: Any) -> SimpleNamespace:
    parallel = {
        "enable_eplb": False,
        "enable_expert_parallel": False,
        "expert_placement_strategy": "linear",
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
    }
    model = {"quantization": None, "enable_sleep_mode": False}
    config = {"speculative_config": None, "lora_config": None}
    for group in (parallel, model, config):
        group |= {key: value for key, value in changes.items() if key in group}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel), model_config=SimpleNamespace(**model), **config
    )


def test_plain_engine_is_taken() -> None:
    check_supported(_config())
    check_supported(_config(enable_expert_parallel=True))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"enable_eplb": True}, "EPLB"),
        (
            {"enable_expert_parallel": True, "expert_placement_strategy": "round_robin"},
            "round_robin",
        ),
        ({"quantization": "fp8"}, "quantised (fp8)"),
        ({"speculative_config": object()}, "draft model"),
        ({"enable_sleep_mode": True}, "sleep mode"),
        ({"lora_config": object()}, "LoRA"),
        ({"decode_context_parallel_size": 2}, "context parallel"),
        ({"prefill_context_parallel_size": 2}, "context parallel"),
    ],
)
def test_what_cannot_be_served_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(errors.EngineError) as caught:
        check_supported(_config(**changes))
    assert named in caught.value.message
    assert caught.value.remedy


def test_model_that_was_loaded_past_the_plug_in_is_refused() -> None:
    class Model:
        """No record of its post-load step exists."""

    with pytest.raises(errors.EngineError, match="post-load step was not seen: Model"):
        parameters_of(Model(), 0)
