"""Fixtures that several test files share; a file imports those that it uses."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Iterator

import pytest

from tests.support.checkpoints import LLAMA, save_model
from tests.support.cluster import Cluster

_models = itertools.count()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A daemon for all cases; each case has its own model key."""
    with Cluster() as running:
        yield running


@pytest.fixture
def model() -> str:
    """A key that no other case uses."""
    return f"case-{next(_models)}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded Llama; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("llama")
    save_model(LLAMA, folder, "8KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder
