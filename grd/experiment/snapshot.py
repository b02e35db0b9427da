"""A copy of training state that the next step of the training cannot change, for writing it meanwhile.

The memory of the copies is used again by the next one: fresh memory costs more than the copying. Tensors on
a GPU are copied by a stream of their own into pinned memory, while the CPU goes on.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PLAIN = (bool, int, float, str, bytes, complex, type(None))


@dataclass(frozen=True)
class Snapshot:
    """Copied state, as `checkpoint_file.write` takes it once ``finish`` has returned."""

    content: Any
    finish: Callable[[], None]
    """Wait for what a GPU still copies."""


class SnapshotMemory:
    """Takes snapshots, one at a time: the next one overwrites what the last one holds."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, bool], list[Any]] = {}
        self._streams: dict[Any, Any] = {}

    def take(self, prepared: Any, private: Collection[Any] = ()) -> Snapshot:
        """A copy of ``prepared``, what `checkpoint_file.prepare` made; ``private`` tensors are not copied.

        Raises MemoryError, or torch's RuntimeError, where there is no room for it.
        """
        copying = _Copying(self, private)
        content = copying.copy(prepared)
        self._buffers = copying.used  # what this state did not need is given back to the system
        return Snapshot(content, copying.finish())

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers = {}

    def _buffer(self, torch: Any, nbytes: int, pinned: bool) -> Any:
        free = self._buffers.get((nbytes, pinned))
        if free:
            return free.pop()
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)

    def _stream(self, torch: Any, device: Any) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class _Copying:
    """One walk over a state; storages that several tensors share are copied once and shared again."""

    def __init__(self, memory: SnapshotMemory, private: Collection[Any]) -> None:
        self.memory = memory
        self.torch = sys.modules.get("torch")
        self.private = {id(tensor) for tensor in private}
        self.used: dict[tuple[int, bool], list[Any]] = {}
        self._copied: dict[int, Any] = {}
        self._seen: dict[int, Any] = {}
        self._streams: dict[Any, Any] = {}

    def copy(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        # What is met twice stays one thing, as where the state itself is written.
        if id(value) not in self._seen:
            self._seen[id(value)] = self._copy(value, kind)
        return self._seen[id(value)]

    def _copy(self, value: Any, kind: type[Any]) -> Any:
        if kind is dict:
            return {key: self.copy(item) for key, item in value.items()}
        if kind is list:
            return [self.copy(item) for item in value]
        if kind is tuple:
            return tuple(self.copy(item) for item in value)
        if kind in (OrderedDict, Counter, defaultdict):
            same: Any = kind(value.default_factory) if kind is defaultdict else kind()
            for key, item in value.items():
                same[key] = self.copy(item)
            if kind is OrderedDict:
                vars(same).update(vars(value))  # modules keep the versions of their parameters there
            return same
        if self.torch is not None and isinstance(value, self.torch.Tensor):
            return value if id(value) in self.private else self._tensor(value)
        return copy.deepcopy(value)

    def _tensor(self, tensor: Any) -> Any:
        torch = self.torch
        assert torch is not None
        tensor_kinds = (torch.Tensor, torch.nn.Parameter)
        is_plain = type(tensor) in tensor_kinds and tensor.layout is torch.strided and not tensor.is_quantized
        if not is_plain or tensor.device.type == "meta" or tensor.is_conj() or tensor.is_neg():
            return tensor.detach().clone()
        with torch.no_grad():
            view: Any = torch.empty(0, dtype=tensor.dtype).set_(
                self._storage(tensor), tensor.storage_offset(), tensor.size(), tensor.stride()
            )
        if type(tensor) is torch.nn.Parameter:
            return torch.nn.Parameter(view, requires_grad=tensor.requires_grad)
        return view.requires_grad_(tensor.requires_grad)

    def _storage(self, tensor: Any) -> Any:
        torch = self.torch
        assert torch is not None
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._copied:
            nbytes, on_gpu = storage.nbytes(), tensor.device.type == "cuda"
            buffer = self.memory._buffer(torch, nbytes, on_gpu)
            self.used.setdefault((nbytes, on_gpu), []).append(buffer)
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (nbytes,))
            if on_gpu:
                self._copy_beside(buffer, source)
            else:
                buffer.copy_(source)
            self._copied[key] = buffer.untyped_storage()
        return self._copied[key]

    def _copy_beside(self, buffer: Any, source: Any) -> None:
        torch = self.torch
        assert torch is not None
        device = source.device
        stream = self.memory._stream(torch, device)
        if device not in self._streams:
            stream.wait_stream(torch.cuda.current_stream(device))  # for what still computes the state
            self._streams[device] = stream
        with torch.cuda.stream(stream):
            buffer.copy_(source, non_blocking=True)

    def finish(self) -> Callable[[], None]:
        """Keep the GPU from changing what is still being copied; returns what waits for the copies."""
        events = []
        for device, stream in self._streams.items():
            event = stream.record_event()
            self.torch.cuda.current_stream(device).wait_event(event)  # type: ignore[union-attr]
            events.append(event)

        def wait() -> None:
            for event in events:
                event.synchronize()

        return wait


@dataclass(frozen=True)
class Size:
    """Bytes of the tensors in a state, of those on a GPU too; what several share is counted for each."""

    nbytes: int
    on_gpu: int


def size_of(prepared: Any) -> Size:
    """What a state weighs; without torch nothing."""
    torch = sys.modules.get("torch")
    total = on_gpu = 0
    left = [prepared] if torch is not None else []
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, (list, tuple)):
            left.extend(value)
        elif isinstance(value, torch.Tensor):  # type: ignore[union-attr]
            nbytes = value.numel() * value.element_size()
            total += nbytes
            on_gpu += nbytes if value.device.type == "cuda" else 0
    return Size(total, on_gpu)


def spare_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use and torch leaves alone."""
    torch = sys.modules.get("torch")
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    return int(cores) - (torch.get_num_threads() if torch is not None else 1)


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that can still be had, of the machine and of its container; None where nothing tells."""
    room = []
    with contextlib.suppress(OSError, IndexError, ValueError):
        text = (root / "proc/meminfo").read_text()
        room.append(int(text.split("MemAvailable:")[1].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        group = root / "sys/fs/cgroup"
        limit = int((group / "memory.max").read_text())
        room.append(max(0, limit - int((group / "memory.current").read_text())))
    return min(room, default=None)
