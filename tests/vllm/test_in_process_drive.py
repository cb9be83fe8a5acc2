"""vLLM in the process of the trainer's rank 0: ``LLM`` and ``AsyncLLM`` driven by their own calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import Cluster
from tests.support.live_llama import LIMIT_SECONDS, TOLERANCE, source_paths
from tests.support.vllm_engine import missing_parts, plugin_folder, vllm_environment

pytestmark = pytest.mark.skipif(bool(missing_parts()), reason=missing_parts() or "-")

CALLS = [
    "pause",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
    "reset_caches",
    "resume",
]
_SECONDS = 300


def _run(kind: str, folder: Path) -> dict[str, Any]:
    """Runs one scenario of tests/support/drive_in_process.py in a process of its own."""
    with Cluster() as cluster:
        environment = {**os.environ, **vllm_environment(plugin_folder(folder / "plugin"), 1)}
        environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], *source_paths()])
        run = subprocess.run(
            [
                sys.executable, "-m", "tests.support.drive_in_process",
                kind, cluster.address, str(folder / "model"),
            ],
            env=environment, capture_output=True, text=True, timeout=_SECONDS,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-8000:] + cluster.logs()
    return json.loads(run.stdout.splitlines()[-1])


def test_llm_is_driven_and_its_death_in_mid_update_is_named_in_time(tmp_path: Path) -> None:
    result = _run("llm", tmp_path)
    for number, sync in enumerate(result["syncs"], start=1):
        assert sync["calls"] == CALLS and sync["resumed"] and sync["caches"] == ["prefix"]
        assert sync["engine"] == "mine" and 0 < sync["pause"] < 30
        assert sync["version"] == str(number) and sync["versions"] == [str(number)]
        assert max(sync["worst"]) < TOLERANCE
    killed = result["killed"]
    # A worker whose core is gone may still say so before it goes itself.
    leaving = killed["reason"] == "ENGINE_REFUSED" and "shutting down" in killed["texts"][0]
    assert leaving or killed["reason"] in ("PEER_LOST", "ENGINE_CALL"), killed
    assert killed["seconds"] < LIMIT_SECONDS and not killed["resumed"], killed
    assert any("mine" in text for text in killed["texts"]), killed


def test_async_llm_keeps_a_request_in_flight_and_goes_on_with_new_weights(tmp_path: Path) -> None:
    result = _run("async", tmp_path)
    assert result["calls"] == CALLS and result["resumed"] and result["caches"] == ["prefix"]
    assert result["version"] == "2" and result["versions"] == ["1", "2"]
    assert result["tokens"] == 120 and max(result["worst"]) < TOLERANCE
