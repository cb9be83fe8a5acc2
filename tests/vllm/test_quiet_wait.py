"""vLLM's engine core, waiting for its workers: asleep in our calls, polling in all others."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, Iterator
from unittest import mock

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.distributed.device_communicators.shm_broadcast import MessageQueue  # noqa: E402
from vllm.v1.executor.multiproc_executor import MultiprocExecutor  # noqa: E402

from weightd.vllm import quiet_wait  # noqa: E402

_SECONDS = 0.5  # until an answer comes; less than vLLM polls for
_FEW = 5  # looks of a reader that sleeps: notices of what it has read already wake it, too


class _Executor:
    """The part of vLLM's executor that waits for one worker's answer, and its worker."""

    def __init__(self, backend: str) -> None:
        transfer = SimpleNamespace(backend=backend)
        self.vllm_config = SimpleNamespace(weight_transfer_config=transfer)
        self.written = MessageQueue(1, 1)
        self.response_mqs = [MessageQueue.create_from_handle(self.written.export_handle(), 0)]
        ready = threading.Thread(target=self.written.wait_until_ready)
        ready.start()
        self.response_mqs[0].wait_until_ready()
        ready.join()
        self.answer("first")  # vLLM polls after an answer
        assert self.response_mqs[0].dequeue() == "first"

    def answer(self, value: str) -> None:
        """Answers as a worker does."""
        self.written.enqueue(value)

    def collective_rpc(self, method: Any, **_: Any) -> tuple[str, int]:
        """The answer that comes in a while, and how often its reader looked for it."""
        queue = self.response_mqs[0]
        looks = mock.patch.object(queue._spin_condition, "wait", wraps=queue._spin_condition.wait)
        threading.Timer(_SECONDS, self.answer, ("late",)).start()
        with looks as wait:
            answer = queue.dequeue(timeout=30)
        return answer, wait.call_count


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch, request: Any) -> Iterator[_Executor]:
    monkeypatch.setattr(MultiprocExecutor, "collective_rpc", _Executor.collective_rpc)
    quiet_wait.install()
    quiet_wait.install()  # does nothing
    yield _Executor(request.param)


@pytest.mark.parametrize("executor", ["weightd"], indirect=True)
def test_core_sleeps_while_its_workers_receive_weights(executor: Any) -> None:
    call = MultiprocExecutor.collective_rpc
    answer, looks = call(executor, "update_weights", kwargs={})
    assert answer == "late" and looks <= _FEW
    answer, looks = call(executor, "execute_model")
    assert answer == "late" and looks > _FEW, "vLLM does not poll: drop weightd.vllm.quiet_wait"


@pytest.mark.parametrize("executor", ["nccl"], indirect=True)
def test_other_backends_are_left_alone(executor: Any) -> None:
    _, looks = MultiprocExecutor.collective_rpc(executor, "update_weights")
    assert looks > _FEW


@pytest.mark.parametrize("executor", ["weightd"], indirect=True)
def test_polling_is_back_after_a_failure(executor: Any) -> None:
    with pytest.raises(RuntimeError, match="a worker died"):
        with quiet_wait.asleep(executor.response_mqs):
            raise RuntimeError("a worker died")
    assert [queue._spin_condition.busy_loop_s for queue in executor.response_mqs] == [1]
