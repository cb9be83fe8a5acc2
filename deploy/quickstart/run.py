"""The main job in one command: four FSDP2 ranks train a small Llama and sync every step into an engine.

    python -m deploy.quickstart.run [--engine vllm|rank] [--weightctl PATH]

The engine is a `vllm serve` with two tensor-parallel workers, or, with `--engine rank`, two processes that hold
parameters in vLLM's layout and do not serve. Needs a daemon at $WEIGHTD_ADDRESS. Exits with 1 if the engine does not
hold what the trainer has.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Sequence, Union

import torch
import torch.multiprocessing as mp

from deploy.quickstart.engine import RankJudge, engine_rank
from deploy.quickstart.serve import VllmServer
from deploy.quickstart.trainer import MODEL, STEPS, trainer_rank
from deploy.quickstart.vllm import VllmJudge

TRAINERS = 4
TP = 2
Judge = Union[VllmJudge, RankJudge]
Engine = tuple[Sequence[str], Judge]


def main() -> int:
    """Starts all processes and waits for their verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("vllm", "rank"), default="vllm", help="what is synced into (vllm)")
    parser.add_argument("--weightctl", help="shows the plan and the status")
    options = parser.parse_args()
    context = mp.get_context("spawn")
    with (vllm_engine() if options.engine == "vllm" else rank_engine(context)) as (urls, judge):
        failed = train(context, urls, judge)
        if options.weightctl and not failed:
            subprocess.run([options.weightctl, "status"], check=False)
    if failed:
        print("FAILED: see the messages above", file=sys.stderr)
        return 1
    print(f"proved: {STEPS} versions of {MODEL}, {judge.verdict}")
    return 0


def train(context: Any, urls: Sequence[str], judge: Judge) -> bool:
    """Runs all trainer ranks; returns whether one failed."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    trainers = [
        context.Process(
            target=trainer_rank, args=(rank, TRAINERS, store.port, urls, judge if rank == 0 else None)
        )
        for rank in range(TRAINERS)
    ]
    for process in trainers:
        process.start()
    for process in trainers:
        process.join()
    return any(process.exitcode != 0 for process in trainers)


@contextmanager
def vllm_engine() -> Iterator[Engine]:
    """A real vLLM server, which rank 0 of the trainer pauses, fills and resumes."""
    with tempfile.TemporaryDirectory(prefix="weightd-quickstart-vllm-") as folder:
        print(f"engine: starting `vllm serve` with {TP} workers and dummy weights (about a minute)", flush=True)
        with VllmServer(Path(folder), TP) as server:
            print(f"engine: vLLM answers at {server.url}", flush=True)
            yield [server.url], VllmJudge(server.url)


@contextmanager
def rank_engine(context: Any) -> Iterator[Engine]:
    """Engine ranks without vLLM: they lend parameters and compare them, and nobody has to pause them."""
    ready, answers = context.Queue(), context.Queue()
    questions = [context.Queue() for _ in range(TP)]
    engines = [
        context.Process(target=engine_rank, args=(rank, TP, ready, questions[rank], answers))
        for rank in range(TP)
    ]
    for process in engines:
        process.start()
    try:
        for _ in engines:
            ready.get(timeout=120)
        print(f"engine: {TP} tensor-parallel ranks hold empty bf16 parameters in vLLM's layout", flush=True)
        yield [], RankJudge(questions, answers)
    finally:
        for queue in questions:
            queue.put(None)
        for process in engines:
            process.join(timeout=30)


if __name__ == "__main__":
    sys.exit(main())
