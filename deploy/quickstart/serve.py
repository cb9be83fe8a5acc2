"""A `vllm serve` on CPUs as a user starts it, and what the quickstart asks of it over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Mapping, Optional, Sequence

from deploy.quickstart.trainer import MODEL, config

_START_SECONDS = 400.0
_STOP_SECONDS = 10.0
_CALL_SECONDS = 120.0
_LOG_TAIL_BYTES = 6000


class VllmClient:
    """What the quickstart asks of a server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def logprobs(self, tokens: list[int]) -> list[float]:
        """Log-probability of each token but the first, given those before it."""
        sampling = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0, "detokenize": False}
        answer = self.post(
            "inference/v1/generate", {"token_ids": tokens, "sampling_params": sampling}
        )
        found = answer["prompt_logprobs"][1:]
        return [step[str(token)]["logprob"] for token, step in zip(tokens[1:], found)]

    def weight_version(self) -> str:
        """What vLLM says about the weights that it serves."""
        return self._call("weight_info")["weight_version"]

    def ask_workers(self, method: str, *arguments: str) -> list[Any]:
        """Calls a method of `Probe` on every worker."""
        return self.post("collective_rpc", {"method": method, "args": arguments})["results"]

    def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """Posts JSON and returns the answer."""
        return self._call(route, json.dumps(body).encode())

    def _call(self, route: str, content: Optional[bytes] = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{route}", content, headers)
        try:
            with urllib.request.urlopen(request, timeout=_CALL_SECONDS) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            raise RuntimeError(f"{route}: {error.code} {text[:500]}") from error


class VllmServer:
    """One server with dummy weights: what it serves comes from the trainer.

    Attributes:
        url: of the server.
        log: what it and its workers print.
    """

    def __init__(
        self,
        folder: Path,
        tp_size: int,
        more: Sequence[str] = (),
        environment: Optional[Mapping[str, str]] = None,
    ) -> None:
        """Starts the server and waits until it answers.

        Args:
            folder: for the model's configuration and the server's log.
            tp_size: tensor-parallel workers, each bound to a core of its own.
            more: options of `vllm serve`.
            environment: more of it.

        Raises:
            RuntimeError: it ended or did not answer in time; the end of its log was printed.
        """
        model = folder / "model"
        config().save_pretrained(model)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        cores = sorted(os.sched_getaffinity(0))
        variables = {
            **os.environ,
            "VLLM_SERVER_DEV_MODE": "1",
            "WEIGHTD_MODEL": MODEL,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(
                str(cores[rank % len(cores)]) for rank in range(tp_size)
            ),
            **(environment or {}),
        }
        command = [
            # What `vllm serve` runs; the command itself does not start from the CPU build's wheel, whose
            # metadata have another name.
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
            "--weight-transfer-config", '{"backend": "weightd"}',
            "--host", "127.0.0.1", "--port", str(port),
            "--load-format", "dummy", "--dtype", "bfloat16", "--tokens-only",
            "--tensor-parallel-size", str(tp_size), "--max-model-len", "128",
            "--max-num-seqs", "4", "--enforce-eager",
            "--worker-extension-cls", "deploy.quickstart.probe.Probe", *more,
        ]  # fmt: skip
        self.log = folder / "vllm.log"
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=variables, start_new_session=True
            )
        try:
            self._await_answer()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the process that answers; its workers are below it."""
        return self._process.pid

    def close(self) -> None:
        """Stops the server and its workers."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(ProcessLookupError):  # workers that outlived it
            os.killpg(self._process.pid, signal.SIGKILL)

    def __enter__(self) -> VllmServer:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        if error is not None:
            self._print_log()
        self.close()

    def _await_answer(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError as error:
                ended = self._process.poll()
                if ended is None and time.monotonic() < deadline:
                    time.sleep(0.5)
                    continue
                self._print_log()
                why = "did not answer in time" if ended is None else f"ended with {ended}"
                raise RuntimeError(f"vllm serve {why}") from error

    def _print_log(self) -> None:
        tail = self.log.read_bytes()[-_LOG_TAIL_BYTES:].decode("utf-8", "replace")
        print(f"---- the end of vLLM's log\n{tail}", file=sys.stderr, flush=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
