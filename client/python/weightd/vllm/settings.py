"""Where weightd is and what this engine calls itself: environment, then vLLM's additional_config."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, fields
from typing import Any, Mapping, Optional

from weightd.errors import layout_error

_KEY = "weightd"
_CHOICES = {"layout": ("auto", "rules", "trace"), "worker": ("daemon", "spawn")}


@dataclass(frozen=True)
class Settings:
    """Keys of ``additional_config["weightd"]``.

    Attributes:
        address: of the daemon; ``WEIGHTD_ADDRESS`` wins; None is the library's default.
        model: key of the model, equal at the trainer; ``WEIGHTD_MODEL`` wins; then vLLM's served
            model name.
        engine: instance name, unique among the engines of one model; ``WEIGHTD_ENGINE`` wins; then
            one that vLLM draws at every start.
        layout: ``"auto"`` traces vLLM's own loader where the daemon has no rule file for the model,
            ``"trace"`` always, ``"rules"`` never.
        worker: ``"spawn"`` lets a vLLM worker start weightd's worker of its device where the daemon
            does not serve it; ``WEIGHTD_WORKER`` wins.
        stage_bytes: most bytes of derived parameters that a sync brings at a time, and so of memory
            that they need beside the model; one module's, if it has more; ``WEIGHTD_STAGE_BYTES``
            wins. An engine that needs several stages cannot catch up from another one.
        quiesce_timeout: seconds that a sync waits for ``update_weights``; below the daemon's
            deadline of Prepare, so that the reason is told.
        update_timeout: seconds that ``update_weights`` waits for the sync to reach this engine.
        connect_timeout: seconds that vLLM's start waits for a daemon; it goes on without one.
        start_timeout: seconds that vLLM's start waits for its registration to be taken.
    """

    address: Optional[str] = None
    model: str = ""
    engine: str = ""
    layout: str = "auto"
    worker: str = "daemon"
    stage_bytes: int = 256 << 20
    quiesce_timeout: float = 12.0
    update_timeout: float = 60.0
    connect_timeout: float = 3.0
    start_timeout: float = 60.0


def read_settings(
    additional_config: Any, served_model_name: str, instance_id: str, environment: Mapping[str, str]
) -> Settings:
    """Merges environment and configuration.

    Args:
        additional_config: of vLLM, whatever the user gave.
        served_model_name: what vLLM calls the model.
        instance_id: what vLLM calls this start of itself.
        environment: ``os.environ``.

    Raises:
        errors.LayoutError: an unknown key, or a value of another type.
    """
    given = additional_config.get(_KEY, {}) if isinstance(additional_config, Mapping) else {}
    known = {field.name: field for field in fields(Settings)}
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise layout_error(
                f"unknown key in additional_config of vLLM: {_KEY}.{key}",
                reason="CONFIG",
                remedy=f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}",
            )
        wanted: Any = (int, float) if key.endswith("_timeout") else str
        if key == "stage_bytes":
            wanted = int
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise layout_error(
                f"wrong type in additional_config of vLLM: {_KEY}.{key}={value!r}",
                reason="CONFIG",
                remedy="seconds and bytes are numbers, names and addresses are text",
            )
    values = {"model": served_model_name, "engine": f"vllm-{instance_id}", **given}
    for key in ("address", "model", "engine", "worker"):
        from_environment = environment.get(f"WEIGHTD_{key.upper()}")
        if from_environment:
            values[key] = from_environment
    for key, choices in _CHOICES.items():
        if values.get(key, choices[0]) not in choices:
            raise layout_error(
                f"unknown value in additional_config of vLLM: {_KEY}.{key}={values[key]!r}",
                reason="CONFIG",
                remedy=f"use one of {', '.join(choices)}",
            )
    if environment.get("WEIGHTD_STAGE_BYTES"):
        values["stage_bytes"] = _bytes_from(environment["WEIGHTD_STAGE_BYTES"])
    return Settings(**values)


def _bytes_from(text: str) -> int:
    if text.isdecimal():
        return int(text)
    raise layout_error(
        f"WEIGHTD_STAGE_BYTES is no number: {text!r}",
        reason="CONFIG",
        remedy="set it to a number of bytes, or leave it out",
    )


def settings_of(vllm_config: Any) -> Settings:
    """Settings of the vLLM engine that this process belongs to. \\see read_settings"""
    return read_settings(
        vllm_config.additional_config,
        vllm_config.model_config.served_model_name,
        vllm_config.instance_id,
        os.environ,
    )
