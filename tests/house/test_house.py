"""The rules of the house: who may include whom, sizes, formatting, registered tests, true lists."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# An arrow is "may include". Every folder may include itself. The link lists in CMake say the same.
ARROWS = {
    "daemon/base": set(),
    "daemon/layout": {"daemon/base"},
    "daemon/wire": {"daemon/layout", "daemon/base", "proto"},
    "daemon/plan": {"daemon/layout", "daemon/base"},
    "daemon/device": {"daemon/layout", "daemon/base"},
    "daemon/transport": {"daemon/device", "daemon/plan", "daemon/layout", "daemon/base"},
    "daemon/registry": {"daemon/layout", "daemon/base"},
    "daemon/sync": {"daemon/registry", "daemon/plan", "daemon/layout", "daemon/base"},
    "daemon/worker": {
        "daemon/transport", "daemon/plan", "daemon/device", "daemon/wire", "daemon/layout", "daemon/base", "proto",
    },
    "daemon/server": {
        "daemon/sync", "daemon/registry", "daemon/plan", "daemon/wire", "daemon/layout", "daemon/base", "proto",
    },
    "daemon/main.cc": {"daemon/server", "daemon/worker", "daemon/base"},
    "loaders": {"daemon/layout", "daemon/base"},
    "client/src": {"client/include", "daemon/wire", "daemon/device", "daemon/layout", "daemon/base", "proto"},
    "client/checkpoint": {"daemon/layout", "daemon/base"},
    "client/ctl": {
        "client/src", "client/include", "client/checkpoint", "loaders", "daemon/wire", "daemon/plan", "daemon/layout",
        "daemon/base", "proto",
    },
}  # fmt: skip
MOST_LINES = 400
OWED = re.compile(r"\b(TO" + "DO|FIX" + "ME|XX" + r"X)\b")


def _tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def _folder(path: str) -> str:
    matches = [folder for folder in ARROWS if path == folder or path.startswith(folder + "/")]
    return max(matches, key=len, default="")


def _sources() -> list[Path]:
    return _tracked("daemon/**/*.h", "daemon/**/*.cc", "daemon/*.cc", "client/**/*.h", "client/**/*.cc", "loaders/*.h", "loaders/*.cc")  # fmt: skip


def test_includes_follow_the_arrows() -> None:
    wrong = []
    for path in _sources():
        name = path.relative_to(ROOT).as_posix()
        if name.startswith("client/include"):
            continue
        folder = _folder(name)
        assert folder, f"{name} lies in no folder that the house knows"
        for included in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
            target = "proto" if included.startswith("weightd/v1/") else _folder(included)
            if included.startswith("client/include"):
                target = "client/include"
            if target and target != folder and target not in ARROWS[folder]:
                wrong.append(f"{name} includes {included}")
    assert not wrong, "\n".join(wrong)


def test_files_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for path in _tracked("*.h", "*.cc", "*.py", "*.sh")
        if (lines := len(path.read_text().splitlines())) > MOST_LINES
    ]
    assert not long, "\n".join(long)


def test_nothing_is_owed_in_a_comment() -> None:
    owed = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in _tracked("daemon", "client", "loaders", "proto", "tests/**/*.py", "tests/**/*.cc")
        for line in path.read_text(errors="replace").splitlines()
        if OWED.search(line)
    ]
    assert not owed, "\n".join(owed)


def test_every_unit_test_is_registered() -> None:
    loose = [
        path.relative_to(ROOT).as_posix()
        for path in _tracked("tests/unit/**/*_test.cc")
        if path.name not in (path.parent / "CMakeLists.txt").read_text()
    ]
    assert not loose, f"not built: {loose}"


def test_top_level_is_fixed() -> None:
    top = {path.relative_to(ROOT).parts[0] for path in _tracked()}
    allowed = {"CMakeLists.txt", "CMakePresets.json", "README.md", "LICENSE", "CHANGELOG.md"}
    folders = {"proto", "daemon", "client", "loaders", "configs", "tests", "deploy"}
    stray = {name for name in top if not name.startswith(".")} - allowed - folders
    assert not stray, f"the top level is fixed: {stray}"


def test_code_is_formatted() -> None:
    formatter = shutil.which("clang-format")
    if formatter is None:
        pytest.skip("clang-format is not installed")
    files = [str(path) for path in _tracked("*.h", "*.cc") if not path.name.endswith(".pb.h")]
    run = subprocess.run(
        [formatter, "--dry-run", "--Werror", *files], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr[-4000:]


def test_every_folder_has_its_page() -> None:
    missing = [
        folder
        for folder in ("proto", "daemon", "client", "loaders", "tests", "deploy", "client/python")
        if not (ROOT / folder / "README.md").is_file()
    ]
    assert not missing, missing
