"""The tensors of a trainer rank: their names, and whether they still lie where they were lent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Iterable, Mapping, Optional, Union

from weightd._layout import LocalTensor, describe, is_dtensor
from weightd._memory import check_tensor, is_cuda
from weightd.errors import Error, layout_error

NameMap = Union[Mapping[str, Optional[str]], Callable[[str], Optional[str]]]

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


@dataclass(frozen=True)
class Entry:
    """One registered tensor and where its owner keeps the live object.

    ``table[key]`` is the live parameter or buffer of a module; ``table`` is None for a tensor that
    was given by itself. Address in bytes, shape and strides in elements, of the local part.
    """

    name: str
    tensor: Any
    table: Optional[dict]
    key: str
    local: Any
    storage: Any
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Source:
    """Named tensors with what this rank holds of each.

    Attributes:
        entries: live tensors, for the check before every sync.
        layout: boxes of this rank per tensor, same order.
    """

    def __init__(self, pairs: Iterable[tuple[str, Any]], module: Any = None) -> None:
        owners = _owners(module) if module is not None else {}
        self._module = module
        self.layout: list[LocalTensor] = []
        self.entries: list[Entry] = []
        for name, tensor in pairs:
            self.layout.append(describe(name, tensor))
            local = tensor._local_tensor if is_dtensor(tensor) else tensor
            check_tensor(name, local)
            table, key = owners.get(id(tensor), (None, ""))
            self.entries.append(
                Entry(
                    name,
                    tensor,
                    table,
                    key,
                    local,
                    local.untyped_storage(),
                    local.data_ptr(),
                    local.shape,
                    local.stride(),
                )
            )

    @property
    def layout_key(self) -> tuple:
        """Names, shapes, dtypes and boxes, for comparison; says nothing of memory."""
        return tuple(
            (t.name, t.shape, t.dtype, tuple(box for box, _ in t.shards)) for t in self.layout
        )

    @property
    def cuda_device(self) -> Any:
        """The torch device of the first tensor on a GPU; None if all lie in host memory."""
        return next((e.local.device for e in self.entries if is_cuda(e.local)), None)

    def refresh(self) -> None:
        """Notes the present addresses, after the memory was moved on purpose."""
        self.entries = [
            Entry(**{**e.__dict__, "address": e.local.data_ptr()}) for e in self.entries
        ]

    def moved(self) -> Optional[Error]:
        """Returns an error that names the first tensor which is no longer where it was registered.

        FSDP2 modules that hold gathered parameters are resharded first, which frees no memory that
        was registered. Takes about a microsecond per tensor.
        """
        found = self._first_moved()
        if found is not None and self._module is not None and reshard(self._module):
            found = self._first_moved()
        if found is None:
            return None
        entry, cause = found
        return layout_error(
            f"registered memory has changed: {cause}",
            reason="MEMORY_MOVED",
            tensor=entry.name,
            remedy="call register() again after parameters were moved, swapped or freed",
        )

    def _first_moved(self) -> Optional[tuple[Entry, str]]:
        for entry in self.entries:
            tensor = entry.tensor
            if entry.table is not None:
                live = entry.table.get(entry.key)
                if live is not tensor:
                    return entry, "the module holds another tensor object under this name"
            local = tensor if entry.local is tensor else tensor._local_tensor
            if local.data_ptr() != entry.address:
                return entry, f"address was {entry.address:#x}, is {local.data_ptr():#x}"
            if local.shape != entry.shape or local.stride() != entry.strides:
                return entry, (
                    f"local shape and strides were {list(entry.shape)}, {list(entry.strides)}, "
                    f"are {list(local.shape)}, {list(local.stride())}"
                )
        return None


def module_pairs(module: Any, name_map: Optional[NameMap] = None) -> list[tuple[str, Any]]:
    """Reads the live tensors behind ``state_dict()`` under their Hugging Face names.

    Raises:
        errors.LayoutError: FSDP1 module, or names that collide after mapping.
    """
    for path, child in module.named_modules():
        if type(child).__name__ == "FullyShardedDataParallel":
            raise layout_error(
                f"FSDP1 keeps flat parameters, which cannot be lent: module={path or '(root)'}",
                reason="SHAPE",
                remedy="use fully_shard (FSDP2), or give state_dict() to sync(tensors=...)",
            )
    reshard(module)
    prefixes = _replica_prefixes(module)
    pairs = []
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not hasattr(tensor, "data_ptr"):
            continue
        for prefix in prefixes:
            if name.startswith(prefix + "module."):
                name = prefix + name[len(prefix) + len("module.") :]
        pairs.append((name, tensor))
    return rename(pairs, name_map)


def named_pairs(
    tensors: Union[Mapping[str, Any], Iterable[tuple[str, Any]]], name_map: Optional[NameMap] = None
) -> list[tuple[str, Any]]:
    """Reads (name, tensor) pairs or a mapping; a leading ``module.`` on all names is dropped."""
    pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    if pairs and all(name.startswith("module.") for name, _ in pairs):
        pairs = [(name[len("module.") :], tensor) for name, tensor in pairs]
    return rename(pairs, name_map)


def rename(pairs: list[tuple[str, Any]], name_map: Optional[NameMap]) -> list[tuple[str, Any]]:
    """Strips wrapper components and applies ``name_map``; a name mapped to None is left out.

    Raises:
        errors.LayoutError: two tensors end under one name, or a mapping has keys that fit nothing.
    """
    renamed: list[tuple[str, Any]] = []
    used: set[str] = set()
    sources: dict[str, str] = {}
    for raw, tensor in pairs:
        stripped = ".".join(c for c in raw.split(".") if c not in _WRAPPERS)
        name: Optional[str] = stripped
        if isinstance(name_map, Mapping):
            used.add(stripped)
            name = name_map.get(stripped, stripped)
        elif name_map is not None:
            name = name_map(stripped)
        if name is None:
            continue
        if name in sources:
            raise layout_error(
                f"two tensors have one name: sources={sources[name]}, {raw}",
                reason="DUPLICATE_TENSOR",
                tensor=name,
                remedy="give each tensor its own name in name_map",
            )
        sources[name] = raw
        renamed.append((name, tensor))
    unused = sorted(set(name_map) - used) if isinstance(name_map, Mapping) else []
    if unused:
        raise layout_error(
            f"name_map has keys that fit no tensor: {unused[:5]}",
            reason="UNKNOWN_TENSOR",
            tensor=unused[0],
            remedy="use the names of state_dict() without wrapper prefixes",
        )
    return renamed


def reshard(module: Any) -> bool:
    """Frees gathered parameters of all FSDP2 modules, locally; True if there is such a module."""
    found = False
    for child in module.modules():
        if any(base.__name__ == "FSDPModule" for base in type(child).__mro__):
            child.reshard()
            found = True
    return found


def _owners(module: Any) -> dict[int, tuple[dict, str]]:
    """Where each live parameter and buffer hangs: id -> (dict of its module, key)."""
    owners: dict[int, tuple[dict, str]] = {}
    for child in module.modules():
        for table in (child._parameters, child._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    owners.setdefault(id(tensor), (table, key))
    return owners


def _replica_prefixes(module: Any) -> list[str]:
    """Prefixes (empty or ending in a dot) of data-parallel wrappers, deepest first."""
    kinds = ("DistributedDataParallel", "DataParallel")
    paths = [path for path, child in module.named_modules() if type(child).__name__ in kinds]
    return sorted((path + "." if path else "" for path in paths), key=len, reverse=True)
