"""Copies of a trainer's GPU tensors that no worker can map, without a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.support.fake_library import FakeLibrary
from weightd import _pull
from weightd._copies import Copies
from weightd._layout import describe
from weightd.errors import UnsupportedError


def test_a_trainers_copies_have_a_limit_and_follow_their_tensors(
    on_gpu: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pull, "allocate", lambda like, size: torch.zeros(size, dtype=torch.uint8))
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(4)[::2], "none": torch.zeros(0)}
    layout = [describe(name, tensor) for name, tensor in tensors.items()]
    with pytest.raises(UnsupportedError, match="512 bytes, of 511 allowed") as caught:
        Copies(layout, 511)
    assert caught.value.tensor == "a" and "copy_bytes" in caught.value.remedy
    copies = Copies(layout, 512)
    lent = {local.name: [tensor for _, tensor in local.shards] for local in copies.lent(layout)}
    assert lent["a"][0].data_ptr() != tensors["a"].data_ptr()
    for _ in range(2):
        for tensor in tensors.values():
            tensor.add_(1)
        assert copies.refresh() is None
        assert torch.equal(lent["a"][0], tensors["a"]) and torch.equal(lent["b"][0], tensors["b"])
    on_gpu.asleep.add(tensors["b"].data_ptr())
    tensors["a"].add_(1)
    refusal = copies.refresh()
    assert (refusal.reason, refusal.tensor) == ("MEMORY_MOVED", "b") and "wake" in refusal.remedy
    assert not torch.equal(lent["a"][0], tensors["a"])
