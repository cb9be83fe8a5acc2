"""Every golden-layout case through the command `weightctl plan export --case`, element by element.

Golden cases come from engines' own loaders; see the README of each folder.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_SHARED = Path(os.environ.get("WEIGHTD_SHARED", _ROOT.parent / "shared"))
FOLDERS = {
    "golden-layouts": _SHARED / "golden-layouts",
    "golden-layouts-vllm032": _SHARED / "golden-layouts-vllm032",
    "tests/data/layouts": _ROOT / "tests" / "data" / "layouts",
}
# Cases that the rules do not reach, each with the reason.
NOT_REACHED: dict[str, str] = {}

pytestmark = pytest.mark.skipif(
    not os.environ.get("WEIGHTCTL_BIN"), reason="WEIGHTCTL_BIN is not set"
)


def _export(case: dict[str, Any], folder: Path) -> tuple[dict[str, Any], str]:
    """Returns the case as the command fills it, and its error text."""
    path = folder / "case.json"
    path.write_text(json.dumps(case), encoding="utf-8")
    command = [os.environ["WEIGHTCTL_BIN"], "plan", "export", "--case", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return (json.loads(done.stdout) if done.returncode == 0 else {}), done.stderr


def _difference(golden: dict[str, Any], folder: Path) -> str:
    """Says what is different; empty if nothing is."""
    question = {**golden, "ranks": [{**rank, "params": []} for rank in golden["ranks"]]}
    answer, error = _export(question, folder)
    if not answer:
        return error.strip()
    for wanted, got in zip(golden["ranks"], answer["ranks"]):
        where = f"tp {wanted['tp_rank']}/{wanted['tp_size']}"
        left = {name: (shape, runs) for name, shape, runs in wanted["params"]}
        right = {name: (shape, runs) for name, shape, runs in got["params"]}
        if left.keys() != right.keys():
            return f"{where}: parameters {sorted(left.keys() ^ right.keys())[:4]}"
        for name, layout in left.items():
            if layout != right[name]:
                return f"{where}: {name} differs"
    return ""


@pytest.mark.parametrize("folder", FOLDERS)
def test_golden_cases_come_out_of_the_command(folder: str, tmp_path: Path) -> None:
    cases = sorted(FOLDERS[folder].glob("*.json.gz"))
    if not cases:
        pytest.skip(f"no cases in {FOLDERS[folder]}; WEIGHTD_SHARED names the folder of both")
    differences = {}
    for path in cases:
        name = path.name.removesuffix(".json.gz")
        difference = _difference(json.loads(gzip.decompress(path.read_bytes())), tmp_path)
        if difference:
            differences[name] = difference
    print(f"\n{folder}: {len(cases) - len(differences)} of {len(cases)}")
    for name, difference in differences.items():
        print(f"  {name}: {NOT_REACHED.get(name, 'NOT EXPECTED')}: {difference}")
    assert differences.keys() <= NOT_REACHED.keys()


def test_the_comparison_sees_a_moved_element(tmp_path: Path) -> None:
    path = FOLDERS["tests/data/layouts"] / "mistral-window.json.gz"
    golden = json.loads(gzip.decompress(path.read_bytes()))
    assert _difference(golden, tmp_path) == ""
    run = golden["ranks"][0]["params"][0][2][0]
    run[3] += 1
    assert "differs" in _difference(golden, tmp_path)
    golden["ranks"][0]["params"].pop(0)
    assert "parameters" in _difference(golden, tmp_path)
