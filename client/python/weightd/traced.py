"""What tracing an engine's loader found: plain values, without torch.

Made by `weightd.trace`, handed to `EngineRank(layout=...)`, written to files that
``weightctl loader check --trace`` compares with a rule file.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, Iterable, Mapping, NamedTuple, Union

# Version of the file format; loaders/README.md describes it.
TRACE_FORMAT = 1

Ints = tuple[int, ...]


class TracedSource(NamedTuple):
    """A source tensor that the loader was fed; ``used`` if this rank holds any element of it."""

    name: str
    shape: Ints
    used: bool


class TracedWrite(NamedTuple):
    """A block of a parameter and the block of a source that lands there.

    Attributes:
        param: position in `TracedLayout.params`.
        source: position in `TracedLayout.sources`; -1 for zeros.
        target_origin, extent: the block of the parameter.
        source_origin: where the block begins in the source; empty for zeros.
        source_dim: per parameter dimension the source dimension that it follows, or -1 for none
            (then its extent is 1). Other source dimensions have extent 1.
    """

    param: int
    source: int
    target_origin: Ints
    extent: Ints
    source_origin: Ints
    source_dim: Ints

    def source_extent(self) -> Ints:
        """Extent of the block in the source."""
        extent = [1] * len(self.source_origin)
        for size, dim in zip(self.extent, self.source_dim):
            if dim >= 0:
                extent[dim] = size
        return tuple(extent)


@dataclass(frozen=True)
class TracedLayout:
    """Where every source element lands on one engine rank.

    Attributes:
        params: name and local shape of every parameter; tied names appear once.
        sources: what the loader was fed.
        writes: blocks that cover every parameter exactly once.
    """

    params: tuple[tuple[str, Ints], ...]
    sources: tuple[TracedSource, ...]
    writes: tuple[TracedWrite, ...]

    @property
    def skipped(self) -> list[str]:
        """Sources of which this rank holds nothing."""
        return [source.name for source in self.sources if not source.used]


def write_traces(
    path: Union[str, os.PathLike[str]],
    ranks: Iterable[tuple[Mapping[str, int], TracedLayout]],
    *,
    architecture: str,
    config: Mapping[str, Any],
    profile: str = "vllm-0.32",
) -> None:
    """Writes the traces of an engine's ranks for ``weightctl loader check --trace``.

    Args:
        path: file to write.
        ranks: coordinates (``tp_size``, ``tp_rank``, and ``ep_`` or ``pp_`` where they apply) and
            layout of every rank.
        architecture: Hugging Face architecture.
        config: Hugging Face config as a mapping.
        profile: naming and merging convention of the engine.

    Raises:
        ValueError: the ranks were traced with different sources.
    """
    found = list(ranks)
    sources = [(name, shape) for name, shape, _ in found[0][1].sources] if found else []
    for at, layout in found:
        if [(name, shape) for name, shape, _ in layout.sources] != sources:
            raise ValueError(f"ranks were traced with different sources: {dict(at)}")
    document = {
        "weightd_trace": TRACE_FORMAT,
        "architecture": architecture,
        "engine_profile": profile,
        "config": dict(config),
        "source": sources,
        "ranks": [
            {
                **at,
                "params": layout.params,
                "writes": layout.writes,
                "skipped_sources": layout.skipped,
            }
            for at, layout in found
        ],
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file, default=str)
        file.write("\n")
