"""What the comparison around vLLM's post-load step finds, on modules of torch alone."""

from __future__ import annotations

from typing import Any, Callable

import pytest
import torch
from torch import nn

from weightd.vllm import post_load
from weightd.vllm.post_load import LoadRecord, Snapshot, is_cast


class Attention(nn.Module):
    """Reads a projection that is its child, as latent attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = nn.Linear(4, 4, bias=False)


class Model(nn.Module):
    """A linear layer with bias, an attention and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 4)
        self.linear = nn.Linear(4, 4)
        self.attention = Attention()
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture(autouse=True)
def _attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post_load, "is_deferred_attention", lambda m: isinstance(m, Attention))


def _record(step: Callable[[Model], Any]) -> LoadRecord:
    model = Model()
    before = Snapshot(model)
    with torch.no_grad():
        step(model)
    return before.compare(model)


# Whatever its step does with its children: the result may lie where no comparison finds it.
_ALWAYS = {"attention": set(), "attention.kv": {"weight"}}


def _changed(step: Callable[[Model], Any]) -> dict[str, set[str]]:
    """Names of changed modules, with what stayed in place in each."""
    return {change.name: change.kept for change in _record(step).changes}


def _repack_in_place(model: Model) -> None:
    model.linear.weight.copy_(model.linear.weight.flip(0))


def _move(model: Model) -> None:
    model.linear.weight.data = model.linear.weight.data.clone()


def _remove(model: Model) -> None:
    model.linear.weight = nn.Parameter(torch.empty(0), requires_grad=False)


def test_what_is_left_alone_is_no_change() -> None:
    def step(model: Model) -> None:
        model.linear.run = lambda x, weight: nn.functional.linear(x, weight)
        model.linear.processed = True
        model.attention.scale = 0.5

    assert _changed(step) == _ALWAYS


def _delete(model: Model) -> None:
    del model.linear.weight


@pytest.mark.parametrize("step", [_repack_in_place, _move, _remove, _delete])
def test_repacked_moved_and_removed_parameters_are_found(step: Callable[[Model], None]) -> None:
    record = _record(step)
    assert [change.name for change in record.changes] == ["linear", *_ALWAYS]
    assert record.changes[0].loadable.keys() == {"weight", "bias"}
    assert record.changes[0].kept == {"bias"}


def test_a_packed_copy_that_only_a_closure_holds_is_found() -> None:
    def step(model: Model) -> None:
        packed = [model.head.weight.detach().clone()]
        model.head.run = lambda x: x @ packed[0]

    assert _changed(step) == {"head": {"weight"}, **_ALWAYS}


def test_attention_that_keeps_a_copy_takes_its_children_along() -> None:
    def step(model: Model) -> None:
        model.attention.w_uv = nn.Parameter(model.attention.kv.weight.detach().clone())

    record = _record(step)
    assert [change.name for change in record.changes] == ["attention", "attention.kv"]
    assert record.changes[1].kept == {"weight"}
    assert record.born == {"attention.w_uv"}


def test_a_view_of_memory_that_was_left_alone_needs_nothing() -> None:
    def step(model: Model) -> None:
        model.linear.part = nn.Parameter(model.linear.weight.detach()[1:])

    record = _record(step)
    assert [change.name for change in record.changes] == [*_ALWAYS]
    assert record.born == {"linear.part"}


def test_a_parameter_that_was_only_cast_is_known_as_such() -> None:
    bias = torch.randn(8).to(torch.bfloat16)
    mark = post_load._mark(bias, {})
    assert is_cast(bias.float(), mark)
    assert not is_cast(bias.float() + 1, mark) and not is_cast(bias.float()[:7], mark)
    assert not is_cast(None, mark)


def test_content_is_read_without_tying_it_to_numpy() -> None:
    model = Model()
    Snapshot(model)
    model.linear.weight.untyped_storage()._share_fd_cpu_()
    assert model.linear.weight.untyped_storage().is_shared()


def test_the_digest_for_other_devices_sees_every_byte_and_its_place() -> None:
    content = torch.arange(40, dtype=torch.float32)
    digests = {post_load._device_digest(content)}
    for place in range(40):
        other = content.clone()
        other[place] += 1
        digests.add(post_load._device_digest(other))
    digests.add(post_load._device_digest(content.flip(0)))
    assert len(digests) == 42
    assert post_load._device_digest(content.clone()) in digests
