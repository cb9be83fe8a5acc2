"""Four FSDP2 ranks of a tiny model that sync into one real vLLM, by rule file and then by tracing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.support.cluster import EngineCaller
from tests.support.llama_trainer import Update
from tests.support.tiny_models import Steps, layers, make_model, save
from weightd import Actor

# Layout by layout the contents (`Steps.set`) that become versions 1, 2, ...; the last is the same.
CONTENTS = {"rules": (1, 2), "trace": (3, 2)}
LAST = 2
PROMPTS = [[5, 6, 7, 8], [200, 3, 17, 250, 31, 99]]
TOKENS = 6


def generate(engine: Any) -> list[Any]:
    """Tokens and the bits of their log-probabilities."""
    answers = engine.call("generate", prompts=PROMPTS, count=TOKENS)
    return [(answer["tokens"], answer["logprobs"]) for answer in answers]


def train(
    rank: int, address: str, name: str, engine: EngineCaller, folder: Path, runs: bool
) -> dict[str, Any]:
    """One trainer rank; rank 0 drives vLLM and compares.

    Args:
        rank: of this process.
        address: of the daemon.
        name: of the model; also its key.
        engine: is open with layout "rules".
        folder: with a checkpoint of every content, named by its number.
        runs: the engine can run the model.

    Returns:
        Rank 0: ``problems``, a list of text; ``tokens`` by layout, if it runs.
    """
    model = make_model(name)
    mesh = init_device_mesh("cpu", (4,))
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    steps = Steps(model)
    result: dict[str, Any] = {"problems": [], "tokens": {}}
    version = 0
    with Actor(address, model=name) as actor:
        actor.register(model)
        for layout, contents in CONTENTS.items():
            if rank == 0 and layout != "rules":
                result["problems"] += _rejoin(engine, layout)
                found = engine.call("call", method="weightd_compare", path=str(folder / str(LAST)))
                result["problems"] += [f"after {layout}: {t}" for part in found for t in part]
            for number in contents:
                version += 1
                steps.set(number)
                dist.barrier()
                update = Update(engine, name, version) if rank == 0 else None
                ack = actor.sync(version)
                if update is None:
                    continue
                answer = update.result()
                if [replica.committed for replica in ack.replicas] != [True]:
                    result["problems"].append(f"{layout}, version {version}: {ack!r}")
                if answer["weight_version"] != str(version):
                    result["problems"].append(f"{layout}, version {version}: {answer}")
                path = str(folder / str(number))
                found = engine.call("call", method="weightd_compare", path=path)
                result["problems"] += [
                    f"{layout}, version {version}: {text}" for part in found for text in part
                ]
            if rank == 0 and runs:
                result["tokens"][layout] = generate(engine)
            dist.barrier()
    return result


def _rejoin(engine: EngineCaller, layout: str) -> list[str]:
    """Lets all workers leave and register anew, with another layout."""
    engine.call("call", method="weightd_leave")
    states = engine.call("call", method="weightd_rejoin", layout=layout)
    return [f"rejoined with {layout}: {s}" for s in states if not s["state"]["registered"]]


def save_contents(name: str, folder: Path) -> None:
    """Writes a checkpoint of every content, named by its number; 0 is another one."""
    model = make_model(name)
    steps = Steps(model)
    for number in sorted({0, *(n for contents in CONTENTS.values() for n in contents)}):
        steps.set(number)
        save(name, model, folder / str(number))
