"""CPU seconds of the processes of a benchmark, told apart by what they are."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

# The first that a command line contains names the process; vLLM renames its own.
_KINDS = {
    "VLLM::EngineCore": "vllm_core",
    "VLLM::Worker": "vllm_workers",
    "weightd\0--worker": "weightd_worker",
    "weightd.toml": "weightd_daemon",
    "resource_tracker": "other",
    "spawn_main": "trainers",
}


def cpu_seconds() -> Counter[str]:
    """CPU seconds so far of this process (``driver``) and all below it, summed by kind.

    Of threads that live now, in user and kernel mode; what ended before is not counted.
    """
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    found: Counter[str] = Counter()
    for pid in parents:
        above = pid
        while above > 1 and above != os.getpid():
            above = parents.get(above, 0)
        if above == os.getpid():
            kind = "driver" if pid == os.getpid() else _kind(pid)
            found[kind] += _seconds(pid)
    return found


def _kind(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return "other"
    return next((kind for text, kind in _KINDS.items() if text in command), "other")


def _seconds(pid: int) -> float:
    nanoseconds = 0
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            nanoseconds += int(task.read_text().split()[0])
        except OSError:
            continue
    return nanoseconds / 1e9
