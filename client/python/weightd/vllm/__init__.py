"""weightd for vLLM: one flag, ``--weight-transfer-config '{"backend": "weightd"}'``.

vLLM finds `register` through the entry point ``vllm.general_plugins`` and calls it in each of its
processes. Nothing here loads native code, starts a thread or touches a device before a worker with
that backend has loaded its model.
"""

from __future__ import annotations

import os
import sys
from typing import Any

BACKEND = "weightd"


def is_chosen(vllm_config: Any) -> bool:
    """True if a vLLM's configuration names this backend; takes None for no configuration."""
    transfer = None if vllm_config is None else vllm_config.weight_transfer_config
    return transfer is not None and transfer.backend == BACKEND


def register() -> None:
    """Registers backend ``weightd`` with vLLM. May be called again."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from weightd.vllm import guard, post_load, quiet_wait, worker_calls

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "weightd.vllm.engine", "WeightdTransferEngine"
        )
    post_load.install()
    guard.install_in_core()
    guard.install_version_in_core()
    quiet_wait.install()
    worker_calls.install()
    register_trainer()
    _spawn_workers()


def register_trainer() -> None:
    """Registers backend ``weightd`` for trainers on vLLM's interface. May be called again."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    if BACKEND not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine(
            BACKEND, "weightd.vllm.trainer", "WeightdTrainerEngine"
        )


def _spawn_workers() -> None:
    """Lets vLLM spawn its workers where forked ones could not connect.

    That is in a process that uses weightd already, say the trainer that starts its own engine. A
    user's choice wins.
    """
    native = sys.modules.get("weightd._native")
    if native is not None and native.library.cache_info().currsize:
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
