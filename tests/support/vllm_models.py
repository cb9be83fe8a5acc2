"""vLLM's real model classes for any tensor- or expert-parallel rank, in one process on a CPU.

The model is built as vLLM's loader builds it, with stand-ins for its process groups: enough to run
`load_weights`, not to run the model. Parameters have no content.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import json
import os
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional
from unittest import mock

import torch

_GROUPS = ("_WORLD", "_TP", "_ETP", "_DCP", "_PP", "_DP", "_EP", "_EPLB", "_PCP")


def missing_vllm() -> str:
    """Returns why vLLM cannot be used here; empty if it can."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        return f"vLLM is not installed: {error}"
    return ""


@dataclass
class _ProcessGroup:
    """Answers what models ask torch's process group."""

    world_size: int
    rank_in_group: int

    def size(self) -> int:
        """Ranks of the group."""
        return self.world_size

    def rank(self) -> int:
        """Position of this rank."""
        return self.rank_in_group


@dataclass
class _Group:
    """One rank's view of a group that does not exist."""

    world_size: int = 1
    rank_in_group: int = 0
    unique_name: str = "stand-in"
    device_communicator: Any = None

    @property
    def device_group(self) -> _ProcessGroup:
        return _ProcessGroup(self.world_size, self.rank_in_group)

    cpu_group = device_group

    @property
    def rank(self) -> int:
        return self.rank_in_group

    @property
    def local_rank(self) -> int:
        return self.rank_in_group

    @property
    def ranks(self) -> list[int]:
        return list(range(self.world_size))

    @property
    def is_first_rank(self) -> bool:
        return self.rank_in_group == 0

    @property
    def is_last_rank(self) -> bool:
        return self.rank_in_group == self.world_size - 1


@contextlib.contextmanager
def _groups(tp_size: int, tp_rank: int) -> Iterator[None]:
    from vllm.distributed import parallel_state

    wide, one = _Group(tp_size, tp_rank), _Group()
    names = {name: one for name in _GROUPS if hasattr(parallel_state, name)}
    names |= {name: wide for name in ("_WORLD", "_TP", "_EP")}
    with contextlib.ExitStack() as stack:
        for name, group in names.items():
            stack.enter_context(mock.patch.object(parallel_state, name, group))
        yield


@contextlib.contextmanager
def _to_load_only() -> Iterator[None]:
    """What a model that only loads can do without.

    vLLM's subprocess per model class, what it remembers of other models of a class, the sizes that
    its CPU kernels ask for, and the package that prepares images.
    """
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.model_executor.models import registry
    from vllm.model_executor.models.transformers import fuser

    fuser.get_fusers.cache.clear()
    supported = staticmethod(lambda *_, **__: (True, None))
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(registry, "_run_in_subprocess", lambda function: function()))
        enter(mock.patch.object(cpu_moe.CPUUnquantizedExperts, "is_supported_config", supported))
        _stand_in_for_images()
        yield


@functools.cache
def _stand_in_for_images() -> None:
    """Lets vision models be imported without torchvision; stays, as what imports it does."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    for name in ("", ".io", ".transforms", ".transforms.v2", ".transforms.v2.functional"):
        module = types.ModuleType(f"torchvision{name}")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None, is_package=True)
        module.__path__ = []
        module.__getattr__ = lambda _: mock.MagicMock()  # type: ignore[method-assign]
        sys.modules[module.__name__] = module


@contextlib.contextmanager
def vllm_model(
    architecture: str,
    config: Mapping[str, Any],
    tp_size: int = 1,
    tp_rank: int = 0,
    expert_parallel: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: Optional[str] = None,
) -> Iterator[torch.nn.Module]:
    """Builds the model of one rank; its loader works inside the context.

    Args:
        architecture: Hugging Face architecture.
        config: Hugging Face config.
        tp_size, tp_rank: coordinates; the expert-parallel group is the tensor-parallel one.
        expert_parallel: whole experts are spread over the ranks.
        dtype: of the parameters.
        device: where parameters are made, e.g. ``meta``; None: in host memory.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.config import DeviceConfig, LoadConfig, ModelConfig, VllmConfig
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with tempfile.TemporaryDirectory(prefix="weightd-model-") as folder, _to_load_only():
        text = json.dumps({**config, "architectures": [architecture]})
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")
        model_config = ModelConfig(
            model=folder,
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=64,
            enforce_eager=True,
        )
        whole = VllmConfig(
            model_config=model_config,
            device_config=DeviceConfig("cpu"),
            load_config=LoadConfig(load_format="dummy"),
        )
        whole.parallel_config.tensor_parallel_size = tp_size
        whole.parallel_config.enable_expert_parallel = expert_parallel
        place = torch.device(device) if device else contextlib.nullcontext()
        with _groups(tp_size, tp_rank), set_current_vllm_config(whole):
            with set_default_torch_dtype(dtype), place:
                model = initialize_model(vllm_config=whole)
            yield model
