"""Makes tests/data/layouts: what vLLM's own `load_weights` does to small models of other sizes and
options than the golden folders have.

    python -m tests.unit.loaders.make_layout_cases [NAME...]

Format as in the golden folders. Every source element gets a number of its own; transformers makes the
models and their names, vLLM's model class of each rank loads what `save_pretrained` writes, and what
its parameters then hold is written down as runs. Names in memory are followed through
`save_pretrained`. Needs vLLM 0.32 for CPUs.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Mapping
from unittest import mock

import numpy as np

from tests.unit.loaders.layout_variants import VARIANTS, Variant

FOLDER = Path(__file__).resolve().parents[2] / "data" / "layouts"
_UNWRITTEN = -1.0
_EXTRA_FROM = 1 << 23
Arrays = dict[str, np.ndarray]
Run = tuple[int, int, int, int, int]


def tagged(architecture: str, config: Mapping[str, Any]) -> tuple[Arrays, Arrays]:
    """Returns a model's tensors under the names in memory and on disk, numbered from 1.

    Runs in a process of its own: vLLM replaces parts of transformers.
    """
    import torch
    import transformers
    from safetensors.torch import load_file

    values = {key: value for key, value in config.items() if key != "architectures"}
    kind = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model = getattr(transformers, architecture)(kind)
    memory: Arrays = {}
    first_of: dict[int, str] = {}
    count = 1
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            same = first_of.setdefault(tensor.data_ptr(), name)
            if same == name:
                numbers = torch.arange(count, count + tensor.numel(), dtype=torch.float32)
                tensor.copy_(numbers.reshape(tensor.shape))
                count += tensor.numel()
            memory[name] = tensor.detach().float().numpy().copy()
    assert count < _EXTRA_FROM, "numbers must be exact in float32"
    disk: Arrays = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for path in sorted(Path(folder).glob("*.safetensors")):
            disk.update({n: t.float().numpy().copy() for n, t in load_file(path).items()})
    return memory, disk


def loaded(variant: Variant, tp_size: int, tp_rank: int, feed: Arrays) -> Arrays:
    """Returns the parameters of one rank after vLLM's `load_weights`."""
    import torch

    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    from tests.support.vllm_models import vllm_model

    # The CPU's kernel wants expert sizes that are multiples of 32; nothing is computed here.
    any_size = mock.patch.object(
        cpu_moe.X86CPUUnquantizedExperts, "_supports_grouped_gemm", lambda *unused: (True, None)
    )
    with any_size, vllm_model(
        variant.architecture, variant.config, tp_size, tp_rank, variant.expert_parallel
    ) as model:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(_UNWRITTEN)
        model.load_weights((name, torch.from_numpy(array)) for name, array in feed.items())
        return {n: p.detach().float().numpy().copy() for n, p in model.named_parameters()}


def runs_of(values: np.ndarray, places: Mapping[float, tuple[int, int]]) -> list[Run]:
    """Writes a parameter down as runs: [offset, length, source, start, stride], taken greedily."""
    runs: list[list[int]] = []
    for offset, value in enumerate(values.reshape(-1).tolist()):
        assert value != _UNWRITTEN, "the loader left an element unwritten"
        source, start = places[value] if value else (-1, 0)
        last = runs[-1] if runs else None
        if last and last[2] == source:
            if source >= 0 and last[1] == 1:
                last[4] = start - last[3]
            if source < 0 or start == last[3] + last[1] * last[4]:
                last[1] += 1
                continue
            if last[1] == 1:
                last[4] = 1
        runs.append([offset, 1, source, start, 1 if source >= 0 else 0])
    return [tuple(run) for run in runs]  # type: ignore[misc]


def make(variant: Variant, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Returns the case of a variant."""
    memory, disk = pool.submit(tagged, variant.architecture, variant.config).result()
    number = _EXTRA_FROM
    for name, shape in variant.extra.items():
        size = int(np.prod(shape))
        extra = np.arange(number, number + size, dtype=np.float32).reshape(shape)
        memory[name] = disk[name] = extra
        number += size
    source = disk if variant.names == "checkpoint" else memory
    places: dict[float, tuple[int, int]] = {}
    for index, array in enumerate(source.values()):
        for start, value in enumerate(array.reshape(-1).tolist()):
            places.setdefault(value, (index, start))
    feed = {name: array for name, array in disk.items() if name not in variant.refused}
    ranks = []
    read: set[int] = set()
    for tp_size in variant.tp_sizes:
        for tp_rank in range(tp_size):
            params = []
            for name, array in loaded(variant, tp_size, tp_rank, feed).items():
                runs = runs_of(array, places)
                read |= {run[2] for run in runs}
                params.append([name, list(array.shape), runs])
            rank: dict[str, Any] = {"tp_size": tp_size, "tp_rank": tp_rank}
            if variant.expert_parallel:
                rank |= {"ep_size": tp_size, "ep_rank": tp_rank}
            ranks.append({**rank, "params": params})
    return {
        "architecture": variant.architecture,
        "engine_profile": "vllm-0.32.0",
        "config": variant.config,
        "source_names": variant.names,
        "source": [[name, list(array.shape)] for name, array in source.items()],
        "skipped_sources": [name for i, name in enumerate(source) if i not in read],
        "ranks": ranks,
    }


def main() -> None:
    """Makes the cases named on the command line, or all."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = sys.argv[1:] or list(VARIANTS)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for name in wanted:
            text = json.dumps(make(VARIANTS[name], pool), separators=(",", ":"))
            (FOLDER / f"{name}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
            print(name, flush=True)


if __name__ == "__main__":
    main()
