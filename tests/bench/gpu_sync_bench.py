"""Whole syncs through the real daemon on GPUs, beside a plain cast or copy kernel in the same run.

    WEIGHTD_BIN=... WEIGHTD_LIBRARY=... PYTHONPATH=client/python:. python -m tests.bench.gpu_sync_bench [CASE ...]

Cases; those that need more GPUs than there are print why they were not run:
    fixed      Qwen2.5-0.5B shapes (290 tensors), 1 trainer rank, float32 -> TP 1 bfloat16 engine, same GPU (P7, P5)
    same       Llama-3.1-8B shapes, 1 trainer rank -> TP 1 engine on the same GPU, float32 and bfloat16 sources
    same_tp2   the same with two trainer ranks and a TP 2 engine, all on one GPU
    pull       8B, float32 -> TP 1 on the same GPU, every engine parameter in memory of a sleep-mode allocator, in stages of
               256 MiB and of 1 GiB; `stage_mib` is what the engine's registration takes on the GPU for them
    moe        Qwen3-30B-A3B shapes with 8 of 48 layers, 1 trainer rank, bfloat16 -> TP 1 engine, same GPU
    peer       8B, trainer rank on GPU 0 -> TP 1 engine on GPU 1 (P2)
    peer_nccl  the same by pack, NCCL and scatter (worker.path = "wire"); its floor is raw NCCL, tests/bench/floor_nccl.py (P1)
    colocated  8B, trainer ranks on GPUs 0 and 1 -> TP 2 engine on the same two (P3), sharded by rows as FSDP2 does by default:
               only what TP cuts by columns crosses the link, 15 % of the bytes
    crossed    the same, every tensor sharded along the dimension that TP does not cut: half of all bytes cross, each way
    moe_peer, moe_peer_nccl   all 48 layers of Qwen3-30B-A3B, bfloat16, trainer rank on GPU 0 -> TP 1 engine on GPU 1
`seconds` is rank 0's wall time in Actor.sync, admission to acknowledgement with verification, median of ROUNDS after one
warm-up. `floor` is the time of torch's own kernel (dst.copy_(src), one contiguous buffer, same dtypes, on or between the
same GPUs) for the bytes that land on the busiest GPU, measured by CUDA events in rank 0's process in this run; where trainer
and engine share two GPUs, of one such kernel per GPU and direction, all four at once. Bytes are
bytes landed in engine memory. `worker_mib` is what daemon and worker take before any client, `added_mib` what the syncs
add on each GPU to what the clients hold. Prints one RESULT line per case.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Callable

import torch

from tests.bench import floor_nccl
from tests.bench.floor_host import machine_facts
from tests.support.cluster import Cluster
from tests.support.gpu import gpu_uuids, missing_gpu, usage_settled
from tests.support.llama_engine import empty_params, source_shapes
from tests.support.moe_engine import moe_params, moe_source_shapes
from tests.support.trainer_ranks import row_shard
from tests.support.unlendable import sleep_pool
from weightd import Actor, EngineRank, new_group

ROUNDS = 9
FLOOR_ELEMENTS = 2 << 30
SMALL = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 128, "vocab_size": 151936, "tie_word_embeddings": False, "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}  # fmt: skip
MOE_WHOLE = {**MOE, "num_hidden_layers": 48}


@dataclass(frozen=True)
class Case:
    """Who holds what where: one trainer rank per entry of `trainers`, one TP rank per `engines`."""

    name: str
    config: dict[str, Any]
    architecture: str
    source: str
    trainers: tuple[int, ...]
    engines: tuple[int, ...]
    path: str = "auto"  # worker.path
    crossed: bool = False  # sharded along the dimension that TP does not cut
    stage_bytes: int = 0  # not 0: no worker can map the engine's parameters

    @property
    def num_gpus(self) -> int:
        """GPUs that the case needs."""
        return 1 + max(*self.trainers, *self.engines)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The trainer's tensors."""
        if "num_experts" in self.config:
            return moe_source_shapes(self.config)
        biases = ("q", "k", "v") if self.config["model_type"] == "qwen2" else ()
        shapes = source_shapes(self.config, biases)
        if self.config["tie_word_embeddings"]:
            shapes.pop("lm_head.weight")
        return shapes

    def shard_dim(self, name: str) -> int:
        """The dimension along which the trainer's ranks share a tensor."""
        by_columns = name.endswith(("o_proj.weight", "down_proj.weight"))
        return int(self.crossed and not by_columns and "norm" not in name)

    def crossing(self) -> float:
        """The part of an engine rank's bytes that comes from the other GPU, for one rank per GPU and TP 2."""
        total = crossing = 0.0
        for name, shape in self.shapes().items():
            elements = torch.Size(shape).numel()
            total += elements
            by_columns = name.endswith(("o_proj.weight", "down_proj.weight"))
            crossing += elements / 2 if self.crossed or by_columns else 0
        return crossing / total

    def params(self, tp_rank: int) -> dict[str, torch.Tensor]:
        """The engine's tensors, without memory."""
        if "num_experts" in self.config:
            return moe_params(self.config)
        with torch.device("meta"):
            return empty_params(self.config, tp_rank, len(self.engines), torch.bfloat16)


def _floor_seconds(case: Case, num_bytes: int, kernel_rate: float) -> float:
    """Seconds that the bytes of the busiest GPU take without us."""
    busiest = max(case.engines.count(gpu) for gpu in set(case.engines)) / len(case.engines)
    if case.path == "wire":
        return floor_nccl.measure(int(num_bytes * busiest), case.trainers[0], case.engines[0])
    return num_bytes * busiest / kernel_rate


def _floor_both(case: Case) -> float:
    """Bytes landed per second and GPU by plain kernels on two GPUs that keep a part and swap the rest."""
    away = int(FLOOR_ELEMENTS * case.crossing())
    pairs, streams = [], []
    for gpu in (0, 1):
        for elements, to in ((FLOOR_ELEMENTS - away, gpu), (away, 1 - gpu)):
            src = torch.randn(elements, device=f"cuda:{gpu}", dtype=getattr(torch, case.source))
            pairs.append((torch.empty(elements, device=f"cuda:{to}", dtype=torch.bfloat16), src))
            streams.append(torch.cuda.Stream(gpu))
    seconds = []
    for _ in range(ROUNDS + 1):
        for gpu in (0, 1):
            torch.cuda.synchronize(gpu)
        begin = time.perf_counter()
        for (dst, src), stream in zip(pairs, streams):
            with torch.cuda.stream(stream):
                dst.copy_(src)
        for stream in streams:
            stream.synchronize()
        seconds.append(time.perf_counter() - begin)
    pairs.clear()
    torch.cuda.empty_cache()
    return 2 * FLOOR_ELEMENTS / statistics.median(seconds[1:])


def _floor(case: Case) -> float:
    """Bytes landed per second by a plain kernel on the way of the busiest GPU's bytes."""
    if len(set(case.trainers)) > 1:
        return _floor_both(case)
    source = torch.device("cuda", case.trainers[0])
    target = torch.device("cuda", case.engines[-1] if len(case.trainers) == 1 else case.engines[0])
    src = torch.randn(FLOOR_ELEMENTS, device=source, dtype=getattr(torch, case.source))
    dst = torch.empty(FLOOR_ELEMENTS, device=target, dtype=torch.bfloat16)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    seconds = []
    for _ in range(ROUNDS + 1):
        begin.record()
        dst.copy_(src)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    del src, dst
    torch.cuda.empty_cache()
    return 2 * FLOOR_ELEMENTS / statistics.median(seconds[1:])


def _trainer(case: Case, address: str, group: str, rank: int, barrier: Any, out: Any) -> None:
    torch.cuda.set_device(case.trainers[rank])
    rate = _floor(case) if rank == 0 and case.path == "auto" else 0.0
    dtype, world = getattr(torch, case.source), len(case.trainers)
    source = {}
    for name, shape in case.shapes().items():
        whole = torch.empty(shape, dtype=dtype, device="meta")
        part = row_shard(whole, world, rank, case.shard_dim(name))
        part._local_tensor = torch.randn(part._local_tensor.shape, device="cuda", dtype=dtype)
        source[name] = part
    torch.cuda.synchronize()
    barrier.wait()  # all memory is allocated
    with Actor(address, model="bench", rank=rank, world_size=world, group=group) as actor:
        begin = time.perf_counter()
        actor.register(source)
        registered = time.perf_counter() - begin
        barrier.wait()
        barrier.wait()  # memory was looked at
        acks = []
        for version in range(1, ROUNDS + 2):
            begin = time.perf_counter()
            ack = actor.sync(version)
            acks.append((time.perf_counter() - begin, ack))
        if rank == 0:
            best = acks[1:]
            print("path bytes", best[0][1].path_bytes)
            phases = {
                name: 1e3 * statistics.median(ack.phases.get(name, 0.0) for _, ack in best)
                for name in best[0][1].phases
            }
            out.put(
                {
                    "seconds": statistics.median(s for s, _ in best),
                    "best": min(s for s, _ in best),
                    "first": acks[0][0],
                    "register_seconds": registered,
                    "bytes": best[0][1].bytes,
                    "phases_ms": phases,
                    "floor_rate": rate,
                }
            )
        barrier.wait()
        barrier.wait()  # memory was looked at


def _engine(case: Case, address: str, tp_rank: int, barrier: Any, ready: Any) -> None:
    torch.cuda.set_device(case.engines[tp_rank])
    with torch.cuda.use_mem_pool(sleep_pool()[0]) if case.stage_bytes else nullcontext():
        params = {
            name: torch.zeros(tensor.shape, dtype=tensor.dtype, device="cuda")
            for name, tensor in case.params(tp_rank).items()
        }
    torch.cuda.synchronize()
    barrier.wait()
    free = torch.cuda.mem_get_info()[0]
    with EngineRank(
        address, model="bench", engine="bench", architecture=case.architecture, config=case.config,
        params=params, tp_rank=tp_rank, tp_size=len(case.engines), stage_bytes=case.stage_bytes,
    ):  # fmt: skip
        ready.put((free - torch.cuda.mem_get_info()[0]) >> 20)
        for _ in range(4):
            barrier.wait()


def run(case: Case) -> dict[str, Any]:
    """Runs one case in processes of its own."""
    spawn = mp.get_context("spawn")
    empty = usage_settled()
    devices = ", ".join(f'"{uuid}"' for uuid in gpu_uuids()[: case.num_gpus])
    with Cluster(f'[worker]\ndevices = [{devices}]\npath = "{case.path}"\n') as cluster:
        time.sleep(3)  # the worker's context
        worker_mib = usage_settled() - empty
        parties = len(case.trainers) + len(case.engines) + 1
        barrier, out, ready = spawn.Barrier(parties), spawn.Queue(), spawn.Queue()
        group = new_group()
        peers = [
            spawn.Process(target=_trainer, args=(case, cluster.address, group, rank, barrier, out))
            for rank in range(len(case.trainers))
        ] + [
            spawn.Process(target=_engine, args=(case, cluster.address, rank, barrier, ready))
            for rank in range(len(case.engines))
        ]
        for peer in peers:
            peer.start()
        try:
            barrier.wait(300)
            stage_mib = [ready.get(timeout=120) for _ in case.engines]
            barrier.wait(120)
            before = [usage_settled(gpu) for gpu in range(case.num_gpus)]
            barrier.wait(120)
            result = out.get(timeout=300)
            barrier.wait(120)
            result["added_mib"] = [usage_settled(gpu) - was for gpu, was in enumerate(before)]
            if case.stage_bytes:
                result["stage_mib"] = stage_mib
            barrier.wait(120)
        except BaseException:
            print(cluster.logs(), file=sys.stderr)
            raise
        finally:
            for peer in peers:
                peer.join(60)
                peer.kill()
    result["floor"] = _floor_seconds(case, result["bytes"], result.pop("floor_rate"))
    result["ratio"] = result["seconds"] / result["floor"]
    result["over_ms"] = (result["seconds"] - result["floor"]) * 1e3
    result["worker_mib"] = worker_mib
    return result


LLAMA_CLASS = "LlamaForCausalLM"
MOE_CLASS = "Qwen3MoeForCausalLM"
CASES: dict[str, Callable[[], list[Case]]] = {
    "fixed": lambda: [Case("fixed", SMALL, "Qwen2ForCausalLM", "float32", (0,), (0,))],
    "same": lambda: [
        Case(f"same_{d}", LLAMA, LLAMA_CLASS, d, (0,), (0,)) for d in ("float32", "bfloat16")
    ],
    "same_tp2": lambda: [Case("same_tp2_float32", LLAMA, LLAMA_CLASS, "float32", (0, 0), (0, 0))],
    "pull": lambda: [
        Case(f"pull_{size >> 20}_mib", LLAMA, LLAMA_CLASS, "float32", (0,), (0,), stage_bytes=size)
        for size in (256 << 20, 1 << 30)
    ],
    "moe": lambda: [Case("moe", MOE, MOE_CLASS, "bfloat16", (0,), (0,))],
    "peer": lambda: [
        Case(f"peer_{d}", LLAMA, LLAMA_CLASS, d, (0,), (1,)) for d in ("float32", "bfloat16")
    ],
    "peer_nccl": lambda: [
        Case(f"peer_nccl_{d}", LLAMA, LLAMA_CLASS, d, (0,), (1,), "wire")
        for d in ("float32", "bfloat16")
    ],
    "colocated": lambda: [
        Case(f"colocated_{d}", LLAMA, LLAMA_CLASS, d, (0, 1), (0, 1))
        for d in ("float32", "bfloat16")
    ],
    "crossed": lambda: [
        Case(f"crossed_{d}", LLAMA, LLAMA_CLASS, d, (0, 1), (0, 1), crossed=True)
        for d in ("float32", "bfloat16")
    ],
    "moe_peer": lambda: [Case("moe_peer", MOE_WHOLE, MOE_CLASS, "bfloat16", (0,), (1,))],
    "moe_peer_nccl": lambda: [
        Case("moe_peer_nccl", MOE_WHOLE, MOE_CLASS, "bfloat16", (0,), (1,), "wire")
    ],
}


def main() -> None:
    """Runs the named cases, or all."""
    reason = missing_gpu()
    if reason:
        print(f"skipped: {reason}")
        raise SystemExit(77)
    print("RESULT", json.dumps({"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, **machine_facts()}))
    for name in sys.argv[1:] or CASES:
        for case in CASES[name]():
            if case.num_gpus > len(gpu_uuids()):
                print("RESULT", json.dumps({"case": case.name, "not_run": f"needs {case.num_gpus} GPUs, has {len(gpu_uuids())}"}))  # fmt: skip
                continue
            print("RESULT", json.dumps({"case": case.name, **run(case)}), flush=True)


if __name__ == "__main__":
    main()
