"""What the plug-in reads out of `EngineRank.state`."""

from __future__ import annotations

from typing import Any

from weightd.errors import Error, error_class
from weightd.vllm.settings import Settings


def summary(settings: Settings, state: dict[str, Any]) -> str:
    """What the log says once the engine has registered."""
    version = state["version"]
    held = f"holds version {version}" if version else "holds no version yet; not ready"
    error = state["error"] or state["idle"]["error"]
    why = f": {error['message']}" if error else ""
    return f"engine {settings.engine} of model {settings.model} {held}{why}"


def code(state: dict[str, Any]) -> int:
    """google.rpc code of the error; 0 without one."""
    return state["error"]["code"] if state["error"] else 0


def reason(state: dict[str, Any]) -> str:
    """Reason of the error; "" without one."""
    return state["error"]["reason"] if state["error"] else ""


def error_text(state: dict[str, Any]) -> str:
    """The error in words."""
    return state["error"]["message"] if state["error"] else "no reason was given"


def refusal(error: dict[str, Any]) -> Error:
    """The exception for an error of a state."""
    fields = {k: error[k] for k in ("reason", "tensor", "rank", "phase", "peer", "remedy")}
    kind = error_class(error["code"], error["reason"])
    return kind(error["message"], code=error["code"], **fields)
