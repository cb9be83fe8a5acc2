"""The trace of vLLM's own loader where vLLM traces it: in a worker, with no current configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.gloo import run_ranks
from tests.support.tiny_models import make_model, save
from tests.support.vllm_engine import missing_parts
from tests.vllm.test_convert import _load, _world  # noqa: F401: process groups of one rank

pytestmark = pytest.mark.skipif(bool(missing_parts()), reason=missing_parts() or "-")


def _saved(_: int, folder: Path) -> str:
    return save("gpt_bigcode", make_model("gpt_bigcode"), folder)


def test_the_transformers_backend_is_traced_after_it_has_wrapped_the_class(tmp_path: Path) -> None:
    from vllm.config import get_current_vllm_config_or_none

    from weightd.vllm.post_load import own_parameters
    from weightd.vllm.shadow import traced_layout

    # In another process: here a test may have had the class wrapped already.
    model, config = _load(run_ranks(1, _saved, tmp_path)[0], "bfloat16")
    assert get_current_vllm_config_or_none() is None
    layout = traced_layout(config)
    assert {name for name, _ in layout.params} <= {name for name, _ in own_parameters(model)}
    assert len(layout.params) > 0
