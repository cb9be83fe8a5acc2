"""Error classes, their table and what they show."""

from __future__ import annotations

import pickle
import re

import pytest

from weightd import errors
from weightd.ack import Ack

_RESULT = (
    '{"version": 7, "attempt": {"epoch": 3, "counter": 9}, "bytes": 4000000, '
    '"phases": {"transfer": 1500, "admit": 500}, "replicas": [{"engine": "e0", "dp_rank": 0, '
    '"committed": true, "version": 7, "state": "SERVING", "verified": "memory", '
    '"caches_reset": ["prefix"], "error": null}, {"engine": "e1", "dp_rank": 1, '
    '"committed": false, "version": 6, "state": "POISONED", "verified": "", '
    '"error": {"message": "worker died"}}]}'
)


def test_table_in_the_docstring_is_the_mapping() -> None:
    rows, current = {}, ""
    for line in errors.__doc__.split("=\n")[2].splitlines():
        match = re.match(r"(\w+)?\s+((?:[A-Z_]{3,}\s*)+)", line)
        if match:
            current = match.group(1) or current
            rows.update(dict.fromkeys(match.group(2).split(), current))
    rows.pop("INTERNAL")
    assert rows == {reason: kind.__name__ for reason, kind in errors._BY_REASON.items()}


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (3, "GAP", errors.LayoutError),
        (9, "MEMORY_MOVED", errors.MemoryMovedError),
        (9, "STALE_VERSION", errors.VersionError),
        (10, "FENCED", errors.FencedError),
        (14, "NEW_REASON", errors.UnavailableError),
        (4, "", errors.DeadlineError),
        (13, "INTERNAL", errors.Error),
    ],
)
def test_reason_decides_before_code(code: int, reason: str, kind: type) -> None:
    assert errors.error_class(code, reason) is kind


def test_text_has_what_where_and_remedy() -> None:
    error = errors.VerifyError(
        "digests differ", reason="VERIFY_MISMATCH", tensor="w", phase="verify", remedy="sync again"
    )
    expected = "digests differ [VERIFY_MISMATCH tensor=w phase=verify]; remedy: sync again"
    assert str(error) == expected


def test_errors_survive_pickling() -> None:
    error = errors.FencedError("superseded", code=10, reason="FENCED", rank="actor 1")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is errors.FencedError
    assert str(copy) == str(error) and copy.code == 10


def test_ack_reads_the_result_of_the_library() -> None:
    ack = Ack.from_json(_RESULT)
    assert (ack.version, ack.attempt, ack.bytes) == (7, "3.9", 4000000)
    assert list(ack.phases.items()) == [("admit", 0.0005), ("transfer", 0.0015)]
    assert ack.verified == "memory"
    assert [r.committed for r in ack.replicas] == [True, False]
    assert ack.replicas[1].error == "worker died"


def test_ack_shows_a_timeline_per_phase() -> None:
    lines = repr(Ack.from_json(_RESULT)).splitlines()
    assert "version=7" in lines[0] and "2.00 GB/s" in lines[0]
    assert lines[1].split("|")[1] == "#" * 10 + " " * 30
    assert lines[2].split("|")[1] == " " * 10 + "#" * 30
    assert "NOT committed: worker died" in lines[4]
