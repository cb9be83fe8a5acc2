"""Starts and stops what an end-to-end test needs: the daemon and processes that hold engine ranks.

Binaries come from the environment: WEIGHTD_BIN (the daemon) and WEIGHTD_LIBRARY (libweightd.so).
Every process writes its log into the cluster's folder, which goes when the cluster is closed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import reduction
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Mapping, Optional, Sequence

_ROOT = Path(__file__).resolve().parents[2]
_START_SECONDS = 30.0
_STOP_SECONDS = 15.0
_LOG_TAIL_BYTES = 6000


def missing_binaries() -> str:
    """Returns why end-to-end tests cannot run here; empty if they can."""
    for name in ("WEIGHTD_BIN", "WEIGHTD_LIBRARY"):
        path = os.environ.get(name)
        if not path:
            return f"{name} is not set"
        if not Path(path).is_file():
            return f"{name} does not exist: {path}"
    return ""


class Cluster:
    """A daemon of its own in a folder of its own, and the processes that tests start beside it.

    Attributes:
        folder: configuration, sockets, logs and whatever a test exchanges by file.
        address: of the daemon's control plane.
    """

    def __init__(self, settings: str = "", ports: bool = False) -> None:
        """Starts the daemon.

        Args:
            settings: TOML appended to the configuration, whole sections.
            ports: serve TCP and HTTP, too, on ports that the system chooses; see `port`.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="weightd-e2e-")
        self.folder = Path(self._folder.name)
        self._socket = self.folder / "weightd.sock"
        self.address = f"unix:{self._socket}"
        self._engines: list[EngineProcess] = []
        self._daemon: Optional[subprocess.Popen] = None
        endpoint = "127.0.0.1:0" if ports else ""
        config = f'[listen]\nsocket = "{self._socket}"\n'
        config += f'tcp = "{endpoint}"\nhttp = "{endpoint}"\n\n'
        config += f'[runtime]\nruntime_dir = "{self.folder}"\nlog_level = "debug"\n\n{settings}'
        (self.folder / "weightd.toml").write_text(config, encoding="utf-8")
        try:
            self.start_daemon()
        except BaseException:
            self.close()
            raise

    @property
    def daemon_pid(self) -> int:
        """Process id of the running daemon."""
        assert self._daemon is not None
        return self._daemon.pid

    def port(self, kind: str) -> int:
        """Port of the running daemon; ``kind`` is ``tcp`` or ``http``."""
        deadline = time.monotonic() + _START_SECONDS
        pattern = re.compile(rf"serves: .*\b{kind}_port=(\d+)")
        while True:
            found = pattern.findall((self.folder / "daemon.log").read_text(errors="replace"))
            if found:
                return int(found[-1])
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.02)

    def start_daemon(self) -> None:
        """Starts the daemon and waits until it takes connections.

        Raises:
            AssertionError: it ended or did not listen in time; the message has its log.
        """
        command = [os.environ["WEIGHTD_BIN"], "--config", str(self.folder / "weightd.toml")]
        with open(self.folder / "daemon.log", "ab") as log:
            self._daemon = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._listens():
            ended = self._daemon.poll()
            assert ended is None, f"the daemon ended with {ended}:\n{self.logs()}"
            assert time.monotonic() < deadline, f"the daemon does not listen:\n{self.logs()}"
            time.sleep(0.02)

    def stop_daemon(self, signal_number: int = signal.SIGTERM) -> int:
        """Ends the daemon and returns its exit status (negative: the signal that ended it)."""
        assert self._daemon is not None
        status = _end(self._daemon, signal_number)
        self._daemon = None
        return status

    def start_engines(
        self,
        name: str,
        module: str = "tests.support.engine_process",
        environment: Optional[Mapping[str, str]] = None,
    ) -> EngineProcess:
        """Starts a process that can hold engine ranks.

        Args:
            name: for logs.
            module: what it runs; it gets the daemon's address and serves requests.
            environment: more of it.
        """
        path = self.folder / f"{name}.log"
        engines = EngineProcess(name, self.address, path, module, environment or {})
        self._engines.append(engines)
        return engines

    def log(self, name: str) -> str:
        """Returns the whole log of one process."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def logs(self) -> str:
        """Returns the end of every log, for the message of a failed test."""
        parts = []
        for path in sorted(self.folder.glob("*.log")):
            text = path.read_bytes()[-_LOG_TAIL_BYTES:].decode("utf-8", "replace")
            parts.append(f"---- {path.name}\n{text}")
        return "\n".join(parts)

    def close(self) -> None:
        """Stops everything and removes the folder."""
        for engines in self._engines:
            engines.close()
        self._engines.clear()
        if self._daemon is not None:
            self.stop_daemon()
        self._folder.cleanup()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            return probe.connect_ex(str(self._socket)) == 0


class EngineProcess:
    """A process that opens engine ranks on request; see tests/support/engine_process.py."""

    def __init__(
        self,
        name: str,
        address: str,
        log_path: Path,
        module: str,
        more_environment: Mapping[str, str],
    ) -> None:
        environment = dict(os.environ)
        paths: Sequence[str] = (str(_ROOT / "client" / "python"), str(_ROOT))
        if "WEIGHTD_INSTALLED" in environment:
            paths = paths[1:]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        for key, value in more_environment.items():
            environment[key] = f"{value}:{environment[key]}" if key == "PYTHONPATH" else value
        with open(log_path, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, address],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=_ROOT,
                env=environment,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self.caller = EngineCaller(name, log_path, self._process.stdin, self._process.stdout)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def call(self, operation: str, **arguments: Any) -> Any:
        """As `EngineCaller.call`."""
        return self.caller.call(operation, **arguments)

    def close(self) -> None:
        """Lets the process close its ranks and end."""
        if self._process.poll() is None and self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            _end(self._process, signal.SIGKILL)


class EngineCaller:
    """The pipes to an `EngineProcess`; may be handed to a process that multiprocessing starts.

    One caller at a time.
    """

    def __init__(self, name: str, log_path: Path, requests: IO[bytes], answers: IO[bytes]) -> None:
        self._name = name
        self._log_path = log_path
        self._requests = requests
        self._answers = answers

    def __reduce__(self) -> tuple[Any, ...]:
        pipes = [reduction.DupFd(pipe.fileno()) for pipe in (self._requests, self._answers)]
        return _caller_in_child, (self._name, self._log_path, *pipes)

    def call(self, operation: str, **arguments: Any) -> Any:
        """Asks for one operation and returns its answer.

        Raises:
            AssertionError: the operation failed or the process is gone; with its traceback or log.
        """
        request = json.dumps({"operation": operation, **arguments}) + "\n"
        try:
            self._requests.write(request.encode())
            self._requests.flush()
        except BrokenPipeError:
            pass
        line = self._answers.readline()
        assert line, f"{self._name} is gone:\n{self._log_path.read_text(errors='replace')}"
        answer = json.loads(line)
        assert "error" not in answer, f"{self._name}: {operation} failed:\n{answer.get('error')}"
        return answer["value"]


def _caller_in_child(name: str, log_path: Path, requests: Any, answers: Any) -> EngineCaller:
    return EngineCaller(
        name, log_path, open(requests.detach(), "wb"), open(answers.detach(), "rb")
    )


def _end(process: subprocess.Popen, signal_number: int) -> int:
    process.send_signal(signal_number)
    try:
        return process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
