"""Checkpoint directories that lie: `weightctl push` names tensor, file and remedy, and leaves every
running engine as it was."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from safetensors.torch import save_file

from tests.support.checkpoints import (
    INDEX,
    LLAMA,
    edit_header,
    edit_json,
    file_of,
    load_model,
    missing_weightctl,
    push,
)
from tests.support.cluster import Cluster
from tests.support.fixtures import checkpoint, cluster, model  # noqa: F401
from tests.support.poisoned_engine import PoisonedEngine

pytestmark = pytest.mark.skipif(bool(missing_weightctl()), reason=missing_weightctl() or "-")

NORM = "model.norm.weight"
HELD = "one of the spoiled file's tensors"


def _drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _wrong_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(architectures=["Qwen2ForCausalLM"]))


def _held(folder: Path) -> set[str]:
    """The tensors in that file."""
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    return {name for name, file in places.items() if file == places[NORM]}


def _missing_shard(folder: Path) -> None:
    file_of(folder, NORM).unlink()


def _index_outside(folder: Path) -> None:
    shutil.move(file_of(folder, NORM), folder.parent / "outside.safetensors")
    edit_json(folder / INDEX, lambda i: i["weight_map"].update({NORM: "../outside.safetensors"}))


def _link_outside(folder: Path) -> None:
    shard = file_of(folder, NORM)
    shutil.move(shard, folder.parent / "outside.safetensors")
    shard.symlink_to("../outside.safetensors")


def _truncated(folder: Path) -> None:
    os.truncate(file_of(folder, NORM), file_of(folder, NORM).stat().st_size - 1)


def _truncated_header(folder: Path) -> None:
    os.truncate(file_of(folder, NORM), 20)


def _offsets_outside(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header[NORM]["data_offsets"] = [x + (1 << 40) for x in header[NORM]["data_offsets"]]

    edit_header(file_of(folder, NORM), change)


def _wrong_dtype(folder: Path) -> None:
    edit_header(file_of(folder, NORM), lambda header: header[NORM].update(dtype="F16"))


def _huge(folder: Path) -> None:
    edit_header(file_of(folder, NORM), lambda header: header[NORM].update(shape=[1 << 63]))


def _rename(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header["model.final.weight"] = header.pop(NORM)

    edit_header(file_of(folder, NORM), change)
    shard = file_of(folder, NORM).name
    edit_json(folder / INDEX, lambda i: i["weight_map"].pop(NORM))
    edit_json(folder / INDEX, lambda i: i["weight_map"].update({"model.final.weight": shard}))


def _save(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrites the checkpoint as one file."""
    tensors = load_model(folder)
    change(tensors)
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    save_file(tensors, folder / "model.safetensors")


def _lost_tensor(folder: Path) -> None:
    _save(folder, lambda tensors: tensors.pop(NORM))


def _other_shape(folder: Path) -> None:
    _save(folder, lambda tensors: tensors.update({NORM: torch.zeros(9)}))


def _fp8(folder: Path) -> None:
    _save(folder, lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.float8_e4m3fn)}))


# What a directory is spoiled by, and the reason, tensor and text of the error.
BAD: dict[str, tuple[Callable[[Path], None], str, str, str]] = {
    "no config": (_drop_config, "CHECKPOINT", "", "config.json"),
    "other architecture": (_wrong_architecture, "CONFIG", "", "Qwen2ForCausalLM"),
    "missing shard": (_missing_shard, "CHECKPOINT", HELD, "no file model-"),
    "index leads out": (_index_outside, "CHECKPOINT", NORM, "leads out of"),
    "link leads out": (_link_outside, "CHECKPOINT", HELD, "leads out of"),
    "truncated": (_truncated, "CHECKPOINT", HELD, ".safetensors"),
    "truncated header": (_truncated_header, "CHECKPOINT", HELD, ".safetensors"),
    "offsets outside": (_offsets_outside, "CHECKPOINT", NORM, ".safetensors"),
    "dtype and size": (_wrong_dtype, "SHAPE", NORM, ".safetensors"),
    "2^63": (_huge, "SHAPE", NORM, ".safetensors"),
    "unknown tensor": (_rename, "UNKNOWN_TENSOR", "model.final.weight", "model.norm.weight"),
    "lost tensor": (_lost_tensor, "MISSING_TENSOR", NORM, NORM),
    "other shape": (_other_shape, "SHAPE", NORM, NORM),
    "fp8": (_fp8, "DTYPE", NORM, "float8_e4m3fn"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_directory_that_lies_leaves_the_engine_as_it_was(
    cluster: Cluster, model: str, tmp_path: Path, checkpoint: Path, case: str
) -> None:
    spoil, reason, tensor, text = BAD[case]
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    held = _held(folder)
    spoil(folder)
    with PoisonedEngine(cluster.address, model, LLAMA) as engine:
        done = push(cluster.address, folder, "--model", model, "-o", "json")
        assert done.returncode == 1, done.stdout
        error = json.loads(done.stdout)["error"]
        assert error["reason"] == reason, error
        assert error["tensor"] in (held if tensor == HELD else {tensor}), error
        assert text in error["message"] and error["remedy"], error
        engine.assert_untouched()
        told = push(cluster.address, folder, "--model", model)
        assert told.returncode == 1 and "remedy:" in told.stderr and text in told.stderr
        engine.assert_untouched()
        assert push(cluster.address, checkpoint, "--model", model).returncode == 0
        engine.assert_holds(checkpoint, 1)
