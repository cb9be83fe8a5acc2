"""From strided views to boxes: which block of one tensor a copy moves into which block of another.

Pure integers. A `Root` is a tensor that owns elements (a source, a parameter, an intermediate
result); views of it are (offset, sizes, strides) in elements of its storage. `blocks` takes a copy
between views of two roots apart into axis-aligned blocks.
"""

from __future__ import annotations

from typing import Iterator, NamedTuple, Optional, Sequence

from weightd.errors import layout_error

# Most blocks that one copy may fall into; a layout that is more scattered is refused.
MAX_BLOCKS = 1 << 20

Ints = tuple[int, ...]


class Root:
    """Index space of a tensor that owns elements.

    Args:
        shape, strides: of the tensor; strides must nest (no two elements share memory).
        offset: of its first element in the storage.
    """

    def __init__(self, shape: Sequence[int], strides: Sequence[int], offset: int = 0) -> None:
        self.shape: Ints = tuple(shape)
        self.strides: Ints = tuple(strides)
        self.offset = offset
        wide = [dim for dim, size in enumerate(self.shape) if size > 1]
        self._order = sorted(wide, key=lambda dim: -self.strides[dim])
        self.dim_of_stride = {self.strides[dim]: dim for dim in wide}
        self.numel = volume(self.shape)
        span = sum((self.shape[dim] - 1) * self.strides[dim] for dim in wide) + 1
        self.end = offset + (span if self.numel else 0)
        self.nests = all(
            self.strides[outer] >= self.strides[inner] * self.shape[inner] > 0
            for outer, inner in zip(self._order, self._order[1:])
        ) and all(self.strides[dim] > 0 for dim in wide)

    def locate(self, offset: int) -> list[int]:
        """Coordinates of the element at a storage offset."""
        place = [0] * len(self.shape)
        rest = offset - self.offset
        for dim in self._order:
            place[dim], rest = divmod(rest, self.strides[dim])
        return place


class Block(NamedTuple):
    """A block of a copy: `dims` pairs (target dimension, source dimension, length)."""

    target_origin: list[int]
    source_origin: list[int]
    dims: list[tuple[int, int, int]]


def volume(extent: Sequence[int]) -> int:
    """Number of elements of a block."""
    count = 1
    for size in extent:
        count *= size
    return count


def blocks(
    sizes: Sequence[int],
    target: Root,
    target_view: tuple[int, Sequence[int]],
    source: Optional[Root] = None,
    source_view: tuple[int, Sequence[int]] = (0, ()),
) -> Iterator[Block]:
    """Takes a copy between two views of equal `sizes` apart.

    Args:
        sizes: of both views.
        target: root that is written.
        target_view: (storage offset, strides) of the view of it.
        source: root that is read; None for a fill.
        source_view: the same of the view of it.

    Yields:
        Blocks that together are the copy, each axis-aligned in both roots.

    Raises:
        errors.LayoutError: more than MAX_BLOCKS.
    """
    if 0 in sizes:
        return
    source_strides = source_view[1] if source is not None else (0,) * len(sizes)
    dims = [
        (size, to, at)
        for size, to, at in zip(sizes, target_view[1], source_strides)
        if size > 1
    ]
    dims.sort(key=lambda dim: -dim[1])
    joined: list[tuple[int, int, int]] = []
    for size, to, at in dims:
        if joined and joined[-1][1:] == (size * to, size * at):
            size *= joined.pop()[0]
        joined.append((size, to, at))
    count = 0
    stack = [(joined, target_view[0], source_view[0])]
    while stack:
        found = _step(stack.pop(), target, source, stack)
        if found is None:
            continue
        count += 1
        if count > MAX_BLOCKS:
            raise layout_error(
                f"one copy of the engine's loader falls into more than {MAX_BLOCKS} blocks",
                reason="LOADER_COMPUTES",
                remedy="write a rule file for this model; see loaders/README.md",
            )
        yield found


def _step(work: tuple, target: Root, source: Optional[Root], stack: list) -> Optional[Block]:
    """Yields a block if every dimension steps by one inside both roots, else cuts the copy."""
    dims, to_offset, at_offset = work
    origin = target.locate(to_offset)
    start = source.locate(at_offset) if source is not None else []
    followed: list[tuple[int, int, int]] = []
    used: tuple[set[int], set[int]] = (set(), set())
    for index, (size, to, at) in enumerate(dims):
        rest = dims[:index] + dims[index + 1 :]
        pair = [-1, -1]
        for side, root, place, stride in ((0, target, origin, to), (1, source, start, at)):
            if root is None:
                continue
            dim = root.dim_of_stride.get(stride)
            if dim is None or dim in used[side]:
                for k in reversed(range(size)):
                    stack.append((rest, to_offset + k * to, at_offset + k * at))
                return None
            length = root.shape[dim]
            room = length - place[dim]
            if size > room:
                _cut(dims, index, length, room, to_offset, at_offset, stack)
                return None
            used[side].add(dim)
            pair[side] = dim
        followed.append((pair[0], pair[1], size))
    return Block(origin, start, followed)


def _cut(
    dims: list, index: int, length: int, room: int, to_offset: int, at_offset: int, stack: list
) -> None:
    """Cuts a run that leaves a dimension of `length`, of which `room` is left, at its border."""
    size, to, at = dims[index]
    before, after = dims[:index], dims[index + 1 :]
    if room == length and size % length == 0:
        both = [(size // length, to * length, at * length), (length, to, at)]
        stack.append((before + both + after, to_offset, at_offset))
        return
    first = size - size % length if room == length else room
    last = (size - first, to, at)
    stack.append((before + [last] + after, to_offset + first * to, at_offset + first * at))
    stack.append((before + [(first, to, at)] + after, to_offset, at_offset))
