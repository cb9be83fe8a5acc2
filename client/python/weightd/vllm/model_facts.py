"""What weightd has to know of a vLLM engine: its parameters, its coordinates, what it cannot serve."""

from __future__ import annotations

from typing import Any

from weightd.errors import FAILED_PRECONDITION, EngineError
from weightd.vllm.convert import Parameters
from weightd.vllm.post_load import record_of


def _refusal(what: str, remedy: str) -> EngineError:
    return EngineError(
        f"weightd cannot update this vLLM engine: {what}",
        code=FAILED_PRECONDITION,
        reason="ENGINE_REFUSED",
        remedy=remedy,
    )


def check_supported(vllm_config: Any) -> None:
    """Refuses engines whose parameters are not where, or not what, a sync would write.

    Args:
        vllm_config: of vLLM.

    Raises:
        errors.EngineError: names the feature.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    refusals = (
        (parallel.enable_eplb, "EPLB moves its experts at run time", "set enable_eplb=False"),
        (
            parallel.enable_expert_parallel and parallel.expert_placement_strategy != "linear",
            f"its experts are placed {parallel.expert_placement_strategy}",
            'set expert_placement_strategy="linear"',
        ),
        (
            model.quantization is not None,
            f"it is quantised ({model.quantization})",
            "serve the model unquantised",
        ),
        (
            vllm_config.speculative_config is not None,
            "it has a draft model, which would keep its old weights",
            "leave speculative_config out",
        ),
        (
            model.enable_sleep_mode,
            "sleep mode takes its memory away",
            "set enable_sleep_mode=False",
        ),
        (
            vllm_config.lora_config is not None,
            "LoRA adapters wrap its layers",
            "set enable_lora=False; merge the adapters in the trainer",
        ),
        (
            max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1,
            "it is context parallel",
            "set the context-parallel sizes to 1",
        ),
    )
    for applies, what, remedy in refusals:
        if applies:
            raise _refusal(what, remedy)


def parameters_of(model: Any, stage_bytes: int) -> Parameters:
    """The parameters that this worker lends.

    Args:
        model: as vLLM has loaded it.
        stage_bytes: see `Parameters`.

    Raises:
        errors.EngineError: the model was loaded past the plug-in, or in another memory.
    """
    record = record_of(model)
    if record is None:
        raise _refusal(
            f"its post-load step was not seen: {type(model).__name__}",
            'use a load format that runs it, e.g. load_format="auto" or "dummy", and do not leave '
            "weightd out of VLLM_PLUGINS",
        )
    return Parameters(model, record, stage_bytes)


def profile() -> str:
    """The naming and merging convention of the installed vLLM, e.g. ``vllm-0.32``."""
    import vllm

    return "vllm-" + ".".join(vllm.__version__.split(".")[:2])


def coordinates(vllm_config: Any) -> dict[str, int]:
    """Where this worker stands in its engine, as arguments of `weightd.EngineRank`."""
    from vllm.distributed.parallel_state import get_ep_group, get_pp_group, get_tp_group

    parallel = vllm_config.parallel_config
    found = {
        "tp_rank": get_tp_group().rank_in_group,
        "tp_size": get_tp_group().world_size,
        "pp_rank": get_pp_group().rank_in_group,
        "pp_size": get_pp_group().world_size,
        "dp_rank": parallel.data_parallel_index,
    }
    if parallel.enable_expert_parallel:
        found |= {
            "ep_rank": get_ep_group().rank_in_group,
            "ep_size": get_ep_group().world_size,
        }
    return found
