"""Starts real vLLM engines beside a cluster's daemon, with the plug-in found as an installed one."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from tests.support.cluster import Cluster, EngineProcess, missing_binaries

_ROOT = Path(__file__).resolve().parents[2]


def missing_parts() -> str:
    """Returns why tests with vLLM cannot run here; empty if they can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    return missing_binaries()


def plugin_folder(folder: Path) -> Path:
    """Writes the package's metadata as a wheel would install it, and returns where.

    With the folder on the path vLLM finds the entry point of the source tree.
    """
    if "WEIGHTD_INSTALLED" in os.environ:
        return folder
    location = _ROOT / "client" / "python" / "build_wheel.py"
    spec = importlib.util.spec_from_file_location("build_wheel", location)
    assert spec is not None and spec.loader is not None
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    for name, content in builder.metadata("py3-none-any").items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def vllm_environment(folder: Path, tp_size: int) -> dict[str, str]:
    """Environment of a vLLM on CPUs; ``folder`` is what `plugin_folder` returned."""
    cores = sorted(os.sched_getaffinity(0))
    bind = "|".join(str(cores[i % len(cores)]) for i in range(tp_size))
    return {
        "PYTHONPATH": str(folder),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": bind,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "INFO",  # tests read the log
        "VLLM_CACHE_ROOT": str(_ROOT / "build" / "vllm-cache"),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }


def start_vllm(cluster: Cluster, name: str, tp_size: int) -> EngineProcess:
    """Starts a process that can run one vLLM; it opens the engine on request."""
    folder = plugin_folder(cluster.folder / "plugin")
    return cluster.start_engines(
        name, "tests.support.vllm_process", vllm_environment(folder, tp_size)
    )


def llama_config(**more: Any) -> dict[str, Any]:
    """A Llama that vLLM's CPU engine takes, with a vocabulary that needs padding."""
    return {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 300,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **more,
    }
