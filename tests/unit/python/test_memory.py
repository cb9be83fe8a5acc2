"""Lending host memory in place: what moves, what must not, and what is refused before it does."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from weightd import _memory, errors


def _share(*tensors: torch.Tensor) -> dict[int, _memory.SharedStorage]:
    return _memory.share([(f"t{i}", tensor) for i, tensor in enumerate(tensors)])


def test_storage_moves_in_place_and_is_readable_through_its_descriptor() -> None:
    tensor = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    view = tensor[1:, 2:5]
    shared = _share(tensor)[_memory.storage_key(view)]
    view.mul_(2)
    raw = os.pread(shared.fd, shared.size_bytes, 0)
    assert numpy.frombuffer(raw, numpy.float32).reshape(4, 6).tolist() == tensor.tolist()
    assert tensor[1, 2] == 16


def test_views_share_one_descriptor_and_a_second_call_takes_no_more() -> None:
    tensor = torch.zeros(8, 8)
    first = _share(tensor, tensor[2:], tensor.t())
    before = len(os.listdir("/proc/self/fd"))
    assert len(first) == 1
    assert _share(tensor[4:]) == first
    assert len(os.listdir("/proc/self/fd")) == before


def test_descriptor_goes_with_the_storage() -> None:
    before = len(os.listdir("/proc/self/fd"))
    tensor = torch.zeros(1000)
    assert _share(tensor)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del tensor
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_that_others_point_into_is_left_alone(tmp_path: Path) -> None:
    array = numpy.zeros(16, numpy.float32)
    exported = torch.zeros(16)
    keep = exported.numpy()
    (tmp_path / "file").write_bytes(bytes(64))
    mapped = torch.from_file(str(tmp_path / "file"), shared=True, size=16)
    tensors = [torch.from_numpy(array), exported, mapped]
    addresses = [tensor.data_ptr() for tensor in tensors]
    assert _share(*tensors) == {}
    assert [tensor.data_ptr() for tensor in tensors] == addresses
    assert keep.ctypes.data == exported.data_ptr()


def test_shared_memory_of_another_kind_is_left_alone() -> None:
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        tensor = torch.zeros(16).share_memory_()
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)
    address = tensor.data_ptr()
    assert _share(tensor) == {}
    assert tensor.data_ptr() == address


def test_too_little_shared_memory_is_refused_before_anything_moves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=3, f_frsize=4096))
    tensors = [torch.zeros(1024), torch.zeros(1024), torch.zeros(1025)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    with pytest.raises(errors.SharedMemoryError, match="needed_bytes=16384, free_bytes=12288") as e:
        _share(*tensors)
    assert "remount" in e.value.remedy and e.value.reason == "SHARED_MEMORY"
    assert [tensor.data_ptr() for tensor in tensors] == addresses
    assert not any(tensor.is_shared() for tensor in tensors)


def test_too_few_descriptors_are_refused_before_anything_moves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 66))
    tensor = torch.zeros(16)
    with pytest.raises(errors.ResourceError, match="hard_limit=66") as caught:
        _share(tensor)
    assert caught.value.reason == "FILE_DESCRIPTORS" and "LimitNOFILE" in caught.value.remedy
    assert not tensor.is_shared()


def test_soft_descriptor_limit_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    raised = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (16, 100000))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: raised.append(limits))
    assert _share(torch.zeros(16))
    assert raised and raised[0][0] > 16 and raised[0][1] == 100000


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.empty(2, device="meta"), "to_empty"),
        (torch.eye(2).to_sparse(), "to_dense"),
    ],
)
def test_tensors_without_plain_host_memory_are_refused(tensor: torch.Tensor, text: str) -> None:
    with pytest.raises(errors.UnsupportedError, match=text) as caught:
        _memory.check_tensor("w", tensor)
    assert caught.value.tensor == "w"


def test_tensors_of_other_devices_are_refused_with_what_to_do() -> None:
    tensor = SimpleNamespace(device=torch.device("xpu:0"))
    with pytest.raises(errors.UnsupportedError, match="neither in host memory nor on an NVIDIA"):
        _memory.check_tensor("w", tensor)
