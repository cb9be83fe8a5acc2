"""A libweightd in Python: records what the package hands over the C ABI and answers as told."""

from __future__ import annotations

import ctypes
import json
import threading
from typing import Any, Optional

from weightd import _native


class FakeLibrary:
    """Behaves like the C library of one actor or engine rank.

    Attributes:
        calls: names of the functions called, in order, without state and wait.
        tensors: what the last actor registration described, as plain values.
        params: what the last engine registration described.
        trace: the trace that came with it, as plain values, or None.
        syncs: options of every sync begun, as plain values.
        failures: per function name, fields of the error that its next call answers.
        outcome: fields of the error with which syncs end, or None for success.
        slices_before_end: how often a wait times out before the sync ends.
        engine_state: answer of ``weightd_engine_state``.
        asleep: addresses of GPU memory without pages; what lies elsewhere cannot be mapped.
        gpu_bytes: allocated and not freed.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.tensors: list[dict[str, Any]] = []
        self.params: list[dict[str, Any]] = []
        self.trace: Optional[dict[str, Any]] = None
        self.syncs: list[dict[str, Any]] = []
        self.opened: Optional[dict[str, Any]] = None
        self.failures: dict[str, dict[str, Any]] = {}
        self.outcome: Optional[dict[str, Any]] = None
        self.slices_before_end = 0
        self.waits = 0
        self.interrupt_at: Optional[int] = None
        self.cancelled = False
        self.engine_state: dict[str, Any] = {"state": "REGISTERED", "version": 0, "pending": ""}
        self.asleep: set[int] = set()
        self.gpu_bytes = 0
        self.answers: list[tuple[str, Optional[str], Optional[str]]] = []
        self._changed = threading.Condition()
        self._counter = 1
        self._errors: dict[int, dict[str, Any]] = {}
        self._strings: dict[int, Any] = {}

    def set_engine_state(self, **fields: Any) -> None:
        """Changes the engine's state and wakes who waits for it."""
        with self._changed:
            self.engine_state = {**self.engine_state, **fields}
            self._counter += 1
            self._changed.notify_all()

    def weightd_error_code(self, error: int) -> int:
        return int(self._errors[error].get("code", 13))

    def weightd_error_field(self, error: int, field: bytes) -> bytes:
        value = self._errors[error].get(field.decode(), "")
        return (json.dumps(value) if isinstance(value, dict) else value).encode()

    def weightd_error_free(self, error: int) -> None:
        del self._errors[error]

    def weightd_string_free(self, text: int) -> None:
        del self._strings[text]

    def weightd_actor_open(self, options: Any, handle: Any) -> Optional[int]:
        return self._open(options._obj, handle)

    def weightd_engine_open(self, options: Any, handle: Any) -> Optional[int]:
        return self._open(options._obj, handle)

    def weightd_actor_register(self, handle: int, tensors: Any, count: int) -> Optional[int]:
        self.tensors = [_tensor(tensors[i]) for i in range(count)]
        return self._answer("register")

    def weightd_engine_register(self, handle: int, params: Any, count: int) -> Optional[int]:
        self.params = [_param(params[i]) for i in range(count)]
        return self._answer("register")

    def weightd_engine_register_traced(
        self, handle: int, params: Any, count: int, trace: Any
    ) -> Optional[int]:
        self.params = [_param(params[i]) for i in range(count)]
        self.trace = _trace(trace._obj)
        return self._answer("register_traced")

    def weightd_gpu_check(self, address: int, size_bytes: int) -> Optional[int]:
        lies = address not in self.asleep
        refusal = {"code": 12, "reason": "MEMORY"} if lies else {"code": 3, "reason": "MEMORY_MOVED"}
        if lies and size_bytes == 0:
            return None
        return self._error(refusal)

    def weightd_gpu_allocate(self, like: int, size_bytes: int, address: Any) -> Optional[int]:
        address._obj.value = 0x7000
        self.gpu_bytes += size_bytes
        return None

    def weightd_gpu_free(self, address: int) -> None:
        assert address == 0x7000
        self.gpu_bytes = 0

    def weightd_actor_sync_begin(self, handle: int, options: Any) -> Optional[int]:
        value = options._obj
        self.syncs.append(
            {
                "version": value.version,
                "require": value.require_replicas,
                "check": value.check_replicas,
                "refuse": (value.refuse_reason or b"").decode(),
                "refuse_tensor": (value.refuse_tensor or b"").decode(),
                "refuse_message": (value.refuse_message or b"").decode(),
                "refuse_remedy": (value.refuse_remedy or b"").decode(),
                "staged": [
                    (s.tensor, s.shard, s.address, list(s.strides))
                    for s in (value.staged[i] for i in range(value.num_staged))
                ],
            }
        )
        self.waits, self.cancelled = 0, False
        return self._answer("begin")

    def weightd_actor_sync_wait(self, handle: int, timeout: int, result: Any, error: Any) -> int:
        self.waits += 1
        if self.waits == self.interrupt_at:
            raise KeyboardInterrupt
        sync = self.syncs[-1]
        if self.cancelled:
            error._obj.value = self._error({"code": 1, "reason": "CANCELLED", "message": "stop"})
        elif self.waits <= self.slices_before_end:
            return 0
        elif sync["refuse"]:
            fields = {name[7:]: sync[name] for name in sync if name.startswith("refuse_")}
            fields.update(code=9, reason=sync["refuse"], rank="actor 0")
            error._obj.value = self._error(fields)
        elif self.outcome is not None:
            error._obj.value = self._error(self.outcome)
        else:
            result._obj.value = self._string({"version": sync["version"], "attempt": "1.1"})
        return 1

    def weightd_actor_sync_cancel(self, handle: int) -> None:
        self.calls.append("cancel")
        self.cancelled = True

    def weightd_actor_state(self, handle: int) -> int:
        return self._string({"connected": True, "phase": "transfer"})

    def weightd_actor_close(self, handle: int) -> None:
        self.calls.append("close")

    def weightd_engine_state(self, handle: int) -> int:
        return self._string(self.engine_state)

    def weightd_engine_wait(self, handle: int, since: int, timeout_ms: int) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._counter != since, timeout_ms / 1000)
            return self._counter

    def weightd_engine_quiesced(self, handle: int, failure: Optional[bytes]) -> Optional[int]:
        self.answers.append(("quiesced", None, failure and failure.decode()))
        self.set_engine_state(pending="")
        return None

    def weightd_engine_converted(self, handle: int, failure: Optional[bytes]) -> Optional[int]:
        self.answers.append(("converted", None, failure and failure.decode()))
        self.set_engine_state(pending="")
        return None

    def weightd_engine_committed(
        self, handle: int, caches: Optional[bytes], failure: Optional[bytes]
    ) -> Optional[int]:
        self.answers.append(("committed", caches and caches.decode(), failure and failure.decode()))
        self.set_engine_state(pending="")
        return None

    def weightd_engine_close(self, handle: int) -> None:
        self.calls.append("close")

    def _open(self, options: Any, handle: Any) -> Optional[int]:
        self.opened = {name: getattr(options, name) for name, _ in options._fields_}
        handle._obj.value = 1
        return self._answer("open")

    def _answer(self, call: str) -> Optional[int]:
        self.calls.append(call)
        fields = self.failures.pop(call, None)
        return None if fields is None else self._error(fields)

    def _error(self, fields: dict[str, Any]) -> int:
        key = 1000 + len(self._errors)
        self._errors[key] = fields
        return key

    def _string(self, value: Any) -> int:
        buffer = ctypes.create_string_buffer(json.dumps(value).encode())
        address = ctypes.addressof(buffer)
        self._strings[address] = buffer
        return address


def _memory(memory: _native.Memory, num_dims: int) -> dict[str, Any]:
    return {
        "fd": memory.fd,
        "fd_size": memory.fd_size,
        "offset_bytes": memory.offset_bytes,
        "address": memory.address,
        "strides": list(memory.strides[:num_dims]),
    }


def _tensor(tensor: _native.Tensor) -> dict[str, Any]:
    dims = tensor.num_dims
    return {
        "name": tensor.name.decode(),
        "dtype": tensor.dtype,
        "shape": list(tensor.shape[:dims]),
        "shards": [
            {
                "origin": list(shard.origin[:dims]),
                "extent": list(shard.extent[:dims]),
                **_memory(shard.memory, dims),
            }
            for shard in (tensor.shards[i] for i in range(tensor.num_shards))
        ],
    }


def _param(param: _native.Param) -> dict[str, Any]:
    dims = param.num_dims
    return {
        "name": param.name.decode(),
        "dtype": param.dtype,
        "shape": list(param.shape[:dims]),
        "kind": param.kind,
        "stage": param.stage,
        "pulled": param.pulled,
        "stage_rows": param.stage_rows,
        "alias_of": param.alias_of and param.alias_of.decode(),
        **_memory(param.memory, dims),
    }


def _trace(trace: Any) -> dict[str, Any]:
    sources = [trace.sources[i] for i in range(trace.num_sources)]
    writes = [trace.writes[i] for i in range(trace.num_writes)]
    return {
        "sources": [(s.name.decode(), list(s.shape[: s.num_dims])) for s in sources],
        "writes": [
            (
                w.param,
                w.source,
                *(list(w_dims[:2]) for w_dims in (w.target_origin, w.extent, w.source_origin)),
                list(w.source_dim[:2]),
            )
            for w in writes
        ],
        "preferred": trace.preferred,
    }
