"""A trainer as a user would write it: FSDP2, AdamW, and four lines of weightd."""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import weightd

MODEL = "quickstart-llama"
STEPS = 3


def config() -> LlamaConfig:
    """A small Llama: about 9 million parameters, grouped-query attention, a vocabulary that needs padding."""
    return LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        vocab_size=8010,
        tie_word_embeddings=False,
    )


def trainer_rank(rank: int, world_size: int, port: int, ask: Optional[tuple[Any, Any]]) -> None:
    """Trains for STEPS steps and syncs after each. Rank 0 asks the engine ranks what they hold.

    Args:
        rank: of this process, in [0, world_size).
        world_size: number of trainer ranks.
        port: of the TCP store on this host.
        ask: (one question queue per engine rank, the queue of their answers); rank 0 only.
    """
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config())
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    actor = weightd.Actor(model=MODEL)  # the address comes from WEIGHTD_ADDRESS
    actor.register(model)
    generator = torch.Generator().manual_seed(rank)
    for step in range(1, STEPS + 1):
        tokens = torch.randint(0, config().vocab_size, (2, 32), generator=generator)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        start = time.perf_counter()
        ack = actor.sync(step)
        seconds = time.perf_counter() - start
        full = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
        if ask is not None:
            print(f"\nstep {step}: loss {loss.item():.3f}; sync took {seconds * 1e3:.1f} ms", flush=True)
            print(ack, flush=True)
            _prove(step, full, *ask)
        dist.barrier()
    actor.close()
    dist.destroy_process_group()


def _prove(version: int, full: dict[str, torch.Tensor], questions: Any, answers: Any) -> None:
    """Lets every engine rank compare its memory with the trainer's full tensors."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "full.pt")
        torch.save(full, path)
        for question in questions:
            question.put((version, path))
        for _ in questions:
            tp_rank, params, differences = answers.get(timeout=120)
            if differences:
                raise SystemExit(f"engine tp {tp_rank} differs: {differences}")
            print(f"  engine tp {tp_rank}: {params} parameters equal the trainer's, bit for bit", flush=True)
