"""Runs a function on several ranks of a gloo process group.

The ranks are forked from a server that has imported torch once and never used weightd, which a
process must not have done before it forks ranks that do.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from multiprocessing import get_context
from typing import Any, Callable

# What every rank would import at its first DTensor operation; imported once, by the server.
PRELOAD = ["torch", "torch._dynamo", "torch.distributed.fsdp", "transformers"]


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls ``function(rank, *args)`` in ``world_size`` processes and returns their results.

    Args:
        world_size: how many ranks.
        function: of a module's top level; it and its arguments are pickled.
        args: after the rank.

    Raises:
        AssertionError: a rank failed; the message has its traceback.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory(prefix="weightd-test-") as folder:
        pipes, ranks = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(sender, folder, rank, world_size, function, args)
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            ranks.append(process)
        answers = [_receive(pipe) for pipe in pipes]
        for process in ranks:
            process.join(30)
            if process.is_alive():
                process.kill()
    failures = [f"rank {r}: {text}" for r, (ok, text) in enumerate(answers) if not ok]
    assert not failures, "\n".join(failures)
    return [value for _, value in answers]


def _receive(pipe: Any) -> tuple[bool, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return False, "died without an answer"


def _rank_main(
    sender: Any, folder: str, rank: int, world_size: int, function: Callable[..., Any], args: tuple
) -> None:
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
        )
        answer = (True, function(rank, *args))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # the parent reports it
        answer = (False, traceback.format_exc())
    sender.send(answer)
    sender.close()
    os._exit(0)
