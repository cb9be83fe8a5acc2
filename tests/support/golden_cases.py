"""Golden layouts: what engines' own loaders do to small models, and traced layouts in that form.

The folders are looked for in $WEIGHTD_SHARED, by default ../shared beside the source tree.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any, Mapping

import torch

from weightd.traced import TracedLayout

_ROOT = Path(__file__).resolve().parents[2]

# Per element of a parameter: position of the source (-1: zero, -2: none), offset in it.
Elements = tuple[torch.Tensor, torch.Tensor]


def case_files(folder: str) -> list[Path]:
    """Returns the case files of a folder of golden layouts; none if there is no such folder."""
    shared = Path(os.environ.get("WEIGHTD_SHARED", _ROOT / ".." / "shared"))
    return sorted((shared / folder).glob("*.json.gz"))


def read_case(path: Path) -> dict[str, Any]:
    """Reads one case."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def golden_elements(rank: Mapping[str, Any]) -> dict[str, Elements]:
    """Spreads the runs of one rank of a case over the elements of its parameters."""
    found = {}
    for name, shape, runs in rank["params"]:
        source = torch.full((torch.Size(shape).numel(),), -2)
        offset = torch.zeros_like(source)
        for begin, length, index, start, stride in runs:
            source[begin : begin + length] = index
            if index >= 0:
                offset[begin : begin + length] = start + stride * torch.arange(length)
        found[name] = source.reshape(shape), offset.reshape(shape)
    return found


def traced_elements(layout: TracedLayout, positions: Mapping[str, int]) -> dict[str, Elements]:
    """Spreads the blocks of a traced layout over the elements of its parameters.

    Args:
        layout: of one rank.
        positions: of the sources in the case.

    Raises:
        AssertionError: an element is written twice.
    """
    found = {
        name: (torch.full(shape, -2), torch.zeros(shape, dtype=torch.int64))
        for name, shape in layout.params
    }
    for write in layout.writes:
        source, offset = found[layout.params[write.param][0]]
        place = tuple(slice(a, a + n) for a, n in zip(write.target_origin, write.extent))
        assert bool((source[place] == -2).all()), "written twice"
        if write.source < 0:
            source[place] = -1
            continue
        name, shape, _ = layout.sources[write.source]
        strides = torch.empty(shape, device="meta").stride()
        block = torch.full(write.extent, sum(a * s for a, s in zip(write.source_origin, strides)))
        for dim, (size, follows) in enumerate(zip(write.extent, write.source_dim)):
            if follows >= 0:
                steps = torch.arange(size) * strides[follows]
                block += steps.reshape([-1 if d == dim else 1 for d in range(len(write.extent))])
        source[place] = positions[name]
        offset[place] = block
    return found


def first_difference(found: Mapping[str, Elements], wanted: Mapping[str, Elements]) -> str:
    """Names the first parameter that differs; empty if none does."""
    if found.keys() != wanted.keys():
        return f"parameters: {sorted(found.keys() ^ wanted.keys())[:3]}"
    for name, elements in wanted.items():
        if found[name][0].shape != elements[0].shape:
            return f"{name}: {tuple(found[name][0].shape)}, not {tuple(elements[0].shape)}"
        if not all(torch.equal(a, b) for a, b in zip(found[name], elements)):
            return f"{name} differs"
    return ""
