"""Keeps vLLM from running a model whose parameters may be torn, and from misnaming what it runs."""

from __future__ import annotations

import functools
from typing import Any

from weightd.errors import FAILED_PRECONDITION, PoisonedError


def poisoned(reason: str) -> PoisonedError:
    """The error of a worker whose memory may be torn."""
    return PoisonedError(
        f"a failed sync may have torn the parameters: {reason}",
        code=FAILED_PRECONDITION,
        reason="POISONED",
        remedy="sync a newer version, or the same one again, before this engine serves",
    )


def install_in_worker() -> None:
    """Wraps the model step of vLLM's workers. Does nothing the second time.

    Concerns workers only whose weight transfer engine has a `refusal`: "" or why not to run.
    """
    from vllm.v1.worker.gpu_worker import Worker

    original = Worker.execute_model
    if hasattr(original, "weightd_original"):
        return

    def weightd_refusal(self: Any) -> str:
        refusal = getattr(self.weight_transfer_engine, "refusal", None)
        return "" if refusal is None else refusal()

    @functools.wraps(original)
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        reason = weightd_refusal(self)
        if reason:
            raise poisoned(reason)
        return original(self, *args, **kwargs)

    execute_model.weightd_original = original  # type: ignore[attr-defined]
    Worker.execute_model = execute_model
    Worker.weightd_refusal = weightd_refusal


def install_in_core() -> None:
    """Lets vLLM's engine core refuse to resume workers that would refuse to run.

    A step that raises ends the engine; a refused resume leaves it paused, to be healed by a sync.
    Concerns engines with our backend. Does nothing the second time.
    """
    from vllm.v1.engine.core import EngineCore

    from weightd.vllm import is_chosen

    original = EngineCore.resume_scheduler
    if hasattr(original, "weightd_original"):
        return

    @functools.wraps(original)
    def resume_scheduler(self: Any) -> Any:
        if is_chosen(self.vllm_config):
            for reason in self.model_executor.collective_rpc("weightd_refusal"):
                if reason:
                    raise poisoned(reason)
        return original(self)

    resume_scheduler.weightd_original = original  # type: ignore[attr-defined]
    EngineCore.resume_scheduler = resume_scheduler


def install_version_in_core() -> None:
    """Lets vLLM's outputs name the version that its workers caught up with while it started.

    vLLM learns a version from ``finish_weight_update`` only. Concerns engines with our backend. Does
    nothing the second time.
    """
    from vllm.v1.engine.core import EngineCore

    from weightd.vllm import is_chosen

    original = EngineCore._initialize_kv_caches  # runs once the workers have their weights
    if hasattr(original, "weightd_original"):
        return

    @functools.wraps(original)
    def _initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
        if is_chosen(vllm_config):
            versions = set(self.model_executor.collective_rpc("weightd_version"))
            if len(versions) == 1 and versions != {0}:
                self._weight_version = str(versions.pop())
        return original(self, vllm_config)

    _initialize_kv_caches.weightd_original = original  # type: ignore[attr-defined]
    EngineCore._initialize_kv_caches = _initialize_kv_caches


def agree(flag: bool) -> bool:
    """True on every rank of the replica if the flag is set on one of them. Collective.

    A step that only one rank refuses would leave the others waiting for it.
    """
    import torch
    import torch.distributed as dist
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    for group in (get_tp_group(), get_pp_group()):
        if group.world_size == 1:
            continue
        value = torch.tensor([int(flag)], dtype=torch.int32)
        try:
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=group.cpu_group)
        except RuntimeError:  # a rank is gone
            return True
        flag = bool(value.item())
    return flag
