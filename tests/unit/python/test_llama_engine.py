"""The tests' own reference of vLLM's layout, against recorded cases of vLLM's own loader.

The cases lie outside of the repository; WEIGHTD_GOLDEN_LAYOUTS lists their folders (a:b).
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from tests.support.llama_engine import empty_params, expected_params, first_difference

_ROOT = Path(__file__).resolve().parents[3]
_FOLDERS = os.environ.get("WEIGHTD_GOLDEN_LAYOUTS", "")
_DEFAULTS = [
    _ROOT / "tests" / "data" / name for name in ("golden-layouts", "golden-layouts-vllm032")
]
_DEFAULTS += [_ROOT.parent / "shared" / path.name for path in _DEFAULTS]
_CASES = sorted(
    path
    for folder in ([Path(f) for f in _FOLDERS.split(":")] if _FOLDERS else _DEFAULTS)
    for family in ("llama-", "qwen2-", "mistral")
    for path in folder.glob(f"{family}*.json.gz")
)


def _replayed(shape: list[int], runs: list[list[int]], source: list[torch.Tensor]) -> torch.Tensor:
    """Fills a parameter as the recorded runs say; see the README of the golden layouts."""
    flat = torch.full((torch.Size(shape).numel(),), -1.0)
    for start, length, index, offset, stride in runs:
        if index < 0:
            flat[start : start + length] = 0
        else:
            values = source[index].flatten()[offset::stride] if stride else source[index].flatten()
            flat[start : start + length] = values[:length]
    return flat.reshape(shape)


@pytest.mark.parametrize("path", _CASES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_reference_equals_what_vllm_loads(path: Path) -> None:
    case = json.loads(gzip.decompress(path.read_bytes()))
    counter, source = 1, []
    for _, shape in case["source"]:
        size = torch.Size(shape).numel()
        source.append(torch.arange(counter, counter + size, dtype=torch.float32).reshape(shape))
        counter += size
    assert counter < 2**24, "values must stay exact in float32"
    named = {name: tensor for (name, _), tensor in zip(case["source"], source)}
    biases = tuple(
        part for part in ("q", "k", "v", "o", "gate", "up", "down")
        if any(name.endswith(f".{part}_proj.bias") for name in named)
    )  # fmt: skip
    compared = 0
    for rank in case["ranks"]:
        tp_rank, tp_size = rank["tp_rank"], rank["tp_size"]
        golden = {name: _replayed(shape, runs, source) for name, shape, runs in rank["params"]}
        mine = expected_params(case["config"], named, tp_rank, tp_size, torch.float32)
        empty = empty_params(case["config"], tp_rank, tp_size, torch.float32, biases)
        assert mine.keys() == golden.keys() == empty.keys()
        for name, tensor in golden.items():
            assert not first_difference(mine[name], tensor), (tp_rank, tp_size, name)
            assert empty[name].shape == tensor.shape
            compared += 1
    assert compared > 0


def test_golden_cases_are_found() -> None:
    if not _CASES:
        pytest.skip("no golden layouts here; set WEIGHTD_GOLDEN_LAYOUTS to their folders")
    assert len(_CASES) >= 2
