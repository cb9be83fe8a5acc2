"""What a driver needs of vLLM's workers beyond the calls that they have.

vLLM's ``collective_rpc`` raises at the first rank that fails and leaves the replies of the others
queued, one late for ever. A trainer that dies between start and finish leaves an update open, and
the next start would raise on every rank; so would a finish without a start. Workers with backend
``weightd`` take both.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

logger = logging.getLogger("vllm.weightd")


def install() -> None:
    """Adds to vLLM's workers what is missing. Does nothing the second time."""
    from vllm.v1.worker.gpu_worker import Worker

    if hasattr(Worker, "weightd_engine"):
        return
    Worker.weightd_engine = _weightd_engine
    Worker.weightd_version = _weightd_version
    Worker.start_weight_update = _start_anew(Worker.start_weight_update)
    Worker.finish_weight_update = _finish_if_open(Worker.finish_weight_update)


def _weightd_engine(worker: Any) -> str:
    """Instance name under which this engine is registered with the daemon."""
    from weightd.vllm.settings import settings_of

    return settings_of(worker.vllm_config).engine


def _weightd_version(worker: Any) -> int:
    """Version that this worker holds and may compute with; 0: none."""
    state = worker.weight_transfer_engine.rank.state
    return 0 if state["dirty"] else int(state["version"])


def _is_ours(worker: Any) -> bool:
    from weightd.vllm import is_chosen

    return is_chosen(worker.vllm_config)


def _start_anew(original: Any) -> Any:
    @functools.wraps(original)
    def start_weight_update(worker: Any) -> None:
        if _is_ours(worker) and worker._weight_update_active:
            logger.warning("weightd: an update was left open by a trainer that went away")
            worker._weight_update_active = False
        original(worker)

    return start_weight_update


def _finish_if_open(original: Any) -> Any:
    @functools.wraps(original)
    def finish_weight_update(worker: Any) -> None:
        if not _is_ours(worker) or worker._weight_update_active:
            original(worker)

    return finish_weight_update
