"""Keeps vLLM from running a model whose parameters may be torn."""

from __future__ import annotations

import functools
from typing import Any, Protocol


class Checked(Protocol):
    """What the guard asks before every step."""

    def check(self) -> None:
        """Raises if the model must not run."""


def install() -> None:
    """Wraps the model step of vLLM's workers. Does nothing the second time.

    Only workers whose weight transfer engine has a `check` are concerned.
    """
    from vllm.v1.worker.gpu_worker import Worker

    original = Worker.execute_model
    if hasattr(original, "weightd_original"):
        return

    @functools.wraps(original)
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        check = getattr(self.weight_transfer_engine, "check", None)
        if check is not None:
            check()
        return original(self, *args, **kwargs)

    execute_model.weightd_original = original  # type: ignore[attr-defined]
    Worker.execute_model = execute_model


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
