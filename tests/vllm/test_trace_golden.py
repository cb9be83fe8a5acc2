"""Tracing vLLM's real loaders finds every golden layout, element by element, and `weightctl loader
check --trace` finds that the rule files say the same.

The golden layouts come from the same loaders run on real numbers. WEIGHTD_TRACE_RANKS=all traces
every rank of every case; by default one rank of tp 1 and the last of the two largest sizes.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from tests.support.golden_cases import (
    case_files,
    first_difference,
    golden_elements,
    read_case,
    traced_elements,
)
from tests.support.vllm_models import missing_vllm, vllm_model
from weightd.trace import trace_loader
from weightd.trace_hf import meta_model, module_sources, trace_model
from weightd.traced import TracedLayout, write_traces

LOADERS = Path(__file__).resolve().parents[2] / "loaders"
CASES = case_files("golden-layouts-vllm032")
pytestmark = [
    pytest.mark.skipif(not CASES, reason="no golden layouts (set WEIGHTD_SHARED)"),
    pytest.mark.skipif(bool(missing_vllm()), reason=missing_vllm() or "-"),
]


def _ranks(case: dict[str, Any]) -> list[dict[str, Any]]:
    ranks = case["ranks"]
    if os.environ.get("WEIGHTD_TRACE_RANKS") == "all":
        return ranks
    sizes = sorted({rank["tp_size"] for rank in ranks})
    wanted = {size: 0 if size == 1 else size - 1 for size in {sizes[0], *sizes[-2:]}}
    return [rank for rank in ranks if wanted.get(rank["tp_size"]) == rank["tp_rank"]]


def _trace(case: dict[str, Any], engine: Any) -> TracedLayout:
    """Traces with the case's names; through `save_pretrained` where vLLM refuses them."""
    if "composed" not in case:
        refused = set(case.get("engine_refuses", ()))
        sources = [(name, shape) for name, shape in case["source"] if name not in refused]
        return trace_loader(engine.load_weights, engine.named_parameters(), sources)
    config = CONFIG_MAPPING[case["config"]["model_type"]].from_dict(
        {**case["config"], "architectures": [case["architecture"]]}
    )
    model = meta_model(config)
    shapes = {name: list(tensor.shape) for name, tensor in module_sources(model)}
    assert shapes == dict(case["source"]), "transformers builds another model"
    return trace_model(engine.load_weights, engine.named_parameters(), model)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_tracing_finds_the_golden_layout(path: Path, tmp_path: Path) -> None:
    case = read_case(path)
    traced = []
    positions = {name: index for index, (name, _) in enumerate(case["source"])}
    skipped = set(positions)
    for rank in _ranks(case):
        size, number = rank["tp_size"], rank["tp_rank"]
        parallel = case.get("expert_parallel", False)
        with vllm_model(case["architecture"], case["config"], size, number, parallel) as engine:
            layout = _trace(case, engine)
        found = traced_elements(layout, positions)
        assert first_difference(found, golden_elements(rank)) == "", f"tp {number}/{size}"
        skipped -= {source.name for source in layout.sources if source.used}
        at = {key: rank[key] for key in ("tp_size", "tp_rank", "ep_size", "ep_rank") if key in rank}
        traced.append((at, layout))
    assert skipped >= set(case["skipped_sources"])
    _compare_with_the_rules(case, traced, tmp_path / "trace.json")


def _compare_with_the_rules(
    case: dict[str, Any], traced: list[tuple[dict[str, int], TracedLayout]], path: Path
) -> None:
    if "WEIGHTCTL_BIN" not in os.environ:
        return
    write_traces(
        path,
        traced,
        architecture=case["architecture"],
        config=case["config"],
        profile=case["engine_profile"],
    )
    command = [os.environ["WEIGHTCTL_BIN"], "loader", "check", str(LOADERS), "--trace", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "tracing found the same" in run.stdout
