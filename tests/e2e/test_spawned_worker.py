"""worker="spawn": what is refused, who starts the worker, and what the client's process keeps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch

from tests.support.cluster import Cluster, missing_binaries
from tests.support.faults import poll
from weightd import Actor, errors, new_group

pytestmark = pytest.mark.skipif(bool(missing_binaries()), reason=missing_binaries() or "-")

AT_ONCE_SECONDS = 10.0  # far below the deadline of a registration, 60 s

# A trainer in a process of its own. argv: address, what its program does with SIGCHLD.
TRAINER = """
import os, signal, subprocess, sys, threading
import torch
from weightd import Actor

signals = []
signal.signal(signal.SIGINT, lambda *_: signals.append("SIGINT"))
if sys.argv[2] == "ignores":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
if sys.argv[2] == "reaps all":
    def reap(*_):
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
    signal.signal(signal.SIGCHLD, reap)
threading.Thread(target=threading.Event().wait, daemon=True).start()
with Actor(sys.argv[1], model="alone", rank=0, world_size=1, worker="spawn") as actor:
    actor.register({"w": torch.zeros(8)})
    if sys.argv[2] == "waits":
        assert subprocess.run(["/bin/sh", "-c", "exit 5"]).returncode == 5
    print("ready", flush=True)
    for line in sys.stdin:  # its terminal is its own
        os.killpg(0, signal.SIGINT)
        print(line.strip(), signals, actor.state["registered"], flush=True)
try:
    print("left", os.waitpid(-1, os.WNOHANG), flush=True)
except ChildProcessError:
    print("no child", flush=True)
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A daemon without a worker of its own; sockets of spawned workers lie in ``tmp_path``."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with Cluster("[worker]\ndevices = []\n") as running:
        yield running
    assert list(tmp_path.glob("weightd-worker-*")) == []


def _actor(address: str, model: str = "m", **options: Any) -> Actor:
    return Actor(address, model=model, group=new_group(), rank=0, world_size=1, **options)


def _tensors() -> dict[str, torch.Tensor]:
    return {"w": torch.arange(64, dtype=torch.float32)}


def _script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def _refused(cluster: Cluster, cause: str) -> None:
    """Registering fails at once, naming device, program and cause."""
    with _actor(cluster.address, worker="spawn") as actor:
        start = time.monotonic()
        with pytest.raises(errors.UnavailableError) as caught:
            actor.register(_tensors())
        assert time.monotonic() - start < AT_ONCE_SECONDS
    assert caught.value.reason == "WORKER_START"
    assert "device=host" in caught.value.message and cause in caught.value.message
    assert os.environ["WEIGHTD_BIN"] in caught.value.message
    assert "standard error" in caught.value.remedy


def test_missing_program_is_named_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTD_BIN", "/nowhere/weightd")
    with pytest.raises(errors.UnavailableError) as caught:
        _actor("unix:/nowhere/weightd.sock", worker="spawn", connect_timeout=0.1)
    assert caught.value.reason == "WORKER_START"
    assert "/nowhere/weightd" in caught.value.message
    assert "WEIGHTD_BIN" in caught.value.remedy


def test_program_that_ends_at_once_fails_the_registration_and_another_client_is_asked(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = os.environ["WEIGHTD_BIN"]
    monkeypatch.setenv("WEIGHTD_BIN", _script(tmp_path / "ends", "exit 7"))
    _refused(cluster, "exit code 7")
    with _actor(cluster.address, "bad", worker="spawn") as bad:
        monkeypatch.setenv("WEIGHTD_BIN", binary)
        with pytest.raises(errors.UnavailableError):
            bad.register(_tensors())
        with _actor(cluster.address, "good", worker="spawn") as good:
            good.register(_tensors())
            assert good.state["worker"] == "host"
            bad.register(_tensors())  # uses the other's worker
            assert bad.state["worker"] == "host"


def test_worker_with_a_wrong_token_is_not_taken(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = os.environ["WEIGHTD_BIN"]
    wrong = f'WEIGHTD_WORKER_TOKEN=wrong exec "{binary}" "$@"'
    monkeypatch.setenv("WEIGHTD_BIN", _script(tmp_path / "wrong", wrong))
    _refused(cluster, "cause=")
    assert "a process that is not this daemon's worker tried to attach" in cluster.log("daemon")


def test_client_that_does_not_spawn_is_refused_until_another_has(cluster: Cluster) -> None:
    with _actor(cluster.address) as plain, _actor(cluster.address, "n", worker="spawn") as owner:
        with pytest.raises(errors.Error) as caught:
            plain.register(_tensors())
        assert caught.value.reason == "UNKNOWN_DEVICE"
        assert "served are none" in caught.value.message
        assert 'worker="spawn"' in caught.value.remedy and "worker.devices" in caught.value.remedy
        owner.register(_tensors())
        plain.register(_tensors())
        assert plain.state["worker"] == "host"


def test_device_of_the_daemon_needs_no_child() -> None:
    with Cluster() as cluster, _actor(cluster.address, worker="spawn") as actor:
        actor.register(_tensors())
        assert actor.state["worker"] == "host"
        log = cluster.log("daemon")
        assert "a client that would start a worker uses the daemon's: device=host" in log
        assert "a client is asked" not in log


@pytest.mark.parametrize("behaviour", ("waits", "ignores", "reaps all"))
def test_the_trainers_process_is_left_alone(
    cluster: Cluster, tmp_path: Path, behaviour: str
) -> None:
    """Ctrl-C, children, SIGCHLD, standard input and output are its own; the environment is bare."""
    keep = ("WEIGHTD_BIN", "WEIGHTD_LIBRARY", "PYTHONPATH", "XDG_RUNTIME_DIR")
    environment = {name: os.environ[name] for name in keep if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, cluster.address, behaviour],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, start_new_session=True,
    )  # fmt: skip
    assert trainer.stdin is not None and trainer.stdout is not None
    assert trainer.stdout.readline() == "ready\n", trainer.communicate()[1]
    sockets = list(tmp_path.glob("weightd-worker-*/worker.sock"))
    assert len(sockets) == 1 and sockets[0].parent.stat().st_mode & 0o777 == 0o700
    trainer.stdin.write("interrupted\n")
    trainer.stdin.flush()
    assert trainer.stdout.readline() == "interrupted ['SIGINT'] True\n"
    worker = _child(trainer.pid)
    if behaviour != "waits":  # the exit status of a worker that dies is taken by the program
        os.kill(worker, signal.SIGKILL)
        poll("worker was started again", lambda: _child(trainer.pid) not in (0, worker))
        poll("it serves", lambda: len(list(tmp_path.glob("weightd-worker-*/worker.sock"))) == 1)
    out, err = trainer.communicate(timeout=30)
    assert trainer.returncode == 0, err
    assert out == "no child\n", (out, err)
    assert not Path(f"/proc/{_child(trainer.pid) or worker}").exists()


def _child(pid: int) -> int:
    """The worker that a process runs; 0 if there is none."""
    try:
        tasks = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return 0
    return next((int(child) for children in tasks for child in children), 0)


def test_a_killed_client_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, cluster.address, "waits"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert trainer.stdout is not None and trainer.stdout.readline() == "ready\n"
    worker = _child(trainer.pid)
    assert worker
    trainer.kill()
    trainer.wait()
    poll("worker has ended", lambda: not Path(f"/proc/{worker}").exists(), 5.0)
    poll("its directory is gone", lambda: not list(tmp_path.glob("weightd-worker-*")), 5.0)
    trainer.communicate()
