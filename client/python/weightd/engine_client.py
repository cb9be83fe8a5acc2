"""What weightd asks of an inference engine that it drives through a sync."""

from __future__ import annotations

from typing import Any, Literal, Optional, Protocol, Sequence, runtime_checkable

PauseMode = Literal["abort", "wait", "keep"]
PAUSE_MODES: tuple[PauseMode, ...] = ("abort", "wait", "keep")


@runtime_checkable
class EngineClient(Protocol):
    """One engine under the control of `weightd.Actor(engines=[...])`.

    Four methods are those of vLLM's own weight-transfer protocol. Every method blocks until the
    engine has done it and raises if it could not; what it raises becomes the cause in the error of
    ``sync()``. All are called from one thread of weightd's, in the order of this class;
    ``init_weight_transfer_engine`` once, when the actor is made.

    Optional members are used where they exist. ``engine`` is the instance name under which the
    engine registered with the daemon; without it an engine counts as committed only where all
    replicas of the sync are. ``identify()`` is called before every pause and may set it.
    ``check_alive()`` returns at once and raises if the engine is dead; it is asked from another
    thread while a call is running. ``check_caller()`` raises if ``sync()`` on its thread would keep
    the engine from answering.
    """

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Checks that the engine can be driven. ``init_info`` is empty."""

    def pause(self, mode: PauseMode) -> None:
        """Stops generation; returns when no model step runs and none will start.

        ``abort`` ends requests in flight, ``wait`` lets them finish, ``keep`` freezes them until
        `resume`. Pausing a paused engine is no error.
        """

    def start_weight_update(self) -> None:
        """Opens an update."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Lets every rank report that it is quiescent; blocks until the daemon's outcome.

        ``update_info`` is ``{"model": str, "version": int}``. Returns also when the outcome is a
        failure, and at once if the engine holds the version already.
        """

    def finish_weight_update(self, weight_version: Optional[str] = None) -> None:
        """Closes the update.

        ``weight_version`` is what outputs show from now on; None after a failure.
        """

    def reset_caches(self) -> Sequence[str]:
        """Drops what was computed with older weights; returns the names of what was really reset.

        Called while the engine is paused. A kept request is computed anew from its first token.
        """

    def resume(self) -> None:
        """Lets generation go on."""
