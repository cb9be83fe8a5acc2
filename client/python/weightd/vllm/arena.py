"""Memory in which derived parameters are received: one arena per device, shared by the stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Hashable, Iterator, Sequence

from weightd.vllm.post_load import TensorMark

_ALIGNMENT = 256


@dataclass
class Unit:
    """Tensors that are received in one stage, since one module holds them or they are tied.

    Attributes:
        owners: what is converted in that stage.
        marks: the tensors, each once.
        stage: number from 1.
    """

    owners: list[Any] = field(default_factory=list)
    marks: list[TensorMark] = field(default_factory=list)
    stage: int = 0

    def size_bytes(self) -> int:
        """Bytes in an arena."""
        return sum(_size_bytes(mark) for mark in self.marks)


def units_of(holders: Sequence[tuple[Any, Sequence[TensorMark]]]) -> list[Unit]:
    """Joins holders of the same tensor, each where the first of them stands.

    Args:
        holders: (owner, its tensors), in the model's order; owners without any are left out.
    """
    units: dict[int, Unit] = {}
    unit_of: dict[Hashable, Unit] = {}
    for owner, marks in holders:
        if not marks:
            continue
        found = {id(unit_of[mark]): unit_of[mark] for mark in marks if mark in unit_of}
        unit, *others = found.values() or [Unit()]
        units.setdefault(id(unit), unit)
        for other in others:
            unit.owners += other.owners
            unit.marks += other.marks
            del units[id(other)]
        unit.owners.append(owner)
        unit.marks += [mark for mark in dict.fromkeys(marks) if mark not in unit_of]
        unit_of |= {mark: unit for mark in unit.marks if _span_bytes(mark) > 0}
    return list(units.values())


def number_stages(units: Sequence[Unit], stage_bytes: int) -> int:
    """Gives units their stages, in order; each is filled up to a limit.

    Args:
        units: in the model's order.
        stage_bytes: limit of a stage; that of the largest unit if it has more.

    Returns:
        How many stages there are.
    """
    limit = max([stage_bytes, *(unit.size_bytes() for unit in units)])
    stage, filled = 0, limit
    for unit in units:
        size = unit.size_bytes()
        if stage == 0 or filled + size > limit:
            stage, filled = stage + 1, 0
        unit.stage = stage
        filled += size
    return stage


class Arena:
    """Buffers for the tensors of all units; those of different stages lie in the same memory."""

    def __init__(self, units: Sequence[Unit]) -> None:
        """Allocates the memory of every device.

        Args:
            units: with their stages.
        """
        import torch

        places: list[tuple[TensorMark, int]] = []
        filled: dict[tuple[Any, int], int] = {}
        sizes: dict[Any, int] = {}
        for unit in units:
            for mark in unit.marks:
                begin = filled.get((mark.device, unit.stage), 0)
                places.append((mark, begin))
                end = filled[mark.device, unit.stage] = begin + _size_bytes(mark)
                sizes[mark.device] = max(sizes.get(mark.device, 0), end)
        self._memory = {
            device: torch.empty(size, dtype=torch.uint8, device=device)
            for device, size in sizes.items()
        }
        self._places = places

    def size_bytes(self) -> int:
        """Bytes of all devices."""
        return sum(memory.numel() for memory in self._memory.values())

    def buffers(self) -> Iterator[tuple[TensorMark, Any]]:
        """Every tensor and its buffer."""
        for mark, begin in self._places:
            memory = self._memory[mark.device][begin : begin + _span_bytes(mark)]
            yield mark, memory.view(mark.dtype).as_strided(mark.shape, mark.stride)


def _span_bytes(mark: TensorMark) -> int:
    """Bytes from the first to the last element."""
    if 0 in mark.shape:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(mark.shape, mark.stride))
    return (last + 1) * mark.dtype.itemsize


def _size_bytes(mark: TensorMark) -> int:
    return -(-_span_bytes(mark) // _ALIGNMENT) * _ALIGNMENT
