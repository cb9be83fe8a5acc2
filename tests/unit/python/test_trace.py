"""Tracing an engine's loader: the layout must say what the loader does to real tensors."""

from __future__ import annotations

import json
import random
from typing import Any, Callable, Iterable

import pytest
import torch
from torch import nn

from tests.support.toy_engine import VOCAB, ToyEngine, ToyModel, described, expected
from weightd import errors
from weightd.trace import checkpoint_sources, module_sources, trace_loader
from weightd.trace_hf import tied_names

Pairs = Iterable[tuple[str, torch.Tensor]]


def _numbered(sources: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Every element of every source has a number of its own, exact in float32."""
    values, begin = {}, 1
    for name, tensor in sources:
        count = tensor.numel()
        numbers = torch.arange(begin, begin + count, dtype=torch.float32)
        values[name] = numbers.reshape(tensor.shape)
        begin += count
    return values


def _trace(load: Callable[[Pairs], Any], target: torch.Tensor, *shapes: tuple[int, ...]) -> Any:
    sources = [(f"s{index}", shape) for index, shape in enumerate(shapes)]
    return trace_loader(load, [("p", target)], sources)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("tp_rank", "tp_size"), [(0, 1), (0, 2), (1, 2), (1, 4), (3, 4)])
def test_layout_is_what_the_loader_does(tp_rank: int, tp_size: int, device: str) -> None:
    sources = module_sources(ToyModel())
    engine = ToyEngine(tp_rank, tp_size, torch.float32, device)
    layout = trace_loader(engine.load_weights, engine.named_parameters(), sources)
    values = _numbered(sources)
    wanted = expected(values, tp_rank, tp_size, torch.float32)
    found = described(layout, values)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor.double()), name
    assert "unused.mask" in layout.skipped


def test_nothing_is_written_while_tracing() -> None:
    engine = ToyEngine(0, 2, torch.float32)
    before = {name: tensor.clone() for name, tensor in engine.named_parameters()}
    trace_loader(engine.load_weights, engine.named_parameters(), module_sources(ToyModel()))
    for name, tensor in engine.named_parameters():
        assert torch.equal(tensor, before[name]), name


def test_blocks_are_as_large_as_they_can_be() -> None:
    def load(weights: Pairs) -> None:
        for _, weight in weights:
            for row in range(8):
                target[row].copy_(weight[:, row])

    target = torch.zeros(8, 5)
    layout = _trace(load, target, (5, 8))
    assert len(layout.writes) == 1
    assert layout.writes[0][2:] == ((0, 0), (8, 5), (0, 0), (1, 0))


def test_later_writes_win() -> None:
    def load(weights: Pairs) -> None:
        for _, weight in weights:
            target.fill_(0)
            target[1:4, 1:3].copy_(weight)
            target[2].zero_()

    target = torch.zeros(5, 4)
    layout = _trace(load, target, (3, 2))
    value = {"s0": torch.arange(1.0, 7.0).reshape(3, 2)}
    wanted = torch.zeros(5, 4)
    wanted[1:4, 1:3] = value["s0"]
    wanted[2] = 0
    assert torch.equal(described(layout, value)["p"], wanted.double())


_COMPUTING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "adds": lambda w: w + 1,
    "scales": lambda w: w * 0.5,
    "exponential": lambda w: -torch.exp(w.float()),
    "quantises": lambda w: torch.round(w / 0.1).clamp(-128, 127),
    "rounds through float16": lambda w: w.to(torch.float16),
    "sum of two": lambda w: w + w.flip(0),
    "in place": lambda w: w.clone().mul_(2),
    "dequantises": lambda w: w.view(torch.int32).float(),
    "reads a value": lambda w: w.new_full(w.shape, w[0, 0].item() * 2),
}


@pytest.mark.parametrize("kind", _COMPUTING)
def test_a_loader_that_computes_is_refused_by_name(kind: str) -> None:
    def load(weights: Pairs) -> None:
        for name, weight in weights:
            params[name].data.copy_(weight if name == "plain" else _COMPUTING[kind](weight))

    params = {name: nn.Parameter(torch.zeros(4, 3)) for name in ("plain", "layers.3.mixed")}
    with pytest.raises(errors.LayoutError) as caught:
        trace_loader(load, params, [(name, (4, 3)) for name in params])
    assert caught.value.reason == "LOADER_COMPUTES"
    assert caught.value.tensor == "layers.3.mixed" and "rule file" in caught.value.remedy


def test_a_parameter_that_the_loader_changes_in_place_is_refused() -> None:
    def load(weights: Pairs) -> None:
        for _, weight in weights:
            target.copy_(weight)
            target.neg_()

    target = torch.zeros(2, 2)
    with pytest.raises(errors.LayoutError, match="neg_") as caught:
        _trace(load, target, (2, 2))
    assert caught.value.tensor == "s0"


@pytest.mark.parametrize(
    "decide", [torch.equal, lambda a, b: bool((a == b).all()), lambda a, b: a.abs().max().item()]
)
def test_a_loader_that_decides_by_values_is_refused(decide: Callable[..., Any]) -> None:
    def load(weights: Pairs) -> None:
        (_, first), (_, second) = weights
        if decide(first, second):
            target.copy_(first)

    target = torch.zeros(2)
    with pytest.raises(errors.LayoutError) as caught:
        _trace(load, target, (2,), (2,))
    assert caught.value.reason == "LOADER_COMPUTES" and caught.value.tensor == "s0"


def test_a_parameter_that_nothing_fills_is_refused_by_name() -> None:
    def load(weights: Pairs) -> None:
        for _, weight in weights:
            target[:3].copy_(weight)

    target = torch.zeros(4)
    with pytest.raises(errors.LayoutError, match="unwritten: p") as caught:
        _trace(load, target, (3,))
    assert caught.value.reason == "UNCOVERED_PARAMETER" and caught.value.tensor == "p"


def test_a_constant_is_refused() -> None:
    def load(weights: Pairs) -> None:
        list(weights)
        target.fill_(1)

    target = torch.zeros(4)
    with pytest.raises(errors.LayoutError, match="fill with 1"):
        _trace(load, target, (3,))


def test_a_copy_into_other_memory_is_refused() -> None:
    def load(weights: Pairs) -> None:
        for _, weight in weights:
            target.copy_(weight)
            elsewhere.copy_(weight)

    target, elsewhere = torch.zeros(4), torch.zeros(4)
    with pytest.raises(errors.LayoutError, match="no registered parameter") as caught:
        _trace(load, target, (4,))
    assert caught.value.tensor == "s0"
    assert not elsewhere.any()


def test_a_loader_that_raises_is_named_with_the_tensor() -> None:
    def load(weights: Pairs) -> None:
        for name, _ in weights:
            raise KeyError(name)

    with pytest.raises(errors.LayoutError, match="KeyError: 's0'") as caught:
        _trace(load, torch.zeros(4), (3,))
    assert caught.value.reason == "LOADER_REFUSED" and caught.value.tensor == "s0"


def test_a_loader_that_replaces_its_parameters_is_refused_and_undone() -> None:
    class Engine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.zeros(3))

        def load_weights(self, weights: Pairs) -> None:
            for _, weight in weights:
                self.p.data.copy_(weight)
                self.p = nn.Parameter(weight)

    engine = Engine()
    before = engine.p
    with pytest.raises(errors.LayoutError, match="new parameters") as caught:
        trace_loader(engine.load_weights, engine.named_parameters(), [("s", (3,))])
    assert caught.value.tensor == "p" and engine.p is before


def test_tied_names_are_traced_once_and_other_overlaps_are_refused() -> None:
    def load(weights: Pairs) -> None:
        for _, weight in weights:
            base.copy_(weight)

    base = torch.zeros(4, 2)
    layout = trace_loader(load, [("a", base), ("b", base[:])], [("s", (4, 2))])
    assert [name for name, _ in layout.params] == ["a"]
    with pytest.raises(errors.LayoutError, match="share memory") as caught:
        trace_loader(load, [("a", base), ("b", base[1:])], [("s", (4, 2))])
    assert caught.value.tensor == "b"
    with pytest.raises(errors.LayoutError, match="share memory"):
        trace_loader(load, [("a", torch.zeros(2, 1).expand(2, 3))], [("s", (4, 2))])


def test_sources_come_from_the_headers_of_a_checkpoint(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    [(name, tensor)] = checkpoint_sources(tmp_path)
    assert (name, tuple(tensor.shape), tensor.dtype) == ("w", (2, 3), torch.bfloat16)
    (tmp_path / "b.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(errors.LayoutError, match="b.safetensors"):
        checkpoint_sources(tmp_path)
    with pytest.raises(errors.LayoutError, match="no safetensors file"):
        checkpoint_sources(tmp_path / "nowhere")


def _random_view(tensor: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """A view or a moved copy of a tensor, by one of the operations that loaders use."""
    dim = draw.randrange(tensor.dim())
    size = tensor.shape[dim]
    kind = draw.randrange(12)
    if kind == 0:
        begin = draw.randrange(size)
        return tensor.narrow(dim, begin, draw.randint(1, size - begin))
    if kind == 1:
        return tensor.transpose(dim, draw.randrange(tensor.dim()))
    if kind == 2:
        return tensor.permute(draw.sample(range(tensor.dim()), tensor.dim())).contiguous()
    if kind == 3:
        return torch.cat([tensor, tensor.flip(dim)], dim=dim)
    if kind == 4 and size % 2 == 0:
        parts = tensor.unflatten(dim, (2, size // 2))
        return parts.transpose(dim, dim + 1).flatten(dim, dim + 1)
    if kind == 5:
        return tensor.repeat_interleave(2, dim=dim)
    if kind == 6:
        return tensor.index_select(dim, torch.tensor([draw.randrange(size) for _ in range(3)]))
    if kind == 7:
        return nn.functional.pad(tensor, (1, 2))
    if kind == 8:
        return torch.stack([tensor.select(dim, k) for k in range(size)], dim=0)
    if kind == 9 and tensor.dim() < 4:
        return tensor.unsqueeze(dim).to(torch.float64)
    if kind == 10:
        step = slice(draw.randrange(2), None, 2)
        return tensor[(slice(None),) * dim + (step,)] if size > 1 else tensor
    return tensor.reshape(-1) if draw.random() < 0.3 else tensor.clone()


@pytest.mark.parametrize("seed", range(150))
def test_random_loaders_are_traced_exactly(seed: int) -> None:
    """Any chain of moves into any view of a parameter: traced and real results are the same."""

    def load(weights: Pairs) -> None:
        draw = random.Random(seed)
        params.zero_()
        for _, weight in weights:
            for _ in range(draw.randint(1, 5)):
                weight = _random_view(weight, draw)
            flat = weight.reshape(-1)[: params.numel()]
            if draw.random() < 0.5:
                params.view(-1)[: flat.numel()].copy_(flat)
            else:
                place = params.t() if draw.random() < 0.5 else params
                rows = min(place.shape[0], max(1, flat.numel() // place.shape[1]))
                count = min(flat.numel(), rows * place.shape[1])
                columns = count // rows
                begin = draw.randint(0, place.shape[1] - columns)
                block = flat[: rows * columns].view(rows, columns)
                place[:rows, begin : begin + columns].copy_(block)

    draw = random.Random(-1 - seed)
    params = torch.zeros(draw.randint(2, 7), draw.randint(2, 7))
    shapes = [
        tuple(draw.randint(1, 4) for _ in range(draw.randint(1, 3)))
        for _ in range(draw.randint(1, 3))
    ]
    layout = _trace(load, params, *shapes)
    values = _numbered((f"s{i}", torch.empty(shape)) for i, shape in enumerate(shapes))
    load(values.items())
    assert torch.equal(described(layout, values)["p"], params.double())


def test_written_trace_has_the_documented_form(tmp_path: Any) -> None:
    from weightd.traced import write_traces

    engine = ToyEngine(1, 2, torch.float32)
    sources = module_sources(ToyModel())
    layout = trace_loader(engine.load_weights, engine.named_parameters(), sources)
    path = tmp_path / "trace.json"
    at = {"tp_size": 2, "tp_rank": 1}
    write_traces(path, [(at, layout)], architecture="ToyForCausalLM", config={"a": 1})
    found = json.loads(path.read_text())
    assert found["weightd_trace"] == 1 and found["engine_profile"] == "vllm-0.32"
    assert ["embed.weight", [VOCAB, 12]] in found["source"]
    [rank] = found["ranks"]
    assert (rank["tp_size"], rank["tp_rank"]) == (2, 1)
    assert rank["skipped_sources"] == layout.skipped and "unused.mask" in layout.skipped
    assert len(rank["writes"]) == len(layout.writes) and len(rank["writes"][0]) == 6


def test_indices_made_beside_a_source_keep_their_values() -> None:
    def load(weights: Pairs) -> None:
        owner = torch.tensor([-1, 0, -1, 1])
        for _, weight in weights:
            mine = (owner != -1).nonzero().flatten().to(weight.device)
            assert mine[0].item() == 1
            odd = torch.arange(0, 2, device=weight.device)
            target.copy_(weight[mine][odd])

    target = torch.zeros(2, 3)
    layout = _trace(load, target, (4, 3))
    value = {"s0": torch.arange(12.0).reshape(4, 3)}
    assert torch.equal(described(layout, value)["p"], value["s0"][[1, 3]].double())


def test_tied_names_are_those_of_a_parameter_that_came_before() -> None:
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    module["b"].weight = module["a"].weight
    assert tied_names(module) == {"b.weight"}
