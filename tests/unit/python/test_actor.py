"""Actor against a recording library: what crosses the C ABI, refusals, versions, Ctrl-C, life."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.support.fake_library import FakeLibrary
from weightd import Actor, errors, new_group


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(2, dtype=torch.float64))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def _actor() -> Actor:
    return Actor(model="m", rank=0, world_size=1)


def test_module_is_lent_under_its_state_dict_names(library: FakeLibrary) -> None:
    net = _Net()
    with _actor() as actor:
        actor.register(net)
        by_name = {tensor["name"]: tensor for tensor in library.tensors}
        assert list(by_name) == ["scale", "embed.weight", "head.weight"]
        (embed,), (head,) = by_name["embed.weight"]["shards"], by_name["head.weight"]["shards"]
        assert embed == head
        assert (embed["origin"], embed["extent"], embed["strides"]) == ([0, 0], [5, 4], [4, 1])
        assert embed["fd"] >= 0 and embed["fd_size"] == 80
        assert embed["address"] == net.embed.weight.data_ptr()
        assert by_name["scale"]["dtype"] == 4
        assert actor.sync().version == 1
    assert library.calls[-2:] == ["cancel", "close"]


def test_view_is_lent_with_offset_and_strides(library: FakeLibrary) -> None:
    base = torch.zeros(6, 8)
    with _actor() as actor:
        actor.register([("w", base[2:4].t())])
    shard = library.tensors[0]["shards"][0]
    assert (shard["offset_bytes"], shard["strides"], shard["extent"]) == (64, [1, 8], [8, 2])


def test_memory_that_must_not_move_is_staged_by_address(library: FakeLibrary) -> None:
    array = torch.zeros(4)
    array.numpy()
    with _actor() as actor:
        actor.register({"w": array})
    shard = library.tensors[0]["shards"][0]
    assert (shard["fd"], shard["address"]) == (-1, array.data_ptr())


@pytest.mark.parametrize(
    ("raw", "stripped"),
    [
        ("_orig_mod.layers.0.w", "layers.0.w"),
        ("layers.0._checkpoint_wrapped_module.w", "layers.0.w"),
        ("_fsdp_wrapped_module.layers._orig_mod.0.w", "layers.0.w"),
        ("module.layers.0.w", "layers.0.w"),
    ],
)
def test_wrapper_prefixes_are_stripped(library: FakeLibrary, raw: str, stripped: str) -> None:
    with _actor() as actor:
        actor.register([(raw, torch.zeros(1))])
    assert library.tensors[0]["name"] == stripped


def test_name_map_renames_leaves_out_and_finds_mistakes(library: FakeLibrary) -> None:
    pairs = [("a", torch.zeros(1)), ("b", torch.zeros(1)), ("c", torch.zeros(1))]
    with _actor() as actor:
        actor.register(pairs, name_map={"a": "x", "b": None})
        assert [t["name"] for t in library.tensors] == ["x", "c"]
        actor.register(pairs, name_map=lambda name: f"model.{name}")
        assert [t["name"] for t in library.tensors] == ["model.a", "model.b", "model.c"]
        with pytest.raises(errors.LayoutError, match="typo") as caught:
            actor.register(pairs, name_map={"typo": "x"})
        assert caught.value.reason == "UNKNOWN_TENSOR"
        with pytest.raises(errors.LayoutError, match="sources=a, b") as caught:
            actor.register(pairs, name_map={"b": "a"})
        assert (caught.value.reason, caught.value.tensor) == ("DUPLICATE_TENSOR", "a")


def _assign_data(net: _Net) -> None:
    net.embed.weight.data = torch.zeros(5, 4)


def _new_parameter(net: _Net) -> None:
    net.embed.weight = nn.Parameter(torch.zeros(5, 4))


def _free(net: _Net) -> None:
    net.embed.weight.untyped_storage().resize_(0)


def _transpose(net: _Net) -> None:
    net.embed.weight.data = net.embed.weight.data.t()


def _new_buffer(net: _Net) -> None:
    net.scale = torch.ones(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("move", "tensor"),
    [
        (_assign_data, "embed.weight"),
        (_new_parameter, "embed.weight"),
        (_free, "embed.weight"),
        (_transpose, "embed.weight"),
        (_new_buffer, "scale"),
    ],
)
def test_moved_memory_makes_this_rank_refuse(
    library: FakeLibrary, move: object, tensor: str
) -> None:
    net = _Net()
    with _actor() as actor:
        actor.register(net)
        actor.sync()
        move(net)
        with pytest.raises(errors.MemoryMovedError) as caught:
            actor.sync()
        assert caught.value.tensor == tensor
        assert library.syncs[-1]["refuse"] == "MEMORY_MOVED"
        if move is not _free:
            actor.register(net)
            assert actor.sync().version == 2
            assert library.syncs[-1]["refuse"] == ""


def test_staged_tensors_register_once_and_pass_addresses(library: FakeLibrary) -> None:
    first, second = torch.zeros(3, 2), torch.ones(3, 2).t()
    with _actor() as actor:
        actor.sync(tensors=[("w", first)])
        assert library.tensors[0]["shards"][0]["fd"] == -1
        assert library.tensors[0]["shards"][0]["address"] is None
        assert library.syncs[-1]["staged"] == [(0, 0, first.data_ptr(), [2, 1] + [0] * 6)]
        assert not first.is_shared()
        again = torch.zeros(3, 2)
        actor.sync(tensors=[("w", again)])
        assert library.calls.count("register") == 1
        assert library.syncs[-1]["staged"][0][2] == again.data_ptr()
        actor.sync(tensors=[("w", second)])
        assert library.calls.count("register") == 2
        assert library.tensors[0]["shape"] == [2, 3]


def test_plain_sync_after_a_staged_one_lends_again(library: FakeLibrary) -> None:
    with _actor() as actor:
        actor.register([("w", torch.zeros(2))])
        actor.sync(tensors=[("merged", torch.zeros(2))])
        actor.sync()
        assert [t["name"] for t in library.tensors] == ["w"]
        assert library.tensors[0]["shards"][0]["fd"] >= 0
        assert library.syncs[-1]["staged"] == []


def test_bad_staged_tensor_refuses_for_all_ranks(library: FakeLibrary) -> None:
    with _actor() as actor:
        actor.register([("w", torch.zeros(2))])
        with pytest.raises(errors.UnsupportedError, match="to_empty"):
            actor.sync(tensors=[("w", torch.empty(2, device="meta"))])
        assert library.syncs[-1]["refuse"] == "DEVICE"
        assert library.syncs[-1]["refuse_tensor"] == "w"


def test_versions_count_from_the_last_acknowledged(library: FakeLibrary) -> None:
    with _actor() as actor:
        actor.register([("w", torch.zeros(2))])
        assert actor.sync(7).version == 7
        library.outcome = {"code": 14, "reason": "PEER_LOST", "message": "gone"}
        with pytest.raises(errors.UnavailableError):
            actor.sync()
        library.outcome = None
        assert actor.sync().version == 8
        library.outcome = {
            "code": 14,
            "reason": "PEER_LOST",
            "message": "gone",
            "result": {"version": 9, "replicas": [{"engine": "e", "committed": True}]},
        }
        with pytest.raises(errors.UnavailableError) as caught:
            actor.sync()
        assert caught.value.result.replicas[0].committed
        library.outcome = None
        assert actor.sync().version == 10


def test_replicas_are_checked_until_the_first_success(library: FakeLibrary) -> None:
    with _actor() as actor:
        actor.register([("w", torch.zeros(2))])
        library.outcome = {"code": 14, "reason": "PEER_LOST", "message": "gone"}
        with pytest.raises(errors.UnavailableError):
            actor.sync()
        library.outcome = None
        actor.sync(require=2)
        actor.sync()
        actor.sync(check_replicas=True)
    assert [sync["check"] for sync in library.syncs] == [1, 1, 0, 1]
    assert [sync["require"] for sync in library.syncs] == [0, 2, 0, 0]


def test_ctrl_c_cancels_and_is_raised_again(library: FakeLibrary) -> None:
    with _actor() as actor:
        actor.register([("w", torch.zeros(2))])
        library.slices_before_end, library.interrupt_at = 1000, 3
        with pytest.raises(KeyboardInterrupt):
            actor.sync()
        assert library.calls[-1] == "cancel"
        library.slices_before_end, library.interrupt_at = 2, None
        assert actor.sync().version == 1


@pytest.mark.parametrize("version", [0, -1, True, "1", 2**64])
def test_bad_version_is_refused_here(library: FakeLibrary, version: object) -> None:
    with _actor() as actor:
        actor.register([("w", torch.zeros(2))])
        with pytest.raises(errors.VersionError):
            actor.sync(version)
    assert library.syncs == []


@pytest.mark.parametrize("require", [0, -1, True, "some"])
def test_bad_require_is_refused_here(library: FakeLibrary, require: object) -> None:
    with _actor() as actor:
        actor.register([("w", torch.zeros(2))])
        with pytest.raises(errors.LayoutError, match="require"):
            actor.sync(require=require)


def test_sync_without_registration_says_what_to_do(library: FakeLibrary) -> None:
    with _actor() as actor, pytest.raises(errors.StateError, match="register") as caught:
        actor.sync()
    assert caught.value.reason == "NOT_REGISTERED"


def test_failed_registration_leaves_nothing_registered(library: FakeLibrary) -> None:
    library.failures["register"] = {"code": 3, "reason": "SHAPE", "message": "no", "tensor": "w"}
    with _actor() as actor:
        with pytest.raises(errors.LayoutError, match="tensor=w"):
            actor.register([("w", torch.zeros(2))])
        with pytest.raises(errors.StateError):
            actor.sync()


def test_closed_actor_refuses_and_close_is_idempotent(library: FakeLibrary) -> None:
    actor = _actor()
    actor.close()
    actor.close()
    assert library.calls.count("close") == 1
    with pytest.raises(errors.StateError, match="closed"):
        actor.sync()


def test_forgotten_actor_is_closed(library: FakeLibrary) -> None:
    actor = _actor()
    del actor
    gc.collect()
    assert library.calls[-1] == "close"


def test_forked_child_neither_uses_nor_closes_the_actor(library: FakeLibrary) -> None:
    actor = _actor()
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            actor.sync()
        except errors.StateError as error:
            actor.close()
            os.write(sender, f"{error.reason} {library.calls.count('close')}".encode())
        os._exit(0)
    os.close(sender)
    assert os.read(receiver, 100) == b"FORKED 0"
    os.close(receiver)
    os.waitpid(child, 0)
    actor.close()


def test_group_is_given_or_local(library: FakeLibrary) -> None:
    group = new_group()
    Actor(model="m", rank=2, world_size=4, group=group).close()
    assert library.opened["group"] == group.encode()
    assert library.opened["group_order"] == int(group.split("@")[1])
    assert (library.opened["rank"], library.opened["world_size"]) == (2, 4)
    Actor(model="m").close()
    assert (library.opened["rank"], library.opened["world_size"]) == (0, 1)


def test_device_of_the_memory_is_passed_on(library: FakeLibrary) -> None:
    Actor(model="m").close()
    assert library.opened["device"] is None
    Actor(model="m", device="host.1").close()
    assert library.opened["device"] == b"host.1"


def test_who_starts_the_worker_is_passed_on(library: FakeLibrary) -> None:
    Actor(model="m").close()
    assert (library.opened["worker"], library.opened["worker_binary"]) == (0, None)
    Actor(model="m", worker="spawn").close()
    assert library.opened["worker"] == 1
    with pytest.raises(errors.LayoutError, match="unknown worker: 'fork'"):
        Actor(model="m", worker="fork")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"rank": 4, "world_size": 4, "group": "g@1"}, "rank=4"),
        ({"rank": 0, "world_size": 2}, "new_group"),
        ({"rank": 0, "world_size": 2, "group": "mine"}, "new_group"),
    ],
)
def test_ranks_that_cannot_agree_are_refused(
    library: FakeLibrary, arguments: dict, text: str
) -> None:
    with pytest.raises(errors.GroupError, match=text):
        Actor(model="m", **arguments)


def test_launched_rank_without_process_group_is_refused(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(errors.GroupError, match="init_process_group"):
        Actor(model="m")


def test_import_is_free_of_torch_threads_and_native_code() -> None:
    code = (
        "import sys, threading, weightd\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert threading.active_count() == 1\n"
        "assert 'libweightd' not in open('/proc/self/maps').read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_missing_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTD_LIBRARY", "/nonexistent/libweightd.so")
    with pytest.raises(errors.Error, match="install the weightd wheel") as caught:
        Actor(model="m")
    assert caught.value.reason == "LIBRARY"
