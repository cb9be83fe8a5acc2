"""The parameters of one vLLM worker as weightd sees them, and the conversion of derived ones.

A raw parameter is lent as it is. A derived one that the post-load step left in place (it only made a
copy of it) is lent as it is, too. Any other is received in a buffer of its loadable layout, stage by
stage: vLLM's own post-load step makes the kernel's form out of what a stage has brought, one module
at a time, before the next stage comes into the same memory.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import Any, Iterator, Optional

from weightd.errors import FAILED_PRECONDITION, EngineError
from weightd.vllm.arena import Arena, number_stages, units_of
from weightd.vllm.post_load import (
    LoadRecord,
    ModuleChange,
    TensorMark,
    full_name,
    is_cast,
    is_deferred_attention,
    own_parameters,
)

_OWN_USERS = 2  # of a storage, if nobody has it but a tensor and the storage object at hand


@dataclass
class Derived:
    """A module that goes through its post-load step at every sync.

    Attributes:
        change: what that step did when the model was loaded.
        stage: in which its buffers are filled; 0 if all of it is in place.
        staged: buffers in loadable layout, by attribute.
        read_later: an attention layer's step, which runs after its own, reads what it has filled.
        kernel: parameters, buffers and names of non-persistent buffers as the engine uses them.
        read_only: staged attributes that the step reads and lets go of, which may be given to it as
            they are; None until it has run once.
        step_seconds: that vLLM's own step took the last time.
    """

    change: ModuleChange
    stage: int = 0
    staged: dict[str, Any] = field(default_factory=dict)
    read_later: bool = False
    kernel: tuple[dict[str, Any], dict[str, Any], set[str]] = field(
        default_factory=lambda: ({}, {}, set())
    )
    read_only: Optional[set[str]] = None
    step_seconds: float = 0.0

    def moved(self) -> list[TensorMark]:
        """The parameters that the step did not leave in place, as they were before it."""
        kept = self.change.kept
        return [mark for key, mark in self.change.loadable.items() if key not in kept]


class Parameters:
    """What one worker lends.

    Attributes:
        pairs: (name, tensor) to lend, in the model's order, then what is listed only.
        kinds: "derived" and "opaque" parameters by name; all others are raw.
        stages: of those that are received in a buffer, by name.
        num_stages: how many there are.
    """

    def __init__(self, model: Any, record: LoadRecord, stage_bytes: int) -> None:
        """Allocates the buffers.

        Args:
            model: after its post-load step.
            record: what that step did.
            stage_bytes: that a stage brings at the most, unless one module has more.

        Raises:
            errors.EngineError: a module was changed in a way that cannot be repeated.
        """
        self._model = model
        self._hook = record.hook
        self._derived = [Derived(change) for change in record.changes if change.loadable]
        self.kinds: dict[str, str] = {}
        self.stages: dict[str, int] = {}
        self.num_stages = 0
        self._arena_bytes = 0
        buffers = self._stage(stage_bytes)
        self._attention = self._order_attention(record)
        self._mark_read_later()
        self.pairs = self._collect(buffers, record.born)

    @property
    def finishes(self) -> bool:
        """True if `finish` has something to do."""
        in_place = any(derived.stage == 0 for derived in self._derived)
        return in_place or self._hook or any(stage == 0 for stage, _ in self._attention)

    def counts(self) -> dict[str, int]:
        """Number of parameters of each kind."""
        counts = {"raw": 0, "derived": 0, "opaque": 0}
        for name, _ in self.pairs:
            counts[self.kinds.get(name, "raw")] += 1
        return counts

    def staged_bytes(self) -> int:
        """Bytes of the buffers in loadable layout, of all stages."""
        tensors = {id(t): t for d in self._derived for t in d.staged.values()}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def step_seconds(self) -> float:
        """Seconds that vLLM's own post-load steps took in the last sync."""
        return sum(derived.step_seconds for derived in self._derived)

    def arena_bytes(self) -> int:
        """Bytes of the memory that the buffers share."""
        return self._arena_bytes

    def convert(self, model_config: Any, stage: int) -> None:
        """Runs the post-load step of the modules whose buffers a stage has filled.

        Args:
            model_config: of vLLM.
            stage: from 1; stages come in order.
        """
        self._process(model_config, stage)

    def finish(self, model_config: Any) -> None:
        """Runs what is left once every stage is converted: modules that are derived in place,
        whatever reads them, and the model's own step.

        Args:
            model_config: of vLLM.
        """
        self._process(model_config, 0)
        if self._hook:
            with _default_dtype(model_config):
                self._model.process_weights_after_loading()

    def _process(self, model_config: Any, stage: int) -> None:
        with _default_dtype(model_config):
            for derived in self._derived:
                if derived.stage == stage:
                    _convert_module(derived)
            for after, module in self._attention:
                if after == stage:
                    self._process_attention(module, model_config.dtype)

    def _mark_read_later(self) -> None:
        readers = [part for _, module in self._attention for part in module.modules()]
        read = {id(part) for part in readers}
        for derived in self._derived:
            derived.read_later = id(derived.change.module) in read

    def _process_attention(self, module: Any, dtype: Any) -> None:
        """Runs the step of an attention layer; only then its parts take the kernel's form."""
        from vllm.model_executor.model_loader.reload.layerwise import (
            _copy_and_restore_kernel_tensors,
        )

        module.process_weights_after_loading(dtype)
        parts = {id(part) for part in module.modules()}
        for derived in self._derived:
            if derived.staged and id(derived.change.module) in parts:
                info = _kernel_info(derived)
                _copy_and_restore_kernel_tensors(derived.change.module, info)
                info.reset()

    def _order_attention(self, record: LoadRecord) -> list[tuple[int, Any]]:
        """Attention layers whose step reads what derived modules hold, each with the stage after
        which all of these are converted; 0 if some are so only at the end."""
        stage_of = {id(derived.change.module): derived.stage for derived in self._derived}
        layers = []
        for change in record.changes:
            if not is_deferred_attention(change.module):
                continue
            parts = [stage_of[id(p)] for p in change.module.modules() if id(p) in stage_of]
            if parts:
                layers.append((0 if 0 in parts else max(parts), change.module))
        return layers

    def _stage(self, stage_bytes: int) -> dict[str, Any]:
        """Makes a buffer for every derived parameter that did not stay in place."""
        buffers: dict[str, Any] = {}
        units = units_of([(derived, derived.moved()) for derived in self._derived])
        self.num_stages = number_stages(units, stage_bytes)
        for unit in units:
            for derived in unit.owners:
                derived.stage = unit.stage
        arena = Arena(units)
        self._arena_bytes = arena.size_bytes()
        by_mark = dict(arena.buffers())  # tied parameters share one
        for derived in self._derived:
            change = derived.change
            module = change.module
            derived.kernel = (
                {k: p for k, p in module._parameters.items() if p is not None},
                {k: b for k, b in module._buffers.items() if b is not None},
                set(module._non_persistent_buffers_set),
            )
            for attribute, mark in change.loadable.items():
                name = full_name(change.name, attribute)
                self.kinds[name] = "derived"
                if attribute in change.kept:
                    continue
                _check_repeatable(module, name, attribute, mark)
                self.stages[name] = derived.stage
                derived.staged[attribute] = buffers[name] = by_mark[mark]
        return buffers

    def _collect(self, buffers: dict[str, Any], born: set[str]) -> list[tuple[str, Any]]:
        lent = [
            (name, buffers.get(name, tensor))
            for name, tensor in own_parameters(self._model)
            if name not in born
        ]
        lent += [pair for pair in buffers.items() if pair[0] not in dict(lent)]  # taken off
        derived = {tensor.data_ptr() for name, tensor in lent if name in self.kinds}
        for name, tensor in lent:
            if tensor.numel() > 0 and tensor.data_ptr() in derived:
                self.kinds[name] = "derived"  # tied to one that is
        listed = [(name, tensor) for name, tensor in own_parameters(self._model) if name in born]
        self.kinds |= {name: "opaque" for name, _ in listed}
        return lent + listed


@contextlib.contextmanager
def _default_dtype(model_config: Any) -> Iterator[None]:
    """The surroundings of vLLM's own post-load step."""
    import torch
    from vllm.utils.torch_utils import set_default_torch_dtype

    with torch.no_grad(), set_default_torch_dtype(model_config.dtype):
        yield


def _check_repeatable(module: Any, name: str, attribute: str, mark: TensorMark) -> None:
    """Makes sure that the parameter can be put back into its loadable form, or was only cast."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    method = getattr(module, "quant_method", None)
    parameters, _ = get_layerwise_info(module).restore_metadata
    # vLLM keeps no loadable form of a bias; a copy into the kernel's form casts it again.
    if isinstance(method, QuantizeMethodBase) and (
        attribute in parameters or is_cast(module._parameters.get(attribute), mark)
    ):
        return
    raise EngineError(
        f"vLLM changed a parameter after loading in a way that it cannot repeat: "
        f"module={type(module).__name__}",
        code=FAILED_PRECONDITION,
        reason="ENGINE_REFUSED",
        tensor=name,
        remedy="use another backend of vLLM for this layer, or reload from a checkpoint",
    )


def _convert_module(derived: Derived) -> None:
    """Puts one module back into its loadable form, fills it and lets vLLM process it."""
    module = derived.change.module
    if not derived.staged:
        begin = time.perf_counter()
        _process(module)
        derived.step_seconds = time.perf_counter() - begin
        return
    from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process
    from vllm.model_executor.model_loader.reload.meta import (
        materialize_layer,
        restore_layer_on_meta,
    )

    info = _kernel_info(derived)
    parameters, buffers, _ = derived.kernel
    restore_layer_on_meta(module, info)
    for attribute in derived.read_only or ():
        _give(module, attribute, derived.staged[attribute])
    materialize_layer(module, info)
    _fill(module, {**buffers, **parameters, **derived.staged})
    given = {key: module._parameters[key].data for key in derived.staged}
    _forget_first_load(module)
    if derived.read_later:
        info.kernel_tensors = None  # leaves its result in place
    begin = time.perf_counter()
    _layerwise_process(module, info)
    derived.step_seconds = time.perf_counter() - begin
    if derived.read_only is None:
        derived.read_only = {
            key for key, tensor in given.items() if _is_let_go(tensor, derived.staged[key])
        }


def _give(module: Any, attribute: str, buffer: Any) -> None:
    """Makes a buffer the parameter of a module whose parameters are on the meta device."""
    form = module._parameters[attribute]
    parameter = buffer.detach()
    parameter.__class__ = form.__class__
    parameter.__dict__ = form.__dict__.copy()
    setattr(module, attribute, parameter)


def _fill(module: Any, sources: dict[str, Any]) -> None:
    for attribute, tensor in (module._parameters | module._buffers).items():
        source = sources.get(attribute)
        if tensor is None or source is None or tensor is source:
            continue
        if tensor.numel() == 0 or tensor.data_ptr() != source.data_ptr():
            tensor.data.copy_(source)


def _is_let_go(given: Any, buffer: Any) -> bool:
    """True if a step has left what it was given unchanged, and nothing refers to it any more.

    A copy was given; the next time the buffer itself can be. (It stays as it was received, for
    engines that catch up, and the next sync may write it.)
    """
    import torch

    if given.dtype != buffer.dtype:
        return False
    storage = given.untyped_storage()
    users = torch._C._storage_Use_Count(storage._cdata)
    return users == _OWN_USERS and torch.equal(given, buffer)


def _kernel_info(derived: Derived) -> Any:
    """What vLLM's reload knows of a module, with the tensors that its kernel uses."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    info = get_layerwise_info(derived.change.module)
    parameters, buffers, non_persistent = derived.kernel
    info.kernel_tensors = (parameters, buffers)
    info.kernel_non_persistent_buffers = non_persistent
    return info


def _process(module: Any) -> None:
    """Runs the post-load step of a module whose loadable parameters are in place."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    method: Optional[Any] = getattr(module, "quant_method", None)
    if isinstance(method, QuantizeMethodBase):
        _forget_first_load(module)
        method.process_weights_after_loading(module)


def _forget_first_load(module: Any) -> None:
    """Lets the post-load step do all that it did at the first load.

    With a kernel at hand the step of expert layers takes a short cut which, on CPUs, leaves out the
    repacking (vLLM 0.32): the experts would be computed with in the wrong order.
    """
    module.__dict__.pop("_already_called_process_weights_after_loading", None)
    method = getattr(module, "quant_method", None)
    if getattr(method, "moe_kernel", None) is not None:
        method.moe_kernel = None
