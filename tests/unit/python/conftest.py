"""Makes the package and the shared test support importable from the source tree."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.fake_library import FakeLibrary

_ROOT = Path(__file__).resolve().parents[3]
for _path in (_ROOT / "client" / "python", _ROOT):
    if str(_path) not in sys.path:
        sys.path.insert(0, str(_path))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """A libweightd in Python that the package uses instead of the native one."""
    from tests.support.fake_library import FakeLibrary

    fake = FakeLibrary()
    monkeypatch.setattr("weightd._native.library", lambda: fake)
    return fake


@pytest.fixture
def on_gpu(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """Takes CPU tensors for GPU memory that no worker can map."""
    monkeypatch.setattr("weightd._memory.is_cuda", lambda tensor: True)
    return library
