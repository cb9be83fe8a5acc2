"""What GPU tests ask of the machine, without a CUDA context in the asking process."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Callable


def _query(field: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]


def missing_gpu() -> str:
    """Returns why GPU tests cannot run here; empty if they can."""
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi is not installed: no NVIDIA driver"
    try:
        return "" if gpu_uuids() else "nvidia-smi lists no GPU"
    except subprocess.CalledProcessError as error:
        return f"nvidia-smi fails: {error.stderr or error.stdout}"


def gpu_uuids() -> list[str]:
    """UUIDs of the machine's GPUs, in nvidia-smi's order."""
    return [line.strip() for line in _query("uuid")]


def used_mib(index: int = 0) -> int:
    """Memory in use on a GPU by all processes, in MiB."""
    return int(_query("memory.used")[index])


def usage_settled(index: int = 0) -> int:
    """Memory in use once two looks in a row agree: contexts of ended processes go late."""
    seen = [-1, used_mib(index)]

    def settled() -> bool:
        seen.append(used_mib(index))
        return seen[-1] == seen[-2]

    wait_until(settled, 10)
    return seen[-1]


def wait_until(condition: Callable[[], bool], seconds: float) -> float:
    """Waits for a condition and returns the seconds it took.

    Raises:
        AssertionError: it did not come true in time.
    """
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, f"not within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - begin


def armed(folder: Path, name: str) -> Path:
    """Arms a failpoint and returns the file that appears when a process has stopped there."""
    (folder / f"{name}.arm").touch()
    return folder / f"{name}.hit"


def disarm(folder: Path, name: str) -> None:
    """Lets a process that stopped at a failpoint go on."""
    (folder / f"{name}.arm").unlink(missing_ok=True)
