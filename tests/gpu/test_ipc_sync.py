"""End to end on one GPU: real torch processes, the real daemon, its worker; bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator

import pytest
import torch

from tests.support.cluster import Cluster
from tests.support.peer import Peer, ask_all
from weightd import new_group

VERSIONS = (1, 2, 3)
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 515,
    "tie_word_embeddings": False,
}
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
TRAINER = "tests.support.gpu_trainer"
ENGINES = "tests.support.engine_process"


class Bench:
    """A daemon with a worker for one GPU, two trainer processes and two engine processes."""

    def __init__(self, gpu: str, environment: dict[str, str]) -> None:
        self.cluster = Cluster(f'[worker]\ndevices = ["{gpu}"]\n')
        try:
            self.trainers = [
                Peer(self.cluster, f"trainer{i}", TRAINER, environment) for i in range(2)
            ]
            self.engines = [
                Peer(self.cluster, f"engines{i}", ENGINES, environment) for i in range(2)
            ]
        except BaseException:
            self.cluster.close()
            raise

    def close(self) -> None:
        """Ends all of it."""
        for peer in (*self.trainers, *self.engines):
            peer.close()
        self.cluster.close()


@pytest.fixture(scope="module", params=("cudaMalloc", "expandable_segments"))
def bench(gpu: str, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """One per kind of torch's allocator."""
    made = Bench(gpu, EXPANDABLE if request.param == "expandable_segments" else {})
    yield made
    made.close()


def save_source(trainers: list[Peer], folder: Path) -> Path:
    """Gathers what the trainer ranks hold now into one file of full tensors."""
    parts = []
    for rank, trainer in enumerate(trainers):
        path = folder / f"part{rank}.pt"
        trainer.call("save", path=str(path))
        parts.append(torch.load(path))
    full = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    torch.save(full, folder / "full.pt")
    return folder / "full.pt"


@pytest.mark.parametrize("tp_size", (1, 2))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("family", ("llama", "qwen2"))
def test_engines_on_the_gpu_hold_the_golden_layout(
    bench: Bench, tmp_path: Path, family: str, dtype: str, tp_size: int
) -> None:
    config = {**CONFIG, "model_type": family}
    model = f"{family}-{dtype}-tp{tp_size}"
    architecture = "LlamaForCausalLM" if family == "llama" else "Qwen2ForCausalLM"
    engines = [(bench.engines[rank], f"{model}/{rank}") for rank in range(tp_size)]
    group = new_group()
    try:
        for rank, (process, key) in enumerate(engines):
            process.call(
                "open", key=key, memory="cuda", model=model, engine="e0", dtype="bfloat16",
                architecture=architecture, config=config, tp_rank=rank, tp_size=tp_size,
            )  # fmt: skip
            process.call("capture", key=key)
        before = [process.call("replay", key=key) for process, key in engines]
        for rank, trainer in enumerate(bench.trainers):
            trainer.ask(
                "open", model=model, group=group, rank=rank, world_size=2, config=config, dtype=dtype
            )
        assert [trainer.answer()["registered"] for trainer in bench.trainers] == [True, True]
        for version in VERSIONS:
            # The last step is still running on the GPU when sync is called.
            ask_all(bench.trainers, "step", version=version, busy=version == VERSIONS[-1])
            acks = ask_all(bench.trainers, "sync", version=version)
            assert [ack.get("committed") for ack in acks] == [1, 1], acks
            source = save_source(bench.trainers, tmp_path)
            for process, key in engines:
                found = process.call("check", key=key, version=version, source=str(source))
                assert found == []
        # The graph was captured before the first sync: it reads the same addresses.
        after = [process.call("replay", key=key) for process, key in engines]
        for process, key in engines:
            process.call("capture", key=key)
        assert after == [process.call("replay", key=key) for process, key in engines]
        assert all(x != y for old, new in zip(before, after) for x, y in zip(old, new))
    except AssertionError as error:
        pytest.fail(f"{error}\n{bench.cluster.logs()}")
    finally:
        for process, key in engines:
            process.call("close", key=key)
        ask_all(bench.trainers, "close_all")


def test_an_fsdp2_module_trained_on_the_gpu(bench: Bench, tmp_path: Path) -> None:
    config = {**CONFIG, "max_position_embeddings": 32}
    config.pop("model_type")
    trainer, (engine, other) = bench.trainers[0], bench.engines
    model, key = "fsdp2", "fsdp2/0"
    engine.call(
        "open", key=key, memory="cuda", model=model, engine="e0", dtype="bfloat16",
        architecture="LlamaForCausalLM", config=CONFIG, tp_rank=0, tp_size=1,
    )  # fmt: skip
    try:
        trainer.call(
            "open_fsdp2", model=model, group=new_group(), config=config, store=str(tmp_path / "s")
        )
        for version in VERSIONS:
            trainer.call("train")
            ack = trainer.call("sync", version=version)
            assert ack.get("committed") == 1, ack
            source = save_source([trainer], tmp_path)
            assert engine.call("check", key=key, version=version, source=str(source)) == []
        # An engine that comes late is filled from the one that serves, without the trainer.
        late = "fsdp2/1"
        other.call(
            "open", key=late, memory="cuda", model=model, engine="e1", dtype="bfloat16",
            architecture="LlamaForCausalLM", config=CONFIG, tp_rank=0, tp_size=1,
        )  # fmt: skip
        found = other.call("check", key=late, version=VERSIONS[-1], source=str(source))
        other.call("close", key=late)
        assert found == []
    except AssertionError as error:
        pytest.fail(f"{error}\n{bench.cluster.logs()}")
    finally:
        engine.call("close", key=key)
        trainer.call("close_all")
