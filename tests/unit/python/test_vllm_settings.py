"""Where the vLLM plug-in takes its settings from."""

from __future__ import annotations

from typing import Any

import pytest

from weightd import errors
from weightd.vllm.settings import Settings, read_settings


def _read(config: Any, **environment: str) -> Settings:
    return read_settings(config, "served", "i1", environment)


def test_defaults_come_from_vllm() -> None:
    settings = _read({})
    assert (settings.address, settings.model, settings.engine) == (None, "served", "vllm-i1")


def test_environment_wins_over_additional_config() -> None:
    config = {"weightd": {"address": "unix:/a", "model": "m", "engine": "e", "quiesce_timeout": 3}}
    assert _read(config) == Settings("unix:/a", "m", "e", quiesce_timeout=3)
    settings = _read(config, WEIGHTD_ADDRESS="unix:/b", WEIGHTD_MODEL="n", WEIGHTD_ENGINE="f")
    assert (settings.address, settings.model, settings.engine) == ("unix:/b", "n", "f")


def test_bytes_of_a_stage() -> None:
    assert _read({}).stage_bytes == 256 << 20
    config = {"weightd": {"stage_bytes": 1000}}
    assert _read(config).stage_bytes == 1000
    assert _read(config, WEIGHTD_STAGE_BYTES="2000").stage_bytes == 2000
    for wrong in ({"weightd": {"stage_bytes": "1000"}}, {"weightd": {"stage_bytes": 1.5}}):
        with pytest.raises(errors.LayoutError, match="wrong type"):
            _read(wrong)
    with pytest.raises(errors.LayoutError, match="WEIGHTD_STAGE_BYTES"):
        _read({}, WEIGHTD_STAGE_BYTES="1k")


def test_unknown_keys_and_wrong_types_are_refused() -> None:
    with pytest.raises(errors.LayoutError, match="did you mean address"):
        _read({"weightd": {"adress": "unix:/a"}})
    with pytest.raises(errors.LayoutError, match="wrong type"):
        _read({"weightd": {"start_timeout": "long"}})
    with pytest.raises(errors.LayoutError, match="wrong type"):
        _read({"weightd": {"model": 3}})
    with pytest.raises(errors.LayoutError, match="auto, rules, trace"):
        _read({"weightd": {"layout": "tracing"}})
    with pytest.raises(errors.LayoutError, match="worker='fork'.*daemon, spawn"):
        _read({"weightd": {"worker": "fork"}})
    with pytest.raises(errors.LayoutError, match="worker='fork'"):
        _read({}, WEIGHTD_WORKER="fork")


def test_one_flag_lets_a_vllm_worker_start_the_worker() -> None:
    assert _read({}).worker == "daemon"
    assert _read({"weightd": {"worker": "spawn"}}).worker == "spawn"
    assert _read({"weightd": {"worker": "daemon"}}, WEIGHTD_WORKER="spawn").worker == "spawn"
