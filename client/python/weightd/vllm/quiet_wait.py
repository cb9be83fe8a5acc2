"""Lets vLLM's engine core sleep while its workers receive weights.

An engine core polls for the answer of a call for a second before it sleeps, which suits a model
step. In a sync it would hold for as long a core that weightd's worker copies with.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Iterator

_CALL = "update_weights"


def install() -> None:
    """Wraps the calls of vLLM's executor of several workers. Does nothing the second time.

    Concerns the call ``update_weights`` of engines with our backend.
    """
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    from weightd.vllm import is_chosen

    original = MultiprocExecutor.collective_rpc
    if hasattr(original, "weightd_original"):
        return

    @functools.wraps(original)
    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        if method != _CALL or not is_chosen(self.vllm_config):
            return original(self, method, *args, **kwargs)
        with asleep(self.response_mqs):
            return original(self, method, *args, **kwargs)

    collective_rpc.weightd_original = original  # type: ignore[attr-defined]
    MultiprocExecutor.collective_rpc = collective_rpc


@contextlib.contextmanager
def asleep(queues: Any) -> Iterator[None]:
    """Who reads from vLLM's message queues sleeps at once until something is written.

    Does nothing with a vLLM whose queues are made otherwise.

    Args:
        queues: `vllm.distributed.device_communicators.shm_broadcast.MessageQueue`; the caller reads.
    """
    conditions = [getattr(queue, "_spin_condition", None) for queue in queues]
    conditions = [condition for condition in conditions if hasattr(condition, "busy_loop_s")]
    before = [condition.busy_loop_s for condition in conditions]
    for condition in conditions:
        condition.busy_loop_s = 0
    try:
        yield
    finally:
        for condition, seconds in zip(conditions, before):
            condition.busy_loop_s = seconds
