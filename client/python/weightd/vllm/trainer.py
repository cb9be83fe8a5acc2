"""vLLM's trainer interface on weightd: `WeightTransferTrainerFactory` with backend ``weightd``.

A trainer written for another backend changes its init info and nothing else:

    from weightd.vllm.trainer import WeightdTrainerInitInfo
    sender = WeightTransferTrainerFactory.trainer_init(
        WeightdTrainerInitInfo("policy", rank=rank), client=client, source=ModuleSource(model)
    )
    sender.send_weights()

In this interface pausing and resuming the engine is the trainer's business, and so is what the
engine has cached; `weightd.Actor(engines=[...])` does both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Optional, Sequence

from vllm.distributed.weight_transfer.base import (
    ModuleSource,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
)

from weightd.ack import Ack
from weightd.actor import Actor
from weightd.engine_client import PauseMode
from weightd.errors import UNIMPLEMENTED, UnsupportedError, layout_error
from weightd.vllm import BACKEND, register_trainer


@dataclass
class WeightdTrainerInitInfo(TrainerInitInfo):
    """What a trainer rank says at the start.

    Attributes:
        model: key of the model, equal at the engines.
        address: of the daemon; None reads ``WEIGHTD_ADDRESS``, then the default.
        world_size: ranks of the trainer; None asks torch.distributed.
        group: id from `weightd.new_group`, equal on all ranks; None shares one.
        engine_timeout: seconds that a call to the engine may take.
        first_version: of the first `send_weights`; above every version that engines hold already.
        worker: who starts the worker of this rank's device, as for `weightd.Actor`.
        rank: of this process; rank 0 drives the engine.
    """

    backend: ClassVar[str] = BACKEND

    model: str
    address: Optional[str] = None
    world_size: Optional[int] = None
    group: Optional[str] = None
    engine_timeout: float = 4.0
    first_version: int = 1
    worker: str = "daemon"


class _Unpaused:
    """The four calls of vLLM's trainer interface as an engine that its user pauses."""

    def __init__(self, client: VLLMWeightSyncClient) -> None:
        self._client = client

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Checks that the engine has a weight-transfer engine."""
        self._client.init_weight_transfer_engine(init_info)

    def pause(self, mode: PauseMode) -> None:
        """Not part of vLLM's interface."""

    def start_weight_update(self) -> None:
        """Opens an update."""
        self._client.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Blocks until the daemon's outcome."""
        self._client.update_weights(update_info)

    def finish_weight_update(self, weight_version: Optional[str] = None) -> None:
        """Closes the update."""
        self._client.finish_weight_update(weight_version)

    def reset_caches(self) -> Sequence[str]:
        """Not part of vLLM's interface."""
        return ()

    def resume(self) -> None:
        """Not part of vLLM's interface."""


class WeightdTrainerEngine(TrainerWeightTransferEngine[WeightdTrainerInitInfo]):
    """Sends a trainer's weights through weightd.

    A `ModuleSource` is not iterated: its module is registered, so that nothing is gathered and only
    local shards are read. Any other source is iterated every round and held in full on each rank.

    Attributes:
        ack: of the last `send_weights`, or None.
    """

    init_info_cls = WeightdTrainerInitInfo

    def __init__(
        self, actor: Actor, client: VLLMWeightSyncClient, source: WeightSource, first_version: int
    ) -> None:
        super().__init__(client=client, source=source, is_sender=actor.group.rank == 0)
        self.ack: Optional[Ack] = None
        self._actor = actor
        self._next = first_version

    @classmethod
    def trainer_init(
        cls,
        init_info: WeightdTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: Optional[WeightSource] = None,
    ) -> WeightdTrainerEngine:
        """Connects this rank and registers its shards. Called on every rank.

        Raises:
            errors.LayoutError: there is no source.
            errors.UnsupportedError: the source gives each rank other parameters.
            errors.Error: as `weightd.Actor` and its ``register``.
        """
        if source is None:
            raise layout_error(
                "backend weightd sends a WeightSource",
                reason="CONFIG",
                remedy="pass source=ModuleSource(model)",
            )
        if source.held_names() is not None:
            raise UnsupportedError(
                "sources that hold other parameters on each rank are not in this build",
                code=UNIMPLEMENTED,
                reason="MEMORY",
                remedy="pass ModuleSource(model), or use weightd.Actor with (name, tensor) pairs",
            )
        actor = Actor(
            init_info.address,
            model=init_info.model,
            rank=init_info.rank,
            world_size=init_info.world_size,
            group=init_info.group,
            engines=[_Unpaused(client)],
            reset_caches=False,
            engine_timeout=init_info.engine_timeout,
            worker=init_info.worker,
        )
        try:
            if isinstance(source, ModuleSource):
                actor.register(source._module)
        except BaseException:
            actor.close()
            raise
        return cls(actor, client, source, init_info.first_version)

    def send_weights(self) -> None:
        """Syncs the present weights as the next version and drives the engine. Every rank calls it.

        Raises:
            errors.Error: as `weightd.Actor.sync`.
        """
        assert self.source is not None
        tensors = None if isinstance(self.source, ModuleSource) else dict(self.source)
        self.ack = self._actor.sync(self._next, tensors=tensors)
        self._next += 1

    def shutdown(self) -> None:
        """Takes the lent memory back and leaves."""
        self._actor.close()


register_trainer()  # a trainer's process loads no plug-ins
