"""A whole sync of a 0.5B-shaped Llama into a real vLLM with two workers, beside vLLM's own reload, in one run.

    WEIGHTD_BIN=... WEIGHTD_LIBRARY=... PYTHONPATH=client/python:. python -m tests.bench.vllm_sync

Four trainer processes hold equal rows of each float32 tensor; rank 0 holds an in-process `vllm.LLM` (tensor-parallel 2,
bfloat16) and drives it. Taken in turns, medians over rounds, in seconds:
    sync     rank 0's wall time in `Actor.sync`: admission, pause, vLLM's calls, transfer, verification, commit, cache reset,
             resume. `calls` are vLLM's own, `pause` is from the call of pause to the return of resume, `phases` are the
             daemon's: prepare contains pause and start, since the daemon waits for the engine there.
    reload   vLLM's own ``reload_weights`` on both workers from a bfloat16 safetensors checkpoint of the same tensors on
             local disk, read before (page cache); without pause, resume and the save of the checkpoint.
    save     writing that checkpoint on one process from full tensors, which a trainer needs for a reload.
    ranks    the same sync with the same trainers into two `EngineRank` processes instead of vLLM: the host path alone
             (tests/bench/sync_bench.py); `own_ratio` = (transfer + verify + commit with vLLM - its own post-load step) /
             (the same phases there). `post_load` is that step of the slower worker: what vLLM does to make its kernel's form of
             a weight, as it does in a reload.
Bytes are bytes landed in engine memory. Prints one JSON object.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.bench.floor_host import machine_facts
from tests.bench.sync_bench import run_case
from tests.support.cluster import Cluster
from tests.support.live_llama import source_paths
from tests.support.llama_engine import source_shapes
from tests.support.trainer_ranks import row_shard
from tests.support.vllm_engine import plugin_folder, vllm_environment
from weightd import Actor, new_group

TRAINERS = 4
TP = 2
ROUNDS = 5
WARM_UP = 2
MODEL = "bench"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 64000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
OWN = ("transfer", "verify", "commit")


def _shard(rank: int) -> list[tuple[str, Any]]:
    torch.manual_seed(rank)
    return [
        (name, row_shard(torch.randn(shape) * 0.02, TRAINERS, rank))
        for name, shape in source_shapes(CONFIG).items()
    ]


def _trainer(address: str, group: str, rank: int, barrier: Any) -> None:
    """A trainer rank other than 0."""
    torch.set_num_threads(1)
    with Actor(address, model=MODEL, rank=rank, world_size=TRAINERS, group=group) as actor:
        actor.register(_shard(rank))
        for version in range(1, WARM_UP + ROUNDS + 1):
            barrier.wait()
            actor.sync(version, check_replicas=False)


def _save(folder: Path) -> float:
    """Writes config and weights as a checkpoint; returns the seconds of the weights."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    full = {n: (torch.randn(s) * 0.02).bfloat16() for n, s in source_shapes(CONFIG).items()}
    begin = time.perf_counter()
    save_file(full, folder / "model.safetensors", metadata={"format": "pt"})
    return time.perf_counter() - begin


def _reload(llm: Any, path: Path) -> float:
    begin = time.perf_counter()
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
    return time.perf_counter() - begin


def _rounds(address: str, llm: Any, path: Path) -> dict[str, Any]:
    """Syncs and reloads in turns."""
    context, group = mp.get_context("spawn"), new_group()
    barrier = context.Barrier(TRAINERS)
    others = [
        context.Process(target=_trainer, args=(address, group, rank, barrier))
        for rank in range(1, TRAINERS)
    ]
    for process in others:
        process.start()
    syncs, acks, reloads, steps = [], [], [], []
    options = {"rank": 0, "world_size": TRAINERS, "group": group, "engine_timeout": 60.0}
    with Actor(address, model=MODEL, engines=[llm], **options) as actor:
        actor.register(_shard(0))
        for version in range(1, WARM_UP + ROUNDS + 1):
            barrier.wait()
            begin = time.perf_counter()
            ack = actor.sync(version, check_replicas=False)
            seconds = time.perf_counter() - begin
            step = max(llm.collective_rpc("weightd_post_load_seconds"))
            reload = _reload(llm, path)
            if version > WARM_UP:
                syncs.append(seconds)
                acks.append(ack)
                reloads.append(reload)
                steps.append(step)
    for process in others:
        process.join()
    drives = [ack.engines[0] for ack in acks]
    median = statistics.median
    return {
        "sync": {
            "seconds": median(syncs),
            "pause": median(drive.pause for drive in drives),
            "calls": {name: median(d.calls[name] for d in drives) for name in drives[0].calls},
            "phases": {name: median(a.phases[name] for a in acks) for name in acks[0].phases},
            "post_load": median(steps),
            "bytes_landed": acks[0].bytes,
            "rounds": syncs,
        },
        "reload": {"seconds": median(reloads), "rounds": reloads},
    }


def main() -> None:
    """Runs everything and prints JSON."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="weightd-bench-") as name:
        folder = Path(name)
        saved = _save(folder / "model")
        os.environ.update(vllm_environment(plugin_folder(folder / "plugin"), TP))
        os.environ["PYTHONPATH"] = os.pathsep.join([os.environ["PYTHONPATH"], *source_paths()])
        sys.path.insert(0, str(folder / "plugin"))  # spawned processes take the path from here
        with Cluster() as cluster:
            from vllm import LLM

            llm = LLM(
                str(folder / "model"), tensor_parallel_size=TP, dtype="bfloat16", enforce_eager=True,
                skip_tokenizer_init=True, max_model_len=256, max_num_seqs=4,
                worker_extension_cls="tests.support.vllm_probe.Probe",
                weight_transfer_config={"backend": "weightd"},
                additional_config={"weightd": {"address": cluster.address, "model": MODEL}},
            )  # fmt: skip
            result = _rounds(cluster.address, llm, folder / "model")
            llm.llm_engine.engine_core.shutdown()
        result["save"] = {"seconds": saved}
    shapes = list(source_shapes(CONFIG).items())
    ranks = run_case("ranks", CONFIG, shapes, TRAINERS, TP, torch.bfloat16, ROUNDS)
    own = {key: sum(case["phases"][name] for name in OWN) for key, case in (("vllm", result["sync"]), ("ranks", ranks))}
    own["vllm"] -= result["sync"]["post_load"]
    result["ranks"] = {**ranks, "own_seconds": own["ranks"]}
    result["sync"]["own_seconds"] = own["vllm"]
    result["own_ratio"] = own["vllm"] / own["ranks"]
    result["faster_than_reload"] = result["reload"]["seconds"] / result["sync"]["seconds"]
    result["machine"] = machine_facts()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
