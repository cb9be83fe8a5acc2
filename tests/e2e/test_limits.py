"""What runs out, is taken or is thrown at the ports: an error at once that says what to do, other
clients undisturbed, and no byte of any engine written."""

from __future__ import annotations

import os
import random
import resource
import socket
import subprocess
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import pytest
import torch

from tests.support.cluster import Cluster, missing_binaries
from tests.support.llama_engine import empty_params, first_difference, source_shapes
from weightd import Actor, EngineRank, Error, errors, new_group

pytestmark = pytest.mark.skipif(bool(missing_binaries()), reason=missing_binaries() or "-")

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 70,
    "tie_word_embeddings": False,
}
LIMITS = "[limits]\nmax_sessions = 6\nmax_tensors = 40\n"
_DAEMON_DESCRIPTORS = 96


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A daemon with small limits that serves all of its ports."""
    with Cluster(LIMITS, ports=True) as running:
        yield running


def _source() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return {name: torch.randn(shape) for name, shape in source_shapes(CONFIG).items()}


class _Engine:
    """One engine rank with poisoned memory."""

    def __init__(self, cluster: Cluster, model: str, **extra: torch.Tensor) -> None:
        self.params = empty_params(CONFIG, 0, 1, torch.bfloat16)
        self.rank = EngineRank(
            cluster.address,
            model=model,
            engine="e0",
            architecture="LlamaForCausalLM",
            config=CONFIG,
            params={**self.params, **extra},
        )

    def __enter__(self) -> _Engine:
        return self

    def __exit__(self, *unused: Any) -> None:
        self.rank.close()

    def assert_untouched(self) -> None:
        """No byte was written."""
        for name, poison in empty_params(CONFIG, 0, 1, torch.bfloat16).items():
            assert not first_difference(self.params[name], poison), name
        assert self.rank.version == 0


def _assert_works(cluster: Cluster, model: str, engine: _Engine, version: int = 1) -> None:
    """A sync is acknowledged and exact."""
    source = _source()
    with Actor(cluster.address, model=model, rank=0, world_size=1) as actor:
        actor.register(source)
        assert actor.sync(version).version == version
    expected = source["model.norm.weight"].to(torch.bfloat16)
    assert not first_difference(engine.params["model.norm.weight"], expected)


def _small_shm(_: Any) -> Any:
    return SimpleNamespace(f_bavail=1, f_frsize=64)


def test_shared_memory_that_is_too_small_is_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _Engine(cluster, "shm") as engine:
        with Actor(cluster.address, model="shm", rank=0, world_size=1) as actor:
            source = _source()
            with monkeypatch.context() as patched:
                patched.setattr(os, "statvfs", _small_shm)
                with pytest.raises(errors.SharedMemoryError) as caught:
                    actor.register(source)
                assert caught.value.tensor in source and "/dev/shm" in caught.value.remedy
                with pytest.raises(errors.SharedMemoryError):
                    _Engine(cluster, "shm-too")
            assert not any(tensor.is_shared() for tensor in source.values())
            engine.assert_untouched()
            # The remedy that the error names: staging needs no shared memory of the trainer.
            assert actor.sync(1, tensors=_source()).version == 1


def _register_with_few_descriptors(address: str) -> tuple[str, str]:
    with Actor(address, model="descriptors", rank=0, world_size=1) as actor:
        used = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, used + 30))
        try:
            actor.register(_source())
        except Error as error:
            return error.reason, error.remedy
    return "", ""


def test_trainer_with_too_few_descriptors_is_refused(cluster: Cluster) -> None:
    with _Engine(cluster, "descriptors") as engine:
        with get_context("spawn").Pool(1) as pool:
            reason, remedy = pool.apply(_register_with_few_descriptors, (cluster.address,))
        assert reason == "FILE_DESCRIPTORS" and "ulimit" in remedy, (reason, remedy)
        engine.assert_untouched()
        _assert_works(cluster, "descriptors", engine)


def test_worker_with_too_few_descriptors_refuses_and_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every lent storage costs the worker a descriptor, too."""
    wrapper = tmp_path / "weightd"
    wrapper.write_text(
        f'#!/bin/sh\nulimit -n {_DAEMON_DESCRIPTORS}\nexec "{os.environ["WEIGHTD_BIN"]}" "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("WEIGHTD_BIN", str(wrapper))
    many = {f"t{i}": torch.zeros(1) for i in range(2 * _DAEMON_DESCRIPTORS)}
    with Cluster() as cluster, _Engine(cluster, "m") as engine:
        with Actor(cluster.address, model="m", rank=0, world_size=1) as actor:
            with pytest.raises(errors.ResourceError) as caught:
                actor.register(many)
        assert caught.value.reason == "FILE_DESCRIPTORS" and "ulimit" in caught.value.remedy
        engine.assert_untouched()
        _assert_works(cluster, "m", engine)


def test_sessions_beyond_the_limit_are_refused(cluster: Cluster) -> None:
    with ExitStack() as stack, _Engine(cluster, "sessions") as engine:
        group = new_group()
        for rank in range(5):
            stack.enter_context(
                Actor(cluster.address, model="sessions", rank=rank, world_size=6, group=group)
            )
        with pytest.raises(errors.ResourceError) as caught:
            Actor(cluster.address, model="sessions", rank=5, world_size=6, group=group)
        assert "max_sessions" in caught.value.remedy, str(caught.value)
        engine.assert_untouched()
    with _Engine(cluster, "sessions") as engine:
        _assert_works(cluster, "sessions", engine)


def test_tensors_beyond_the_limit_are_refused(cluster: Cluster) -> None:
    many = {f"t{i}": torch.zeros(1) for i in range(41)}
    with _Engine(cluster, "tensors") as engine:
        with Actor(cluster.address, model="tensors", rank=0, world_size=1) as actor:
            with pytest.raises(errors.ResourceError) as caught:
                actor.register(many)
            assert caught.value.reason == "MESSAGE_TOO_LARGE", str(caught.value)
            assert "max_tensors" in caught.value.remedy
        with pytest.raises(errors.ResourceError) as caught:
            _Engine(cluster, "tensors-too", **many)
        assert "max_tensors" in caught.value.remedy
        engine.assert_untouched()
        _assert_works(cluster, "tensors", engine)


def _unix(path: str) -> Callable[[], socket.socket]:
    def connect() -> socket.socket:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer.connect(path)
        return peer

    return connect


def _tcp(port: int) -> Callable[[], socket.socket]:
    return lambda: socket.create_connection(("127.0.0.1", port), timeout=5)


def _throw(connect: Callable[[], socket.socket], noise: random.Random) -> None:
    for size in (0, 1, 4, 33, 1000, 70_000):
        with connect() as peer:
            peer.settimeout(5)
            try:
                peer.sendall(noise.randbytes(size))
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(4096):
                    pass
            except OSError:
                continue  # it hung up on us


def test_random_bytes_on_every_port_disturb_nobody(cluster: Cluster) -> None:
    noise = random.Random(20261124)
    with _Engine(cluster, "noise") as engine:
        workers = list(cluster.folder.glob("worker-*.sock"))
        assert len(workers) == 1, workers
        pid = cluster.daemon_pid
        for connect in (
            _unix(cluster.address.removeprefix("unix:")),
            _unix(str(workers[0])),
            _tcp(cluster.port("tcp")),
            _tcp(cluster.port("http")),
        ):
            _throw(connect, noise)
        engine.assert_untouched()
        _assert_works(cluster, "noise", engine)
        assert cluster.daemon_pid == pid and "died" not in cluster.logs()


def _start(*arguments: str) -> tuple[int, str]:
    command = [os.environ["WEIGHTD_BIN"], *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.returncode, done.stderr


def test_daemon_whose_socket_is_taken_does_not_start(cluster: Cluster) -> None:
    config = str(cluster.folder / "weightd.toml")
    status, text = _start("--config", config)
    assert status == 1 and "another daemon is listening" in text and "remedy: stop it" in text
    with _Engine(cluster, "taken") as engine:
        _assert_works(cluster, "taken", engine)


@pytest.mark.parametrize(
    "path", ("/proc/weightd.sock", "/dev/null/weightd.sock", "/sys/kernel/weightd/weightd.sock")
)
def test_daemon_that_may_not_write_its_socket_does_not_start(path: str) -> None:
    settings = (f"listen.socket={path}", "listen.tcp=", "listen.http=")
    status, text = _start(*(word for setting in settings for word in ("--set", setting)))
    assert status == 1 and path in text and "remedy: " in text, (status, text)


@pytest.mark.parametrize("arguments", ((), ("--check-config",)))
def test_malformed_rule_file_stops_the_start(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    rules = "architecture A\nprofile p\nsource hf\nw -> & : sideways\n"
    (tmp_path / "mine.rules").write_text(rules)
    settings = (f"listen.socket={tmp_path}/s", "listen.tcp=", "listen.http=")
    settings += (f"runtime.loaders_dir={tmp_path}",)
    status, text = _start(*arguments, *(w for s in settings for w in ("--set", s)))
    assert status == 1 and f"{tmp_path}/mine.rules:4" in text and "remedy: " in text, (status, text)
