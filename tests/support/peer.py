"""Processes beside a cluster that answer requests as tests/support/engine_process.py does.

Unlike a plain `EngineProcess` one may be asked without waiting, so that several work at a time, be
of another module, have an environment of its own, and be killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

from tests.support.cluster import Cluster

_ROOT = Path(__file__).resolve().parents[2]
_STOP_SECONDS = 15.0


class Peer:
    """One process. One caller at a time."""

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        module: str,
        environment: Optional[Mapping[str, str]] = None,
    ) -> None:
        self.name = name
        self._log_path = cluster.folder / f"{name}.log"
        paths = (str(_ROOT / "client" / "python"), str(_ROOT))
        with open(self._log_path, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, cluster.address],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=_ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})},
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def ask(self, operation: str, **arguments: Any) -> None:
        """Asks for one operation; `answer` waits for what comes of it."""
        assert self._process.stdin is not None
        try:
            request = json.dumps({"operation": operation, **arguments}) + "\n"
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            pass

    def answer(self) -> Any:
        """Waits for the answer to the oldest question that has none yet.

        Raises:
            AssertionError: the operation failed or the process is gone; with its traceback or log.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"{self.name} is gone:\n{self._log_path.read_text(errors='replace')}"
        answer = json.loads(line)
        assert "error" not in answer, f"{self.name} failed:\n{answer.get('error')}"
        return answer["value"]

    def call(self, operation: str, **arguments: Any) -> Any:
        """Asks for one operation and returns its answer.

        Raises:
            AssertionError: as `answer`.
        """
        self.ask(operation, **arguments)
        return self.answer()

    def kill(self) -> None:
        """Ends the process as kill -9 does, and waits until it is gone."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Lets the process close what it holds and end."""
        if self._process.poll() is None and self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()


def ask_all(peers: Sequence[Peer], operation: str, **arguments: Any) -> list[Any]:
    """Asks several processes at once and returns their answers."""
    for peer in peers:
        peer.ask(operation, **arguments)
    return [peer.answer() for peer in peers]
