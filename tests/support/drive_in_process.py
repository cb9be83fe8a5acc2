"""A trainer of one rank that holds vLLM in its own process and drives it; one scenario a run.

    python -m tests.support.drive_in_process llm|async ADDRESS FOLDER

Prints one JSON object as its last line.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from typing import Any

import torch

from deploy.quickstart.trainer import MODEL, config
from tests.support.live_llama import LiveLlama
from weightd import Actor, Error

PROMPT = list(range(40, 60))
MANY, FEW = 120, 8


def _options(folder: str, address: str) -> dict[str, Any]:
    config().save_pretrained(folder)
    return {
        "model": folder,
        "load_format": "dummy",
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 4,
        "additional_config": {"weightd": {"address": address, "model": MODEL, "engine": "mine"}},
    }


def _sampling(count: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=count, logprobs=0, ignore_eos=True, detokenize=False
    )


def _answer(llama: LiveLlama, output: Any) -> dict[str, Any]:
    """Spans of the versions, and how far each span is from what its weights alone say."""
    tokens = list(output.token_ids)
    found = [step[token].logprob for step, token in zip(output.logprobs, tokens)]
    spans, worst = [], []
    for span in output.weight_versions:
        expected = llama.logprobs(int(span.version), PROMPT + tokens)[len(PROMPT) - 1 :]
        pairs = list(zip(expected, found))[span.start : span.end]
        spans.append(span.version)
        worst.append(max(abs(a - b) for a, b in pairs))
    return {"versions": spans, "worst": worst, "tokens": len(tokens)}


def _drive(ack: Any) -> dict[str, Any]:
    (drive,) = ack.engines
    return {
        "engine": drive.engine,
        "resumed": drive.resumed,
        "pause": drive.pause,
        "caches": list(drive.caches_reset),
        "calls": list(drive.calls),
    }


def _kill_in_update(actor: Actor, core: int) -> dict[str, Any]:
    """Kills the engine core when the driver begins to call update_weights; the error it gives."""
    client = actor._engines[0].client
    update = client.update_weights
    times = []

    def killing(info: dict[str, Any]) -> None:
        times.append(time.monotonic())
        os.kill(core, signal.SIGKILL)
        update(info)

    client.update_weights = killing  # type: ignore[method-assign]
    try:
        actor.sync()
    except Error as error:
        causes = [str(error)] + ([str(error.__cause__)] if error.__cause__ else [])
        return {
            "seconds": time.monotonic() - times[0],
            "reason": error.reason,
            "texts": causes,
            "resumed": bool(error.result and error.result.engines[0].resumed),
        }
    return {"reason": ""}


def run_llm(address: str, folder: str) -> dict[str, Any]:
    """`vllm.LLM`: two syncs, then its core is killed in the third."""
    from vllm import LLM

    options = _options(folder, address)
    llm = LLM(weight_transfer_config={"backend": "weightd"}, **options)
    llama = LiveLlama()
    result: dict[str, Any] = {"syncs": []}
    with Actor(
        address, model=MODEL, rank=0, world_size=1, engines=[llm], engine_timeout=30.0
    ) as actor:
        actor.register(llama.model)
        for version in (1, 2):
            llama.train(version)
            drive = _drive(actor.sync(version))
            (request,) = llm.generate({"prompt_token_ids": PROMPT}, _sampling(FEW), use_tqdm=False)
            answer = _answer(llama, request.outputs[0])
            result["syncs"].append({**drive, **answer, "version": llm.get_weight_version()})
        core = llm.llm_engine.engine_core.resources.engine_manager.processes[0].pid
        result["killed"] = _kill_in_update(actor, core)
    return result


async def run_async(address: str, folder: str) -> dict[str, Any]:
    """``AsyncLLM``: a request is in flight and kept while new weights arrive."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    options = _options(folder, address)
    arguments = AsyncEngineArgs(weight_transfer_config={"backend": "weightd"}, **options)
    llm = AsyncLLM.from_engine_args(arguments)
    llama = LiveLlama()
    begun = asyncio.Event()

    async def generate() -> Any:
        prompt = {"prompt_token_ids": PROMPT}
        async for output in llm.generate(prompt, _sampling(MANY), "request"):
            begun.set()
        return output.outputs[0]

    actor = Actor(
        address, model=MODEL, rank=0, world_size=1, engines=[llm], pause_mode="keep",
        engine_timeout=30.0,
    )  # fmt: skip
    actor.register(llama.model)
    llama.train(1)
    await asyncio.to_thread(actor.sync, 1)
    task = asyncio.create_task(generate())
    await begun.wait()
    llama.train(2)
    drive = _drive(await asyncio.to_thread(actor.sync, 2))
    answer = _answer(llama, await task)
    version = await llm.get_weight_version()
    actor.close()
    llm.shutdown()
    return {**drive, **answer, "version": version}


def main() -> None:
    """Runs one scenario."""
    kind, address, folder = sys.argv[1:]
    torch.set_num_threads(1)
    result = run_llm(address, folder) if kind == "llm" else asyncio.run(run_async(address, folder))
    print("\n" + json.dumps(result), flush=True)
    os._exit(0)  # an engine whose core was killed must not hold the process up


if __name__ == "__main__":
    main()
