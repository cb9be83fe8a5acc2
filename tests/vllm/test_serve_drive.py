"""`vllm serve` with two workers, driven over HTTP: requests in flight in each pause mode, caches,
the trainer interface of vLLM, and the death of one of two engines.

One server serves all tests, in this order; the last one kills it.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch

from deploy.quickstart.serve import VllmClient, VllmServer
from deploy.quickstart.trainer import MODEL, config
from tests.support.cluster import Cluster
from tests.support.live_llama import LIMIT_SECONDS, TOLERANCE, LiveLlama, source_paths
from tests.support.vllm_engine import missing_parts, plugin_folder
from weightd import Ack, Actor, errors

pytestmark = pytest.mark.skipif(bool(missing_parts()), reason=missing_parts() or "-")

TP = 2
REQUESTS = 3
PROMPT = 70  # more than two blocks of the prefix cache
MANY, FEW = 400, 100  # new tokens: far more than are made before a pause, and few enough to drain
PATIENT = 60.0  # seconds for a call where the machine is busy with other tests
_versions = itertools.count(1)


class _Rig:
    """Daemon, server and trainer."""

    def __init__(self, cluster: Cluster, server: VllmServer, failpoints: Path) -> None:
        self.cluster = cluster
        self.server = server
        self.failpoints = failpoints
        self.client = VllmClient(server.url)
        self.llama = LiveLlama()

    def actor(self, **options: Any) -> Actor:
        """A trainer of one rank that drives the server."""
        options = {"engines": [self.server.url], "engine_timeout": PATIENT, **options}
        actor = Actor(self.cluster.address, model=MODEL, rank=0, world_size=1, **options)
        actor.register(self.llama.model)
        return actor

    def sync(self, actor: Actor) -> Ack:
        """Trains a step and syncs it."""
        version = next(_versions)
        self.llama.train(version)
        return actor.sync(version)

    def generate(self, prompt: list[int], count: int) -> dict[str, Any]:
        """Greedy tokens with their log-probabilities and the versions that made them."""
        sampling = {
            "max_tokens": count, "temperature": 0, "logprobs": 0, "ignore_eos": True,
            "detokenize": False,
        }  # fmt: skip
        answer = self.client.post(
            "inference/v1/generate", {"token_ids": prompt, "sampling_params": sampling}
        )
        return answer["choices"][0]

    def running(self) -> int:
        """Requests that the server runs now."""
        with urllib.request.urlopen(f"{self.server.url}/metrics") as response:
            for line in response.read().decode().splitlines():
                if line.startswith("vllm:num_requests_running{"):
                    return int(float(line.rpartition(" ")[2]))
        raise AssertionError("the server does not count its requests")

    def worst(self, prompt: list[int], choice: dict[str, Any], version: int) -> float:
        """Largest distance of the tokens of one version from what its weights alone say."""
        tokens = choice["token_ids"]
        expected = self.llama.logprobs(version, prompt + tokens)[len(prompt) - 1 :]
        found = [step["logprob"] for step in choice["logprobs"]["content"]]
        span = next(s for s in choice["weight_versions"] if s["version"] == str(version))
        return max(abs(a - b) for a, b in list(zip(expected, found))[span["start"] : span["end"]])


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Rig]:
    """One daemon and one server for all tests."""
    failpoints = tmp_path_factory.mktemp("failpoints")
    os.environ["WEIGHTD_FAILPOINT_DIR"] = str(failpoints)
    try:
        with Cluster() as cluster:
            paths = [str(plugin_folder(cluster.folder / "plugin")), *source_paths()]
            environment = {
                "WEIGHTD_ADDRESS": cluster.address,
                "PYTHONPATH": os.pathsep.join(paths),
            }
            more = ("--max-model-len", "1024", "--block-size", "32", "--enable-prefix-caching")
            with VllmServer(cluster.folder, TP, more, environment) as server:
                yield _Rig(cluster, server, failpoints)
    finally:
        del os.environ["WEIGHTD_FAILPOINT_DIR"]


def _prompt(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, config().vocab_size, (PROMPT,), generator=generator).tolist()


def _in_flight(rig: _Rig, actor: Actor, count: int) -> tuple[int, Ack, list, list]:
    """Syncs while requests run. Returns version before, acknowledgement, prompts and answers."""
    before = rig.sync(actor).version
    version = next(_versions)
    rig.llama.train(version)  # takes longer than some requests
    prompts = [_prompt(before * 10 + i) for i in range(REQUESTS)]
    with ThreadPoolExecutor(REQUESTS) as pool:
        answers: list[Future] = [pool.submit(rig.generate, prompt, count) for prompt in prompts]
        deadline = time.monotonic() + PATIENT
        while rig.running() < REQUESTS:
            assert time.monotonic() < deadline, "the requests never ran at once"
            time.sleep(0.01)
        ack = actor.sync(version)
        return before, ack, prompts, [answer.result() for answer in answers]


def _spans(choice: dict[str, Any]) -> list[str]:
    return [span["version"] for span in choice["weight_versions"] or ()]


def test_sync_reaches_memory_outputs_and_version(rig: _Rig, tmp_path: Path) -> None:
    with rig.actor() as actor:
        for _ in range(2):
            ack = rig.sync(actor)
            (drive,) = ack.engines
            assert drive.resumed and drive.caches_reset == ("prefix",)
            assert drive.engine.startswith("http://") and 0 < drive.pause < PATIENT
            path = tmp_path / "full.pt"
            torch.save(rig.llama.full(), path)
            for found in rig.client.ask_workers("quickstart_compare", str(path)):
                assert found["differences"] == [] and found["equal"] + found["packed"] == 39
            assert rig.client.weight_version() == str(ack.version)
            choice = rig.generate(_prompt(0), 8)
            assert _spans(choice) == [str(ack.version)]
            assert rig.worst(_prompt(0), choice, ack.version) < TOLERANCE


def test_kept_requests_go_on_with_new_weights_and_nothing_computed_before(rig: _Rig) -> None:
    with rig.actor(pause_mode="keep") as actor:
        before, ack, prompts, choices = _in_flight(rig, actor, MANY)
        for prompt, choice in zip(prompts, choices):
            assert choice["finish_reason"] == "length" and len(choice["token_ids"]) == MANY
            assert _spans(choice) == [str(before), str(ack.version)]
            assert rig.worst(prompt, choice, before) < TOLERANCE
            assert rig.worst(prompt, choice, ack.version) < TOLERANCE


def test_control_kept_requests_show_what_was_computed_before_if_no_reset_is_asked_for(
    rig: _Rig,
) -> None:
    with rig.actor(pause_mode="keep", reset_caches=False) as actor:
        _, ack, prompts, choices = _in_flight(rig, actor, MANY)
        assert ack.engines[0].caches_reset == ()
        worst = [rig.worst(p, choice, ack.version) for p, choice in zip(prompts, choices)]
        assert min(worst) > 2 * TOLERANCE, "the test above would not see a stale cache"


def test_drained_requests_end_with_the_weights_they_began_with(rig: _Rig) -> None:
    with rig.actor(pause_mode="wait") as actor:
        before, _, prompts, choices = _in_flight(rig, actor, FEW)
        for prompt, choice in zip(prompts, choices):
            assert choice["finish_reason"] == "length" and len(choice["token_ids"]) == FEW
            assert _spans(choice) == [str(before)]
            assert rig.worst(prompt, choice, before) < TOLERANCE


def test_aborted_requests_say_so_and_never_saw_the_new_weights(rig: _Rig) -> None:
    with rig.actor(pause_mode="abort") as actor:
        before, ack, _, choices = _in_flight(rig, actor, MANY)
        for choice in choices:
            assert choice["finish_reason"] == "abort" and len(choice["token_ids"]) < MANY
            assert set(_spans(choice)) <= {str(before)}
        choice = rig.generate(_prompt(1), 8)
        assert _spans(choice) == [str(ack.version)]
        assert rig.worst(_prompt(1), choice, ack.version) < TOLERANCE


@pytest.mark.parametrize("reset", [True, False])
def test_prefix_cached_with_older_weights_is_used_only_if_no_reset_is_asked_for(
    rig: _Rig, reset: bool
) -> None:
    prompt = _prompt(2)
    with rig.actor(reset_caches=reset) as actor:
        rig.sync(actor)
        rig.generate(prompt, 2)
        ack = rig.sync(actor)
        worst = rig.worst(prompt, rig.generate(prompt, 8), ack.version)
        assert worst < TOLERANCE if reset else worst > 2 * TOLERANCE


def test_update_left_open_by_a_trainer_that_died_is_begun_anew(rig: _Rig) -> None:
    with rig.actor() as actor:
        client = actor._engines[0].client
        client.start_weight_update()
        ack = rig.sync(actor)
        assert ack.engines[0].resumed and rig.client.weight_version() == str(ack.version)
        client.finish_weight_update()
        assert rig.sync(actor).engines[0].resumed
        assert actor._engines[0].name.startswith("vllm-"), "every rank gave its own answer"


def test_trainer_of_vllms_own_interface_changes_only_its_init_info(
    rig: _Rig, tmp_path: Path
) -> None:
    from vllm.distributed.weight_transfer import (
        HTTPVLLMWeightSyncClient,
        ModuleSource,
        WeightTransferTrainerFactory,
    )

    from weightd.vllm.trainer import WeightdTrainerInitInfo

    version = next(_versions)
    rig.llama.train(version)
    sender = WeightTransferTrainerFactory.trainer_init(
        WeightdTrainerInitInfo(
            MODEL, rig.cluster.address, 1, first_version=version, engine_timeout=PATIENT, rank=0
        ),
        client=HTTPVLLMWeightSyncClient(rig.server.url),
        source=ModuleSource(rig.llama.model),
    )
    sender.send_weights()
    assert rig.client.weight_version() == str(version)
    path = tmp_path / "full.pt"
    torch.save(rig.llama.full(), path)
    for found in rig.client.ask_workers("quickstart_compare", str(path)):
        assert found["differences"] == []
    sender.shutdown()


def _light_engine(rig: _Rig, name: str) -> Any:
    process = rig.cluster.start_engines(name)
    process.call(
        "open", key="k", model=MODEL, engine=name, architecture="LlamaForCausalLM",
        config=config().to_dict() | {"dtype": None}, tp_rank=0, tp_size=1, dtype="bfloat16",
    )  # fmt: skip
    return process


def _kill_when_prepared(rig: _Rig, pid: int) -> tuple[threading.Thread, list[float]]:
    """Kills a process once every engine is quiescent. Returns the thread and when it was."""
    arm, hit = rig.failpoints / "prepared.arm", rig.failpoints / "prepared.hit"
    hit.unlink(missing_ok=True)
    arm.touch()
    times: list[float] = []

    def kill() -> None:
        while not hit.exists():
            time.sleep(0.01)
        times.append(time.monotonic())
        os.kill(pid, signal.SIGKILL)
        arm.unlink()

    thread = threading.Thread(target=kill)
    thread.start()
    return thread, times


def test_vllm_commits_and_serves_when_the_other_engine_is_killed(rig: _Rig) -> None:
    process = _light_engine(rig, "light")
    with rig.actor() as actor:
        killer, _ = _kill_when_prepared(rig, process.pid)
        version = next(_versions)
        rig.llama.train(version)
        with pytest.raises(errors.UnavailableError, match="light") as caught:
            actor.sync(version)
        killer.join()
        result = caught.value.result
        assert result is not None and result.engines[0].resumed
        choice = rig.generate(_prompt(3), 8)
        assert _spans(choice) == [str(version)]
        assert rig.worst(_prompt(3), choice, version) < TOLERANCE


def _engine_core(server: VllmServer) -> int:
    """Process id of the server's engine core."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = status.read_text().split("PPid:\t")[1].split("\n")[0]
            title = (status.parent / "cmdline").read_text()
        except OSError:
            continue
        if int(parent) == server.pid and "EngineCore" in title:
            return int(status.parent.name)
    raise AssertionError("the server has no engine core")


def test_engine_core_killed_in_mid_update_is_named_in_time(rig: _Rig, tmp_path: Path) -> None:
    light = _light_engine(rig, "light2")
    with rig.actor(engine_timeout=4.0) as actor:
        killer, times = _kill_when_prepared(rig, _engine_core(rig.server))
        version = next(_versions)
        rig.llama.train(version)
        with pytest.raises(errors.Error) as caught:
            actor.sync(version)
        took = time.monotonic() - times[0]
        killer.join()
        assert took < LIMIT_SECONDS, caught.value
        assert caught.value.reason in ("ENGINE_CALL", "PEER_LOST"), caught.value
        assert caught.value.result is not None
        assert not caught.value.result.engines[0].resumed and caught.value.result.engines[0].error
        source = tmp_path / "full.pt"
        torch.save(rig.llama.full(), source)
        assert light.call("check", key="k", version=version, source=str(source)) == []
