"""Watches an engine's loader at torch's dispatcher: no element is moved, only where it would go.

Sources are tensors without memory, parameters the engine's own. Views of both are made by torch;
what would move elements between storages is recorded as boxes and not run. Anything that would
compute new values is run on shapes alone and its result remembered as computed.
"""

from __future__ import annotations

import math
from typing import Any, Iterable, Iterator, Mapping, Optional, Sequence

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from weightd._trace_boxes import Root, blocks
from weightd._trace_ops import FACTORIES, HANDLERS, VIEWS, on_shapes
from weightd._trace_pieces import (
    UNDEFINED,
    ZERO,
    Content,
    Opaque,
    Piece,
    compose,
    fill,
    merged,
)
from weightd.errors import Error, layout_error

_REMEDY = "write a rule file for this model; see loaders/README.md"
_SWEEP = 4096
# A number that no loader writes by itself; the n-th element read out as a Python number is n of it.
_TOKEN = 2.0**900


class Tracked:
    """A tensor that owns elements, and what they hold."""

    def __init__(self, label: str, tensor: torch.Tensor, pieces: Sequence[Piece] = ()) -> None:
        self.label = label
        self.dtype = tensor.dtype
        self.root = Root(tensor.shape, tensor.stride(), tensor.storage_offset())
        self.content = Content(self.root, pieces)
        self.storage = StorageWeakRef(tensor.untyped_storage())


class Recorder(TorchDispatchMode):
    """Records what a loader does with sources and parameters while the mode is active.

    Args:
        params: name and tensor of every parameter, none sharing memory with another.
    """

    def __init__(self, params: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().__init__()
        self.failure: Optional[Error] = None
        self._sources: list[tuple[str, torch.dtype]] = []
        self._tracked: dict[int, list[Tracked]] = {}
        self._tokens: list[torch.Tensor] = []
        self._sweep_at = _SWEEP
        for name, tensor in params:
            self._track(Tracked(name, tensor))

    def source(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Makes the tagged tensor of the next source: no memory, every element its own tag."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
        dims = tuple(range(len(shape)))
        whole = Piece((0,) * len(shape), tuple(shape), len(self._sources), (0,) * len(shape), dims)
        self._sources.append((name, dtype))
        self._tracked.pop(tensor.untyped_storage()._cdata, None)  # made under this mode
        self._track(Tracked(name, tensor, [whole]))
        return tensor

    def content(self, tensor: torch.Tensor) -> list[Piece]:
        """What a whole parameter holds now."""
        found = self.find(tensor)
        assert found is not None, "not a parameter of this recorder"
        shape = found.root.shape
        return merged(list(found.content.read((0,) * len(shape), shape)))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple = (),
        kwargs: Optional[dict[str, Any]] = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view or func in VIEWS:
            return func(*args, **kwargs)
        try:
            if func in FACTORIES:
                return FACTORIES[func](self, func, args, kwargs)
            if not self.touches(args, kwargs):
                return func(*args, **_real(kwargs))
            answer = NotImplemented
            if func in HANDLERS:
                answer = HANDLERS[func](self, func, args, kwargs)
            return self._compute(func, args, kwargs) if answer is NotImplemented else answer
        except Error as error:
            self.failure = self.failure or error  # a loader may swallow what it raises
            raise

    # ---- what is tracked

    def _track(self, tracked: Tracked) -> None:
        self._tracked.setdefault(tracked.storage.cdata, []).append(tracked)
        if len(self._tracked) > self._sweep_at:
            dead = [key for key, roots in self._tracked.items() if roots[0].storage.expired()]
            for key in dead:
                del self._tracked[key]
            self._sweep_at = len(self._tracked) + _SWEEP

    def find(self, tensor: torch.Tensor) -> Optional[Tracked]:
        """The tracked tensor of which this is a view."""
        found = self._tracked.get(tensor.untyped_storage()._cdata)
        if found is None:
            return None
        begin = tensor.storage_offset()
        for tracked in found:
            inside = tracked.root.offset <= begin < tracked.root.end
            if inside and tracked.dtype.itemsize == tensor.element_size():
                return tracked
        return None if tensor.numel() else found[0]

    def touches(self, *trees: Any) -> bool:
        return any(
            isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata in self._tracked
            for leaf in tree_flatten(trees)[0]
        )

    def scratch(self, tensor: torch.Tensor, value: Optional[Opaque] = None) -> torch.Tensor:
        shape = tuple(tensor.shape)
        pieces = [] if value is None else [Piece((0,) * len(shape), shape, value)]
        self._track(Tracked("", tensor, pieces))
        return tensor

    # ---- what is recorded

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Records that `target` receives the elements of `source`, broadcast to its shape."""
        written, read = self.find(target), self.find(source)
        if written is None or read is None:
            return self._copy_unknown(target, source, written)
        seen_as, kept_as = (target.dtype, source.dtype), (written.dtype, read.dtype)
        if seen_as != kept_as and (seen_as[0] != seen_as[1] or kept_as[0] != kept_as[1]):
            return self.fill(target, _reinterpreted(self._names(source)))
        source = source.expand(target.shape)
        via = frozenset((read.dtype,)) if read.label == "" else frozenset()
        dims = len(written.root.shape)
        found = blocks(
            target.shape,
            written.root,
            (target.storage_offset(), target.stride()),
            read.root,
            (source.storage_offset(), source.stride()),
        )
        pieces = [compose(block, dims, read.content, via) for block in found]
        written.content.write([piece for part in pieces for piece in part])

    def _copy_unknown(
        self, target: torch.Tensor, source: torch.Tensor, written: Optional[Tracked]
    ) -> None:
        """One side is memory that is neither source nor parameter, or another view of its bits."""
        names = self._names(source)
        if written is not None and not names and not self.touches(source):
            plain = source.device.type != "meta" and not torch.count_nonzero(source).item()
            return self.fill(target, ZERO if plain else Opaque("constant", "copy_"))
        if written is not None:
            return self.fill(target, _reinterpreted(names))
        if self.touches(target):
            return self._spoil(target, _reinterpreted(names))
        if names:
            raise layout_error(
                "the engine's loader puts a tensor into memory that is no registered parameter: "
                f"shape={list(target.shape)}",
                reason="LOADER_COMPUTES",
                tensor=min(names),
                remedy="register that buffer with the parameters, or write a rule file",
            )

    def _spoil(self, tensor: torch.Tensor, value: Opaque) -> None:
        """Every tracked tensor in this storage now holds `value`."""
        for tracked in self._tracked[tensor.untyped_storage()._cdata]:
            shape = tracked.root.shape
            tracked.content.write([Piece((0,) * len(shape), shape, value)])

    def fill(self, target: torch.Tensor, value: Opaque) -> None:
        """Records that `target` receives one value that is no source's."""
        written = self.find(target)
        if written is None:
            return self._spoil(target, value)
        dims = len(written.root.shape)
        view = (target.storage_offset(), target.stride())
        found = blocks(target.shape, written.root, view)
        written.content.write([fill(block, dims, value) for block in found])

    def fill_number(self, target: torch.Tensor, number: Any) -> None:
        """Records a fill with a Python number, which may be an element read out before."""
        index = number / _TOKEN if isinstance(number, float) else 0.0
        if 1 <= index <= len(self._tokens) and index == int(index):
            self.copy(target, self._tokens[int(index) - 1])
        elif number == 0 and math.copysign(1.0, number) > 0:
            self.fill(target, ZERO)
        else:
            self.fill(target, Opaque("constant", f"fill with {number}"))

    def read_out(self, tensor: torch.Tensor) -> float:
        """A Python number that stands for an element of a source; of nothing else there is one."""
        if any(isinstance(piece.value, Opaque) for piece in self._held(tensor)):
            raise self.refusal("reading a value", self._names(tensor))
        self._tokens.append(tensor)
        return len(self._tokens) * _TOKEN

    def _names(self, *trees: Any) -> frozenset[str]:
        """Sources from which the tensors in `trees` come."""
        names: set[str] = set()
        for leaf in tree_flatten(trees)[0]:
            if not isinstance(leaf, torch.Tensor):
                continue
            for piece in self._held(leaf):
                if isinstance(piece.value, Opaque):
                    names |= piece.value.names
                else:
                    names.add(self._sources[piece.value][0])
        return frozenset(names)

    def _held(self, view: torch.Tensor) -> Iterator[Piece]:
        """What a view holds; all of its storage where it is no plain view of a tracked tensor."""
        tracked = self.find(view)
        if tracked is None:
            for other in self._tracked.get(view.untyped_storage()._cdata, ()):
                yield from other.content.pieces()
            return
        dims = [(n, step) for n, step in zip(view.shape, view.stride()) if step]
        sizes, strides = [n for n, _ in dims], [step for _, step in dims]
        rank = len(tracked.root.shape)
        for block in blocks(sizes, tracked.root, (view.storage_offset(), strides)):
            place = fill(block, rank, UNDEFINED)
            yield from tracked.content.read(place.origin, place.extent)

    def _compute(self, func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Runs an operation on shapes alone; whatever it writes or returns is computed."""
        names = self._names(args, kwargs)
        try:
            answer = on_shapes(func, args, kwargs)
        except Exception as cause:
            raise self.refusal(str(func), names) from cause
        value = Opaque("computed", str(func), names)
        written = _written(func, args, kwargs)
        for tensor in written:
            if self.find(tensor) is not None:
                self.fill(tensor, value)
            else:
                self.copy(tensor, next(t for t in tree_flatten(args)[0] if self.touches(t)))
        if written:
            return written[0] if len(written) == 1 else tuple(written)
        leaves = tree_flatten(answer)[0]
        if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise self.refusal(str(func), names)
        for leaf in leaves:
            self.scratch(leaf, value)
        return answer

    def refusal(self, operation: str, names: Iterable[str], where: str = "") -> Error:
        """The error for a loader that computes with values instead of placing them."""
        found = sorted(names)
        more = f" and {len(found) - 1} more sources" if len(found) > 1 else ""
        return layout_error(
            f"the engine's loader computes with values of this tensor{more}: "
            f"operation={operation}{where}",
            reason="LOADER_COMPUTES",
            tensor=found[0] if found else "",
            remedy=_REMEDY,
        )


def _real(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Indices that are made beside a source, on its device, keep their values."""
    device = kwargs.get("device")
    if device is None or torch.device(device).type != "meta":
        return kwargs
    return {**kwargs, "device": torch.device("cpu")}


def _reinterpreted(names: frozenset[str]) -> Opaque:
    return Opaque("computed", "view as another type", names)


def _written(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensor arguments that an operation writes."""
    found: list[torch.Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        found += [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]
    return found
