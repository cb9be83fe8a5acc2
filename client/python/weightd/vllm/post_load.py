"""What vLLM's post-load step did to each module: decides which parameters may be written in place.

After a checkpoint is loaded, vLLM repacks, moves or copies what it has loaded into the form that its
kernels want. That step is wrapped; the addresses, shapes, digests and other attributes of every
module are compared before and after. What it left alone is written in place; anything else has to
go through that step again.
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import types
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, Optional
from weakref import WeakKeyDictionary

_PART_BYTES = 1 << 24
_FACTOR = 0x9E3779B1  # odd: no two places of one part weigh the same
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, enum.Enum)


@dataclass(frozen=True)
class TensorMark:
    """What identifies a tensor's memory and content."""

    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: Any
    device: Any
    digest: bytes


@dataclass
class ModuleChange:
    """A module that the post-load step changed, and its loadable tensors.

    Attributes:
        module: the module.
        name: its name in the model.
        loadable: what its parameters looked like before the step, by attribute.
        kept: attributes whose memory and content the step left as they were.
    """

    module: Any
    name: str
    loadable: dict[str, TensorMark]
    kept: set[str] = field(default_factory=set)


@dataclass
class LoadRecord:
    """What the post-load step did to one model.

    Attributes:
        changes: modules that it changed, in the model's order.
        born: names of parameters that it has made.
        hook: True if the model has a post-load step of its own.
    """

    changes: list[ModuleChange]
    born: set[str]
    hook: bool


_records: WeakKeyDictionary[Any, LoadRecord] = WeakKeyDictionary()


def record_of(model: Any) -> Optional[LoadRecord]:
    """The record of a model that was loaded while the plug-in watched."""
    return _records.get(model)


def install() -> None:
    """Wraps vLLM's post-load step. Does nothing the second time."""
    from vllm.model_executor.model_loader import base_loader

    original = base_loader.process_weights_after_loading
    if not hasattr(original, "weightd_original"):
        base_loader.process_weights_after_loading = _wrapped(original)


def _wrapped(original: Callable[..., None]) -> Callable[..., None]:
    def process_weights_after_loading(model: Any, model_config: Any, target_device: Any) -> None:
        if not _wanted():
            return original(model, model_config, target_device)
        before = Snapshot(model)
        original(model, model_config, target_device)
        _records[model] = before.compare(model)
        return None

    process_weights_after_loading.weightd_original = original  # type: ignore[attr-defined]
    return process_weights_after_loading


def _wanted() -> bool:
    """True while a model is loaded for an engine with our backend."""
    from vllm.config import get_current_vllm_config_or_none

    from weightd.vllm import is_chosen

    return is_chosen(get_current_vllm_config_or_none())


class Snapshot:
    """All modules of a model at one time."""

    def __init__(self, model: Any) -> None:
        self._names = {name for name, _ in own_parameters(model)}
        self._tensors: dict[str, dict[str, TensorMark]] = {}
        self._attributes: dict[str, dict[str, Any]] = {}
        marks: dict[int, TensorMark] = {}
        for name, module in model.named_modules():
            self._tensors[name] = {
                attribute: _mark(tensor, marks) for attribute, tensor in _tensors(module)
            }
            # Held, not only compared by id, so that no id is used again before the comparison.
            self._attributes[name] = dict(_attributes(module))

    def compare(self, model: Any) -> LoadRecord:
        """Returns what has changed since. Modules that appeared or went are changes, too."""
        marks: dict[int, TensorMark] = {}
        left_alone = {(mark.address, mark.dtype) for mark in self._kept(model, marks)}
        changed: set[int] = set()
        for name, module in model.named_modules():
            if self._is_changed(name, module, marks, left_alone) or _reads_parts(module):
                changed.add(id(module))
                if is_deferred_attention(module):
                    changed |= {id(part) for part in module.modules()}
        changes = []
        for name, module in model.named_modules():
            if id(module) not in changed:
                continue
            parameters = dict(module.named_parameters(recurse=False))
            before = self._tensors.get(name, {})
            now = {key: _mark(tensor, marks) for key, tensor in parameters.items()}
            loadable = {
                key: mark for key, mark in before.items() if full_name(name, key) in self._names
            }
            kept = {key for key, mark in loadable.items() if now.get(key) == mark}
            changes.append(ModuleChange(module, name, loadable, kept))
        born = {name for name, _ in own_parameters(model)} - self._names
        return LoadRecord(changes, born, hasattr(model, "process_weights_after_loading"))

    def _kept(self, model: Any, marks: dict[int, TensorMark]) -> Iterator[TensorMark]:
        for name, module in model.named_modules():
            for attribute, tensor in _tensors(module):
                mark = _mark(tensor, marks)
                if self._tensors.get(name, {}).get(attribute) == mark:
                    yield mark

    def _is_changed(
        self,
        name: str,
        module: Any,
        marks: dict[int, TensorMark],
        left_alone: set[tuple[int, Any]],
    ) -> bool:
        before = self._tensors.get(name)
        if before is None:
            return True
        now = dict(_tensors(module))
        if any(key not in now for key in before):
            return True
        for key, tensor in now.items():
            if before.get(key) != _mark(tensor, marks) and not _is_view(tensor, left_alone):
                return True
        held = self._attributes[name]
        return any(
            key not in held or held[key] is not value
            for key, value in _attributes(module)
            if _may_hold_weights(value, left_alone)
        )


def is_deferred_attention(module: Any) -> bool:
    """True for vLLM's attention layers, whose post-load step runs after all others."""
    from vllm.model_executor.layers.attention import is_deferred_attention_layer

    return bool(is_deferred_attention_layer(module))


def _reads_parts(module: Any) -> bool:
    """True for attention layers whose step reads what their parts hold, as MLA's does.

    What it makes of them may lie where it is not seen, e.g. in the layer's backend.
    """
    return is_deferred_attention(module) and next(module.parameters(), None) is not None


def is_cast(tensor: Optional[Any], mark: TensorMark) -> bool:
    """True if the tensor has the marked shape and, cast back to the marked dtype, its content."""
    if tensor is None or tuple(tensor.shape) != mark.shape:
        return False
    return _digest(tensor.to(mark.dtype)) == mark.digest


def own_parameters(model: Any) -> Iterator[tuple[str, Any]]:
    """Parameters with their names: tied ones under each name, those of a module that is reached in
    several ways under its first."""
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield full_name(prefix, attribute), parameter


def full_name(module: str, attribute: str) -> str:
    """Name of a module's parameter in its model."""
    return f"{module}.{attribute}" if module else attribute


def _tensors(module: Any) -> Iterator[tuple[str, Any]]:
    for group in (module._parameters, module._buffers):
        for name, tensor in group.items():
            if tensor is not None:
                yield name, tensor


def _attributes(module: Any) -> Iterator[tuple[str, Any]]:
    """Attributes that are not a module's machinery."""
    for name, value in module.__dict__.items():
        if name in ("_parameters", "_buffers", "_modules", "training") or name.endswith("_hooks"):
            continue
        yield name, value


def _mark(tensor: Any, marks: dict[int, TensorMark]) -> TensorMark:
    """Marks a tensor; tied ones are read once."""
    mark = marks.get(id(tensor))
    if mark is None:
        mark = TensorMark(
            tensor.data_ptr(),
            tuple(tensor.shape),
            tuple(tensor.stride()),
            tensor.dtype,
            tensor.device,
            _digest(tensor),
        )
        marks[id(tensor)] = mark
    return mark


def _digest(tensor: Any) -> bytes:
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return b""
    dense = tensor.detach().contiguous()
    if tensor.device.type != "cpu":
        return _device_digest(dense)
    # Not through NumPy: a storage that NumPy has seen cannot move into shared memory any more.
    size = dense.numel() * dense.element_size()
    content = (ctypes.c_char * size).from_address(dense.data_ptr())
    return hashlib.blake2b(content, digest_size=16).digest()


def _device_digest(dense: Any) -> bytes:
    """Digest of memory that only its device reads fast: sums weighted by position, mod 2^64."""
    import torch

    words = dense.reshape(-1).view(torch.uint8)
    sums = torch.zeros(2, dtype=torch.int64, device=dense.device)
    for begin in range(0, words.numel(), _PART_BYTES):
        part = words[begin : begin + _PART_BYTES].to(torch.int64)
        place = torch.arange(begin, begin + part.numel(), dtype=torch.int64, device=part.device)
        sums[0] += (part * (place * _FACTOR + 1)).sum()
        sums[1] += (part * (place * place + 1)).sum()
    return repr(sums.tolist()).encode()


def _is_view(tensor: Any, left_alone: set[tuple[int, Any]]) -> bool:
    """True if the tensor shows memory of one that was left alone."""
    base = tensor.untyped_storage().data_ptr()
    return tensor.numel() > 0 and (base, tensor.dtype) in left_alone


def _may_hold_weights(value: Any, left_alone: set[tuple[int, Any]], depth: int = 0) -> bool:
    """False if a copy of weights cannot be reached from the value."""
    import torch

    if isinstance(value, torch.Tensor):
        return not _is_view(value, left_alone)
    if isinstance(value, _PLAIN + (torch.dtype, torch.device, torch.nn.Module)):
        return False
    if isinstance(value, types.BuiltinFunctionType) or depth > 4:
        return depth > 4
    parts: list[Any]
    if isinstance(value, types.FunctionType):
        parts = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        parts += value.__defaults__ or ()
    elif isinstance(value, types.MethodType):
        parts = [value.__self__]
    elif isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    else:
        return True
    return any(_may_hold_weights(part, left_alone, depth + 1) for part in parts)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents
    except ValueError:
        return False
    return True
