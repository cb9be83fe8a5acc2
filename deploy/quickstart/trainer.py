"""A trainer as a user would write it: FSDP2, AdamW, and four lines of weightd."""

from __future__ import annotations

import time
from typing import Callable, Optional, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import weightd

MODEL = "quickstart-llama"
STEPS = 3
SEQUENCE = [1, 17, 4711, 250, 8009, 99, 3, 1234, 60, 2048, 5, 77, 600, 7, 8000, 42]

# Judges a step on rank 0: (step, full tensors, log-probability of each token of SEQUENCE).
Judge = Callable[[int, dict[str, torch.Tensor], list[float]], None]


def config() -> LlamaConfig:
    """A small Llama: about 9 million parameters, grouped-query attention, a vocabulary that needs padding."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        vocab_size=8010,
        tie_word_embeddings=False,
    )


def trainer_rank(
    rank: int, world_size: int, port: int, engines: Sequence[str], judge: Optional[Judge]
) -> None:
    """Trains for STEPS steps and syncs after each.

    Args:
        rank: of this process, in [0, world_size).
        world_size: number of trainer ranks.
        port: of the TCP store on this host.
        engines: URLs of the engines that rank 0 drives.
        judge: what rank 0 does after every step.
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

    actor = weightd.Actor(model=MODEL, engines=engines)  # the address comes from WEIGHTD_ADDRESS
    actor.register(model)
    generator = torch.Generator().manual_seed(rank)
    for step in range(1, STEPS + 1):
        tokens = torch.randint(0, config().vocab_size, (2, len(SEQUENCE)), generator=generator)
        tokens[0] = torch.tensor(SEQUENCE)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        start = time.perf_counter()
        ack = actor.sync(step)
        seconds = time.perf_counter() - start
        full = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
        logprobs = _logprobs(model)
        if judge is not None:
            print(f"\nstep {step}: loss {loss.item():.3f}; sync took {seconds * 1e3:.1f} ms", flush=True)
            print(ack, flush=True)
            judge(step, full, logprobs)
        dist.barrier()
    actor.close()
    dist.destroy_process_group()


@torch.no_grad()
def _logprobs(model: torch.nn.Module) -> list[float]:
    """What the trainer gives each token of SEQUENCE but the first. Every rank has to call it."""
    tokens = torch.tensor([SEQUENCE])
    scores = model(input_ids=tokens).logits.float().log_softmax(-1)[0, :-1]
    return scores.gather(1, tokens[0, 1:, None])[:, 0].tolist()
