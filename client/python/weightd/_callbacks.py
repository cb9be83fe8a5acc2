"""What an engine rank asks of its user, and how the answers become outcomes."""

from __future__ import annotations

from typing import Any, Callable, Iterable, NamedTuple, Optional

from weightd.errors import layout_error

Quiesce = Callable[[], None]
Commit = Callable[[], Optional[Iterable[str]]]
Convert = Callable[[int], None]


class Callbacks(NamedTuple):
    """What the user wants to be asked. Each answer ends with what the callback raised, or None."""

    quiesce: Optional[Quiesce]
    commit: Optional[Commit]
    convert: Optional[Convert]
    num_stages: int

    @property
    def any(self) -> bool:
        """False if the library may answer by itself."""
        return (self.quiesce, self.commit, self.convert) != (None, None, None)

    def check(self) -> None:
        """Refuses stages that nobody converts."""
        if self.num_stages > 1 and self.convert is None:
            raise layout_error(
                f"nobody converts the stages: stages={self.num_stages}",
                reason="CONFIG",
                remedy="pass convert=",
            )

    def stop(self) -> Optional[str]:
        """Answers Prepare."""
        return _call(self.quiesce)[1]

    def take(self, stage: int) -> Optional[str]:
        """Converts a stage."""
        return _call(self.convert, stage)[1]

    def finish(self) -> tuple[Any, Optional[str]]:
        """Answers Commit: the last stage is converted first."""
        if self.num_stages > 0:
            failure = self.take(self.num_stages)
            if failure is not None:
                return None, failure
        return _call(self.commit)


def _call(callback: Optional[Callable[..., Any]], *arguments: Any) -> tuple[Any, Optional[str]]:
    """Runs a user's callback; (its value, None) or (None, what it raised)."""
    if callback is None:
        return None, None
    try:
        return callback(*arguments), None
    except Exception as error:  # becomes the replica's outcome; the thread has to live on
        return None, f"{type(error).__name__}: {error}"
