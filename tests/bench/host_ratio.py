"""Runs the host path's floor and the shm transport in turns and prints their ratios as JSON.

    python tests/bench/host_ratio.py build/release/tests/bench/shm_bench --turns 3

Each turn runs floor_host.py, then shm_bench, both with two threads, so that a slow phase of the
machine meets both. A ratio is the median over turns of (transport seconds / floor seconds of the
same turn); below 1 the transport is faster than the floor.

Output keys: `without_verification` (Transfer, no digest; the bar is 1.5), `with_verification`
(Transfer with source digests, then every landed byte read again; the bar is 2.0), `floor_seconds`
and `turns` (the raw numbers, seconds).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Dict, List

HERE = os.path.dirname(os.path.abspath(__file__))


def run_json(command: List[str]) -> Dict[str, object]:
    """Runs a program and returns the JSON object that it prints."""
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Parses the command line, runs the turns, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("shm_bench", help="the built benchmark")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--isa", default="", help="portable, avx2 or avx512; empty: the fastest")
    arguments = parser.parse_args()
    bench = [arguments.shm_bench, "--threads", "2"]
    if arguments.isa:
        bench += ["--isa", arguments.isa]
    turns: List[Dict[str, float]] = []
    for _ in range(max(1, arguments.turns)):
        floor = run_json([sys.executable, os.path.join(HERE, "floor_host.py"), "--rounds", "7"])
        ours = run_json(bench)
        turns.append(
            {
                "floor": float(str(floor["seconds"])),
                "transfer_plain": float(str(ours["transfer_plain_seconds"])),
                "verified": float(str(ours["verified_seconds"])),
            }
        )
    report = {
        "without_verification": statistics.median(t["transfer_plain"] / t["floor"] for t in turns),
        "with_verification": statistics.median(t["verified"] / t["floor"] for t in turns),
        "floor_seconds": statistics.median(t["floor"] for t in turns),
        "isa": ours["isa"],
        "turns": turns,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
