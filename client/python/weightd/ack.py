"""What a sync did: the acknowledgement and the outcome of every replica."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Mapping

_BAR_WIDTH = 40
# The order in which a sync runs them; JSON objects have none.
_PHASES = (
    "admit",
    "resolve_layouts",
    "build_plan",
    "prepare",
    "transfer",
    "verify",
    "commit",
    "report",
)


@dataclass(frozen=True)
class ReplicaOutcome:
    """What one sync did to one replica (all ranks of one engine).

    Attributes:
        engine: instance name.
        dp_rank: which replica of that engine.
        committed: True if it was verified and published and now serves ``version``.
        version: the version it holds now; 0 when none.
        state: engine state, e.g. ``SERVING``.
        verified: ``memory`` (digests of the live parameters) or ``loadable`` (derived parameters).
        caches_reset: caches that the engine reported as reset.
        error: why it did not commit; empty if it did.
    """

    engine: str
    dp_rank: int = 0
    committed: bool = False
    version: int = 0
    state: str = ""
    verified: str = ""
    caches_reset: tuple[str, ...] = ()
    error: str = ""

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ReplicaOutcome:
        """Reads one element of the result's ``replicas``; unknown keys are ignored."""
        error = value.get("error") or ""
        if isinstance(error, Mapping):
            error = error.get("message", "")
        return cls(
            engine=str(value.get("engine", "")),
            dp_rank=int(value.get("dp_rank", 0)),
            committed=bool(value.get("committed", False)),
            version=int(value.get("version", 0)),
            state=str(value.get("state", "")),
            verified=str(value.get("verified", "")),
            caches_reset=tuple(value.get("caches_reset") or ()),
            error=str(error),
        )


@dataclass(frozen=True)
class EngineDrive:
    """What one sync did to one engine of ``Actor(engines=[...])``.

    Attributes:
        engine: instance name, or where it is: its URL or type.
        pause: seconds from the call of pause to the return of resume, or to the end of the sync if
            it was not resumed; 0 if it was never paused.
        resumed: True if it generates again, with the version of the acknowledgement.
        caches_reset: caches that the engine confirmed as reset.
        calls: seconds per call to the engine, in order.
        error: why it was not resumed; empty if it was.
    """

    engine: str
    pause: float = 0.0
    resumed: bool = False
    caches_reset: tuple[str, ...] = ()
    calls: dict[str, float] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Ack:
    """The acknowledgement: ``version`` is verified and published in every committed replica.

    Attributes:
        version: the version that was synced.
        attempt: identity of the attempt, as in the daemon's log.
        bytes: bytes landed in engine memory, all replicas.
        phases: seconds per phase, in order.
        path_bytes: bytes by the path that they took, as `weightctl plan show` names them.
        replicas: outcome of every replica.
        engines: what the driver did to every engine it drives; on rank 0 only, in the order given.
    """

    version: int
    attempt: str = ""
    bytes: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    replicas: tuple[ReplicaOutcome, ...] = ()
    engines: tuple[EngineDrive, ...] = ()
    path_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def pause(self) -> float:
        """Seconds of the longest pause of a driven engine; 0 if none was driven."""
        return max((engine.pause for engine in self.engines), default=0.0)

    @property
    def verified(self) -> str:
        """What was verified in all committed replicas: ``memory``, ``loadable`` or empty (none)."""
        kinds = {replica.verified for replica in self.replicas if replica.committed}
        return kinds.pop() if len(kinds) == 1 else ("loadable" if "loadable" in kinds else "")

    @property
    def seconds(self) -> float:
        """Seconds of all phases together."""
        return sum(self.phases.values())

    @classmethod
    def from_json(cls, text: str) -> Ack:
        """Reads the result JSON of the C ABI (phases in microseconds)."""
        value = json.loads(text)
        attempt = value.get("attempt", "")
        if isinstance(attempt, Mapping):
            attempt = f"{attempt.get('epoch', 0)}.{attempt.get('counter', 0)}"
        phases = value.get("phases") or {}
        order = {name: place for place, name in enumerate(_PHASES)}
        return cls(
            version=int(value.get("version", 0)),
            attempt=str(attempt),
            bytes=int(value.get("bytes", 0)),
            phases={
                name: phases[name] / 1e6
                for name in sorted(phases, key=lambda name: order.get(name, len(order)))
            },
            replicas=tuple(ReplicaOutcome.from_dict(r) for r in value.get("replicas") or ()),
            path_bytes={str(path): int(n) for path, n in (value.get("path_bytes") or {}).items()},
        )

    def __repr__(self) -> str:
        total = self.seconds
        rate = f", {self.bytes / total / 1e9:.2f} GB/s" if total > 0 and self.bytes else ""
        lines = [
            f"Ack(version={self.version}, attempt={self.attempt}, bytes={self.bytes}, "
            f"seconds={total:.6f}{rate}, verified={self.verified or 'nothing'})"
        ]
        start = 0.0
        for name, seconds in self.phases.items():
            left = round(_BAR_WIDTH * start / total) if total > 0 else 0
            width = max(1, round(_BAR_WIDTH * seconds / total)) if total > 0 else 1
            bar = " " * min(left, _BAR_WIDTH - 1) + "#" * width
            lines.append(
                f"  {name:<16}{seconds * 1e3:>10.3f} ms |{bar[:_BAR_WIDTH]:<{_BAR_WIDTH}}|"
            )
            start += seconds
        if self.path_bytes:
            paths = ", ".join(f"{path} {count}" for path, count in self.path_bytes.items())
            lines.append(f"  bytes by path: {paths}")
        for replica in self.replicas:
            state = "committed" if replica.committed else f"NOT committed: {replica.error}"
            lines.append(
                f"  {replica.engine}/{replica.dp_rank}: {state}, holds {replica.version}, "
                f"{replica.state}"
            )
        for engine in self.engines:
            calls = ", ".join(f"{name} {value * 1e3:.1f}" for name, value in engine.calls.items())
            state = "resumed" if engine.resumed else f"NOT resumed: {engine.error}"
            lines.append(
                f"  {engine.engine}: {state}, paused {engine.pause * 1e3:.1f} ms ({calls}), "
                f"caches reset: {', '.join(engine.caches_reset) or 'none'}"
            )
        return "\n".join(lines)
