"""The main job in one command: four FSDP2 ranks train a small Llama and sync it into two engine ranks.

    python -m deploy.quickstart.run --weightctl PATH

Needs a daemon at $WEIGHTD_ADDRESS. Exits with 1 if any parameter of the engine differs from the trainer's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import torch
import torch.multiprocessing as mp

from deploy.quickstart.engine import engine_rank
from deploy.quickstart.trainer import MODEL, STEPS, trainer_rank

TRAINERS = 4
TP = 2


def main() -> int:
    """Starts all processes and waits for their verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weightctl", help="shows the plan and the status")
    weightctl = parser.parse_args().weightctl
    context = mp.get_context("spawn")
    ready, checks = context.Queue(), context.Queue()
    questions = [context.Queue() for _ in range(TP)]
    engines = [
        context.Process(target=engine_rank, args=(rank, TP, ready, questions[rank], checks))
        for rank in range(TP)
    ]
    for process in engines:
        process.start()
    for _ in engines:
        ready.get(timeout=120)
    print(f"engine: {TP} tensor-parallel ranks hold empty bf16 parameters in vLLM's layout", flush=True)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ask = (questions, checks)
    trainers = [
        context.Process(target=trainer_rank, args=(rank, TRAINERS, store.port, ask if rank == 0 else None))
        for rank in range(TRAINERS)
    ]
    for process in trainers:
        process.start()
    for process in trainers:
        process.join()
    failed = any(process.exitcode != 0 for process in trainers)
    if weightctl and not failed:
        subprocess.run([weightctl, "status"], check=False)
    for queue in questions:
        queue.put(None)
    for process in engines:
        process.join(timeout=30)
    if failed:
        print("FAILED: see the messages above", file=sys.stderr)
        return 1
    print(f"proved: {STEPS} versions of {MODEL}, every parameter of both ranks equal bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
