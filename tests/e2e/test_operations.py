"""What operators see of a real daemon: HTTP, metrics, weightctl as JSON, a sync in progress, the
check of a configuration, and the drain at SIGTERM."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
import torch

from tests.support.cluster import Cluster, missing_binaries
from tests.support.llama_engine import empty_params, source_shapes
from weightd import Actor, EngineRank, Error, errors

pytestmark = pytest.mark.skipif(bool(missing_binaries()), reason=missing_binaries() or "-")

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "tie_word_embeddings": False,
}
SETTINGS = '[worker]\nthreads = 1\n\n[limits]\nwindow_bytes = "4KiB"\n'
PHASES = (
    "admit",
    "resolve_layouts",
    "build_plan",
    "prepare",
    "transfer",
    "verify",
    "commit",
    "report",
)
RULES = "architecture A\nprofile p\nsource hf\nw -> & : rep\n"
IDLE_BYTES = 50 << 20
_WAIT_SECONDS = 30.0


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A daemon with ports, small windows and failpoints in ``tmp_path``."""
    with monkeypatch.context() as patched:
        patched.setenv("WEIGHTD_FAILPOINT_DIR", str(tmp_path))
        running = Cluster(SETTINGS, ports=True)
    with running:
        yield running


def _source() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {name: torch.randn(shape) for name, shape in source_shapes(CONFIG).items()}


def _engine(cluster: Cluster, **callbacks: Callable[[], None]) -> EngineRank:
    return EngineRank(
        cluster.address,
        model="m",
        engine="e0",
        architecture="LlamaForCausalLM",
        config=CONFIG,
        params=empty_params(CONFIG, 0, 1, torch.bfloat16),
        **callbacks,
    )


def _actor(cluster: Cluster) -> Actor:
    return Actor(cluster.address, model="m", rank=0, world_size=1)


def _sync(actor: Actor, version: int) -> str:
    """Returns the reason of the error; "" when it was acknowledged."""
    try:
        actor.sync(version)
    except Error as error:
        return error.reason
    return ""


def _poll(what: str, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _WAIT_SECONDS
    while not done():
        assert time.monotonic() < deadline, f"did not happen: {what}"
        time.sleep(0.02)


def _get(cluster: Cluster, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{cluster.port('http')}{path}", timeout=10
        ) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def _metrics(cluster: Cluster) -> dict[tuple[str, tuple[str, ...]], float]:
    """Values by name and sorted label pairs."""
    status, text = _get(cluster, "/metrics")
    assert status == 200
    found = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        name, labels, value = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line).groups()
        pairs = tuple(sorted(re.findall(r'\w+="[^"]*"', labels or "")))
        found[name, pairs] = float(value)
    return found


def _weightctl(cluster: Cluster, *arguments: str, status: int = 0) -> str:
    command = [os.environ["WEIGHTCTL_BIN"], "--address", cluster.address, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == status, (arguments, done)
    return done.stdout


def _json(cluster: Cluster, *arguments: str, status: int = 0) -> Any:
    return json.loads(_weightctl(cluster, *arguments, "-o", "json", status=status))


def test_probes_follow_daemon_and_engine(cluster: Cluster) -> None:
    assert _get(cluster, "/livez") == (200, "ok\n")
    _poll("the worker is attached", lambda: _get(cluster, "/readyz")[0] == 200)
    assert _get(cluster, "/readyz/engines/e0")[0] == 404
    with _engine(cluster):
        status, text = _get(cluster, "/readyz/engines/e0")
        assert status == 503 and json.loads(text)["ready"] is False
        _json(cluster, "health", "--engine", "e0", status=3)
        with _actor(cluster) as actor:
            actor.register(_source())
            actor.sync(1)
            assert _get(cluster, "/readyz/engines/e0")[0] == 200
            assert _json(cluster, "health", "--engine", "e0")["healthy"] is True
    _poll("the engine has left", lambda: _get(cluster, "/readyz/engines/e0")[0] == 404)
    assert not any('engine="e0"' in labels for _, labels in _metrics(cluster))


def test_metrics_tell_of_every_sync(cluster: Cluster) -> None:
    at = ('dp_rank="0"', 'engine="e0"', 'model="m"')
    with _engine(cluster), _actor(cluster) as actor:
        actor.register(_source())
        ack = actor.sync(3)
        assert _sync(actor, 2) == "STALE_VERSION"
        # The trainer is answered first; what is counted follows at once.
        failure = ("weightd_sync_failures_total", ('reason="STALE_VERSION"',))
        _poll("the failure is counted", lambda: failure in _metrics(cluster))
        found = _metrics(cluster)
    for phase in (*PHASES, "total"):
        count = 1 if phase not in ("admit", "report", "total") else 2
        assert found["weightd_sync_duration_seconds_count", (f'phase="{phase}"',)] == count, phase
        assert found["weightd_sync_duration_seconds_sum", (f'phase="{phase}"',)] > 0, phase
    assert found["weightd_transfer_bytes_total", ('transport="shm"',)] == ack.bytes > 0
    assert found[failure] == 1
    assert found["weightd_verify_mismatch_total", ()] == 0
    assert found["weightd_engine_weight_version", at] == 3
    states = {
        labels[-1]: value
        for (name, labels), value in found.items()
        if name == "weightd_engine_state" and set(at) <= set(labels)
    }
    assert {state for state, value in states.items() if value} == {'state="SERVING"'}
    assert len(states) == 7
    assert abs(found["weightd_last_success_timestamp_seconds", ('model="m"',)] - time.time()) < 60
    assert found["weightd_staging_bytes", ('device="host"',)] == 0
    builds = [labels for (name, labels) in found if name == "weightd_build_info"]
    assert len(builds) == 1 and any(re.match(r'version="\d+\.', label) for label in builds[0])


def test_every_command_speaks_json(cluster: Cluster, tmp_path: Path) -> None:
    rules = tmp_path / "mine.rules"
    rules.write_text(RULES)
    case = tmp_path / "case.json"
    case.write_text(
        json.dumps(
            {
                "architecture": "LlamaForCausalLM",
                "engine_profile": "vllm-0.32",
                "config": CONFIG,
                "source": [[name, list(shape)] for name, shape in source_shapes(CONFIG).items()],
                "ranks": [{"tp_size": 2, "tp_rank": 1}],
            }
        )
    )
    with _engine(cluster), _actor(cluster) as actor:
        actor.register(_source())
        actor.sync(1)
        status = _json(cluster, "status")
        assert status["models"][0]["highest_version"] == "1" and status["workers"][0]["attached"]
        assert _json(cluster, "health")["healthy"] is True
        engine = _json(cluster, "engines")["models"][0]["engines"][0]
        assert engine["state"] == "ENGINE_STATE_SERVING" and engine["ready"] is True
        (latest,) = _json(cluster, "versions")["models"][0]["history"]
        assert latest["version"] == "1" and int(latest["pause_us"]) > 0
        plan = _json(cluster, "plan", "show", "--model", "m")
        assert int(plan["total_bytes"]) > 0 and plan["pairs"] and plan["predicted_seconds"] > 0
        text = _weightctl(cluster, "plan", "show", "--tensor", "layers.1.self_attn.k_proj")
        assert "qkv_proj" in text and "actor 0" in text and "shm" in text
    exported = _json(cluster, "plan", "export", "--case", str(case))
    assert exported["ranks"][0]["params"]
    assert any("LlamaForCausalLM" in entry["architectures"] for entry in _loaders(cluster))
    assert _json(cluster, "loader", "check", str(rules))["files"][0]["ok"] is True
    assert _json(cluster, "version")["protocol"]["major"] >= 1
    assert _json(cluster, "plan", "show", "--model", "none", status=1)["error"]["remedy"]


def _loaders(cluster: Cluster) -> list[dict[str, Any]]:
    return _json(cluster, "loader", "list")["loaders"]


def test_sync_in_progress_shows_phase_bytes_and_rate(cluster: Cluster, tmp_path: Path) -> None:
    if b"WEIGHTD_FAILPOINT_DIR" not in Path(os.environ["WEIGHTD_BIN"]).read_bytes():
        pytest.skip("this build has no failpoints (preset test)")
    with _engine(cluster), _actor(cluster) as actor, ThreadPoolExecutor(1) as pool:
        actor.register(_source())
        for window in range(2):
            (tmp_path / f"window.{window}.arm").touch()
        running = pool.submit(_sync, actor, 7)
        _poll("the first window", (tmp_path / "window.0.hit").exists)
        time.sleep(0.3)  # progress is told at most ten times a second
        (tmp_path / "window.0.arm").unlink()
        _poll("the second window", (tmp_path / "window.1.hit").exists)
        _poll("progress", lambda: int(_running(cluster)["bytes_done"]) > 0)
        sync = _running(cluster)
        text = _weightctl(cluster, "status")
        (tmp_path / "window.1.arm").unlink()
        assert running.result() == ""
    assert sync["phase"] == "PHASE_TRANSFER" and sync["version"] == "7"
    assert 0 < int(sync["bytes_done"]) < int(sync["bytes_total"])
    assert sync["bytes_per_second"] > 0 and sync["waiting_for"] == "worker host"
    assert re.search(r"transfer.*KiB.*/s", text), text
    assert "sync" not in _json(cluster, "status")["models"][0]


def _running(cluster: Cluster) -> dict[str, Any]:
    return _json(cluster, "status")["models"][0]["sync"]


def test_sigterm_finishes_the_running_sync_and_takes_no_other(cluster: Cluster) -> None:
    publish, asked = threading.Event(), threading.Event()

    def commit() -> None:
        asked.set()
        publish.wait(_WAIT_SECONDS)

    with _engine(cluster, commit=commit) as engine, ThreadPoolExecutor(2) as pool:
        with _actor(cluster) as actor:
            actor.register(_source())
            running = pool.submit(_sync, actor, 1)
            assert asked.wait(_WAIT_SECONDS)
            worker = int(_json(cluster, "status")["workers"][0]["pid"])
            stopping = pool.submit(cluster.stop_daemon, signal.SIGTERM)
            _poll("the daemon is not ready", lambda: _get(cluster, "/readyz")[0] == 503)
            assert "draining" in _get(cluster, "/readyz")[1] and _get(cluster, "/livez")[0] == 200
            assert _json(cluster, "health", status=3)["detail"] == "weightd is draining"
            with pytest.raises(errors.UnavailableError) as caught:
                Actor(cluster.address, model="m2", rank=0, world_size=1)
            assert caught.value.reason == "DRAINING" and caught.value.remedy
            assert not running.done() and not stopping.done()
            publish.set()
            assert running.result() == ""
            assert stopping.result() == 0
        assert engine.version == 1 and engine.ready
    assert not os.path.exists(f"/proc/{worker}")
    assert list(cluster.folder.glob("*.sock")) == []


def _check(path: Path) -> tuple[int, str, str]:
    command = [os.environ["WEIGHTD_BIN"], "--config", str(path), "--check-config"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.returncode, done.stdout, done.stderr


def test_check_config_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "weightd.toml"
    path.write_text(f'[listen]\nsocket = "{tmp_path}/s"\n')
    assert _check(path) == (0, "configuration is fine\n", "")
    path.write_text(f'[listen]\nsocket = "{tmp_path}/s"\n\n[limits]\nwindow_byte = 1\n')
    status, _, text = _check(path)
    assert status == 1 and f"{path}:5: unknown key limits.window_byte" in text
    assert "remedy: did you mean limits.window_bytes?" in text
    assert not (tmp_path / "s").exists()


def test_sample_configuration_is_fine() -> None:
    assert _check(Path(__file__).resolve().parents[2] / "configs" / "weightd.toml")[0] == 0


def _resident_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", text).group(1)) << 10


def test_idle_daemon_and_worker_are_small(cluster: Cluster) -> None:
    _poll("the worker is attached", lambda: _get(cluster, "/readyz")[0] == 200)
    worker = int(_json(cluster, "status")["workers"][0]["pid"])
    assert _resident_bytes(cluster.daemon_pid) <= IDLE_BYTES
    assert _resident_bytes(worker) <= IDLE_BYTES
