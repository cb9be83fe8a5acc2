"""A whole sync through the real daemon, beside torch's own copy of the same bytes, in one run.

    WEIGHTD_BIN=... WEIGHTD_LIBRARY=... PYTHONPATH=client/python:. python -m tests.bench.sync_bench

Cases, each the median over rounds of rank 0's wall time in `Actor.sync` (admission to acknowledgement, verification
included), in seconds:
    host   1 GiB float32, equal rows on 4 trainer processes -> 0.5 GiB bfloat16 in a TP 2 engine of 2 processes.
           `ratio` = seconds / floor, floor = tests/bench/floor_host.py with two threads, measured in turns in this run.
    fixed  300 tensors of at most 512 elements, 1 trainer process -> 1 engine rank: what a sync costs beyond its bytes.
    daemon seconds from start to a listening socket with its worker attached; resident MB of daemon and worker when idle;
           CPU seconds that both use in 5 idle seconds.
Bytes are bytes landed in engine memory. Prints one JSON object.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from tests.bench.floor_host import llama_shapes, machine_facts, measure
from tests.support.cluster import Cluster
from tests.support.llama_engine import empty_params, source_shapes
from tests.support.trainer_ranks import row_shard
from weightd import Actor, EngineRank, new_group

TRAINERS = 4
TP = 2
ROUNDS = 9
CONFIG = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 17,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


def _engine(address: str, model: str, config: dict[str, Any], tp_rank: int, tp: int, dtype: torch.dtype, ready: Any, done: Any) -> None:  # fmt: skip
    params = empty_params(config, tp_rank, tp, dtype)
    with EngineRank(
        address, model=model, engine="bench", architecture="LlamaForCausalLM", config=config,
        params=params, tp_rank=tp_rank, tp_size=tp,
    ):  # fmt: skip
        ready.put(tp_rank)
        done.wait()


def _trainer(address: str, model: str, group: str, rank: int, world: int, shapes: Any, dtype: torch.dtype, rounds: int, barrier: Any, out: Any) -> None:  # fmt: skip
    torch.set_num_threads(1)
    full = ((name, torch.randn(shape).to(dtype)) for name, shape in shapes)
    tensors = [(name, t if world == 1 else row_shard(t, world, rank)) for name, t in full]
    seconds, phases = [], []
    with Actor(address, model=model, rank=rank, world_size=world, group=group) as actor:
        actor.register(tensors)
        for version in range(1, rounds + 3):
            barrier.wait()
            begin = time.perf_counter()
            ack = actor.sync(version, check_replicas=False)
            if version > 2:
                seconds.append(time.perf_counter() - begin)
                phases.append(ack.phases)
    if rank == 0:
        out.put((seconds, phases, ack.bytes))


def run_case(model: str, config: dict[str, Any], shapes: Any, world: int, tp: int, dtype: torch.dtype, rounds: int, source_dtype: torch.dtype = torch.float32) -> dict[str, Any]:  # fmt: skip
    """Runs one case on a fresh daemon and returns medians; ``dtype`` is the engine's, ``source_dtype`` the trainer's."""
    context, group = mp.get_context("spawn"), new_group()
    ready, out, done = context.Queue(), context.Queue(), context.Event()
    barrier = context.Barrier(world)
    with Cluster() as cluster:
        engines = [
            context.Process(target=_engine, args=(cluster.address, model, config, r, tp, dtype, ready, done))
            for r in range(tp)
        ]  # fmt: skip
        for process in engines:
            process.start()
        for _ in engines:
            ready.get(timeout=120)
        trainers = [
            context.Process(target=_trainer, args=(cluster.address, model, group, r, world, shapes, source_dtype, rounds, barrier, out))
            for r in range(world)
        ]  # fmt: skip
        for process in trainers:
            process.start()
        seconds, phases, landed = out.get(timeout=300)
        for process in trainers:
            process.join()
        done.set()
        for process in engines:
            process.join()
    return {
        "seconds": statistics.median(seconds),
        "best_seconds": min(seconds),
        "bytes_landed": landed,
        "phases": {name: statistics.median(p[name] for p in phases) for name in phases[0]},
        "rounds": seconds,
    }


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def daemon_case() -> dict[str, Any]:
    """Start-up time and idle cost of the daemon and its worker."""
    begin = time.perf_counter()
    with Cluster() as cluster:
        started = time.perf_counter() - begin
        time.sleep(1)
        children = subprocess.run(
            ["pgrep", "-P", str(cluster.daemon_pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        pids = [cluster.daemon_pid, *map(int, children)]
        before = sum(map(_cpu_seconds, pids))
        time.sleep(5)
        return {
            "ready_seconds": started,
            "resident_mb": [_resident_mb(pid) for pid in pids],
            "idle_cpu_seconds_in_5_s": sum(map(_cpu_seconds, pids)) - before,
        }


def main() -> None:
    """Runs all cases and prints JSON."""
    floor = measure(threads=2, rounds=7, warmup=2, shared=True)["seconds"]
    host = run_case("host", CONFIG, llama_shapes(), TRAINERS, TP, torch.bfloat16, ROUNDS)
    floor = min(floor, measure(threads=2, rounds=7, warmup=2, shared=True)["seconds"])
    host["floor_seconds"], host["ratio"] = floor, host["seconds"] / floor
    small = dict(CONFIG, hidden_size=8, intermediate_size=8, num_hidden_layers=33, head_dim=8,
                 num_attention_heads=1, num_key_value_heads=1, vocab_size=64)  # fmt: skip
    shapes = list(source_shapes(small).items())
    fixed = run_case("fixed", small, shapes, 1, 1, torch.float32, 101)
    fixed["tensors"] = len(shapes)
    print(json.dumps({"host": host, "fixed": fixed, "daemon": daemon_case(), "machine": machine_facts()}, indent=2))


if __name__ == "__main__":
    main()
