"""A process that holds one trainer rank on a GPU; answers requests as engine_process does.

    python -m tests.support.gpu_trainer ADDRESS

Operations: open, open_fsdp2, train, step, save, sync, usable; see the methods of the same names.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Optional

import torch

from tests.support.engine_process import serve
from tests.support.llama_engine import config_biases, source_shapes
from tests.support.trainer_ranks import row_shard
from tests.support.unlendable import sleep_pool, unlendable_params
from weightd import Actor, Error

# About a quarter of a second on an H100 or H200: long beside a sync.
_BUSY_CYCLES = 400_000_000


def full_tensors(config: dict[str, Any], dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """The weights of version 0, alike in every process: many of them not exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in source_shapes(config, config_biases(config)).items()
    }


class Trainer:
    """One rank: rows of every tensor of a model, in GPU memory of torch's allocator."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._actor: Optional[Actor] = None
        self._local: dict[str, torch.Tensor] = {}
        self._module: Any = None
        self._optimizer: Any = None

    def open(
        self,
        model: str,
        group: str,
        rank: int,
        world_size: int,
        config: dict[str, Any],
        dtype: str,
        device: str = "cuda",
        seed: int = 7,
        pulled: str = "",
        copy_bytes: int = 0,
    ) -> dict[str, Any]:
        """Makes the rank's shards and registers them.

        ``pulled``: ``some`` or ``all`` of them lie in memory that no worker can map.
        """
        source = {}
        for name, tensor in full_tensors(config, getattr(torch, dtype), seed).items():
            part = row_shard(tensor, world_size, rank)
            part._local_tensor = part._local_tensor.to(device)
            source[name] = part
        local = {name: part._local_tensor for name, part in source.items()}
        self._local = unlendable_params(local, pulled)
        for name, part in source.items():
            part._local_tensor = self._local[name]
        self._actor = Actor(
            self._address, model=model, rank=rank, world_size=world_size, group=group,
            copy_bytes=copy_bytes,
        )  # fmt: skip
        self._actor.register(source)
        return self._actor.state

    def open_fsdp2(
        self, model: str, group: str, config: dict[str, Any], store: str
    ) -> dict[str, Any]:
        """Makes an FSDP2 model of one rank over NCCL and registers the module."""
        import torch.distributed as dist
        from torch.distributed.fsdp import fully_shard
        from transformers import LlamaConfig, LlamaForCausalLM

        dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
        torch.manual_seed(7)
        module = LlamaForCausalLM(LlamaConfig(**config)).to("cuda")
        for layer in module.model.layers:
            fully_shard(layer)
        self._module = fully_shard(module)
        self._optimizer = torch.optim.AdamW(self._module.parameters(), lr=0.01)
        self._local = {
            name: tensor._local_tensor for name, tensor in self._module.state_dict().items()
        }
        self._actor = Actor(self._address, model=model, group=group)
        self._actor.register(self._module)
        return self._actor.state

    def train(self) -> float:
        """One step of training on the GPU; returns without waiting for it, but for its loss."""
        tokens = torch.randint(0, self._module.config.vocab_size, (2, 16), device="cuda")
        loss = self._module(tokens, labels=tokens).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    def step(self, version: int, busy: bool = False) -> None:
        """Changes every element; with ``busy`` long after this returns, on a stream of its own."""
        stream = torch.cuda.Stream() if busy else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.set_stream(stream)
        if busy:
            torch.cuda._sleep(_BUSY_CYCLES)
        for tensor in self._local.values():
            tensor.mul_(1.0 + 0.125 * version)
            tensor.add_(0.001 * version)

    def save(self, path: str) -> None:
        """Writes the rank's rows to a file."""
        torch.save({name: tensor.cpu() for name, tensor in self._local.items()}, path)

    def sync(self, version: int) -> dict[str, Any]:
        """Syncs; the answer has the seconds it took and the outcome, or the error."""
        assert self._actor is not None
        begin = time.monotonic()
        try:
            ack = self._actor.sync(version)
        except Error as error:
            return {
                "seconds": time.monotonic() - begin,
                "reason": error.reason,
                "message": str(error),
            }
        return {
            "seconds": time.monotonic() - begin,
            "version": ack.version,
            "committed": sum(replica.committed for replica in ack.replicas),
            "bytes": ack.bytes,
            "path_bytes": ack.path_bytes,
            "verified": ack.verified,
        }

    def sleep(self) -> None:
        """Takes the pages of unlendable memory away."""
        torch.cuda.synchronize()
        sleep_pool()[1].pool_sleep()

    def usable(self) -> float:
        """Computes something on the GPU: fails if this process's CUDA context is broken."""
        return float(torch.ones(1024, device="cuda").sum())

    def close_all(self) -> None:
        """Leaves."""
        if self._actor is not None:
            self._actor.close()


if __name__ == "__main__":
    serve(Trainer(sys.argv[1]))
