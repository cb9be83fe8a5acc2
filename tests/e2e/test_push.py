"""`weightctl push`: a checkpoint directory as transformers writes it into running engines, bit for
bit."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Callable

import pytest
import torch

from tests.support.checkpoints import (
    INDEX,
    LLAMA,
    QWEN2,
    file_of,
    load_model,
    missing_weightctl,
    push,
    push_command,
    save_model,
)
from tests.support.cluster import Cluster
from tests.support.fixtures import checkpoint, cluster, model  # noqa: F401
from tests.support.poisoned_engine import PoisonedEngine
from weightd import Actor, errors

pytestmark = pytest.mark.skipif(bool(missing_weightctl()), reason=missing_weightctl() or "-")

NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("config", "architecture", "dtype"),
    [
        (LLAMA, "LlamaForCausalLM", torch.bfloat16),
        (LLAMA, "LlamaForCausalLM", torch.float32),
        (QWEN2, "Qwen2ForCausalLM", torch.bfloat16),
    ],
    ids=str,
)
def test_engines_hold_the_checkpoint_bit_for_bit(
    cluster: Cluster,
    model: str,
    tmp_path: Path,
    config: dict[str, Any],
    architecture: str,
    dtype: torch.dtype,
) -> None:
    save_model(config, tmp_path, "8KB")
    options = {"config": config, "architecture": architecture, "dtype": dtype}
    with PoisonedEngine(cluster.address, model, **options) as two, PoisonedEngine(
        cluster.address, model, tp_size=1, engine="e1", **options
    ) as one:
        done = push(cluster.address, tmp_path, "--model", model)
        assert done.returncode == 0, done.stderr + cluster.logs()
        for engine in (one, two):
            engine.assert_holds(tmp_path, 1)
        assert f"to model {model} as version 1" in done.stdout and "SERVING" in done.stdout


def test_a_single_file_and_versions_that_count_on(
    cluster: Cluster, model: str, tmp_path: Path
) -> None:
    with PoisonedEngine(cluster.address, model, LLAMA) as engine:
        for seed, version in ((1, 1), (2, 2)):
            save_model(LLAMA, tmp_path, "1GB", seed)
            assert not (tmp_path / INDEX).exists()
            done = push(cluster.address, tmp_path, "--model", model, "-o", "json")
            assert done.returncode == 0, done.stdout + done.stderr
            answer = json.loads(done.stdout)
            assert (answer["model"], answer["version"], answer["files"]) == (model, version, 1)
            assert answer["tensors"] == len(load_model(tmp_path))
            assert [r["state"] for r in answer["result"]["replicas"]] == ["SERVING"]
            assert done.stderr == ""
            engine.assert_holds(tmp_path, version)
        done = push(cluster.address, tmp_path, "--model", model, "--version", "7", "-o", "json")
        assert json.loads(done.stdout)["version"] == 7
        done = push(cluster.address, tmp_path, "--model", model, "--version", "3", "-o", "json")
        answer = json.loads(done.stdout)
        assert (done.returncode, answer["error"]["reason"]) == (1, "STALE_VERSION")
        engine.assert_holds(tmp_path, 7)


def test_a_hub_cache_is_pushed_through_its_links(
    cluster: Cluster, model: str, tmp_path: Path, checkpoint: Path
) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123abc"
    blobs = tmp_path / "models--some--model" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(checkpoint.iterdir())):
        shutil.copy(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    with PoisonedEngine(cluster.address, model, LLAMA) as engine:
        done = push(cluster.address, snapshot, "--model", model)
        assert done.returncode == 0, done.stderr
        engine.assert_holds(checkpoint, 1)


def test_a_registered_trainer_is_not_fenced_unless_told(
    cluster: Cluster, model: str, checkpoint: Path
) -> None:
    source = load_model(checkpoint)
    with PoisonedEngine(cluster.address, model, LLAMA) as engine, Actor(
        cluster.address, model=model, rank=0, world_size=1
    ) as actor:
        actor.register(source)
        assert actor.sync(1).version == 1
        done = push(cluster.address, checkpoint, "--model", model)
        assert done.returncode == 1 and "a trainer is registered" in done.stderr
        assert actor.sync(2).version == 2
        done = push(cluster.address, checkpoint, "--model", model, "--take-over")
        assert done.returncode == 0, done.stderr
        engine.assert_holds(checkpoint, 3)
        with pytest.raises(errors.FencedError):
            actor.sync(4)


def test_without_an_engine_or_a_daemon_push_says_so(
    cluster: Cluster, model: str, tmp_path: Path, checkpoint: Path
) -> None:
    done = push(cluster.address, checkpoint, "--model", model)
    assert done.returncode == 1 and model in done.stderr and "remedy:" in done.stderr
    done = push(f"unix:{tmp_path}/none.sock", checkpoint)
    assert done.returncode == 4 and "cannot reach weightd" in done.stderr


class _AtPrepare:
    """An engine whose Prepare, before any byte moves, does something to the push."""

    def __init__(self, cluster: Cluster, model: str, act: Callable[[], None]) -> None:
        self._act, self._armed = act, True
        self.engine = PoisonedEngine(
            cluster.address, model, LLAMA, tp_size=1, quiesce=self._quiesce, commit=lambda: None
        )

    def _quiesce(self) -> None:
        if self._armed:
            self._armed = False
            self._act()


def test_a_file_truncated_meanwhile_poisons_and_a_second_push_heals(
    cluster: Cluster, model: str, tmp_path: Path, checkpoint: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)

    def truncate() -> None:
        for path in folder.glob("*.safetensors"):
            os.truncate(path, 0)

    with _AtPrepare(cluster, model, truncate).engine as engine:
        done = push(cluster.address, folder, "--model", model, "-o", "json")
        answer = json.loads(done.stdout)
        assert (done.returncode, answer["error"]["reason"]) == (1, "CHECKPOINT"), done
        assert "truncated" in answer["error"]["message"] and answer["error"]["remedy"]
        engine.ranks[0].wait(state="POISONED", timeout=60)
        assert push(cluster.address, checkpoint, "--model", model).returncode == 0
        engine.assert_holds(checkpoint, engine.ranks[0].version)


def test_a_file_written_to_meanwhile_is_reported(
    cluster: Cluster, model: str, tmp_path: Path, checkpoint: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    shard = file_of(folder, NORM)

    def write() -> None:
        with open(shard, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")

    with _AtPrepare(cluster, model, write).engine:
        done = push(cluster.address, folder, "--model", model, "-o", "json")
        error = json.loads(done.stdout)["error"]
        assert done.returncode == 1 and shard.name in error["message"] and error["remedy"]


def test_interrupt_cancels_and_leaves_the_engine_as_it_was(
    cluster: Cluster, model: str, checkpoint: Path
) -> None:
    started: list[subprocess.Popen[str]] = []

    def interrupt() -> None:
        started[0].send_signal(signal.SIGINT)
        started[0].wait(60)

    probe = _AtPrepare(cluster, model, interrupt)
    with probe.engine as engine:
        command = push_command(cluster.address, checkpoint, "--model", model, "-o", "json")
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        output, _ = started[0].communicate(timeout=120)
        assert json.loads(output)["error"]["reason"] == "CANCELLED"
        engine.assert_untouched()


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(
    cluster: Cluster, model: str, checkpoint: Path
) -> None:
    with PoisonedEngine(
        cluster.address, model, LLAMA, quiesce=lambda: time.sleep(0.5), commit=lambda: None
    ):
        done = push(cluster.address, checkpoint, "--model", model)
        assert done.returncode == 0 and "prepare\n" in done.stderr
        assert "\r" not in done.stderr and "\x1b" not in done.stderr
        primary, secondary = pty.openpty()
        command = push_command(cluster.address, checkpoint, "--model", model)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=secondary, timeout=120)
        drawn = os.read(primary, 1 << 16).decode()
        os.close(secondary)
        os.close(primary)
        assert done.returncode == 0 and "\r\x1b[Kprepare" in drawn


def test_memory_stays_bounded(cluster: Cluster, model: str, tmp_path: Path) -> None:
    """Half a gigabyte of checkpoint never is resident as a whole."""
    config = {**LLAMA, "hidden_size": 1024, "head_dim": 8, "vocab_size": 65536}
    save_model(config, tmp_path, "200MB")
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    started: list[subprocess.Popen[bytes]] = []
    peaks: list[int] = []

    def look() -> None:
        status = Path(f"/proc/{started[0].pid}/status").read_text(encoding="utf-8")
        peaks.extend(int(kib) * 1024 for kib in re.findall(r"VmHWM:\s+(\d+) kB", status))

    with PoisonedEngine(
        cluster.address, model, config, tp_size=1, quiesce=lambda: None, commit=look
    ):
        command = push_command(cluster.address, tmp_path, "--model", model, "-o", "json")
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        assert started[0].wait(120) == 0
    assert len(peaks) == 1 and peaks[0] < size // 2, (peaks, size)
