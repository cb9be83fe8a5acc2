"""The suite notices wrong code: a test build breaks its own results on purpose, one way at a time
(``Mutated`` in daemon/base/failpoint.h), and every one is caught by a named unit test and by real
syncs whose outcome is compared with torch's.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import pytest
import torch

from tests.support.cluster import Cluster, missing_binaries
from tests.support.llama_engine import (
    empty_params,
    expected_params,
    first_difference,
    source_shapes,
)
from tests.support.staged_rank import StagedParams
from weightd import Actor, EngineRank, Error

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 70,
    "tie_word_embeddings": False,
}
TP_SIZE = 2
_HOLD_SECONDS = 2.0
_WAIT_SECONDS = 30


def _unusable() -> str:
    reason = missing_binaries()
    if reason:
        return reason
    if b"WEIGHTD_MUTATION" not in Path(os.environ["WEIGHTD_BIN"]).read_bytes():
        return "this build has no failpoints (preset test)"
    return ""


pytestmark = pytest.mark.skipif(bool(_unusable()), reason=_unusable() or "-")


def _source(version: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(version)
    return {name: torch.randn(shape) for name, shape in source_shapes(CONFIG).items()}


class _Engine:
    """An engine of two ranks in this process."""

    def __init__(self, cluster: Cluster, **callbacks: Callable[[], None]) -> None:
        self.params = [empty_params(CONFIG, rank, TP_SIZE, torch.bfloat16) for rank in range(2)]
        self._ranks = [
            EngineRank(
                cluster.address,
                model="m",
                engine="e0",
                architecture="LlamaForCausalLM",
                config=CONFIG,
                params=self.params[rank],
                tp_rank=rank,
                tp_size=TP_SIZE,
                **callbacks,
            )
            for rank in range(TP_SIZE)
        ]

    def __enter__(self) -> _Engine:
        return self

    def __exit__(self, *unused: Any) -> None:
        for rank in self._ranks:
            rank.close()

    def holds(self, version: int) -> bool:
        """True if every byte is the version's, and no other."""
        for rank, params in enumerate(self.params):
            wanted = expected_params(CONFIG, _source(version), rank, TP_SIZE, torch.bfloat16)
            if any(first_difference(params[name], wanted[name]) for name in params):
                return False
        return True

    def untouched(self) -> bool:
        """True if no byte was written."""
        for rank, params in enumerate(self.params):
            poison = empty_params(CONFIG, rank, TP_SIZE, torch.bfloat16)
            if any(first_difference(params[name], poison[name]) for name in params):
                return False
        return True


class _Trainer:
    """A trainer of one rank that lends its memory."""

    def __init__(self, cluster: Cluster) -> None:
        self._actor = Actor(cluster.address, model="m", rank=0, world_size=1)
        self._tensors = _source(0)
        self._actor.register(self._tensors)

    def __enter__(self) -> _Trainer:
        return self

    def __exit__(self, *unused: Any) -> None:
        self._actor.close()

    def sync(self, version: int) -> Optional[str]:
        """Syncs; returns the reason of the error, or None when it was acknowledged."""
        for name, tensor in _source(version).items():
            self._tensors[name].copy_(tensor)
        try:
            self._actor.sync(version)
        except Error as error:
            return error.reason
        return None


def _state(cluster: Cluster) -> str:
    """What the daemon says of the engine."""
    command = [os.environ["WEIGHTCTL_BIN"], "--address", cluster.address, "engines", "-o", "json"]
    done = subprocess.run(command, capture_output=True, timeout=20, check=True)
    return json.loads(done.stdout)["models"][0]["engines"][0]["state"]


def _comes_true(condition: Callable[[], bool]) -> bool:
    """Looks for a while whether something happens that must not."""
    deadline = time.monotonic() + _HOLD_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# What a careful observer sees of a daemon: "" if nothing is wrong.


def exact(cluster: Cluster) -> str:
    """An acknowledged engine holds the bytes; one that may be torn is POISONED."""
    with _Engine(cluster) as engine, _Trainer(cluster) as trainer:
        for version in (1, 2):
            reason = trainer.sync(version)
            if reason is not None:
                return reason if _state(cluster) == "ENGINE_STATE_POISONED" else "not poisoned"
            if not engine.holds(version):
                return "wrong bytes"
    return ""


def patient(cluster: Cluster) -> str:
    """Nobody is acknowledged before every rank of the engine has published."""
    publish, asked = threading.Event(), threading.Event()

    def commit() -> None:
        asked.set()
        publish.wait(_WAIT_SECONDS)

    with _Engine(cluster, commit=commit), _Trainer(cluster) as trainer:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(trainer.sync, 1)
            early = _comes_true(running.done)
            assert early or asked.wait(_WAIT_SECONDS)
            publish.set()
            reason = running.result()
    return reason or ("acknowledged early" if early else "")


def polite(cluster: Cluster) -> str:
    """Nothing is written before every rank of the engine has stopped reading."""
    quiescent, asked = threading.Event(), threading.Event()

    def quiesce() -> None:
        asked.set()
        quiescent.wait(_WAIT_SECONDS)

    with _Engine(cluster, quiesce=quiesce) as engine, _Trainer(cluster) as trainer:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(trainer.sync, 1)
            assert asked.wait(_WAIT_SECONDS)
            early = _comes_true(lambda: not engine.untouched())
            quiescent.set()
            reason = running.result()
    return "written early" if early else reason or ""


def monotonic(cluster: Cluster) -> str:
    """A version that is older than the published one is refused."""
    with _Engine(cluster), _Trainer(cluster) as trainer:
        assert trainer.sync(2) is None
        return "" if trainer.sync(1) == "STALE_VERSION" else "went back"


def staged(cluster: Cluster) -> str:
    """Derived parameters that are received one layer at a time are all converted."""
    params = StagedParams(CONFIG, 0, 1, torch.bfloat16)
    options = {"model": "m", "engine": "e0", "architecture": "LlamaForCausalLM", "config": CONFIG}
    with EngineRank(cluster.address, **options, **params.options()), _Trainer(cluster) as trainer:
        for version in (1, 2):
            reason = trainer.sync(version)
            if reason is not None:
                return reason
            wanted = expected_params(CONFIG, _source(version), 0, 1, torch.bfloat16)
            if params.differences(wanted):
                return "wrong bytes"
    return ""


OBSERVERS: tuple[Callable[[Cluster], str], ...] = (exact, patient, polite, monotonic, staged)


class Case(NamedTuple):
    """Who notices a mutation.

    Attributes:
        unit: binary and case of the unit test that fails.
        observer: of real syncs.
        noticed: what the observer says.
    """

    unit: tuple[str, str]
    observer: Callable[[Cluster], str]
    noticed: str


_LANDS = (
    "transport/transport_test",
    "every parameter holds what the layout says, bit for bit, and the digests agree",
)
_DIFFERS = (
    "sync/sync_test",
    "bytes that differ after landing are never acknowledged and poison the engine",
)
MUTATIONS = {
    "skip_tensor": Case(_LANDS, exact, "VERIFY_MISMATCH"),
    "skip_zeros": Case(_LANDS, exact, "VERIFY_MISMATCH"),
    "swap_boxes": Case(_LANDS, exact, "VERIFY_MISMATCH"),
    "off_by_one": Case(_LANDS, exact, "VERIFY_MISMATCH"),
    "drop_digest": Case(_LANDS, exact, "VERIFY_MISMATCH"),
    # What follows the digest cannot see: it proves the transport, not the plan and not the cast.
    "swap_sources": Case(_LANDS, exact, "wrong bytes"),
    "swap_tensors": Case(
        ("layout/layout_property_test", "random models lower to what slicing full tensors gives"),
        exact,
        "wrong bytes",
    ),
    "wrong_cast": Case(
        ("device/device_test", "every instruction set gives torch's bits"), exact, "wrong bytes"
    ),
    "swap_boxes,blind_verify": Case(_DIFFERS, exact, "wrong bytes"),
    "swap_boxes,forget_poison": Case(_DIFFERS, exact, "not poisoned"),
    "early_ack": Case(
        ("sync/sync_test", "an engine that does not publish is not acknowledged, and is poisoned"),
        patient,
        "acknowledged early",
    ),
    "early_write": Case(
        (
            "sync/sync_test",
            "an engine that does not answer Prepare is named at the deadline and left untouched",
        ),
        polite,
        "written early",
    ),
    "skip_convert": Case(
        ("sync/sync_test", "each stage is transferred, verified and converted before the next"),
        staged,
        "wrong bytes",
    ),
    "reuse_version": Case(
        ("registry/registry_test", "versions only go up"), monotonic, "went back"
    ),
}


@pytest.fixture
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A daemon and worker with the mutations of the parameter."""
    with monkeypatch.context() as patched:
        patched.setenv("WEIGHTD_MUTATION", request.param)
        running = Cluster()
    with running:
        yield running


def _run_unit(unit: tuple[str, str], mutation: str) -> int:
    binary = Path(os.environ["WEIGHTD_BUILD_DIR"]) / "tests" / "unit" / unit[0]
    environment = {**os.environ, "WEIGHTD_MUTATION": mutation}
    command = [str(binary), unit[1].replace(",", "\\,"), "--warn", "NoTests"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False)
    return done.returncode


@pytest.mark.parametrize("cluster", [""], indirect=True, ids=["no-mutation"])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_observers_find_nothing_wrong_without_a_mutation(
    cluster: Cluster, observer: Callable[[Cluster], str]
) -> None:
    assert observer(cluster) == "", cluster.logs()


@pytest.mark.parametrize(("cluster", "mutation"), [(m, m) for m in MUTATIONS], indirect=["cluster"])
def test_a_real_sync_notices(cluster: Cluster, mutation: str) -> None:
    case = MUTATIONS[mutation]
    assert case.observer(cluster) == case.noticed, cluster.logs()


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_named_unit_test_notices(mutation: str) -> None:
    case = MUTATIONS[mutation]
    assert _run_unit(case.unit, "") == 0
    assert _run_unit(case.unit, mutation) > 0


def test_the_proof_of_a_plan_is_needed() -> None:
    """A planner that proves nothing is noticed by the property tests of the proof."""
    unit = ("plan/plan_test", "the proof notices a layout that is broken on purpose")
    assert _run_unit(unit, "") == 0
    assert _run_unit(unit, "lax_proof") > 0
