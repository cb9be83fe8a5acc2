"""Typed errors of weightd.

Every failure is an :class:`Error`. The subclass follows from the stable ``reason`` token, or, for a
reason that this release does not know, from the google.rpc ``code``:

=================  ===================================================================  =====
class              reasons                                                              codes
=================  ===================================================================  =====
LayoutError        MISSING_TENSOR UNKNOWN_TENSOR DUPLICATE_TENSOR SHAPE DTYPE GAP       3
                   OVERLAP PARTIAL PLAN_MISMATCH TABLE_MISMATCH REPLICAS_DIFFER
                   UNCOVERED_PARAMETER AMBIGUOUS_RULE RULE_FILE DIVISIBILITY CONFIG
                   UNKNOWN_ARCHITECTURE UNKNOWN_PROFILE LOADER_COMPUTES
                   LOADER_REFUSED
MemoryMovedError   MEMORY_MOVED (a LayoutError)
VersionError       STALE_VERSION REUSED_VERSION
GroupError         WORLD_SIZE DUPLICATE_RANK                                            6
FencedError        FENCED                                                               10
UnavailableError   PEER_LOST WORKER_LOST WORKER_START DAEMON_LOST DRAINING SOCKET       14
DeadlineError      DEADLINE                                                             4
ResourceError      MESSAGE_TOO_LARGE FILE_DESCRIPTORS TOO_MANY_SESSIONS                 8
SharedMemoryError  SHARED_MEMORY (a ResourceError)
ProtocolError      PROTOCOL_VERSION PROTOCOL
VerifyError        VERIFY_MISMATCH
EngineError        ENGINE_REFUSED ENGINE_CALL NO_ENGINE NO_PLAN                         5
PoisonedError      POISONED (an EngineError)
CancelledError     CANCELLED                                                            1
UnsupportedError   DEVICE DRIVER MEMORY                                                 12
StateError         CLOSED FORKED BUSY NOT_REGISTERED STAGED                             9
Error              INTERNAL and everything else                                         13
=================  ===================================================================  =====
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from weightd.ack import Ack

INVALID_ARGUMENT = 3
RESOURCE_EXHAUSTED = 8
FAILED_PRECONDITION = 9
INTERNAL = 13
UNIMPLEMENTED = 12
DEADLINE_EXCEEDED = 4
NOT_FOUND = 5
UNAVAILABLE = 14


class Error(Exception):
    """A failure, with what is needed to act on it.

    Attributes:
        message: one sentence, values last.
        code: google.rpc code.
        reason: stable upper-case token, e.g. ``MISSING_TENSOR``.
        tensor, rank, phase, peer: where it happened; empty where it does not apply.
        remedy: what to do about it.
        result: outcome of the sync with every replica's fate, or None if there was none.
    """

    def __init__(
        self,
        message: str,
        *,
        code: int = INTERNAL,
        reason: str = "INTERNAL",
        tensor: str = "",
        rank: str = "",
        phase: str = "",
        peer: str = "",
        remedy: str = "",
        result: Optional[Ack] = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.tensor = tensor
        self.rank = rank
        self.phase = phase
        self.peer = peer
        self.remedy = remedy
        self.result = result

    def __str__(self) -> str:
        places = [self.reason]
        for label in ("tensor", "rank", "phase", "peer"):
            value = getattr(self, label)
            if value:
                places.append(f"{label}={value}")
        text = f"{self.message} [{' '.join(places)}]"
        if self.remedy:
            text += f"; remedy: {self.remedy}"
        return text

    def __reduce__(self) -> tuple:
        return (_rebuild, (type(self), dict(self.__dict__)))


def _rebuild(kind: type[Error], fields: dict) -> Error:
    return kind(fields.pop("message"), **fields)


class LayoutError(Error, ValueError):
    """Names, shapes, dtypes or boxes do not fit together; nothing was written."""


class MemoryMovedError(LayoutError):
    """Registered memory was moved, reallocated or freed since ``register``; nothing was written."""


class VersionError(Error):
    """The version is not newer than what was consumed, or its bytes differ from an earlier try."""


class GroupError(Error):
    """The ranks of the trainer disagree about world size or rank numbers."""


class FencedError(Error):
    """A newer start of the trainer has superseded this one."""


class UnavailableError(Error):
    """The daemon, a worker or another participant is gone."""


class DeadlineError(Error):
    """A phase or a wait took longer than its deadline."""


class ResourceError(Error):
    """A limit of the machine or of the daemon is exhausted."""


class SharedMemoryError(ResourceError):
    """/dev/shm cannot hold the tensors that are to be lent; nothing was moved."""


class ProtocolError(Error):
    """Client library and daemon do not speak the same protocol."""


class VerifyError(Error):
    """What landed in an engine differs from what was sent."""


class EngineError(Error):
    """An engine refused the weights, or there is none."""


class PoisonedError(EngineError):
    """A failed sync may have torn this engine's memory; only a full sync heals it."""


class CancelledError(Error):
    """The sync was cancelled."""


class UnsupportedError(Error):
    """What was asked for is not part of this build."""


class StateError(Error):
    """The call does not fit the state of the object: closed, forked, busy or not registered."""


_BY_REASON: dict[str, type[Error]] = {
    **dict.fromkeys(
        (
            "MISSING_TENSOR",
            "UNKNOWN_TENSOR",
            "DUPLICATE_TENSOR",
            "SHAPE",
            "DTYPE",
            "GAP",
            "OVERLAP",
            "PARTIAL",
            "PLAN_MISMATCH",
            "TABLE_MISMATCH",
            "REPLICAS_DIFFER",
            "UNCOVERED_PARAMETER",
            "AMBIGUOUS_RULE",
            "RULE_FILE",
            "DIVISIBILITY",
            "CONFIG",
            "UNKNOWN_ARCHITECTURE",
            "UNKNOWN_PROFILE",
            "LOADER_COMPUTES",
            "LOADER_REFUSED",
        ),
        LayoutError,
    ),
    "MEMORY_MOVED": MemoryMovedError,
    **dict.fromkeys(("STALE_VERSION", "REUSED_VERSION"), VersionError),
    **dict.fromkeys(("WORLD_SIZE", "DUPLICATE_RANK"), GroupError),
    "FENCED": FencedError,
    **dict.fromkeys(
        ("PEER_LOST", "WORKER_LOST", "WORKER_START", "DAEMON_LOST", "DRAINING", "SOCKET"),
        UnavailableError,
    ),
    "DEADLINE": DeadlineError,
    **dict.fromkeys(
        ("MESSAGE_TOO_LARGE", "FILE_DESCRIPTORS", "TOO_MANY_SESSIONS"), ResourceError
    ),
    "SHARED_MEMORY": SharedMemoryError,
    **dict.fromkeys(("PROTOCOL_VERSION", "PROTOCOL"), ProtocolError),
    "VERIFY_MISMATCH": VerifyError,
    **dict.fromkeys(("ENGINE_REFUSED", "ENGINE_CALL", "NO_ENGINE", "NO_PLAN"), EngineError),
    "POISONED": PoisonedError,
    "CANCELLED": CancelledError,
    **dict.fromkeys(("DEVICE", "DRIVER", "MEMORY"), UnsupportedError),
    **dict.fromkeys(("CLOSED", "FORKED", "BUSY", "NOT_REGISTERED", "STAGED"), StateError),
}

_BY_CODE: dict[int, type[Error]] = {
    1: CancelledError,
    3: LayoutError,
    4: DeadlineError,
    5: EngineError,
    6: GroupError,
    8: ResourceError,
    9: StateError,
    10: FencedError,
    12: UnsupportedError,
    14: UnavailableError,
}


def error_class(code: int, reason: str) -> type[Error]:
    """Returns the class for a failure; see the table in the module's docstring."""
    if reason in _BY_REASON:
        return _BY_REASON[reason]
    return _BY_CODE.get(code, Error)


def layout_error(message: str, *, reason: str, tensor: str = "", remedy: str = "") -> Error:
    """Builds the error for input that this process itself found wrong (code INVALID_ARGUMENT)."""
    kind = error_class(INVALID_ARGUMENT, reason)
    return kind(message, code=INVALID_ARGUMENT, reason=reason, tensor=tensor, remedy=remedy)


def state_error(message: str, *, reason: str, remedy: str) -> StateError:
    """Builds the error for a call at the wrong time (code FAILED_PRECONDITION)."""
    return StateError(message, code=FAILED_PRECONDITION, reason=reason, remedy=remedy)
