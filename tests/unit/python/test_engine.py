"""EngineRank against a recording library: parameters, aliases, callbacks, waiting."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.fake_library import FakeLibrary
from weightd import EngineRank, errors
from weightd.traced import TracedLayout, TracedSource, TracedWrite


def _engine(params: Any = None, **options: Any) -> EngineRank:
    values = {"architecture": "LlamaForCausalLM", "config": {"hidden_size": 4}, **options}
    return EngineRank(model="m", engine="e0", params=params or [("w", torch.zeros(2))], **values)


def test_parameters_are_lent_and_tied_names_become_aliases(library: FakeLibrary) -> None:
    embed = torch.zeros(4, 2, dtype=torch.bfloat16)
    with _engine([("embed", embed), ("norm", torch.ones(2)), ("head", embed[:])], tp_size=2):
        embed_param, norm, head = library.params
        assert embed_param["fd"] >= 0 and embed_param["dtype"] == 3
        assert (embed_param["alias_of"], norm["alias_of"]) == (None, None)
        assert head["alias_of"] == "embed"
        assert {param["kind"] for param in library.params} == {1}
        assert library.opened["auto_quiesce"] == 1 and library.opened["tp_size"] == 2
        assert library.opened["profile"] == b"vllm-0.32"


def test_who_starts_the_worker_is_passed_on(library: FakeLibrary) -> None:
    with _engine([("w", torch.zeros(2))]):
        assert library.opened["worker"] == 0
    with _engine([("w", torch.zeros(2))], worker="spawn"):
        assert library.opened["worker"] == 1


def test_device_of_the_memory_is_passed_on(library: FakeLibrary) -> None:
    with _engine([("w", torch.zeros(2))], device="host.1"):
        assert library.opened["device"] == b"host.1"


def test_views_of_other_parts_are_no_aliases(library: FakeLibrary) -> None:
    base = torch.zeros(4, 2)
    with _engine([("a", base[:2]), ("b", base[2:]), ("c", base)]):
        assert [param["alias_of"] for param in library.params] == [None] * 3
        assert [param["offset_bytes"] for param in library.params] == [0, 16, 0]


def test_kinds_are_told_and_opaque_parameters_are_not_lent(library: FakeLibrary) -> None:
    pairs = [("a", torch.zeros(2)), ("b", torch.zeros(2)), ("c", torch.zeros(1).expand(3))]
    with _engine(pairs, kinds={"b": "derived", "c": "opaque"}):
        assert [param["kind"] for param in library.params] == [1, 2, 3]
        assert [param["fd"] >= 0 for param in library.params] == [True, True, False]
    with pytest.raises(errors.LayoutError, match="unknown kind of parameter: packed"):
        _engine(kinds={"w": "packed"})


def test_memory_that_cannot_be_lent_is_refused_where_nothing_may_be_pulled(
    library: FakeLibrary,
) -> None:
    tensor = torch.zeros(2)
    tensor.numpy()
    with pytest.raises(errors.UnsupportedError, match="clone") as caught:
        _engine([("w", tensor)], stage_bytes=0)
    assert caught.value.tensor == "w"
    assert library.calls == []


def test_memory_that_cannot_be_lent_is_received_in_stages(library: FakeLibrary) -> None:
    tensor = torch.zeros(5, 64)
    tensor.numpy()
    with _engine([("a", torch.zeros(2)), ("w", tensor), ("tied", tensor)], stage_bytes=512):
        assert library.opened["auto_quiesce"] == 0
        assert [param["pulled"] for param in library.params] == [0, 1, 1]
        assert [param["stage"] for param in library.params] == [0, 1, 1]
        assert [param["stage_rows"] for param in library.params] == [0, 2, 2]
        assert [param["alias_of"] for param in library.params] == [None, None, "w"]
        library.set_engine_state(pending="prepare")
        _until(library, lambda: len(library.answers) == 1)
        for stage in (1, 2):
            library.set_engine_state(pending="convert", stage=stage)
            _until(library, lambda stage=stage: len(library.answers) == 1 + stage)
        library.set_engine_state(pending="commit")
        _until(library, lambda: len(library.answers) == 4)
    assert library.answers == [
        ("quiesced", None, None),
        ("converted", None, None),
        ("converted", None, None),
        ("committed", None, None),
    ]


def test_expanded_parameter_is_refused(library: FakeLibrary) -> None:
    with pytest.raises(errors.LayoutError, match="share memory"):
        _engine([("w", torch.zeros(1).expand(3))])


def test_config_may_be_an_object_with_odd_values(library: FakeLibrary) -> None:
    config = SimpleNamespace(to_dict=lambda: {"dtype": torch.bfloat16, "vocab_size": 3})
    with _engine(config=config):
        assert json.loads(library.opened["config_json"]) == {
            "dtype": "torch.bfloat16",
            "vocab_size": 3,
        }
    with pytest.raises(errors.LayoutError, match="to_dict"):
        _engine(config="llama")


def test_failed_registration_closes_the_session(library: FakeLibrary) -> None:
    library.failures["register"] = {
        "code": 5,
        "reason": "UNKNOWN_ARCHITECTURE",
        "message": "unknown architecture",
        "remedy": "nearest: LlamaForCausalLM",
    }
    with pytest.raises(errors.LayoutError, match="nearest: LlamaForCausalLM"):
        _engine(architecture="LlamaForCausal")
    assert library.calls == ["open", "register", "close"]


def _traced(name: str = "w", shape: tuple[int, ...] = (3, 2)) -> TracedLayout:
    """Rows 4 and 5 of a source, transposed, and zeros below them."""
    return TracedLayout(
        params=((name, shape),),
        sources=(TracedSource("q", (9, 2), True), TracedSource("mask", (4,), False)),
        writes=(
            TracedWrite(0, 0, (0, 0), (2, 2), (4, 0), (1, 0)),
            TracedWrite(0, -1, (2, 0), (1, 2), (), ()),
        ),
    )


def test_traced_layout_is_registered_with_the_parameters_it_names(library: FakeLibrary) -> None:
    params = [("norm", torch.zeros(2)), ("w", torch.zeros(3, 2))]
    with _engine(params, layout=_traced(), prefer_layout=True):
        assert library.calls == ["open", "register_traced"]
        assert library.trace == {
            "sources": [("q", [9, 2]), ("mask", [4])],
            "writes": [
                (1, 0, [0, 0], [2, 2], [4, 0], [1, 0]),
                (1, -1, [2, 0], [1, 2], [0, 0], [0, 0]),
            ],
            "preferred": 1,
        }


def test_traced_name_may_be_an_alias(library: FakeLibrary) -> None:
    tensor = torch.zeros(3, 2)
    with _engine([("embed", tensor), ("head", tensor[:])], layout=_traced("head")):
        assert {write[0] for write in library.trace["writes"]} == {0}


def test_names_that_are_tied_by_now_are_written_once(library: FakeLibrary) -> None:
    both = TracedLayout(
        params=(("embed", (2, 2)), ("head", (2, 2))),
        sources=(TracedSource("e", (2, 2), True), TracedSource("h", (2, 2), True)),
        writes=tuple(TracedWrite(i, i, (0, 0), (2, 2), (0, 0), (0, 1)) for i in range(2)),
    )
    tensor = torch.zeros(2, 2)
    with _engine([("embed", tensor), ("head", tensor[:])], layout=both):
        assert [write[:2] for write in library.trace["writes"]] == [(0, 0)]


def test_other_parameters_than_the_traced_are_refused(library: FakeLibrary) -> None:
    with pytest.raises(errors.LayoutError, match="not registered") as caught:
        _engine([("v", torch.zeros(3, 2))], layout=_traced())
    assert caught.value.tensor == "w" and library.calls == ["open", "close"]
    with pytest.raises(errors.LayoutError, match=r"traced=\[3, 2\], registered=\[2, 3\]"):
        _engine([("w", torch.zeros(2, 3))], layout=_traced())


def test_tracing_is_left_out_where_a_rule_file_fits(library: FakeLibrary) -> None:
    with _engine([("w", torch.zeros(3, 2))], layout=lambda: pytest.fail("traced")):
        assert library.calls == ["open", "register"]


def test_without_a_rule_file_the_layout_is_traced(library: FakeLibrary) -> None:
    library.failures["register"] = {"code": 5, "reason": "UNKNOWN_ARCHITECTURE", "message": "?"}
    with _engine([("w", torch.zeros(3, 2))], layout=_traced):
        assert library.calls == ["open", "register", "register_traced"]
    library.failures["register"] = {"code": 3, "reason": "SHAPE", "message": "?"}
    with pytest.raises(errors.LayoutError):
        _engine([("w", torch.zeros(3, 2))], layout=lambda: pytest.fail("traced"))


def test_in_the_background_the_layout_is_traced_at_once(library: FakeLibrary) -> None:
    with _engine([("w", torch.zeros(3, 2))], layout=_traced, connect_timeout=-1):
        assert library.calls == ["open", "register_traced"]
        assert library.trace["preferred"] == 0


def test_a_trace_may_come_later(library: FakeLibrary) -> None:
    with _engine([("w", torch.zeros(3, 2))], connect_timeout=-1) as engine:
        engine.register_layout(_traced())
        assert library.calls == ["open", "register", "register_traced"]


def test_state_version_and_readiness(library: FakeLibrary) -> None:
    with _engine() as engine:
        assert (engine.version, engine.ready) == (0, False)
        library.set_engine_state(state="SERVING", version=4, dirty=False)
        assert (engine.version, engine.ready) == (4, True)
        engine.check()
        library.set_engine_state(state="POISONED", dirty=True, error={"message": "worker died"})
        assert not engine.ready
        with pytest.raises(errors.PoisonedError, match="worker died"):
            engine.check()


def test_wait_returns_when_the_version_is_served(library: FakeLibrary) -> None:
    with _engine() as engine:
        waiter_result: list[dict] = []
        waiter = threading.Thread(target=lambda: waiter_result.append(engine.wait(version=2)))
        waiter.start()
        library.set_engine_state(state="SERVING", version=1)
        library.set_engine_state(state="STAGING", version=1)
        library.set_engine_state(state="SERVING", version=2)
        waiter.join()
        assert waiter_result[0]["version"] == 2
        assert engine.wait(version=1)["version"] == 2


def test_wait_gives_up_with_the_last_state(library: FakeLibrary) -> None:
    with _engine() as engine:
        with pytest.raises(errors.DeadlineError, match="state=REGISTERED"):
            engine.wait(version=1, timeout=0.01)


def test_callbacks_answer_prepare_and_commit(library: FakeLibrary) -> None:
    done = []
    engine = _engine(
        quiesce=lambda: done.append("quiesce"), commit=lambda: done.append("commit") or ["prefix"]
    )
    with engine:
        assert library.opened["auto_quiesce"] == 0
        library.set_engine_state(pending="prepare", state="STAGING")
        _until(library, lambda: len(library.answers) == 1)
        library.set_engine_state(pending="commit", state="COMMITTING")
        _until(library, lambda: len(library.answers) == 2)
        library.set_engine_state(state="SERVING", version=1)
        assert engine.wait(version=1)["state"] == "SERVING"
    assert done == ["quiesce", "commit"]
    assert library.answers == [("quiesced", None, None), ("committed", "prefix", None)]


def test_every_stage_is_converted_the_last_one_before_commit(library: FakeLibrary) -> None:
    arena, done = torch.zeros(4), []
    staged = [("w", torch.zeros(2)), ("a", arena[:3]), ("b", arena[:3]), ("tied", arena[:3])]
    with _engine(
        staged,
        kinds={"a": "derived", "b": "derived", "tied": "derived"},
        stages={"a": 1, "b": 2, "tied": 2},
        convert=lambda stage: done.append(stage),
        commit=lambda: done.append("commit"),
    ):
        assert [param["stage"] for param in library.params] == [0, 1, 2, 2]
        assert [param["alias_of"] for param in library.params] == [None, None, None, "b"]
        library.set_engine_state(pending="convert", stage=1)
        _until(library, lambda: len(library.answers) == 1)
        library.set_engine_state(pending="commit")
        _until(library, lambda: len(library.answers) == 2)
    assert done == [1, 2, "commit"]
    assert library.answers == [("converted", None, None), ("committed", None, None)]


def test_a_last_stage_that_cannot_be_converted_is_not_committed(library: FakeLibrary) -> None:
    def fail(stage: int) -> None:
        raise RuntimeError(f"stage {stage}")

    done: list[str] = []
    options = {"kinds": {"w": "derived"}, "stages": {"w": 1}, "convert": fail}
    with _engine(**options, commit=lambda: done.append("commit")):
        library.set_engine_state(pending="commit")
        _until(library, lambda: len(library.answers) == 1)
    assert library.answers == [("committed", None, "RuntimeError: stage 1")] and done == []


def test_callback_that_raises_is_reported_and_the_thread_lives_on(library: FakeLibrary) -> None:
    def fail() -> None:
        raise RuntimeError("cannot pause")

    with _engine(quiesce=fail) as engine:
        for count in (1, 2):
            library.set_engine_state(pending="prepare")
            _until(library, lambda count=count: len(library.answers) == count)
        assert engine.state["pending"] == ""
    assert library.answers == [("quiesced", None, "RuntimeError: cannot pause")] * 2


def test_waiting_for_a_change_ends_with_the_change_or_a_wake(library: FakeLibrary) -> None:
    with _engine(quiesce=lambda: None) as engine:
        seen = engine.wait_change(-1, 0.0)
        library.set_engine_state(state="SERVING", version=3)
        changed = engine.wait_change(seen, 30.0)
        assert changed > seen and engine.version == 3
        engine.wake()
        assert engine.wait_change(changed, 30.0) == changed + 1


def _until(library: FakeLibrary, condition: Any) -> None:
    counter = 0
    while not condition():
        counter = library.weightd_engine_wait(1, counter, 1000)


def test_closed_engine_refuses(library: FakeLibrary) -> None:
    engine = _engine(quiesce=lambda: None)
    engine.close()
    engine.close()
    assert library.calls.count("close") == 1
    with pytest.raises(errors.StateError, match="closed"):
        engine.wait()
