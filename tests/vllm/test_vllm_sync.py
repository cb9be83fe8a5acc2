"""From real trainers into real vLLM engines: after every sync each worker holds what vLLM's own
loader makes of the same tensors, and the engine answers as one freshly started from them.

One engine at a time: TP 1 and 2, in bfloat16 (all raw on a CPU without bfloat16 instructions) and
float32 (linear layers are packed away after loading: derived). Norms are raw everywhere. Two of the
engines start as a user starts them; the others, and fresh ones, are forked, which takes seconds.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any, Union

import pytest
import torch

from tests.support.cluster import Cluster, EngineProcess
from tests.support.gloo import run_ranks
from tests.support.llama_trainer import MESHES, STEPS, make_model, train_and_sync
from tests.support.vllm_engine import missing_parts, start_vllm
from tests.support.vllm_fork import ForkedEngine

pytestmark = pytest.mark.skipif(bool(missing_parts()), reason=missing_parts() or "-")

MODEL = "policy"
PROMPTS = [[5, 6, 7, 8], [200, 3], [17, 250, 31, 99, 4, 60, 2]]
TOKENS = 12
DTYPES = (torch.bfloat16, torch.float32)
# TP size, dtype, eager, settings; one case with vLLM's default, torch.compile, one in which the daemon
# has no worker (a worker of vLLM starts it and the trainer uses it), one that converts a module at a
# time.
CASES: list[tuple[int, str, bool, dict[str, Any]]] = [
    (1, "bfloat16", True, {}),
    (1, "float32", False, {}),
    (2, "bfloat16", True, {"worker": "spawn"}),
    (2, "float32", True, {"stage_bytes": 1}),
]
IDS = [f"{tp_size}-{dtype}" for tp_size, dtype, *_ in CASES]


def _save(folder: Path, name: str, steps: int) -> str:
    """A checkpoint in float32 of the weights after some steps."""
    path = folder / name
    make_model(torch.float32, steps).save_pretrained(path)
    return str(path)


def _start(
    cluster: Cluster, name: str, tp_size: int, eager: bool, settings: dict[str, Any]
) -> Union[EngineProcess, ForkedEngine]:
    """A process for one engine; forked ones do not compile."""
    if eager and "worker" not in settings:
        return ForkedEngine(cluster, name, tp_size)
    return start_vllm(cluster, name, tp_size)


def _fresh_answers(
    cluster: Cluster, path: str, tp_size: int, eager: bool, **options: Any
) -> list[Any]:
    with closing(_start(cluster, "fresh", tp_size, eager, {})) as fresh:
        fresh.call("open", path=path, weightd=None, enforce_eager=eager, **options)
        return fresh.call("generate", prompts=PROMPTS, count=TOKENS)


def _bits(answers: list[Any]) -> list[Any]:
    return [(answer["tokens"], answer["logprobs"]) for answer in answers]


@pytest.mark.parametrize(("tp_size", "dtype", "eager", "settings"), CASES, ids=IDS)
def test_engine_equals_a_fresh_one(
    tp_size: int, dtype: str, eager: bool, settings: dict[str, Any], capsys: Any
) -> None:
    options = {"dtype": dtype, "tensor_parallel_size": tp_size}
    with Cluster("[worker]\ndevices = []\n" if "worker" in settings else "") as cluster:
        engine = _start(cluster, "engine", tp_size, eager, settings)
        try:
            start = engine.call(
                "open",
                path=_save(cluster.folder, "other", 0),
                weightd={"model": MODEL, **settings},
                enforce_eager=eager,
                **options,
            )
            workers = engine.call("call", method="weightd_state")
            counts = [worker["counts"] for worker in workers]
            stages = {worker["stages"] for worker in workers}
            with capsys.disabled():
                told = f"{start['seconds']} s, {counts[0]}, stages {stages}"
                print(f"\nvLLM tp={tp_size} {dtype}: {told}", flush=True)
            assert min(stages) > 1 if "stage_bytes" in settings else max(stages) <= 1
            assert all(count["raw"] > 0 for count in counts)
            assert dtype == "bfloat16" or all(count["derived"] > 0 for count in counts)
            before = engine.call("generate", prompts=PROMPTS, count=TOKENS)
            version = 1
            for trainer_dtype in DTYPES:  # float32 last: the checkpoint is in float32
                for mesh in MESHES:
                    arguments = (MODEL, mesh, trainer_dtype, version, engine.caller, cluster.folder)
                    problems = run_ranks(4, train_and_sync, cluster.address, *arguments)
                    assert [text for part in problems for text in part] == []
                    version += STEPS
            after = engine.call("generate", prompts=PROMPTS, count=TOKENS)
            assert {version for answer in after for version in answer["versions"]} == {
                str(version - 1)
            }
        except BaseException:
            print(cluster.logs())
            raise
        finally:
            engine.close()
        last = _save(cluster.folder, "last", STEPS)
        fresh = _fresh_answers(cluster, last, tp_size, eager, **options)
    assert _bits(before) != _bits(after)
    assert _bits(after) == _bits(fresh)
