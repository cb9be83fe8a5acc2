"""Registers an engine rank, with the trace of its loader where no rule file describes the model."""

from __future__ import annotations

import ctypes
import struct
from typing import Any, Callable, Optional, Union

from weightd import _native
from weightd.errors import layout_error
from weightd.traced import TracedLayout, TracedWrite

Layout = Union[TracedLayout, Callable[[], TracedLayout]]
_NO_RULE_FILE = ("UNKNOWN_ARCHITECTURE", "UNKNOWN_PROFILE")
# weightd_traced_write, which has no padding: param, source, then three lists of dims, source_dim.
_WRITE = struct.Struct(f"=Ii{3 * _native.MAX_DIMS}q{_native.MAX_DIMS}b")


def register(
    lib: Any,
    handle: int,
    array: ctypes.Array,
    count: int,
    layout: Optional[Layout],
    preferred: bool,
) -> None:
    """Registers the parameters of a ``weightd_param[]``.

    Args:
        lib: the library.
        handle: of the engine.
        array: what `engine.param_array` built.
        count: number of its parameters.
        layout: trace of this rank, a function that makes it, or None. A function is only called
            if no rule file describes the model.
        preferred: use a trace although a rule file describes the model.

    Raises:
        errors.Error: what the daemon refuses, or what makes the trace impossible.
    """
    if not isinstance(layout, TracedLayout):
        error = _native.take_error(lib.weightd_engine_register(handle, array, count))
        if error is None:
            return
        if layout is None or error.reason not in _NO_RULE_FILE:
            raise error
        layout = layout()
    trace = trace_struct(layout, array, count, preferred)
    _native.check(lib.weightd_engine_register_traced(handle, array, count, ctypes.byref(trace)))


def trace_struct(
    layout: TracedLayout, array: ctypes.Array, count: int, preferred: bool
) -> _native.Trace:
    """Builds ``weightd_trace`` for the parameters of a ``weightd_param[]``.

    Args:
        layout: of this rank. Parameters are found by name; a name that is an alias stands for the
            parameter whose memory it shares, and is left out if that one was traced, too.
        array: what `engine.param_array` built.
        count: number of its parameters.
        preferred: use the trace although a rule file describes the model.

    Raises:
        errors.LayoutError: UNKNOWN_TENSOR / SHAPE: the parameters are not those that were traced.
    """
    position = {array[i].name.decode(): i for i in range(count)}
    alias_of = {
        array[i].name.decode(): array[i].alias_of.decode()
        for i in range(count)
        if array[i].alias_of is not None
    }
    position |= {alias: position[name] for alias, name in alias_of.items()}
    traced = {name for name, _ in layout.params}
    places: list[Optional[int]] = []
    for name, shape in layout.params:
        place = position.get(name)
        if place is None:
            raise _not_traced("a traced parameter is not registered", "UNKNOWN_TENSOR", name)
        param = array[place]
        if tuple(param.shape[: param.num_dims]) != tuple(shape):
            message = (
                f"a parameter was traced with another shape: traced={list(shape)}, "
                f"registered={list(param.shape[: param.num_dims])}"
            )
            raise _not_traced(message, "SHAPE", name)
        written_as_another = alias_of.get(name) in traced
        places.append(None if written_as_another else place)
    kept = [write for write in layout.writes if places[write.param] is not None]
    sources = (_native.TracedSource * max(1, len(layout.sources)))()
    for target, (name, shape, _) in zip(sources, layout.sources):
        target.name = name.encode("utf-8")
        target.num_dims = len(shape)
        target.shape[: len(shape)] = shape
    writes = (_native.TracedWrite * max(1, len(kept)))()
    step = ctypes.sizeof(_native.TracedWrite)
    for index, write in enumerate(kept):
        _WRITE.pack_into(writes, index * step, *_numbers(places[write.param], write))
    trace = _native.Trace(
        ctypes.cast(sources, ctypes.POINTER(_native.TracedSource)),
        len(layout.sources),
        ctypes.cast(writes, ctypes.POINTER(_native.TracedWrite)),
        len(kept),
        int(preferred),
    )
    trace.keep_alive = (sources, writes)
    return trace


def _numbers(place: Optional[int], write: TracedWrite) -> list[Optional[int]]:
    """The fields of one ``weightd_traced_write`` in order."""
    numbers = [place, write.source]
    for dims in (write.target_origin, write.extent, write.source_origin, write.source_dim):
        numbers += dims
        numbers += [0] * (_native.MAX_DIMS - len(dims))
    return numbers


def _not_traced(message: str, reason: str, name: str) -> Exception:
    return layout_error(
        message,
        reason=reason,
        tensor=name,
        remedy="register the parameters that were traced, with the layout of this rank",
    )
