"""Devices that a machine does not have are refused before the daemon serves anyone."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.support.cluster import missing_binaries
from tests.support.gpu import missing_gpu

pytestmark = pytest.mark.skipif(
    bool(missing_binaries()) or not missing_gpu(), reason=missing_binaries() or "this machine has a GPU"
)


def test_all_gpus_of_a_machine_without_one() -> None:
    command = [os.environ["WEIGHTD_BIN"], "--set", "worker.devices=gpu", "--check-config"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 1
    assert 'worker.devices has "gpu", but this machine has no usable GPU' in ended.stderr
    assert "remedy: install the NVIDIA driver" in ended.stderr
