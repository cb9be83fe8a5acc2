"""Where pulled parameters are received, and what is found when a copy does not hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.fake_library import FakeLibrary
from tests.support.unlendable import numpy_backed
from weightd import _pull
from weightd._callbacks import Callbacks
from weightd.errors import MemoryMovedError, UnsupportedError, VerifyError


def _pull_of(*tensors: torch.Tensor, stage_bytes: int) -> _pull.Pull:
    pairs = [(f"p{i}", numpy_backed(tensor)) for i, tensor in enumerate(tensors)]
    return _pull.Pull(pairs, range(len(pairs)), 1, stage_bytes)


def _fill(pull: _pull.Pull, wanted: dict[int, torch.Tensor], stage: int) -> None:
    """What a worker does in one round."""
    for position, tensor in wanted.items():
        at = pull.places[position]
        if not at.rows and at.stage == stage:
            pull.lent[position].copy_(tensor)
        begin = (stage - at.stage) * at.rows
        if at.rows and 0 <= begin < len(tensor):
            part = tensor[begin : begin + at.rows]
            pull.lent[position][: len(part)].copy_(part)


@pytest.mark.parametrize("stage_bytes", (1, 256, 1024, 4096, 1 << 20))
def test_stages_in_turn_bring_everything_and_keep_their_bound(stage_bytes: int) -> None:
    torch.manual_seed(1)
    shapes = [(7, 33), (64, 5), (), (129,), (3, 4, 5), (1, 100)]
    wanted = {i: torch.randn(shape, dtype=torch.float64) for i, shape in enumerate(shapes)}
    pull = _pull_of(*(torch.zeros_like(t) for t in wanted.values()), stage_bytes=stage_bytes)
    row = 100 * 8
    assert pull.size_bytes <= max(stage_bytes, -(-row // 256) * 256)
    for stage in range(1, max(pull._stages) + 1):
        pull.memory.fill_(0x7F)
        _fill(pull, wanted, stage)
        pull.take(stage)
    for (name, tensor), expected in zip(pull._tensors, wanted.values()):
        assert torch.equal(tensor, expected), name


def test_small_parameters_share_a_stage_and_none_overlap() -> None:
    places, size = _pull.place([torch.empty(3), torch.empty(100), torch.empty(2, 40)], 4, 1024)
    assert places == [(4, 0, 0), (4, 256, 0), (5, 0, 0)]
    assert size == 768


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.int8, torch.float64))
def test_one_bit_that_differs_is_found_and_named(dtype: torch.dtype) -> None:
    class Loses(torch.Tensor):
        """A parameter that does not hold its last element."""

        def copy_(self, source: Any, *more: Any) -> Any:
            """Copies, and loses a bit."""
            torch.Tensor.copy_(self, source, *more)
            self.view(torch.uint8).view(-1)[-1].bitwise_xor_(1)
            return self

    good, bad = torch.zeros(5, 3, dtype=dtype), torch.zeros(4, 3, dtype=dtype)
    pull = _pull_of(good, bad, stage_bytes=1 << 20)
    pull.lent[0].fill_(1), pull.lent[1].fill_(1)
    pull.take(1)
    (part,) = [part for part in pull._stages[1] if part.name == "p1"]
    part.target = part.target.as_subclass(Loses)
    with pytest.raises(VerifyError, match="p1") as caught:
        pull.take(1)
    assert caught.value.tensor == "p1" and caught.value.remedy


def test_nan_payloads_are_copied_and_compared_as_bits() -> None:
    pull = _pull_of(torch.zeros(8), stage_bytes=1 << 20)
    pull.lent[0].view(torch.int32).fill_(0x7FC01234)
    pull.take(1)
    assert (pull._tensors[0][1].view(torch.int32) == 0x7FC01234).all()


def test_large_tensors_are_compared_in_pieces_of_any_layout() -> None:
    whole = torch.arange(12 * 1024 * 1024, dtype=torch.int32).view(3, 4096, 1024)
    for tensor in (whole, whole.transpose(0, 2), whole[:, ::2]):
        pieces = list(_pull._pieces(tensor, tensor.clone()))
        assert len(pieces) > 1
        assert all(a.numel() <= _pull._PIECE_ELEMENTS for a, _ in pieces)
        assert sum(a.nbytes for a, _ in pieces) == tensor.nbytes
        assert all(torch.equal(a, b) for a, b in pieces)


def test_conversions_go_to_whose_stage_it_is() -> None:
    done: list[Any] = []
    pairs = [("p", numpy_backed(torch.zeros(4, 64)))]
    pull = _pull.Pull(pairs, [0], 3, 512)
    pull.take = lambda stage: done.append(("pull", stage))
    user = Callbacks(None, None, lambda stage: done.append(("user", stage)), 2)
    both = _pull.callbacks_with(pull, user)
    assert both.any and both.num_stages == 4
    for stage in (1, 2, 3):
        assert both.take(stage) is None
    assert both.finish() == (None, None) and both.stop() is None
    assert done == [("user", 1), ("user", 2), ("pull", 3), ("pull", 4)]


# ---- GPU memory, with a library that answers for the driver


def test_gpu_memory_of_the_stages_is_freed_with_its_last_tensor(on_gpu: FakeLibrary) -> None:
    buffer = _pull._GpuBuffer(0x1000, 512)
    interface = buffer.__cuda_array_interface__
    assert (interface["shape"], interface["typestr"]) == ((512,), "|u1")
    assert interface["data"] == (0x7000, False) and on_gpu.gpu_bytes == 512
    del buffer
    assert on_gpu.gpu_bytes == 0


def test_gpu_memory_is_asked_for_by_address(on_gpu: FakeLibrary) -> None:
    tensor = torch.zeros(8)
    refusal = _pull.gpu_refusal("w", tensor)
    assert (refusal.reason, refusal.tensor) == ("MEMORY", "w")
    assert _pull.gpu_refusal("empty", torch.zeros(0, 3)) is None
    on_gpu.asleep.add(tensor.data_ptr())
    with pytest.raises(MemoryMovedError) as caught:
        _pull.gpu_refusal("w", tensor)
    assert caught.value.tensor == "w"


def test_an_engine_that_sleeps_is_told_to_wake(on_gpu: FakeLibrary) -> None:
    pull = _pull_of(torch.zeros(8), torch.zeros(9), stage_bytes=1 << 20)
    pull._device = torch.device("cuda")
    pull.check_awake()
    on_gpu.asleep.add(pull._tensors[1][1].data_ptr())
    with pytest.raises(UnsupportedError, match="no memory now: p1") as caught:
        pull.check_awake()
    assert "wake" in caught.value.remedy
