"""What NCCL alone takes for a number of bytes from one GPU to another: the floor of the nccl path.

    PYTHONPATH=. python -m tests.bench.floor_nccl BYTES     needs two GPUs, else exit status 77

Two processes send and receive contiguous GPU memory in pieces of 1 GiB, one after the other on one stream, with torch's
NCCL and nothing else: no packing, no control, no verification. The figure is the median over ROUNDS of the receiver's
wall time for all pieces, after one warm-up, from a barrier to the end of the last piece.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import statistics
import sys
import tempfile
import time
from typing import Any

ROUNDS = 9
PIECE_BYTES = 1 << 30


def _rank(rank: int, gpus: tuple[int, int], num_bytes: int, store: str, out: Any) -> None:
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(gpus[rank])
    device = torch.device("cuda", gpus[rank])
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=2, device_id=device
    )
    memory = torch.ones(num_bytes, dtype=torch.uint8, device="cuda")
    pieces = memory.split(PIECE_BYTES)
    seconds = []
    for _ in range(ROUNDS + 1):
        dist.barrier()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for piece in pieces:
            if rank == 0:
                dist.send(piece, 1)
            else:
                dist.recv(piece, 0)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    if rank == 1:
        out.put(statistics.median(seconds[1:]))
    dist.barrier()
    dist.destroy_process_group()


def measure(num_bytes: int, source: int = 0, target: int = 1) -> float:
    """Returns the seconds for ``num_bytes`` from GPU ``source`` to GPU ``target``."""
    spawn = mp.get_context("spawn")
    out = spawn.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = ((source, target), num_bytes, f"{folder}/store", out)
        ranks = [spawn.Process(target=_rank, args=(rank, *arguments)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        try:
            return out.get(timeout=120)
        finally:
            for rank in ranks:
                rank.join(60)
                rank.kill()


def main() -> None:
    """Prints one RESULT line."""
    import torch

    if torch.cuda.device_count() < 2:
        print(f"skipped: needs 2 GPUs, has {torch.cuda.device_count()}")
        raise SystemExit(77)
    num_bytes = int(sys.argv[1])
    seconds = measure(num_bytes)
    print("RESULT", json.dumps({"bytes": num_bytes, "seconds": seconds, "gb_per_s": num_bytes / seconds / 1e9}))


if __name__ == "__main__":
    main()
