"""Torch's own way to update an engine from FSDP2 shards, as a peer for the host path.

Four gloo ranks hold a Llama with about 268 million parameters as float32 DTensors, Shard(0) over a
one-dimensional mesh. For every tensor each rank calls `full_tensor()` (an all-gather over gloo);
ranks 0 and 1, which stand for the two tensor-parallel ranks of an engine, cast the whole tensor to
bfloat16 and copy their slice into the engine's merged parameters (qkv_proj, gate_up_proj) in
shared memory. A round ends when every rank has passed a barrier.

This file is a yardstick. It is committed before the path that it is compared with and stays as it
is.

    python tests/bench/peer_torch.py            # JSON on stdout
    python tests/bench/peer_torch.py --rounds 9

Output, one JSON object:
    seconds       median wall time of one round, barrier to barrier, on rank 0
    bytes_read    bytes of the float32 shards, all ranks together
    bytes_landed  bytes of the bfloat16 parameters of both engine ranks
    definition    what was timed, in words
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from typing import Dict, List, Tuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import floor_host  # noqa: E402  (the shapes and the machine facts are the floor's)

WORLD_SIZE = 4
TP_SIZE = 2

DEFINITION = (
    "median over rounds of the wall time from barrier to barrier in which 4 gloo ranks call "
    "full_tensor() on every Shard(0) DTensor and ranks 0 and 1 cast to bfloat16 and copy their "
    "TP 2 slice into merged parameters"
)


def merged_place(name: str) -> Tuple[str, str]:
    """Returns (engine parameter, part) that a Hugging Face name lands in; part is "" if alone."""
    for part in ("q", "k", "v"):
        if f".{part}_proj." in name:
            return name.replace(f".{part}_proj.", ".qkv_proj."), part
    for part in ("gate", "up"):
        if f".{part}_proj." in name:
            return name.replace(f".{part}_proj.", ".gate_up_proj."), part
    return name, ""


def split_dim(name: str, shape: Tuple[int, ...]) -> int:
    """Returns the dimension that tensor parallelism cuts, -1 for a replicated tensor."""
    if len(shape) < 2:
        return -1
    return 1 if ".o_proj." in name or ".down_proj." in name else 0


def make_engine(tp_rank: int) -> Dict[str, Tuple[torch.Tensor, int, int]]:
    """Returns, per Hugging Face name, (parameter view [local rows, local columns], dim, start).

    The view is the part of the merged bfloat16 parameter that the tensor fills on `tp_rank`; `dim`
    is the cut dimension of the source (-1: none) and `start` the first index of the slice there.
    """
    rows: Dict[str, int] = {}
    places: List[Tuple[str, str, Tuple[int, ...], int, int]] = []
    for name, shape in floor_host.llama_shapes():
        dim = split_dim(name, shape)
        local = list(shape)
        if dim >= 0:
            local[dim] //= TP_SIZE
        param, _ = merged_place(name)
        places.append((name, param, tuple(local), dim, rows.get(param, 0)))
        rows[param] = rows.get(param, 0) + local[0]
    storages: Dict[str, torch.Tensor] = {}
    views: Dict[str, Tuple[torch.Tensor, int, int]] = {}
    for name, param, local, dim, first in places:
        if param not in storages:
            whole = torch.empty((rows[param],) + local[1:], dtype=torch.bfloat16)
            storages[param] = whole.share_memory_().zero_()
        view = storages[param][first : first + local[0]]
        views[name] = (view, dim, tp_rank * local[dim] if dim >= 0 else 0)
    return views


def one_round(
    shards: List[Tuple[str, DTensor]], engine: Dict[str, Tuple[torch.Tensor, int, int]]
) -> None:
    """Gathers every tensor and, on an engine's rank, copies its slice. Blocks on the collective."""
    for name, shard in shards:
        full = shard.full_tensor()
        if not engine:
            continue
        view, dim, start = engine[name]
        cast = full.to(torch.bfloat16)
        view.copy_(cast if dim < 0 else cast.narrow(dim, start, view.shape[dim]))


def run_rank(rank: int, port: int, rounds: int, warmup: int) -> None:
    """Runs one gloo rank; rank 0 prints the JSON object described at the top of this file."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    shards: List[Tuple[str, DTensor]] = []
    bytes_read = 0
    for name, shape in floor_host.llama_shapes():
        whole = torch.empty(shape).normal_(0.0, 0.02)
        bytes_read += whole.nbytes
        shards.append((name, distribute_tensor(whole, mesh, [Shard(0)])))
    engine = make_engine(rank) if rank < TP_SIZE else {}
    landed = TP_SIZE * sum(view.nbytes for view, _, _ in engine.values())
    seconds: List[float] = []
    for turn in range(warmup + rounds):
        dist.barrier()
        begin = time.perf_counter()
        one_round(shards, engine)
        dist.barrier()
        if turn >= warmup:
            seconds.append(time.perf_counter() - begin)
    if rank == 0:
        report = {
            "seconds": statistics.median(seconds),
            "bytes_read": bytes_read,
            "bytes_landed": landed,
            "definition": DEFINITION,
            "best_seconds": min(seconds),
            "rounds": seconds,
            "machine": floor_host.machine_facts(),
        }
        print(json.dumps(report, indent=2))
    dist.destroy_process_group()


def free_port() -> int:
    """Returns a TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Parses the command line and starts the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, at least 3")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before the clock")
    arguments = parser.parse_args()
    if arguments.rounds < 3:
        parser.error("--rounds must be at least 3 so that the median means something")
    mp.spawn(
        run_rank,
        args=(free_port(), arguments.rounds, arguments.warmup),
        nprocs=WORLD_SIZE,
        join=True,
    )


if __name__ == "__main__":
    main()
