"""A small Llama as four trainer ranks hold it, and its syncs into vLLM engines."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Optional, Protocol, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.cluster import EngineCaller
from tests.support.vllm_engine import llama_config
from weightd import Ack, Actor

MESHES = {
    "fsdp4": ((4,), ("dp",)),
    "hsdp2x2": ((2, 2), ("rep", "dp")),
    "fsdp2xtp2": ((2, 2), ("dp", "tp")),
}
STEPS = 3
_SEED = 7
_STD = 0.05


def make_model(dtype: torch.dtype, steps: int = 0) -> nn.Module:
    """The same weights in every process, after ``steps`` steps of training."""
    torch.manual_seed(_SEED)
    model = LlamaForCausalLM(LlamaConfig(**llama_config())).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            values = torch.randn(parameter.shape, dtype=torch.float32) * _STD + mean
            parameter.copy_(values.to(dtype))
    for number in range(1, steps + 1):
        train_step(model, number)
    return model


def train_step(model: nn.Module, number: int) -> None:
    """Changes every element; two roundings, alike on a shard and on the whole tensor."""
    with torch.no_grad():
        for parameter in model.parameters():
            local = getattr(parameter, "_local_tensor", parameter)
            local.mul_(1.0 + 0.0625 * number)
            local.add_(0.001 * number)


def shard_model(model: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2 over the last data dimension, HSDP over ``rep``, tensor parallelism over ``tp``."""
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        for layer in model.model.layers:
            plan = {f"self_attn.{p}_proj": ColwiseParallel() for p in "qkv"}
            plan |= {f"mlp.{p}_proj": ColwiseParallel() for p in ("gate", "up")}
            plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
            parallelize_module(layer, mesh["tp"], plan)
        mesh = mesh["dp"]
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


class _Callable(Protocol):
    """A process that runs a vLLM, or what makes calls to one."""

    def call(self, operation: str, **arguments: Any) -> Any: ...


class Update(threading.Thread):
    """vLLM's calls of one update, made beside the sync, as a driver does."""

    def __init__(self, engine: _Callable, model: str, version: int) -> None:
        super().__init__(daemon=True)
        self._engine, self._model, self._version = engine, model, version
        self.answer: dict[str, Any] = {}
        self.error: Optional[BaseException] = None
        self.start()

    def run(self) -> None:
        """Makes the calls."""
        try:
            self.answer = self._engine.call("update", model=self._model, version=self._version)
        except BaseException as error:  # told by `result`
            self.error = error

    def result(self) -> dict[str, Any]:
        """Waits for the calls and returns their answer."""
        self.join()
        if self.error is not None:
            raise self.error
        return self.answer


def train_and_sync(
    rank: int,
    address: str,
    model_key: str,
    mesh: str,
    dtype: torch.dtype,
    first_version: int,
    engine: EngineCaller,
    folder: Path,
) -> list[str]:
    """One trainer rank: STEPS versions, each compared in the engine. Returns what went wrong."""
    shape, names = MESHES[mesh]
    model, whole = make_model(dtype), make_model(dtype)
    shard_model(model, init_device_mesh("cpu", shape, mesh_dim_names=names))
    problems: list[str] = []
    with Actor(address, model=model_key) as actor:
        actor.register(model)
        for step in range(1, STEPS + 1):
            version = first_version + step - 1
            train_step(model, step)
            train_step(whole, step)
            update = Update(engine, model_key, version) if rank == 0 else None
            ack = actor.sync(version)
            if update is None:
                continue
            problems += _unexpected(ack, update.result(), version)
            source = folder / f"{model_key}-{version}.pt"
            torch.save({name: t.clone() for name, t in whole.state_dict().items()}, source)
            found = engine.call("call", method="weightd_compare", path=str(source))
            problems += [f"version {version}: {text}" for part in found for text in part]
            source.unlink()
    return problems


def _unexpected(ack: Ack, answer: dict[str, Any], version: int) -> Sequence[str]:
    found = ([r.committed for r in ack.replicas], ack.version, answer.get("weight_version"))
    wanted = ([True], version, str(version))
    return [] if found == wanted else [f"acknowledged {found} instead of {wanted}: {ack!r}"]
