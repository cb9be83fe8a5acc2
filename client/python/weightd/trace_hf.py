"""Sources for `weightd.trace` from a Hugging Face config: the tensors that an FSDP2 trainer holds.

Needs transformers. Models are built on the ``meta`` device: no memory, no weights, no network.
"""

from __future__ import annotations

import copy
from typing import Any, Iterable, Iterator

import torch

from weightd._source import named_pairs
from weightd.errors import Error, layout_error
from weightd.trace import LoadWeights, module_sources, trace_loader
from weightd.traced import TracedLayout


def meta_model(config: Any) -> torch.nn.Module:
    """Builds the Hugging Face model of a config without memory.

    Args:
        config: a transformers config object, e.g. a vLLM engine's ``model_config.hf_config``.

    Raises:
        errors.LayoutError: CONFIG: transformers knows no model for it.
    """
    import transformers

    wanted = getattr(config, "architectures", None) or []
    try:
        kind = next((getattr(transformers, name, None) for name in wanted), None)
        with torch.device("meta"):
            if kind is not None:
                return kind(config)
            return transformers.AutoModelForCausalLM.from_config(config)
    except Exception as cause:
        raise layout_error(
            f"transformers cannot build this model: {type(cause).__name__}: {cause}",
            reason="CONFIG",
            remedy="trace with checkpoint_sources(DIRECTORY) instead",
        ) from cause


def trace_model(load_weights: LoadWeights, params: Any, model: torch.nn.Module) -> TracedLayout:
    """Traces an engine's loader with the tensors of a Hugging Face model as its trainer holds them.

    Where the loader refuses these names (transformers keeps the experts of a layer in one tensor,
    some loaders only know those of checkpoints), the trace goes through what ``save_pretrained``
    does to them, so that the layout is still that of the tensors in memory.

    Args:
        load_weights, params: see `weightd.trace.trace_loader`.
        model: see `meta_model`.

    Raises:
        errors.LayoutError: as `weightd.trace.trace_loader`; with the refusal of the names in memory
            if the checkpoint's are refused as well.
    """
    params, sources = named_pairs(params), module_sources(model)
    module = getattr(load_weights, "__self__", None)
    loaders = [load_weights, saved_first(load_weights, model), turned_first(load_weights, model)]
    refusals: list[Error] = []
    for loader in loaders:
        try:
            return trace_loader(loader, params, sources, module)
        except Error as refusal:
            if refusal.reason not in ("LOADER_REFUSED", "UNCOVERED_PARAMETER"):
                raise
            refusals.append(refusal)
    raise refusals[0] from refusals[1]


def saved_first(load_weights: LoadWeights, model: torch.nn.Module) -> LoadWeights:
    """A loader that takes the names in memory: converts them as ``save_pretrained`` does.

    Args:
        load_weights: takes the names of checkpoints.
        model: the Hugging Face model.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tied = tied_names(model)

    def convert(pairs: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        saved = {name: tensor for name, tensor in pairs if name not in tied}
        yield from revert_weight_conversion(model, saved).items()

    return lambda pairs: load_weights(convert(pairs))


def tied_names(model: torch.nn.Module) -> set[str]:
    """Names in a module's state that denote the same parameter as an earlier one.

    ``save_pretrained`` leaves them out, so a loader of checkpoints need not know them.
    """
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name for name, tensor in state.items() if first.setdefault(id(tensor), name) != name}


def turned_first(load_weights: LoadWeights, model: torch.nn.Module) -> LoadWeights:
    """As `saved_first`, for checkpoints whose tensors transformers transposes when it loads them.

    It does so by comparing shapes, and therefore does not turn them back when it saves a model in
    which they have the right shape; a loader of such checkpoints wants them turned back.

    Args:
        load_weights: takes the names of checkpoints.
        model: the Hugging Face model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter

    twin = copy.copy(model)
    twin._weight_conversions = [  # type: ignore[assignment]
        conversion
        for conversion in get_model_conversion_mapping(model, add_legacy=False)
        if not isinstance(conversion, PrefixChange)
    ]
    for conversion in twin._weight_conversions:
        for operation in conversion.operations if isinstance(conversion, WeightConverter) else ():
            if hasattr(operation, "check_dims"):
                operation.check_dims = False
    return saved_first(load_weights, twin)
