"""What every element of a tensor holds while a loader is traced: blocks of sources, or no source.

Pure integers. A `Content` keeps the pieces that were written to a root; `compose` and `fill` make
them from the blocks of a copy or fill, `merged` joins what belongs together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, NamedTuple, Optional, Sequence

from weightd._trace_boxes import Block, Ints, Root, volume


@dataclass(frozen=True)
class Opaque:
    """A value that is no element of a source: zero, undefined, a constant, or computed."""

    kind: str
    operation: str = ""
    names: frozenset[str] = frozenset()


ZERO = Opaque("zero")
UNDEFINED = Opaque("undefined")


class Piece(NamedTuple):
    """A block of a root and what it holds.

    Attributes:
        origin, extent: the block.
        value: position of a source, or an `Opaque`.
        source_origin: where the block begins in the source; empty for an `Opaque`.
        source_dim: per dimension of the block, the source dimension that it follows; -1 for none
            (then its extent is 1). Source dimensions that none follows have extent 1.
        via: element types that the values went through on their way.
    """

    origin: Ints
    extent: Ints
    value: object
    source_origin: Ints = ()
    source_dim: Ints = ()
    via: frozenset = frozenset()

    def clip(self, origin: Ints, extent: Ints) -> Piece:
        """The part of this piece in a block that lies inside it."""
        if isinstance(self.value, Opaque):
            return self._replace(origin=origin, extent=extent)
        start = list(self.source_origin)
        for dim, follows in enumerate(self.source_dim):
            if follows >= 0:
                start[follows] += origin[dim] - self.origin[dim]
        return self._replace(origin=origin, extent=extent, source_origin=tuple(start))


class Content:
    """What the elements of a root hold: later writes win, the rest is undefined."""

    def __init__(self, root: Root, pieces: Sequence[Piece] = ()) -> None:
        self.root = root
        self._pieces: list[Piece] = []
        self._log: list[Sequence[Piece]] = []
        self.write(pieces)

    def write(self, pieces: Sequence[Piece]) -> None:
        """Writes pieces, which are disjoint, over what was there."""
        if pieces:
            self._log.append(pieces)

    def pieces(self) -> list[Piece]:
        """Disjoint pieces; elements in none of them were never written."""
        if self._log:
            found = self._pieces + [piece for batch in self._log for piece in batch]
            if len(found) > 1 and _overlaps(found):
                found = _last_wins([self._pieces, *self._log])
            self._pieces, self._log = found, []
        return self._pieces

    def read(self, origin: Ints, extent: Ints) -> Iterator[Piece]:
        """The pieces inside a block, clipped to it, with what is undefined as pieces of its own."""
        left = volume(extent)
        found = []
        for piece in self.pieces():
            common = intersect(piece.origin, piece.extent, origin, extent)
            if common is not None:
                found.append(piece if common == piece[:2] else piece.clip(*common))
                left -= volume(common[1])
        yield from found
        if left:
            rest = [Piece(origin, extent, UNDEFINED)]
            for piece in found:
                rest = [part for one in rest for part in _without(one, piece)]
            yield from rest


def intersect(
    origin: Ints, extent: Ints, other_origin: Ints, other_extent: Ints
) -> Optional[tuple[Ints, Ints]]:
    """The common block of two blocks; None if they have no element in common."""
    low, size = [], []
    for begin, length, other_begin, other_length in zip(
        origin, extent, other_origin, other_extent
    ):
        first = max(begin, other_begin)
        last = min(begin + length, other_begin + other_length)
        if last <= first:
            return None
        low.append(first)
        size.append(last - first)
    return tuple(low), tuple(size)


def _without(piece: Piece, hole: Piece) -> Iterator[Piece]:
    """What is left of `piece` outside the block of `hole`."""
    common = intersect(piece.origin, piece.extent, hole.origin, hole.extent)
    if common is None:
        yield piece
        return
    low, size = list(piece.origin), list(piece.extent)
    for dim, (begin, length) in enumerate(zip(*common)):
        for first, last in ((low[dim], begin), (begin + length, low[dim] + size[dim])):
            if last > first:
                at = tuple(low[:dim] + [first] + low[dim + 1 :])
                yield piece.clip(at, tuple(size[:dim] + [last - first] + size[dim + 1 :]))
        low[dim], size[dim] = begin, length


def _last_wins(log: Sequence[Sequence[Piece]]) -> list[Piece]:
    """What is left of batches of disjoint pieces that were written one over the other."""
    kept: list[Piece] = []
    for batch in log:
        if not batch:
            continue
        low = tuple(map(min, zip(*(piece.origin for piece in batch))))
        ends = (map(sum, zip(piece.origin, piece.extent)) for piece in batch)
        size = tuple(end - begin for begin, end in zip(low, map(max, zip(*ends))))
        whole = Piece(low, size, UNDEFINED)
        survived = []
        for one in kept:
            rest = [one]
            if intersect(*one[:2], *whole[:2]) is not None:
                for piece in batch:
                    rest = [part for left in rest for part in _without(left, piece)]
            survived += rest
        kept = survived + list(batch)
    return kept


def _overlaps(pieces: list[Piece]) -> bool:
    """Sweeps along the dimension in which the pieces begin at the most places."""
    dims = len(pieces[0].origin)
    if dims == 0:
        return len(pieces) > 1
    along = max(range(dims), key=lambda dim: len({piece.origin[dim] for piece in pieces}))
    active: list[Piece] = []
    for piece in sorted(pieces, key=lambda one: one.origin[along]):
        begin = piece.origin[along]
        active = [one for one in active if one.origin[along] + one.extent[along] > begin]
        if any(intersect(*one[:2], *piece[:2]) is not None for one in active):
            return True
        active.append(piece)
    return False


def compose(block: Block, target_dims: int, source: Content, via: frozenset) -> list[Piece]:
    """The pieces that one block of a copy writes, traced back to what its source holds."""
    extent = [1] * target_dims
    source_extent = [1] * len(block.source_origin)
    follows = [-1] * target_dims
    for to, at, size in block.dims:
        extent[to] = size
        source_extent[at] = size
        follows[to] = at
    written = []
    start = tuple(block.source_origin)
    for piece in source.read(start, tuple(source_extent)):
        origin, size = list(block.target_origin), list(extent)
        for to, at, _ in block.dims:
            origin[to] += piece.origin[at] - start[at]
            size[to] = piece.extent[at]
        dims = piece.source_dim
        mapped = tuple(dims[at] if at >= 0 and dims else -1 for at in follows)
        seen = piece.via | via
        written.append(
            Piece(tuple(origin), tuple(size), piece.value, piece.source_origin, mapped, seen)
        )
    return written


def fill(block: Block, target_dims: int, value: Opaque) -> Piece:
    """The piece that one block of a fill writes."""
    extent = [1] * target_dims
    for to, _, size in block.dims:
        extent[to] = size
    return Piece(tuple(block.target_origin), tuple(extent), value)


def merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Joins disjoint pieces that continue each other, dimension by dimension."""
    found = list(pieces)
    for dim in reversed(range(len(found[0].origin) if found else 0)):
        if len(found) < 2:
            break
        found.sort(key=lambda one: _line(one, dim))
        joined = [found[0]]
        for piece in found[1:]:
            both = _join(joined[-1], piece, dim)
            if both is None:
                joined.append(piece)
            else:
                joined[-1] = both
        found = joined
    return sorted(found, key=lambda one: one.origin)


def _line(piece: Piece, dim: int) -> tuple:
    origin, extent = piece.origin, piece.extent
    others = origin[:dim] + origin[dim + 1 :], extent[:dim] + extent[dim + 1 :]
    return (*others, origin[dim])


def _join(first: Piece, second: Piece, dim: int) -> Optional[Piece]:
    """One piece for two neighbours along `dim`, if the second goes on where the first ends."""
    length = first.extent[dim]
    if first.value != second.value or first.via != second.via:
        return None
    if _line(first, dim)[:2] != _line(second, dim)[:2]:
        return None
    if first.origin[dim] + length != second.origin[dim]:
        return None
    extent = list(first.extent)
    extent[dim] += second.extent[dim]
    whole = first._replace(extent=tuple(extent))
    if isinstance(first.value, Opaque):
        return whole
    steps = [b - a for a, b in zip(first.source_origin, second.source_origin)]
    moved = [index for index, step in enumerate(steps) if step != 0]
    if len(moved) != 1 or steps[moved[0]] != length:
        return None
    dims = list(first.source_dim)
    dims[dim] = moved[0]
    for piece in (first, second):
        if piece.extent[dim] > 1 and piece.source_dim[dim] != moved[0]:
            return None
        elsewhere = [d for d in range(len(dims)) if d != dim and piece.extent[d] > 1]
        if any(piece.source_dim[d] != first.source_dim[d] for d in elsewhere):
            return None
        if any(piece.source_dim[d] == moved[0] for d in elsewhere):
            return None
    dims = [
        follows if size > 1 else -1 for follows, size in zip(dims, extent)
    ]
    return whole._replace(source_dim=tuple(dims))
