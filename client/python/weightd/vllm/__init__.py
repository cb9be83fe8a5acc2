"""weightd for vLLM: one flag, ``--weight-transfer-config '{"backend": "weightd"}'``.

vLLM finds `register` through the entry point ``vllm.general_plugins`` and calls it in each of its
processes. Nothing here loads native code, starts a thread or touches a device before a worker with
that backend has loaded its model.
"""

from __future__ import annotations

BACKEND = "weightd"


def register() -> None:
    """Registers backend ``weightd`` with vLLM. May be called again."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from weightd.vllm import guard, post_load

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "weightd.vllm.engine", "WeightdTransferEngine"
        )
    post_load.install()
    guard.install_in_core(BACKEND)
