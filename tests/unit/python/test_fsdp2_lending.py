"""FSDP2 goes on training in memory that was lent: gathering, backward and the optimizer see it."""

from __future__ import annotations

import mmap

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.support.gloo import run_ranks
from weightd import _memory
from weightd._source import Source, module_pairs


def _lend(source: Source) -> dict[int, _memory.SharedStorage]:
    pairs = [(local.name, tensor) for local in source.layout for _, tensor in local.shards]
    shared = _memory.share(pairs)
    source.refresh()
    return shared


def _as_the_worker_sees(local: torch.Tensor, shared: dict[int, _memory.SharedStorage]) -> list:
    lent = shared[_memory.storage_key(local)]
    with mmap.mmap(lent.fd, lent.size_bytes, prot=mmap.PROT_READ) as view:
        raw = bytearray(view[:])
    whole = torch.frombuffer(raw, dtype=local.dtype)
    return whole.as_strided(local.shape, local.stride(), local.storage_offset()).tolist()


def _train(rank: int) -> list[str]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.BatchNorm1d(3))
    fully_shard(model[0], mesh=init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    source = Source(module_pairs(model), model)
    shared = _lend(source)
    problems = []
    for step in range(3):
        before = [t.clone() for local in source.layout for _, t in local.shards]
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model(torch.randn(4, 6))
        if isinstance(model[2].weight, nn.Parameter) and hasattr(model[2].weight, "placements"):
            problems.append("the test does not leave parameters gathered")
        moved = source.moved()
        if moved is not None:
            problems.append(f"step {step}: {moved}")
        after = [(local.name, t) for local in source.layout for _, t in local.shards]
        for (name, tensor), old in zip(after, before):
            if "weight" in name and torch.equal(tensor, old):
                problems.append(f"step {step}: {name} did not change")
            if _as_the_worker_sees(tensor, shared) != tensor.tolist():
                problems.append(f"step {step}: {name} differs in shared memory")
    model[0].weight._local_tensor.untyped_storage().resize_(0)
    moved = source.moved()
    if moved is None or (moved.reason, moved.tensor) != ("MEMORY_MOVED", "0.weight"):
        problems.append(f"freed memory is not noticed: {moved}")
    return problems


def test_training_goes_on_in_lent_memory() -> None:
    assert run_ranks(2, _train) == [[], []]
