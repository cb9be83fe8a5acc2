"""Finds an engine's layout by tracing its own loader, for models that have no rule file.

    layout = weightd.trace.trace_loader(model.load_weights, model.named_parameters(), sources)
    rank = weightd.EngineRank(..., params=model.named_parameters(), layout=layout)

The loader runs once, on tensors without memory; nothing is written to the engine's parameters and
no weight is needed. What it does with them is watched at torch's dispatcher, so that slicing,
transposing, stacking, padding and replicating are exact for every element. A loader that computes
(adds, scales, quantises) is refused by the tensor's name. Needs torch.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Sequence, Union

import torch

from weightd._source import named_pairs
from weightd._trace_boxes import Root
from weightd._trace_pieces import UNDEFINED, ZERO, Opaque, Piece
from weightd._trace_recorder import Recorder
from weightd.errors import Error, layout_error
from weightd.traced import TracedLayout, TracedSource, TracedWrite

LoadWeights = Callable[[Iterable[tuple[str, torch.Tensor]]], Any]
Shape = Sequence[int]
# Names listed in a message.
_LISTED = 3
_MAX_HEADER_BYTES = 100 << 20


def trace_loader(
    load_weights: LoadWeights,
    params: Union[Mapping[str, Any], Iterable[tuple[str, Any]]],
    sources: Iterable[tuple[str, Union[torch.Tensor, Shape]]],
    module: Optional[torch.nn.Module] = None,
) -> TracedLayout:
    """Runs an engine's loader on tagged tensors and returns where it puts every element.

    Args:
        load_weights: the engine's own; takes an iterable of (name, tensor). It is fed one tensor
            at a time. It may be any callable that ends in the engine's loader, for instance one
            that first converts names.
        params: names and tensors of this rank's parameters in the layout that the loader fills;
            on any device, also ``meta``. They are not written. Names that share storage, offset
            and shape are traced as the first of them.
        sources: names and shapes of the trainer's tensors, or tensors with these shapes (``meta``
            is enough; their dtype is taken, float32 otherwise, which shows every rounding).
        module: the engine's, whose parameters are put back should the loader replace them; None:
            the owner of ``load_weights``, if it is a module.

    Returns:
        The layout: its blocks cover every parameter exactly once.

    Raises:
        errors.LayoutError: LOADER_COMPUTES if an element of a parameter is no element of a source
            or zero; UNCOVERED_PARAMETER if the loader leaves a parameter unwritten;
            LOADER_REFUSED if it raises; OVERLAP for parameters that share memory otherwise.
    """
    pairs = _distinct(named_pairs(params))
    recorder = Recorder(pairs)
    fed: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    owner = getattr(load_weights, "__self__", None) if module is None else module
    before = _parameter_dicts(owner)
    try:
        with torch.no_grad(), recorder:
            load_weights(_feed(recorder, sources, fed))
    except Error:
        raise
    except Exception as cause:
        if recorder.failure is not None:
            raise recorder.failure from cause
        raise layout_error(
            f"the engine's loader raises: {type(cause).__name__}: {cause}",
            reason="LOADER_REFUSED",
            tensor=fed[-1][0] if fed else "",
            remedy="feed it the names that it knows (checkpoint names, or those in memory), "
            "or leave the tensor out",
        ) from cause
    finally:
        replaced = _restore(before)
    if recorder.failure is not None:
        raise recorder.failure
    if replaced:
        raise layout_error(
            f"the engine's loader makes new parameters instead of filling its own: {replaced}",
            reason="LOADER_COMPUTES",
            tensor=replaced,
            remedy="trace it before anything is loaded, or write a rule file",
        )
    return _layout(recorder, pairs, fed)


def module_sources(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Names and tensors of a Hugging Face model as an FSDP2 trainer registers them.

    Args:
        module: the model; built on the ``meta`` device it costs no memory.
    """
    return [
        (name, tensor)
        for name, tensor in module.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    ]


def checkpoint_sources(folder: Union[str, Path]) -> list[tuple[str, torch.Tensor]]:
    """Names and shapes of the tensors of a checkpoint: reads the headers of its safetensors files.

    Args:
        folder: directory with ``*.safetensors`` files.

    Raises:
        errors.LayoutError: no such file, or a header that is damaged.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise layout_error(
            f"no safetensors file in the directory: {folder}",
            reason="MISSING_TENSOR",
            remedy="name the directory of a Hugging Face checkpoint",
        )
    return [pair for path in files for pair in _header(path)]


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _header(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one file, without memory."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER_BYTES, path.stat().st_size):
                raise ValueError(f"header of {length} bytes")
            entries = json.loads(file.read(length))
        for name, entry in entries.items():
            if name != "__metadata__":
                dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
                yield name, torch.empty(entry["shape"], dtype=dtype, device="meta")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, struct.error) as cause:
        raise layout_error(
            f"the header of a safetensors file cannot be read: {path}: {cause}",
            reason="SHAPE",
            remedy="download the file again",
        ) from cause


def _distinct(pairs: Sequence[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """Leaves out names that denote the memory of an earlier one."""
    seen: dict[tuple, str] = {}
    by_storage: dict[int, list[tuple[Root, str]]] = {}
    found = []
    for name, tensor in pairs:
        storage = tensor.untyped_storage()._cdata
        key = (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if seen.setdefault(key, name) != name:
            continue
        root = Root(tensor.shape, tensor.stride(), tensor.storage_offset())
        if not root.nests:
            raise layout_error(
                f"elements of the parameter share memory: strides={list(tensor.stride())}",
                reason="OVERLAP",
                tensor=name,
                remedy="trace the parameter itself, not an expanded view",
            )
        for other, other_name in by_storage.setdefault(storage, []):
            if root.offset < other.end and other.offset < root.end:
                raise layout_error(
                    f"two parameters share memory: {other_name} and {name}",
                    reason="OVERLAP",
                    tensor=name,
                    remedy="leave out the one that is derived from the other",
                )
        by_storage[storage].append((root, name))
        found.append((name, tensor))
    return found


def _feed(
    recorder: Recorder, sources: Iterable[tuple[str, Any]], fed: list
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, given in sources:
        is_tensor = isinstance(given, torch.Tensor)
        shape = tuple(int(size) for size in (given.shape if is_tensor else given))
        dtype = given.dtype if is_tensor else torch.float32
        fed.append((name, shape, dtype))
        yield name, recorder.source(name, shape, dtype)


def _parameter_dicts(module: Any) -> list[tuple[str, dict, dict]]:
    """The parameters that every submodule holds now."""
    if not isinstance(module, torch.nn.Module):
        return []
    return [
        (prefix, child._parameters, dict(child._parameters))
        for prefix, child in module.named_modules()
    ]


def _restore(before: list[tuple[str, dict, dict]]) -> str:
    """Puts replaced parameters back; returns the name of the first."""
    first = ""
    for prefix, now, then in before:
        changed = [n for n in {**then, **now} if now.get(n) is not then.get(n)]
        if not changed:
            continue
        first = first or f"{prefix}.{changed[0]}".lstrip(".")
        now.clear()
        now.update(then)
    return first


def _layout(
    recorder: Recorder, pairs: Sequence[tuple[str, torch.Tensor]], fed: list
) -> TracedLayout:
    """Turns what the recorder saw into a layout, or says what it cannot be."""
    writes: list[TracedWrite] = []
    used: set[int] = set()
    unwritten: list[str] = []
    for position, (name, tensor) in enumerate(pairs):
        for piece in recorder.content(tensor):
            if piece.value == UNDEFINED:
                if name not in unwritten[-1:]:
                    unwritten.append(name)
                continue
            _check(recorder, piece, name, tensor, fed)
            is_source = not isinstance(piece.value, Opaque)
            if is_source:
                used.add(piece.value)
            writes.append(
                TracedWrite(
                    position,
                    piece.value if is_source else -1,
                    piece.origin,
                    piece.extent,
                    piece.source_origin if is_source else (),
                    _followed(piece) if is_source else (),
                )
            )
    if unwritten:
        more = len(unwritten) - _LISTED
        raise layout_error(
            f"the engine's loader leaves elements of parameters unwritten: "
            f"{', '.join(unwritten[:_LISTED])}{f' and {more} more' if more > 0 else ''}",
            reason="UNCOVERED_PARAMETER",
            tensor=unwritten[0],
            remedy="feed the tensors that they are made of, or leave out parameters that are no "
            "weights",
        )
    return TracedLayout(
        params=tuple((name, tuple(tensor.shape)) for name, tensor in pairs),
        sources=tuple(
            TracedSource(name, shape, index in used) for index, (name, shape, _) in enumerate(fed)
        ),
        writes=tuple(writes),
    )


def _followed(piece: Piece) -> tuple[int, ...]:
    return tuple(dim if size > 1 else -1 for dim, size in zip(piece.source_dim, piece.extent))


def _check(recorder: Recorder, piece: Piece, param: str, tensor: torch.Tensor, fed: list) -> None:
    """Refuses values that are neither a source's element, cast once, nor zero."""
    where = f", parameter={param}"
    if isinstance(piece.value, Opaque):
        if piece.value == ZERO:
            return
        if piece.value.kind == "constant":
            raise layout_error(
                f"the engine's loader writes a constant into a parameter: "
                f"{piece.value.operation}, parameter={param}",
                reason="LOADER_COMPUTES",
                tensor=param,
                remedy="leave the parameter out if it is no weight, or write a rule file",
            )
        raise recorder.refusal(piece.value.operation, piece.value.names, where)
    name, _, dtype = fed[piece.value]
    for step in piece.via:
        if step != tensor.dtype and torch.promote_types(dtype, step) != step:
            raise recorder.refusal(f"rounding through {step}", [name], where)
