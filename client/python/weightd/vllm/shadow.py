"""The layout of a vLLM model that no rule file describes: its own loader, traced on a twin.

The twin is the same model class, built once more without memory: its parameters are as the loader
fills them (the running model's may be repacked by now), and nothing that the running model uses is
touched.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from typing import Any, Iterator

from weightd.errors import layout_error
from weightd.traced import TracedLayout

logger = logging.getLogger("vllm.weightd")


def traced_layout(vllm_config: Any) -> TracedLayout:
    """Traces the loader of this worker's model, for the tensors that an FSDP2 trainer of it holds.

    Args:
        vllm_config: of this worker, whose process groups exist.

    Raises:
        errors.LayoutError: the model cannot be built again, transformers does not know it, or its
            loader computes with values.
    """
    from weightd.trace_hf import meta_model, trace_model

    begin = time.monotonic()
    with apart(vllm_config):  # vLLM's Transformers backend wraps transformers' own classes
        source = meta_model(copy.deepcopy(vllm_config.model_config.hf_config))
    twin = _twin(vllm_config)
    layout = trace_model(twin.load_weights, twin.named_parameters(), source)
    logger.info(
        "weightd: no rule file is used: traced vLLM's own loader of %s in %.1f s: "
        "%d tensors to %d parameters, %d blocks, %d tensors left out",
        type(twin).__name__,
        time.monotonic() - begin,
        len(layout.sources),
        len(layout.params),
        len(layout.writes),
        len(layout.skipped),
    )
    return layout


@contextlib.contextmanager
def apart(vllm_config: Any) -> Iterator[Any]:
    """A copy of a configuration as the current one: layers enter themselves into it by name.

    Args:
        vllm_config: of the running model; keeps its layers.
    """
    from vllm.config import set_current_vllm_config

    own = copy.copy(vllm_config)
    own.compilation_config = copy.copy(vllm_config.compilation_config)
    own.compilation_config.static_forward_context = {}
    own.compilation_config.static_all_moe_layers = []
    with set_current_vllm_config(own):
        yield own


def _twin(vllm_config: Any) -> Any:
    """Builds the model again, without memory; in untouched host memory if it needs numbers."""
    try:
        return _build(vllm_config, "meta")
    except Exception as cause:  # e.g. slopes or frequencies that are computed and read
        logger.debug("weightd: building on meta failed: %s: %s", type(cause).__name__, cause)
    try:
        return _build(vllm_config, "cpu")
    except Exception as cause:
        raise layout_error(
            f"vLLM cannot build this model a second time: {type(cause).__name__}: {cause}",
            reason="CONFIG",
            remedy="write a rule file for this model; see loaders/README.md",
        ) from cause


def _build(vllm_config: Any, device: str) -> Any:
    import torch
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    dtype = vllm_config.model_config.dtype
    with apart(vllm_config) as own, set_default_torch_dtype(dtype), torch.device(device):
        return initialize_model(vllm_config=own)
