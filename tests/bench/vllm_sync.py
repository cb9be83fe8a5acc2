"""A whole sync of a 0.5B-shaped Llama into a real vLLM with two workers, beside vLLM's own reload, in one run.

    WEIGHTD_BIN=... WEIGHTD_LIBRARY=... PYTHONPATH=client/python:. python -m tests.bench.vllm_sync [float32] [bfloat16]

Four trainer processes hold equal rows of each tensor, of the dtypes that are named (default: both, one after the other);
rank 0 holds an in-process `vllm.LLM` (tensor-parallel 2, bfloat16) and drives it. Per trainer dtype, taken in turns, medians
over rounds, in seconds:
    sync     rank 0's wall time in `Actor.sync`: admission, pause, vLLM's calls, transfer, verification, commit, cache reset,
             resume. `calls` are vLLM's own, `pause` is from the call of pause to the return of resume, `phases` are the
             daemon's: prepare contains pause and start, since the daemon waits for the engine there; commit contains the
             conversions between rounds. `post_load` is the part of commit that vLLM's own step takes in the slower worker:
             what makes its kernel's form of a weight, as in a reload. `cpu` are CPU seconds per kind of process in the sync.
    reload   vLLM's own ``reload_weights`` on both workers from a safetensors checkpoint of the same shapes on local disk, read
             before (page cache); without pause, resume and the save. By dtype of the checkpoint: `reload.float32` is that of
             a float32 trainer's own tensors, which vLLM casts as it loads; `reload.bfloat16` is that of tensors that were
             cast before, in the save.
    save     writing that checkpoint on one process from full tensors in the checkpoint's dtype, which a trainer needs for a
             reload; a cast and the gathering of the tensors are not in it.
    ranks    the same sync with the same trainers into two `EngineRank` processes instead of vLLM: the host path alone
             (tests/bench/sync_bench.py).
Ratios:
    own_ratio                       (transfer + verify + commit with vLLM - `post_load`) / (the same phases of `ranks`)
    reload_of_same_tensors_to_sync  reload from the trainer's dtype / sync: above 1, the sync is faster
    reload_of_bfloat16_to_sync      reload from bfloat16 / sync
Bytes are bytes landed in engine memory. Prints one JSON object.
"""

from __future__ import annotations

import argparse
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

from tests.bench.cpu_times import cpu_seconds
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
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of trainers and of checkpoints


def _shard(rank: int, dtype: str) -> list[tuple[str, Any]]:
    torch.manual_seed(rank)
    return [
        (name, row_shard((torch.randn(shape) * 0.02).to(DTYPES[dtype]), TRAINERS, rank))
        for name, shape in source_shapes(CONFIG).items()
    ]


def _trainer(address: str, group: str, rank: int, dtype: str, first: int, barrier: Any) -> None:
    """A trainer rank other than 0."""
    torch.set_num_threads(1)
    with Actor(address, model=MODEL, rank=rank, world_size=TRAINERS, group=group) as actor:
        actor.register(_shard(rank, dtype))
        for version in range(first, first + WARM_UP + ROUNDS):
            barrier.wait()
            actor.sync(version, check_replicas=False)


def _save(folder: Path, dtype: str) -> float:
    """Writes config and weights as a checkpoint; returns the seconds of the weights."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    full = {n: (torch.randn(s) * 0.02).to(DTYPES[dtype]) for n, s in source_shapes(CONFIG).items()}
    begin = time.perf_counter()
    save_file(full, folder / "model.safetensors", metadata={"format": "pt"})
    return time.perf_counter() - begin


def _reload(llm: Any, path: Path) -> float:
    begin = time.perf_counter()
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
    return time.perf_counter() - begin


def _sync(actor: Actor, llm: Any, version: int, barrier: Any) -> dict[str, Any]:
    """One sync of all ranks; what was measured."""
    cpu = cpu_seconds()
    barrier.wait()
    begin = time.perf_counter()
    ack = actor.sync(version, check_replicas=False)
    seconds = time.perf_counter() - begin
    cpu = cpu_seconds() - cpu  # kinds that used none are not in it
    post_load = max(llm.collective_rpc("weightd_post_load_seconds"))
    return {"seconds": seconds, "ack": ack, "cpu": cpu, "post_load": post_load}


def _rounds(address: str, llm: Any, paths: dict[str, Path], dtype: str, first: int) -> dict[str, Any]:
    """Syncs and reloads in turns, versions from ``first`` on, reloads from the checkpoints at ``paths``."""
    context, group = mp.get_context("spawn"), new_group()
    barrier = context.Barrier(TRAINERS)
    others = [
        context.Process(target=_trainer, args=(address, group, rank, dtype, first, barrier))
        for rank in range(1, TRAINERS)
    ]
    for process in others:
        process.start()
    syncs: list[dict[str, Any]] = []
    reloads: dict[str, list[float]] = {name: [] for name in paths}
    options = {"rank": 0, "world_size": TRAINERS, "group": group, "engine_timeout": 60.0}
    with Actor(address, model=MODEL, engines=[llm], **options) as actor:
        actor.register(_shard(0, dtype))
        for version in range(first, first + WARM_UP + ROUNDS):
            syncs.append(_sync(actor, llm, version, barrier))
            for name, path in paths.items():
                reloads[name].append(_reload(llm, path))
    for process in others:
        process.join()
    timed = {name: seconds[WARM_UP:] for name, seconds in reloads.items()}
    return {
        "sync": _medians(syncs[WARM_UP:]),
        "reload": {name: {"seconds": statistics.median(s), "rounds": s} for name, s in timed.items()},
    }


def _medians(syncs: list[dict[str, Any]]) -> dict[str, Any]:
    median = statistics.median
    acks = [sync["ack"] for sync in syncs]
    drives = [ack.engines[0] for ack in acks]
    kinds = sorted({kind for sync in syncs for kind in sync["cpu"]})
    return {
        "seconds": median(sync["seconds"] for sync in syncs),
        "pause": median(drive.pause for drive in drives),
        "calls": {name: median(d.calls[name] for d in drives) for name in drives[0].calls},
        "phases": {name: median(a.phases[name] for a in acks) for name in acks[0].phases},
        "post_load": median(sync["post_load"] for sync in syncs),
        "cpu": {kind: median(sync["cpu"][kind] for sync in syncs) for kind in kinds},
        "bytes_landed": acks[0].bytes,
        "rounds": [sync["seconds"] for sync in syncs],
    }


def _add_ratios(case: dict[str, Any], dtype: str) -> None:
    """Adds the host path alone and the ratios of the head of this file."""
    shapes = list(source_shapes(CONFIG).items())
    ranks = run_case("ranks", CONFIG, shapes, TRAINERS, TP, torch.bfloat16, ROUNDS, DTYPES[dtype])
    sync = case["sync"]
    sync["own_seconds"] = sum(sync["phases"][name] for name in OWN) - sync["post_load"]
    ranks["own_seconds"] = sum(ranks["phases"][name] for name in OWN)
    case["ranks"] = ranks
    case["own_ratio"] = sync["own_seconds"] / ranks["own_seconds"]
    case["reload_of_same_tensors_to_sync"] = case["reload"][dtype]["seconds"] / sync["seconds"]
    case["reload_of_bfloat16_to_sync"] = case["reload"]["bfloat16"]["seconds"] / sync["seconds"]


def main() -> None:
    """Runs everything and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("dtypes", nargs="*", metavar="DTYPE", help="of the trainer: float32, bfloat16")
    dtypes = parser.parse_args().dtypes or list(DTYPES)
    if not set(dtypes) <= DTYPES.keys():
        parser.error(f"trainer dtypes are {', '.join(DTYPES)}, not {' '.join(dtypes)}")
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="weightd-bench-") as name:
        folder = Path(name)
        paths = {dtype: folder / dtype for dtype in DTYPES if dtype in {*dtypes, "bfloat16"}}
        saved = {dtype: _save(path, dtype) for dtype, path in paths.items()}
        os.environ.update(vllm_environment(plugin_folder(folder / "plugin"), TP))
        os.environ["PYTHONPATH"] = os.pathsep.join([os.environ["PYTHONPATH"], *source_paths()])
        sys.path.insert(0, str(folder / "plugin"))  # spawned processes take the path from here
        with Cluster() as cluster:
            from vllm import LLM

            llm = LLM(
                str(paths["bfloat16"]), tensor_parallel_size=TP, dtype="bfloat16", enforce_eager=True,
                skip_tokenizer_init=True, max_model_len=256, max_num_seqs=4,
                worker_extension_cls="tests.support.vllm_probe.Probe",
                weight_transfer_config={"backend": "weightd"},
                additional_config={"weightd": {"address": cluster.address, "model": MODEL}},
            )  # fmt: skip
            for index, dtype in enumerate(dtypes):
                chosen = {name: paths[name] for name in dict.fromkeys([dtype, "bfloat16"])}
                first = 1 + index * (WARM_UP + ROUNDS)
                result[dtype] = _rounds(cluster.address, llm, chosen, dtype, first)
            llm.llm_engine.engine_core.shutdown()
    for dtype in dtypes:
        _add_ratios(result[dtype], dtype)
    result["save"] = {dtype: {"seconds": seconds} for dtype, seconds in saved.items()}
    result["machine"] = machine_facts()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
