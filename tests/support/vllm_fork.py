"""Real vLLM engines as children of a server that has imported vLLM once: a start takes seconds.

The engine core runs in the child itself, workers of more than one rank are forked from it. The server
is multiprocessing's, the same that `tests.support.gloo` forks trainer ranks from; it computes
nothing and uses no weightd, so its children may do both.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Mapping

from tests.support import gloo
from tests.support.cluster import Cluster, EngineCaller
from tests.support.vllm_engine import plugin_folder, vllm_environment

# What an engine imports at its start.
PRELOAD = [
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "tests.support.vllm_process",
]
_STOP_SECONDS = 30.0


class ForkedEngine:
    """One process that can run one vLLM; serves the operations of tests/support/vllm_process.py.

    Attributes:
        caller: makes the calls; may be handed to another process.
    """

    def __init__(self, cluster: Cluster, name: str, tp_size: int) -> None:
        """Forks it; it opens the engine on request.

        Args:
            cluster: whose daemon it uses and in whose folder it logs.
            name: for logs.
            tp_size: of the engine.
        """
        folder = plugin_folder(cluster.folder / "plugin")
        environment = vllm_environment(folder, tp_size) | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_WORKER_MULTIPROC_METHOD": "fork",
        }
        log = cluster.folder / f"{name}.log"
        context = get_context("forkserver")
        context.set_forkserver_preload([*gloo.PRELOAD, *PRELOAD])
        requests_in, requests = context.Pipe(duplex=False)
        answers, answers_out = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_child,
            args=(cluster.address, str(log), environment, requests_in, answers_out),
            name=name,
        )
        self._process.start()
        requests_in.close()
        answers_out.close()
        self._requests = os.fdopen(os.dup(requests.fileno()), "wb")
        self._answers = os.fdopen(os.dup(answers.fileno()), "rb")
        requests.close()
        answers.close()
        self.caller = EngineCaller(name, log, self._requests, self._answers)

    def call(self, operation: str, **arguments: Any) -> Any:
        """As `EngineCaller.call`."""
        return self.caller.call(operation, **arguments)

    def close(self) -> None:
        """Lets the process stop its engine and end; kills it and its workers if it does not."""
        self._requests.close()
        self._process.join(_STOP_SECONDS)
        if self._process.is_alive() and self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.join()
        self._answers.close()


def _child(
    address: str,
    log: str,
    environment: Mapping[str, str],
    requests: Connection,
    answers: Connection,
) -> None:
    os.setpgid(0, 0)  # so that `close` finds its workers
    os.environ.update(environment)
    sys.path.insert(0, environment["PYTHONPATH"])
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(written, 1)
    os.dup2(written, 2)
    import torch._dynamo
    from vllm.v1.executor import multiproc_executor

    from tests.support.vllm_process import serve

    # vLLM spawns workers on CPUs for the sake of libraries that it preloads there.
    multiproc_executor.get_mp_context = lambda: get_context("fork")
    torch._dynamo.config.disable = True  # it compiles how log-probabilities are ranked, in seconds
    with open(requests.fileno(), "r", closefd=False) as source:
        with open(answers.fileno(), "w", closefd=False) as target:
            serve(address, source, target)
