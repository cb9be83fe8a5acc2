"""Parameters of an engine rank on their way to the C ABI."""

from __future__ import annotations

import ctypes
import json
from typing import Any, Iterable, Mapping, Optional

from weightd import _memory, _native
from weightd._layout import LocalTensor, describe
from weightd._marshal import fill_memory
from weightd._pull import Pull
from weightd.errors import layout_error

_KINDS = {"raw": 1, "derived": 2, "opaque": 3}
OPAQUE = _KINDS["opaque"]


def config_json(config: Any) -> str:
    """Hugging Face config as JSON; values that JSON does not know (dtypes) become their text."""
    value = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(value, Mapping):
        raise layout_error(
            f"config is neither a mapping nor has to_dict(): {type(config).__name__}",
            reason="CONFIG",
            remedy="pass the model's Hugging Face config",
        )
    return json.dumps(value, default=str)


def param_array(
    layout: list[LocalTensor],
    pairs: list[tuple[str, Any]],
    shared: Mapping[int, _memory.SharedStorage],
    kinds: Iterable[int],
    stages: Iterable[int],
    pull: Optional[Pull] = None,
) -> ctypes.Array:
    """Builds ``weightd_param[]``; names that denote the same memory, and are not received in
    different stages, become aliases of the first.

    Args:
        layout: what `describe` says of each tensor.
        pairs: (name, tensor).
        shared: their storages in shared memory.
        kinds: number of each parameter's kind.
        stages: stage of each parameter.
        pull: the parameters that cannot be lent, and what is lent instead.
    """
    array = (_native.Param * max(1, len(pairs)))()
    seen: dict[tuple, str] = {}
    rows = zip(array, layout, pairs, kinds, stages)
    for position, (target, local, (name, tensor), kind, stage) in enumerate(rows):
        target.name = name.encode("utf-8")
        target.dtype = local.dtype
        target.num_dims = len(local.shape)
        target.shape[: len(local.shape)] = local.shape
        target.kind = kind
        target.stage = stage
        if pull is not None and position in pull.places:
            tensor, place = pull.lent[position], pull.places[position]
            target.stage, target.pulled, target.stage_rows = place.stage, 1, place.rows
        if kind == OPAQUE:
            target.memory.fd = -1
            continue
        where = (_memory.storage_key(tensor), tensor.storage_offset())
        key = (where, local.shape, tensor.stride(), target.stage)
        first = seen.setdefault(key, name) if tensor.numel() else name
        target.alias_of = _native.encode(first) if first != name else None
        fill_memory(target.memory, tensor, shared)
    return array


def kind_numbers(pairs: list[tuple[str, Any]], kinds: Mapping[str, str]) -> list[int]:
    """The number of each parameter's kind.

    Raises:
        errors.LayoutError: there is no such kind.
    """
    for name, kind in kinds.items():
        if kind not in _KINDS:
            raise layout_error(
                f"unknown kind of parameter: {kind}",
                reason="CONFIG",
                tensor=name,
                remedy=f"use one of {', '.join(_KINDS)}",
            )
    return [_KINDS[kinds.get(name, "raw")] for name, _ in pairs]


def stage_numbers(pairs: list[tuple[str, Any]], stages: Mapping[str, int]) -> list[int]:
    """The stage of each parameter; 0 for those that are written in place.

    Raises:
        errors.LayoutError: a stage is no number from 1 on, or of no parameter.
    """
    unknown = stages.keys() - {name for name, _ in pairs}
    for name, stage in stages.items():
        if name in unknown or not isinstance(stage, int) or stage < 1:
            raise layout_error(
                f"cannot use the stage of a parameter: stage={stage!r}"
                + (", there is no such parameter" if name in unknown else ""),
                reason="UNKNOWN_TENSOR" if name in unknown else "CONFIG",
                tensor=name,
                remedy="number the stages of registered parameters from 1",
            )
    return [stages.get(name, 0) for name, _ in pairs]


def checked(name: str, tensor: Any, kind: int) -> LocalTensor:
    """Describes a parameter; one that is lent must be writable host memory.

    Raises:
        errors.LayoutError: unsupported shape or dtype, or elements that share memory.
        errors.UnsupportedError: not in host memory.
    """
    local = describe(name, tensor)
    if kind == OPAQUE:
        return local
    _memory.check_tensor(name, tensor)
    overlapping = any(s == 0 and n > 1 for s, n in zip(tensor.stride(), local.shape))
    if overlapping:
        raise layout_error(
            f"elements of the parameter share memory: strides={list(tensor.stride())}",
            reason="OVERLAP",
            tensor=name,
            remedy="register the parameter itself, not an expanded view",
        )
    return local
