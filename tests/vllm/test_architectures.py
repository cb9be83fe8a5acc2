"""Architecture by architecture, on real vLLM engines: what four FSDP2 ranks sync into them is what
vLLM's own loader makes of the same tensors, and they answer as engines freshly started from them.

One engine per (model, TP size) takes versions by rule file, registers anew and takes versions by
tracing; one fresh engine says what tokens and log-probabilities are right for both.

Without ``WEIGHTD_FULL=1`` a few models stand for all; tests/vllm/ARCHITECTURES.md has the outcome of
all. With ``WEIGHTD_TABLE=FILE`` the outcome is appended to that file as rows of that table.
"""

from __future__ import annotations

import os
from contextlib import closing
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.support.architecture_trainer import CONTENTS, LAST, generate, save_contents, train
from tests.support.cluster import Cluster
from tests.support.gloo import run_ranks
from tests.support.tiny_models import MODELS, TinyModel
from tests.support.vllm_engine import missing_parts
from tests.support.vllm_fork import ForkedEngine

pytestmark = pytest.mark.skipif(bool(missing_parts()), reason=missing_parts() or "-")

FULL = os.environ.get("WEIGHTD_FULL") == "1"
QUICK = {("gpt2", 2), ("gemma2", 1), ("gpt_bigcode", 1), ("deepseek_v2", 2), ("qwen3_moe", 2)}
ALL = [(name, tp_size) for name in MODELS for tp_size in (1, 2)]
EXPERTS = [name for name, tiny in MODELS.items() if tiny.experts]
QUICK_EXPERTS = {"qwen3_moe"}
OPTIONS = {"dtype": "bfloat16", "num_gpu_blocks_override": 32}
LAYOUTS = {"rules": "rule file", "trace": "traced"}


def _runs(name: str, tp_size: int) -> bool:
    return tp_size not in MODELS[name].refused


CASES = [case for case in ALL if _runs(*case) and (FULL or case in QUICK)]
REFUSED = [case for case in ALL if not _runs(*case) and FULL]
EXPERT_CASES = [name for name in EXPERTS if FULL or name in QUICK_EXPERTS]


def test_says_what_is_left_out(capsys: Any) -> None:
    left_out = [f"{name}-{tp}" for name, tp in ALL if (name, tp) not in CASES + REFUSED]
    left_out += [f"{name}-ep2" for name in EXPERTS if name not in EXPERT_CASES]
    if left_out:
        with capsys.disabled():
            print(f"\nleft out without WEIGHTD_FULL=1: {' '.join(left_out)}", flush=True)
    assert {case[0] for case in QUICK} <= MODELS.keys()


def _options(tp_size: int, **more: Any) -> dict[str, Any]:
    return {**OPTIONS, "tensor_parallel_size": tp_size, **more}


def _fresh_tokens(cluster: Cluster, tp_size: int, name: str) -> list[Any]:
    with closing(ForkedEngine(cluster, name, tp_size)) as fresh:
        path = str(cluster.folder / str(LAST))
        fresh.call("open", path=path, weightd=None, **_options(tp_size))
        return generate(fresh)


def _sync(cluster: Cluster, name: str, tp_size: int, runs: bool, **more: Any) -> dict[str, Any]:
    """Opens the live engine and runs the trainer; its first rank's result, with the counts."""
    save_contents(name, cluster.folder)
    with closing(ForkedEngine(cluster, "engine", tp_size)) as engine:
        engine.call(
            "open",
            path=str(cluster.folder / "0"),
            weightd={"model": name, "layout": "rules"},
            **_options(tp_size, **more),
        )
        before = generate(engine) if runs else None
        states = engine.call("call", method="weightd_state")
        sizes = engine.call("call", method="weightd_content_size")
        arguments = (cluster.address, name, engine.caller, cluster.folder, runs)
        result = run_ranks(4, train, *arguments)[0]
    assert min(sizes) > 0
    log = cluster.log("engine")
    assert "traced vLLM's own loader" in log
    return {**result, "before": before, "counts": states[0]["counts"]}


def _note(name: str, size: str, result: dict[str, Any], tokens: dict[str, str]) -> None:
    """Appends rows to the table that WEIGHTD_TABLE names."""
    path = os.environ.get("WEIGHTD_TABLE")
    if not path:
        return
    counts = "/".join(str(result["counts"][kind]) for kind in ("raw", "derived", "opaque"))
    rows = []
    for layout, contents in CONTENTS.items():
        problems = [text for text in result["problems"] if layout in text]
        equal = "equal" if not problems else f"{len(problems)} differences"
        rows.append(
            f"| {name} | {MODELS[name].engine_architecture} | {size} | {LAYOUTS[layout]} | {counts}"
            f" | {len(contents)} | {equal} | {tokens[layout]} | {date.today()} |\n"
        )
    with open(path, "a", encoding="utf-8") as table:
        table.writelines(rows)


@pytest.mark.parametrize(("name", "tp_size"), CASES, ids=[f"{n}-{tp}" for n, tp in CASES])
def test_engine_holds_and_answers_as_a_fresh_one(name: str, tp_size: int) -> None:
    tiny: TinyModel = MODELS[name]
    with Cluster() as cluster:
        try:
            result = _sync(cluster, name, tp_size, runs=True)
            fresh = _fresh_tokens(cluster, tp_size, "fresh")
            again = _fresh_tokens(cluster, tp_size, "again") if tiny.unstable else fresh
        except BaseException:
            print(cluster.logs())
            raise
    equal = {layout: tokens == fresh for layout, tokens in result["tokens"].items()}
    words = {True: "equal", False: "differ"}
    verdict = {key: "unstable" if tiny.unstable else words[equal[key]] for key in equal}
    _note(name, f"TP {tp_size}", result, verdict)
    assert result["problems"] == []
    assert result["before"] != fresh
    if tiny.unstable:
        assert again != fresh, "stable now: compare its tokens"
    else:
        assert equal == dict.fromkeys(CONTENTS, True), (result["tokens"], fresh)


@pytest.mark.parametrize("name", EXPERT_CASES)
def test_expert_parallel_engine_holds_what_its_own_loader_produces(name: str) -> None:
    """Bytes only: the forward pass of such an engine crashes on a CPU (vLLM 0.32)."""
    with Cluster() as cluster:
        try:
            result = _sync(cluster, name, 2, runs=False, enable_expert_parallel=True)
        except BaseException:
            print(cluster.logs())
            raise
    _note(name, "TP 2, EP 2", result, dict.fromkeys(CONTENTS, "not run"))
    assert result["problems"] == []


@pytest.mark.parametrize(("name", "tp_size"), REFUSED, ids=[f"{n}-{tp}" for n, tp in REFUSED])
def test_vllm_itself_does_not_run_it(name: str, tp_size: int, capsys: Any) -> None:
    """The models that are left out above are left out because of vLLM."""
    with Cluster() as cluster:
        save_contents(name, cluster.folder)
        with closing(ForkedEngine(cluster, "fresh", tp_size)) as fresh:
            path = str(Path(cluster.folder) / "0")
            with pytest.raises(AssertionError) as caught:
                fresh.call("open", path=path, weightd=None, **_options(tp_size))
                generate(fresh)
        text = f"{caught.value}\n{cluster.log('fresh')}"
    lines = [line for line in text.splitlines() if re.search(MODELS[name].refused[tp_size], line)]
    with capsys.disabled():
        print(f"\n{name} TP {tp_size}: {lines[:1] or text[-1500:]}", flush=True)
    assert lines
