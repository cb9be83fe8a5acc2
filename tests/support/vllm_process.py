"""A process that runs a real vLLM: reads requests, one JSON object a line, and answers alike.

    python -m tests.support.vllm_process ADDRESS

Operations: open, generate, update, resume, call, close; see the functions of the same names. Ends with its
input. vLLM writes to standard output, too: answers go to a copy of it, everything else to the log.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import IO, Any, Callable, Optional


class Engine:
    """One in-process `vllm.LLM`."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._llm: Any = None
        self._shared: set[str] = set()  # files of its ranks, which vLLM leaves behind

    def open(self, path: str, weightd: Optional[dict[str, Any]], **options: Any) -> dict[str, Any]:
        """Starts vLLM.

        Args:
            path: of the checkpoint.
            weightd: keys of ``additional_config["weightd"]``; None starts it without weightd.
            options: of `vllm.LLM`.

        Returns:
            Seconds that the start took.
        """
        from vllm import LLM

        more: dict[str, Any] = {}
        if weightd is not None:
            more["weight_transfer_config"] = {"backend": "weightd"}
            more["additional_config"] = {"weightd": {"address": self._address, **weightd}}
        begin = time.monotonic()
        self._llm = LLM(
            path,
            worker_extension_cls="tests.support.vllm_probe.Probe",
            skip_tokenizer_init=True,
            max_model_len=64,
            max_num_seqs=4,
            **{"enforce_eager": True, **options, **more},
        )
        seconds = round(time.monotonic() - begin, 1)
        self._shared = {path for part in self.call("weightd_shared_files") for path in part}
        return {"seconds": seconds}

    def generate(self, prompts: list[list[int]], count: int) -> list[dict[str, Any]]:
        """Greedy tokens of each prompt, one prompt at a time, with the bits of their
        log-probabilities, and the versions of the weights that made them."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=count, logprobs=1, detokenize=False, ignore_eos=True
        )
        answers = []
        for prompt in prompts:
            (request,) = self._llm.generate(
                [{"prompt_token_ids": prompt}], sampling, use_tqdm=False
            )
            (output,) = request.outputs
            logprobs = [step[token] for step, token in zip(output.logprobs, output.token_ids)]
            answers.append(
                {
                    "tokens": list(output.token_ids),
                    "logprobs": [float(value.logprob).hex() for value in logprobs],
                    "versions": [span.version for span in output.weight_versions or ()]
                    if hasattr(output, "weight_versions")
                    else [],
                }
            )
        return answers

    def update(self, model: str, version: int) -> dict[str, Any]:
        """vLLM's calls of one update, as a driver makes them; returns seconds and the version."""
        begin = time.monotonic()
        self._llm.start_weight_update()
        self._llm.update_weights({"update_info": {"model": model, "version": version}})
        self._llm.finish_weight_update(str(version))
        seconds = time.monotonic() - begin
        self._llm.reset_prefix_cache()
        return {"seconds": seconds, "weight_version": self._llm.get_weight_version()}

    def resume(self) -> None:
        """Resumes the scheduler, as a user may."""
        self._llm.llm_engine.engine_core.call_utility("resume_scheduler")

    def call(self, method: str, **arguments: Any) -> list[Any]:
        """Calls a method of the probe on every worker."""
        return self._llm.collective_rpc(method, kwargs=arguments)

    def close(self) -> None:
        """Stops vLLM."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
        for path in self._shared:
            Path(path).unlink(missing_ok=True)


def serve(address: str, requests: IO[str], answers: IO[str]) -> None:
    """Serves requests until the input ends."""
    engine = Engine(address)
    for line in requests:
        request = json.loads(line)
        name = request.pop("operation")
        operation: Callable[..., Any] = getattr(engine, name)
        begin = time.monotonic()
        try:
            answer = {"value": operation(**request)}
        except Exception:  # the caller shows it
            answer = {"error": traceback.format_exc()}
        seconds = time.monotonic() - begin
        print(f"{name} {request.get('method', '')}: {seconds:.1f} s", file=sys.stderr, flush=True)
        print(json.dumps(answer), file=answers, flush=True)
    engine.close()


def main() -> None:
    """Serves standard input."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        serve(sys.argv[1], sys.stdin, answers)


if __name__ == "__main__":
    main()
