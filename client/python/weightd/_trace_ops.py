"""What torch's operations mean to the recorder: which only move elements, and where to.

A handler gets the recorder, the operation and its arguments, of which at least one tensor is
tracked. It records and returns what the operation would, or NotImplemented: then the result counts
as computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Optional, Sequence

import torch
from torch.utils._pytree import tree_map

from weightd._trace_pieces import ZERO

if TYPE_CHECKING:
    from weightd._trace_recorder import Recorder

_aten = torch.ops.aten
Handler = Callable[["Recorder", Any, tuple, dict[str, Any]], Any]

# Views that do not say so in their schema.
VIEWS = frozenset(
    {_aten._unsafe_view.default, _aten._reshape_alias.default, _aten.lift_fresh.default}
)


def on_shapes(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Runs an operation on tensors without memory."""
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    return func(*tree_map(_shape_only, args), **tree_map(_shape_only, kwargs))


def _shape_only(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("meta")
    if not isinstance(value, torch.Tensor) or value.device.type == "meta":
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _copy(recorder: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    recorder.copy(args[0], args[1])
    return args[0]


def _clone(recorder: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    answer = recorder.scratch(on_shapes(func, args, kwargs))
    recorder.copy(answer, args[0])
    return answer


def _fill(recorder: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    recorder.fill_number(args[0], args[1])
    return args[0]


def _fill_tensor(recorder: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    recorder.copy(args[0], args[1])
    return args[0]


def _zero(recorder: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    recorder.fill(args[0], ZERO)
    return args[0]


def _item(recorder: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    return recorder.read_out(args[0])


def _cat(recorder: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    answer = recorder.scratch(on_shapes(func, args, kwargs))
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    begin = 0
    for part in args[0]:
        if part.numel() == 0:
            continue
        recorder.copy(answer.narrow(dim, begin, part.shape[dim]), part)
        begin += part.shape[dim]
    return answer


def _stack(recorder: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    answer = recorder.scratch(on_shapes(func, args, kwargs))
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    for index, part in enumerate(args[0]):
        recorder.copy(answer.select(dim, index), part)
    return answer


def _pad(recorder: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    tensor, padding = args[0], args[1]
    answer = recorder.scratch(on_shapes(func, args, kwargs))
    recorder.fill_number(answer, args[2] if len(args) > 2 else kwargs.get("value", 0))
    inner, part = answer, tensor
    for pair in range(len(padding) // 2):
        dim = tensor.dim() - 1 - pair
        before, after = padding[2 * pair], padding[2 * pair + 1]
        part = part.narrow(dim, max(0, -before), part.shape[dim] - max(0, -before) - max(0, -after))
        inner = inner.narrow(dim, max(0, before), part.shape[dim])
    recorder.copy(inner, part)
    return answer


def _repeat(recorder: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    answer = recorder.scratch(on_shapes(func, args, kwargs))
    tensor = args[0]
    tensor = tensor.reshape((1,) * (answer.dim() - tensor.dim()) + tuple(tensor.shape))
    folded, wide = [], []
    for times, size in zip(args[1], tensor.shape):
        folded += [times, size]
        wide += [1, size]
    recorder.copy(answer.view(folded), tensor.view(wide))
    return answer


def _flip(recorder: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    answer = recorder.scratch(on_shapes(func, args, kwargs))
    tensor, dims = args[0], [dim % args[0].dim() for dim in args[1]]
    if len(dims) != 1:
        return NotImplemented
    size = tensor.shape[dims[0]]
    for index in range(size):
        part = tensor.select(dims[0], size - 1 - index)
        recorder.copy(answer.select(dims[0], index), part)
    return answer


def _runs(places: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(position, first place, length) of every run of places that count up by one."""
    begin = 0
    for end in range(1, len(places) + 1):
        if end == len(places) or places[end] != places[end - 1] + 1:
            yield begin, places[begin], end - begin
            begin = end


def _places(recorder: Recorder, index: torch.Tensor, size: int) -> Optional[list[int]]:
    """The elements that an index tensor picks along a dimension; None if it is no plain list."""
    if index.device.type == "meta" or recorder.touches(index) or index.dim() != 1:
        return None
    if index.dtype in (torch.bool, torch.uint8):
        return torch.nonzero(index).flatten().tolist()
    return [place % size for place in index.tolist()]


def _only_index(indices: Sequence[Optional[torch.Tensor]]) -> Optional[int]:
    """The one dimension that is indexed; None if there are several."""
    given = [dim for dim, index in enumerate(indices) if index is not None]
    return given[0] if len(given) == 1 else None


def _pick(recorder: Recorder, tensor: torch.Tensor, dim: int, index: torch.Tensor) -> Any:
    places = _places(recorder, index, tensor.shape[dim])
    if places is None:
        return NotImplemented
    shape = [*tensor.shape]
    shape[dim] = len(places)
    answer = recorder.scratch(torch.empty(shape, dtype=tensor.dtype, device="meta"))
    for at, first, length in _runs(places):
        recorder.copy(answer.narrow(dim, at, length), tensor.narrow(dim, first, length))
    return answer


def _index_select(recorder: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    return _pick(recorder, args[0], args[1] % max(1, args[0].dim()), args[2])


def _index(recorder: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    dim = _only_index(args[1])
    return NotImplemented if dim is None else _pick(recorder, args[0], dim, args[1][dim])


def _index_put(recorder: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    target, indices, values = args[:3]
    dim = _only_index(indices)
    if dim is None or (args[3] if len(args) > 3 else kwargs.get("accumulate", False)):
        return NotImplemented
    places = _places(recorder, indices[dim], target.shape[dim])
    if places is None:
        return NotImplemented
    shape = [*target.shape]
    shape[dim] = len(places)
    values = values.expand(shape)
    for at, first, length in _runs(places):
        recorder.copy(target.narrow(dim, first, length), values.narrow(dim, at, length))
    return target


def _index_copy(recorder: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    target, dim, index, values = args
    indices = [None] * (dim % target.dim()) + [index]
    return _index_put(recorder, func, (target, indices, values), {})


def _empty(recorder: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    return recorder.scratch(on_shapes(func, args, kwargs))


def _zeros(recorder: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    return recorder.scratch(on_shapes(func, args, kwargs), ZERO)


def _full(recorder: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    answer = recorder.scratch(on_shapes(func, args, kwargs))
    recorder.fill_number(answer, args[1])
    return answer


def _factory(made: Handler) -> Handler:
    """Tensors of floating point that a loader makes get no memory; others are real (indices)."""

    def make(recorder: Recorder, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        dtype = kwargs.get("dtype")
        counts = len(args) > 1 and isinstance(args[1], int)  # torch.full of an integer
        if not (dtype.is_floating_point if dtype is not None else not counts):
            return func(*args, **kwargs)
        return made(recorder, func, args, {**kwargs, "device": torch.device("meta")})

    return make


FACTORIES: dict[Any, Handler] = {
    _aten.empty.memory_format: _factory(_empty),
    _aten.empty_strided.default: _factory(_empty),
    _aten.zeros.default: _factory(_zeros),
    _aten.full.default: _factory(_full),
}

HANDLERS: dict[Any, Handler] = {
    _aten.copy_.default: _copy,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _clone,
    _aten.fill_.Scalar: _fill,
    _aten.fill_.Tensor: _fill_tensor,
    _aten.zero_.default: _zero,
    _aten._local_scalar_dense.default: _item,
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
    _aten.constant_pad_nd.default: _pad,
    _aten.repeat.default: _repeat,
    _aten.flip.default: _flip,
    _aten.index_select.default: _index_select,
    _aten.index.Tensor: _index,
    _aten.index_put_.default: _index_put,
    _aten.index_copy_.default: _index_copy,
    _aten.empty_like.default: _empty,
    _aten.new_empty.default: _empty,
    _aten.new_empty_strided.default: _empty,
    _aten.zeros_like.default: _zeros,
    _aten.new_zeros.default: _zeros,
    _aten.full_like.default: _full,
    _aten.new_full.default: _full,
}
