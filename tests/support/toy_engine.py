"""A model that no rule file describes: a trainer's module, and an engine with a loader of its own.

The engine's `load_weights` does by hand what real engines do: tensor-parallel slices, merged qkv
with replicated key/value heads, merged gate and up, a transposed Conv1D, a padded vocabulary, a
tied head, expert stacks from one 3-D tensor, rotary rows permuted within heads, fused projections,
a scalar, and a bias that only rank 0 holds.
"""

from __future__ import annotations

from typing import Any, Callable, Iterable

import torch
from torch import nn

ARCHITECTURE = "ToyForCausalLM"
HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, HEAD, EXPERTS, LAYERS = 12, 16, 21, 4, 1, 6, 3, 2
PADDED = 32


class _Weight(nn.Module):
    def __init__(self, *shapes: tuple[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes:
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


class ToyModel(nn.Module):
    """What the trainer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = _Weight(("weight", (VOCAB, HIDDEN)))
        self.layers = nn.ModuleList(_layer() for _ in range(LAYERS))
        self.norm = _Weight(("weight", (HIDDEN,)))
        self.unused = _Weight(("mask", (5, 5)))


def _layer() -> nn.Module:
    layer = nn.Module()
    shapes = {
        "q": (HEADS * HEAD, HIDDEN),
        "k": (KV_HEADS * HEAD, HIDDEN),
        "v": (KV_HEADS * HEAD, HIDDEN),
        "o": (HIDDEN, HEADS * HEAD),
        "gate": (INNER, HIDDEN),
        "up": (INNER, HIDDEN),
        "c_fc": (HIDDEN, INNER),
        "a": (5, HIDDEN),
        "b": (3, HIDDEN),
    }
    for name, shape in shapes.items():
        layer.add_module(name, _Weight(("weight", shape)))
    stacks = ("gate_up", (EXPERTS, HIDDEN, 2 * INNER)), ("down", (EXPERTS, INNER, HIDDEN))
    layer.experts = _Weight(*stacks, ("bias", (EXPERTS, HIDDEN)))
    layer.norm = _Weight(("weight", (HIDDEN,)))
    layer.scale = _Weight(("weight", (1,)))
    return layer


class ToyEngine(nn.Module):
    """One rank of the engine.

    Args:
        tp_rank, tp_size: coordinates.
        dtype: of the parameters.
        device: of the parameters.
    """

    def __init__(
        self, tp_rank: int, tp_size: int, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        super().__init__()
        self.rank, self.size = tp_rank, tp_size
        self._kv = max(1, KV_HEADS // tp_size)
        shapes: dict[str, tuple[int, ...]] = {"embed": (PADDED // tp_size, HIDDEN)}
        inner, rows = INNER // tp_size, (HEADS // tp_size + 2 * self._kv) * HEAD
        for n in range(LAYERS):
            shapes |= {
                f"l{n}_qkv": (rows, HIDDEN),
                f"l{n}_o": (HIDDEN, HEADS * HEAD // tp_size),
                f"l{n}_gate_up": (2 * inner, HIDDEN),
                f"l{n}_c_fc": (inner, HIDDEN),
                f"l{n}_fused": (8, HIDDEN),
                f"l{n}_w13": (EXPERTS, 2 * inner, HIDDEN),
                f"l{n}_w2": (EXPERTS, HIDDEN, inner),
                f"l{n}_w2_bias": (EXPERTS, HIDDEN),
                f"l{n}_norm": (HIDDEN,),
                f"l{n}_scale": (1,),
            }
        shapes["norm"] = (HIDDEN,)
        for name, shape in shapes.items():
            empty = torch.full(shape, 77.0, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.head = self.embed

    def part(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's equal part of a dimension."""
        size = tensor.shape[dim] // self.size
        return tensor.narrow(dim, self.rank * size, size)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Puts every tensor where this rank holds it."""
        for name, weight in weights:
            if name.startswith("layers."):
                _, number, kind, last = name.split(".")
                loaders: dict[str, Callable[..., None]] = {
                    "experts": self._experts,
                    "q": self._qkv,
                    "k": self._qkv,
                    "v": self._qkv,
                }
                loaders.get(kind, self._plain)(f"l{number}_", kind, last, weight)
            elif name == "embed.weight":
                self._vocab(self.embed.data, weight)
            elif name == "norm.weight":
                self.norm.data.copy_(weight)

    def _vocab(self, target: torch.Tensor, weight: torch.Tensor) -> None:
        rows = target.shape[0]
        begin = min(self.rank * rows, VOCAB)
        count = min(rows, VOCAB - begin)
        target[:count].copy_(weight.narrow(0, begin, count))
        target[count:].fill_(0)

    def _qkv(self, prefix: str, kind: str, last: str, weight: torch.Tensor) -> None:
        target = getattr(self, prefix + "qkv").data
        queries = HEADS // self.size * HEAD
        if kind == "q":
            part = self.part(weight, 0).view(-1, HEAD // 2, 2, HIDDEN)
            target[:queries].copy_(part.transpose(1, 2).reshape(queries, HIDDEN))
            return
        head = self.rank * KV_HEADS // self.size * HEAD
        begin = queries + (self._kv * HEAD if kind == "v" else 0)
        target.narrow(0, begin, self._kv * HEAD).copy_(weight[head : head + self._kv * HEAD])

    def _experts(self, prefix: str, kind: str, last: str, weight: torch.Tensor) -> None:
        if last == "bias":
            target = getattr(self, prefix + "w2_bias")
            target.data.copy_(weight if self.rank == 0 else torch.zeros_like(weight))
        elif last == "down":
            part = self.part(weight, 1).transpose(-1, -2).contiguous()
            getattr(self, prefix + "w2").data.copy_(part)
        else:
            halves = [self.part(half, 2) for half in weight.chunk(2, dim=-1)]
            target = getattr(self, prefix + "w13").data
            for expert in range(EXPERTS):
                target[expert] = torch.cat([half[expert].t() for half in halves])

    def _plain(self, prefix: str, kind: str, last: str, weight: torch.Tensor) -> None:
        inner = INNER // self.size
        if kind == "o":
            self.l(prefix + "o").copy_(self.part(weight, 1).to(torch.float32))
        elif kind in ("gate", "up"):
            begin = inner if kind == "up" else 0
            self.l(prefix + "gate_up").narrow(0, begin, inner).copy_(self.part(weight, 0))
        elif kind == "c_fc":
            self.l(prefix + "c_fc").copy_(self.part(weight.t(), 0))
        elif kind in ("a", "b"):
            begin = 5 if kind == "b" else 0
            self.l(prefix + "fused").narrow(0, begin, weight.shape[0]).copy_(weight)
        elif kind == "scale":
            self.l(prefix + "scale").fill_(weight.item())
        else:
            self.l(prefix + kind).copy_(weight)

    def l(self, name: str) -> torch.Tensor:  # noqa: E743
        """The memory of a parameter."""
        return getattr(self, name).data


def expected(
    source: dict[str, torch.Tensor], tp_rank: int, tp_size: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What the engine's own loader makes of real tensors, cast to the engine's dtype first."""
    engine = ToyEngine(tp_rank, tp_size, dtype)
    with torch.no_grad():
        engine.load_weights((name, tensor.to(dtype)) for name, tensor in source.items())
    return {name: parameter.data for name, parameter in engine.named_parameters()}


def described(layout: Any, sources: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a traced layout makes of real tensors: plain slicing, block by block.

    Raises:
        AssertionError: an element is written twice, or not at all.
    """
    names = [source.name for source in layout.sources]
    values, counts = [], []
    for _, shape in layout.params:
        values.append(torch.zeros(shape, dtype=torch.float64))
        counts.append(torch.zeros(shape, dtype=torch.int32))
    for write in layout.writes:
        place = tuple(slice(a, a + n) for a, n in zip(write.target_origin, write.extent))
        counts[write.param][place] += 1
        if write.source < 0:
            continue
        tensor = sources[names[write.source]].to(torch.float64)
        begin, extent = write.source_origin, write.source_extent()
        block = tensor[tuple(slice(a, a + n) for a, n in zip(begin, extent))]
        followed = [dim for dim in write.source_dim if dim >= 0]
        rest = [dim for dim in range(tensor.dim()) if dim not in followed]
        values[write.param][place] = block.permute(followed + rest).reshape(write.extent)
    assert all(bool((count == 1).all()) for count in counts), "not covered exactly once"
    return {name: value for (name, _), value in zip(layout.params, values)}
