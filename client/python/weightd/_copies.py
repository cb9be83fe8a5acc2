"""A trainer's GPU tensors that no worker can map: lent are copies, made anew at every sync."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Optional, Sequence

from weightd import _native, _pull
from weightd._layout import LocalTensor
from weightd.errors import UNIMPLEMENTED, Error, UnsupportedError

_UNBOUNDED = 1 << 62


class Copies:
    """Copies of the shards of one rank that cannot be lent, in memory that can.

    Attributes:
        size_bytes: of all; 0 if every shard can be lent.
    """

    def __init__(self, layout: Sequence[LocalTensor], limit: int) -> None:
        """Allocates the copies, without content.

        Args:
            layout: what the rank holds.
            limit: most bytes.

        Raises:
            errors.UnsupportedError: a shard cannot be lent, and its copy is above the limit.
            errors.ResourceError: the GPU has no room for the copies.
        """
        refused = [
            (local.name, tensor, refusal)
            for local in layout
            for _, tensor in local.shards
            if (refusal := _pull.gpu_refusal(local.name, tensor)) is not None
        ]
        tensors = [tensor for _, tensor, _ in refused]
        places, self.size_bytes = _pull.place(tensors, 1, _UNBOUNDED)  # all in one stage
        if self.size_bytes > limit:
            name, _, refusal = refused[0]
            raise UnsupportedError(
                f"{refusal.message}; copies of such tensors would take {self.size_bytes} bytes, of "
                f"{limit} allowed",
                code=UNIMPLEMENTED,
                reason="MEMORY",
                tensor=name,
                remedy=f"{refusal.remedy}; or let weightd keep copies: Actor(copy_bytes=...)",
            )
        self._names = [name for name, _, _ in refused]
        self._pairs: list[tuple[Any, Any]] = []
        if tensors:
            memory = _pull.allocate(tensors[0], self.size_bytes)
            copies = [_pull.view(memory, t, at) for t, at in zip(tensors, places)]
            self._pairs = [(copy, t.detach()) for copy, t in zip(copies, tensors)]
        self._copy_of = {id(t): copy for t, (copy, _) in zip(tensors, self._pairs)}

    def lent(self, layout: Sequence[LocalTensor]) -> list[LocalTensor]:
        """The layout with the copies in place of what cannot be lent."""
        result = []
        for local in layout:
            shards = tuple((box, self._copy_of.get(id(t), t)) for box, t in local.shards)
            result.append(replace(local, shards=shards))
        return result

    def refresh(self) -> Optional[Error]:
        """Copies the tensors on the current stream, without waiting; or says why it cannot."""
        import torch

        library = _native.library()
        for name, (_, tensor) in zip(self._names, self._pairs):
            error = _native.take_error(library.weightd_gpu_check(tensor.data_ptr(), 0))
            if error is not None:
                error.tensor = name
                error.remedy = "wake the trainer's weights before a sync"
                return error
        with torch.no_grad():
            for copy, tensor in self._pairs:
                copy.copy_(tensor, non_blocking=True)
        return None
