"""GPU tests run only where a GPU is; tests/gpu/run_sync.sh says so with exit status 77."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import pytest

from tests.support.cluster import missing_binaries
from tests.support.gpu import gpu_uuids, missing_gpu

_FAILPOINTS = "WEIGHTD_FAILPOINT_DIR"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips everything here, with the reason, where it cannot run."""
    reason = missing_gpu() or missing_binaries()
    for item in items:
        if reason and Path(__file__).parent in Path(item.path).parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def gpu() -> str:
    """UUID of the first GPU."""
    return gpu_uuids()[0]


@pytest.fixture()
def failpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which a test arms failpoints of daemons and workers started from now on."""
    monkeypatch.setenv(_FAILPOINTS, str(tmp_path))
    yield tmp_path
    for armed in tmp_path.glob("*.arm"):
        armed.unlink()
