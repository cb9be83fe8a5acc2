"""Trainer and engine ranks as processes that a test may kill or freeze.

The processes are forked from a server that has imported torch once, so that one costs milliseconds.
Every weight is a canary: a float32 that says which version and which element it is, so that memory
itself shows what it holds.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Optional

import torch

from tests.support.llama_engine import (
    expected_params,
    first_difference,
    poisoned,
    source_shapes,
)
from tests.support.staged_rank import StagedParams
from tests.support.unlendable import unlendable_params
from tests.support.trainer_ranks import row_shard
from weightd import Actor, EngineRank, Error

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "tie_word_embeddings": False,
}
_ELEMENTS = 1 << 16  # canaries per version; versions below 128 are exact in float32
_ANSWER_SECONDS = 30.0
_END_SECONDS = 10.0

torch.set_num_threads(1)  # in the server, too: a pool of threads would not survive its forks


def canary(name: str, shape: tuple[int, ...], version: int) -> torch.Tensor:
    """Returns a float32 tensor whose every element encodes version, tensor and position."""
    base = int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "big")
    count = int(torch.Size(shape).numel())
    places = (torch.arange(count, dtype=torch.int64) + base) % _ELEMENTS
    return (places + version * _ELEMENTS).to(torch.float32).reshape(shape)


def canaries(version: int) -> dict[str, torch.Tensor]:
    """Returns every full tensor of the trainer at ``version``."""
    return {name: canary(name, shape, version) for name, shape in source_shapes(CONFIG).items()}


class TrainerRank:
    """One trainer rank: rows of the matrices, all of the vectors."""

    def __init__(self) -> None:
        self._actor: Optional[Actor] = None
        self._place = (0, 1)
        self._source: dict[str, Any] = {}

    def register(
        self,
        address: str,
        model: str,
        group: str,
        rank: int,
        world_size: int,
        staged: bool = False,
        device: Optional[str] = None,
        worker: str = "daemon",
        environment: Optional[dict[str, str]] = None,
    ) -> None:
        """Opens the session and registers the shards; ``staged`` lends no memory."""
        os.environ.update(environment or {})  # a worker that is spawned gets it
        self._place = (rank, world_size)
        self._actor = Actor(
            address,
            model=model,
            group=group,
            rank=rank,
            world_size=world_size,
            device=device,
            worker=worker,
        )
        if staged:
            return
        self._source = self._shards(0)
        self._actor.register(self._source)

    def sync(self, version: int, content: Optional[int] = None, **options: Any) -> dict[str, Any]:
        """Fills the memory with ``content`` (default: the version) and syncs it.

        Returns:
            ``seconds`` and either ``ack`` (replica outcomes) or the fields of the error.
        """
        assert self._actor is not None
        for name, tensor in self._shards(version if content is None else content).items():
            _local(self._source[name]).copy_(_local(tensor))
        return self._timed(lambda: self._actor.sync(version, **options))

    def sync_staged(self, version: int) -> dict[str, Any]:
        """Syncs tensors that exist only now; see `sync` for what it returns."""
        assert self._actor is not None
        return self._timed(lambda: self._actor.sync(version, tensors=self._shards(version)))

    def fork(self) -> int:
        """Forks a child that sleeps, as a data loader's would; returns its process id."""
        child = os.fork()
        if child == 0:
            while True:
                signal.pause()
        return child

    def close(self) -> None:
        """Ends the session."""
        if self._actor is not None:
            self._actor.close()

    def _shards(self, version: int) -> dict[str, Any]:
        rank, world_size = self._place
        full = canaries(version)
        return {
            name: row_shard(tensor, world_size, rank) if tensor.dim() > 1 else tensor
            for name, tensor in full.items()
        }

    @staticmethod
    def _timed(call: Any) -> dict[str, Any]:
        start = time.monotonic()
        answer: dict[str, Any] = {"ack": None}
        try:
            answer["ack"] = [vars(replica) for replica in call().replicas]
        except Error as error:
            fields = ("reason", "message", "phase", "peer", "rank", "remedy")
            answer.update({field: getattr(error, field) for field in fields})
            answer["kind"] = type(error).__name__
            result = error.result
            answer["replicas"] = [vars(replica) for replica in result.replicas] if result else []
        answer["seconds"] = time.monotonic() - start
        return answer


class ServingRank:
    """One engine rank; its memory is what the test reads."""

    def __init__(self) -> None:
        self._rank: Optional[EngineRank] = None
        self._place = (0, 1)
        self._params: dict[str, torch.Tensor] = {}
        self._stages: Optional[StagedParams] = None

    def register(
        self,
        address: str,
        model: str,
        engine: str,
        tp_rank: int,
        tp_size: int,
        device: Optional[str] = None,
        worker: str = "daemon",
        environment: Optional[dict[str, str]] = None,
        staged: bool = False,
        pulled: str = "",
    ) -> None:
        """Opens the rank with poisoned parameters.

        ``staged`` receives projections in stages; ``pulled``: ``some`` or ``all`` parameters lie in
        memory that no worker can map, and come in stages of 4 KiB.
        """
        os.environ.update(environment or {})  # a worker that is spawned gets it
        self._place = (tp_rank, tp_size)
        like = expected_params(CONFIG, canaries(0), tp_rank, tp_size, torch.float32)
        self._params = {
            name: poisoned(tuple(tensor.shape), torch.float32) for name, tensor in like.items()
        }
        self._params = unlendable_params(self._params, pulled)
        options: dict[str, Any] = {"params": self._params, "stage_bytes": 4096}
        if staged:
            self._stages = StagedParams(CONFIG, tp_rank, tp_size, torch.float32)
            options = self._stages.options()
        self._rank = EngineRank(
            address,
            model=model,
            engine=engine,
            architecture="LlamaForCausalLM",
            config=CONFIG,
            **options,
            tp_rank=tp_rank,
            tp_size=tp_size,
            device=device,
            worker=worker,
        )

    def state(self) -> dict[str, Any]:
        """Returns the rank's own state."""
        assert self._rank is not None
        return self._rank.state

    def wait(self, version: Optional[int] = None, state: Optional[str] = None) -> dict[str, Any]:
        """Waits for a version or a state."""
        assert self._rank is not None
        return self._rank.wait(version=version, state=state, timeout=_ANSWER_SECONDS / 2)

    def differences(self, version: int) -> list[str]:
        """Compares the memory, bit by bit, with what ``version`` must be."""
        expected = expected_params(CONFIG, canaries(version), *self._place, torch.float32)
        if self._stages is not None:
            return self._stages.differences(expected)
        found = [(name, first_difference(self._params[name], expected[name])) for name in expected]
        return [f"{name}: {difference}" for name, difference in found if difference]

    def content(self) -> str:
        """Returns a digest of the memory: equal as long as nobody writes."""
        digest = hashlib.sha256()
        for tensor in self._params.values():
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        """Closes the rank."""
        if self._rank is not None:
            self._rank.close()


ROLES = {"actor": TrainerRank, "engine": ServingRank}


def freeze(pid: int) -> None:
    """Stops every thread of a process; returns when all of them have stopped.

    The signal is handled by one thread, and until that has run the others go on.
    """
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + _END_SECONDS
    while not all(_stopped(task) for task in Path(f"/proc/{pid}/task").glob("*/stat")):
        assert time.monotonic() < deadline, f"process {pid} does not stop"
        time.sleep(0.001)


def _stopped(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(") ")[2][0] in "TZX"
    except FileNotFoundError:  # the thread has ended
        return True


def _local(tensor: Any) -> torch.Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def _play(role: str, connection: Connection) -> None:
    """Serves requests, one (operation, arguments) at a time, until the connection ends."""
    player = ROLES[role]()
    while True:
        try:
            operation, arguments = connection.recv()
        except EOFError:
            break
        try:
            connection.send(("value", getattr(player, operation)(**arguments)))
        except Exception as error:  # the caller raises it
            connection.send(("error", f"{type(error).__name__}: {error}"))
    player.close()


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.fault_roles"])
    return context


class Player:
    """A process that plays one rank.

    Attributes:
        name: for messages.
    """

    def __init__(self, name: str, role: str) -> None:
        self.name = name
        context = _context()
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_play, args=(role, theirs), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Process id."""
        return int(self._process.pid or 0)

    def begin(self, operation: str, **arguments: Any) -> None:
        """Asks for one operation; `answer` waits for it."""
        self._connection.send((operation, arguments))

    def answer(self, seconds: float = _ANSWER_SECONDS) -> Any:
        """Returns the answer to the last `begin`.

        Raises:
            AssertionError: the operation raised, the process is gone, or time is up.
        """
        assert self._connection.poll(seconds), f"{self.name} did not answer within {seconds} s"
        try:
            kind, value = self._connection.recv()
        except EOFError:
            raise AssertionError(f"{self.name} is gone") from None
        assert kind == "value", f"{self.name}: {value}"
        return value

    def call(self, operation: str, **arguments: Any) -> Any:
        """Asks for one operation and waits for its answer."""
        self.begin(operation, **arguments)
        return self.answer()

    def kill(self) -> None:
        """Ends the process as kill -9 does, and waits until it is gone."""
        self._process.kill()
        self._process.join(_END_SECONDS)

    def freeze(self) -> None:
        """Stops every thread of the process."""
        freeze(self.pid)

    def thaw(self) -> None:
        """Lets a frozen process go on."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """Lets the process close its session and end."""
        self._connection.close()
        if self._process.is_alive():
            self.thaw()
            self._process.join(_END_SECONDS)
        if self._process.is_alive():
            self.kill()
