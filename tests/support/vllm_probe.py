"""What tests ask of a vLLM worker; mixed into it by ``worker_extension_cls``."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any, Iterator
from unittest import mock

import torch

_SEED = 11
_DEPTH = 3  # of objects below a module

torch.cpu._init_amx()  # vLLM's attention uses tiles, but does not ask the kernel for them


class Probe:
    """Methods for `collective_rpc`; ``self`` is the worker."""

    model_runner: Any
    weight_transfer_engine: Any

    def weightd_state(self) -> dict[str, Any]:
        """State of the worker's engine rank, kinds of its parameters, its process."""
        engine = self.weight_transfer_engine
        return {
            "state": engine.rank.state,
            "kinds": engine.parameters.kinds,
            "counts": engine.parameters.counts(),
            "stages": engine.parameters.num_stages,
            "pid": os.getpid(),
        }

    def weightd_compare(self, path: str) -> list[str]:
        """Compares the worker's weights, bit by bit, with what vLLM itself makes of a checkpoint.

        A second model is built beside the running one and filled by vLLM's own loader and post-load
        step; the running one is left alone. Packed weights, which cannot be read, are compared
        through what the layers compute.

        Args:
            path: a checkpoint's folder, or a file of full tensors under Hugging Face names.

        Returns:
            The differences.
        """
        mine = dict(content(self.model_runner.model))
        theirs = dict(content(_load_beside(self.vllm_config, path)))  # type: ignore[attr-defined]
        differences = [f"only on one side: {name}" for name in mine.keys() ^ theirs.keys()]
        for name in mine.keys() & theirs.keys():
            if not same_bits(mine[name], theirs[name]):
                differences.append(f"{name}: differs from vLLM's own load")
        return differences

    def weightd_content_size(self) -> int:
        """How many tensors and outputs `weightd_compare` compares."""
        return sum(1 for _ in content(self.model_runner.model))

    def weightd_leave(self) -> None:
        """Takes the worker's parameters back from weightd, as at the engine's end."""
        self.weight_transfer_engine.shutdown()

    def weightd_rejoin(self, layout: str) -> dict[str, Any]:
        """Registers the worker anew, as at an engine's start, after all ranks have left.

        Args:
            layout: as in the settings.

        Returns:
            As `weightd_state`.
        """
        config = self.vllm_config  # type: ignore[attr-defined]
        config.additional_config["weightd"]["layout"] = layout
        left = self.weight_transfer_engine
        # What the post-load step did cannot be looked at again: other weights are in place now.
        known = mock.patch("weightd.vllm.engine.parameters_of", lambda *_: left.parameters)
        with known:
            self.weight_transfer_engine = type(left)(
                left.config, config, left.device, self.model_runner.get_model()
            )
        return self.weightd_state()

    def weightd_post_load_seconds(self) -> float:
        """Seconds that vLLM's own post-load steps took in the last sync."""
        return self.weight_transfer_engine.parameters.step_seconds()

    def weightd_shared_files(self) -> list[str]:
        """Files in shared memory through which the ranks of this engine talk."""
        identity = os.environ.get("VLLM_DIST_IDENT", "none")
        return [str(path) for path in Path("/dev/shm").glob(f"{identity}-*")]

    def weightd_kill(self, rank: int) -> None:
        """Kills the worker of that rank."""
        if self.rank == rank:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGKILL)


def content(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Copies of all tensors that modules hold, and outputs of all layers with a linear weight.

    Parameters, buffers, and copies that a post-load step made, in attributes of modules or of what
    they consist of (MLA's projections lie in its backend); not the KV cache.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        for key, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None:
                yield f"{name}.{key}", tensor.detach().clone()
        yield from _attributes(module, name, seen)
    with torch.inference_mode():
        for name, module in model.named_modules():
            width = _input_width(module)
            if width:
                inputs = _inputs(width, module.weight.dtype)
                yield f"{name}(...)", module.quant_method.apply(module, inputs, None).clone()


def _attributes(
    owner: Any, name: str, seen: set[int], depth: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors among the attributes of an object, and of vLLM's own objects among these."""
    for key, value in vars(owner).items():
        if key.startswith(("kv_cache", "_parameters", "_buffers", "_modules")):
            continue
        if isinstance(value, torch.Tensor):
            yield f"{name}.{key}", value.detach().clone()
            continue
        package = type(value).__module__
        ours = package.startswith("vllm.") and not package.startswith("vllm.config")
        if isinstance(value, torch.nn.Module) or not ours or not hasattr(value, "__dict__"):
            continue
        if depth < _DEPTH and id(value) not in seen:
            seen.add(id(value))
            yield from _attributes(value, f"{name}.{key}", seen, depth + 1)


def _load_beside(vllm_config: Any, path: str) -> torch.nn.Module:
    """A second model of this worker, loaded as vLLM loads one at its start."""
    from vllm.model_executor.model_loader.utils import (
        initialize_model,
        process_weights_after_loading,
    )
    from vllm.utils.torch_utils import set_default_torch_dtype

    from weightd.vllm.shadow import apart

    model_config = vllm_config.model_config
    with apart(vllm_config) as own, set_default_torch_dtype(model_config.dtype):
        with torch.device("cpu"):
            model = initialize_model(vllm_config=own)
        model.load_weights(_tensors(Path(path)))
        process_weights_after_loading(model, model_config, torch.device("cpu"))
    return model.eval()


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    if not path.is_dir():
        yield from torch.load(path).items()
        return
    from safetensors.torch import load_file

    for file in sorted(path.glob("*.safetensors")):
        yield from load_file(file).items()


def _input_width(module: torch.nn.Module) -> int:
    """Input features of a linear layer or head; 0 for other modules."""
    if not hasattr(module, "quant_method") or not hasattr(module, "weight"):
        return 0
    if module.weight.numel() == 0 and hasattr(module, "_cpu_skip_gemm_dispatch"):
        return 0  # its attention layer has taken the weight
    width = getattr(module, "input_size_per_partition", getattr(module, "embedding_dim", 0))
    return int(width)


def _inputs(width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn((5, width), generator=generator).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if shape, type and every bit are equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*flat)
