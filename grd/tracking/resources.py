"""What a piece of work used: CPU and wall time, the true peak of its memory, GPU memory by process.

Memory is in MiB. The peak is that of the process with all its children: pages they share count once, and a
spike of the process itself between two samples is known from the kernel's own high-water mark.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from grd.hardware.monitor import get_gpu_monitor
from grd.tracking.process_tree import (
    TreeUse,
    high_water_bytes,
    measure_tree,
    reset_high_water,
    shared_out_bytes,
    started_at,
)

MEBIBYTE = 1024**2
SAMPLE_SECONDS = 0.02
SHARED_SECONDS = 0.2
GPU_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class ResourceSnapshot:
    """A process tree at one moment; gpu_vram_mb (MiB) is None where the driver lists none of it."""

    wall_clock: float
    cpu_time_seconds: float
    rss_bytes: int
    vms_bytes: int
    gpu_vram_mb: float | None
    gpu_available: bool


@dataclass(frozen=True, kw_only=True)
class ResourceUsage:
    """What was used between two snapshots; memory in MiB. gpu_vram_used_mb is None, not 0, if unknown."""

    cpu_time_seconds: float
    wall_clock_seconds: float
    peak_memory_mb: float
    gpu_vram_used_mb: float | None
    gpu_available: bool


def _gpu_memory(pids: tuple[int, ...], gpu_index: int | None) -> tuple[float | None, bool]:
    monitor = get_gpu_monitor(mock_mode=False)
    # A card lists the processes of its MIG instances too: what is told by both counts once.
    cards: dict[int, int] = {}
    instances: dict[int, int] = {}
    for row in monitor.get_gpu_stats():
        if gpu_index is not None and row.gpu_id != gpu_index:
            continue
        found = instances if row.instance else cards
        for process in row.processes or []:
            if process["pid"] in pids and process["memory_mb"] is not None:
                found[row.gpu_id] = found.get(row.gpu_id, 0) + process["memory_mb"]
    used = [max(cards.get(gpu, 0), instances.get(gpu, 0)) for gpu in cards | instances]
    # Not listed is not 0: in a container the driver lists the host's pids.
    return (float(sum(used)) if used else None), monitor.device_count > 0


def _pid_of(process: Any) -> int:
    if process is None:
        return os.getpid()
    return int(getattr(process, "pid", process))


def _known_bytes(use: TreeUse, *, shared: bool) -> int:
    """What a tree has at least: its largest process, or with ``shared`` all of it, shared pages once."""
    largest = max(use.sizes.values())
    return max(largest, shared_out_bytes(use.pids) or 0) if shared and len(use.pids) > 1 else largest


def _snapshot(use: TreeUse, gpu_index: int | None) -> ResourceSnapshot:
    vram, available = _gpu_memory(use.pids, gpu_index)
    return ResourceSnapshot(
        wall_clock=time.monotonic(),
        cpu_time_seconds=use.cpu_seconds,
        rss_bytes=use.rss_bytes,
        vms_bytes=use.vms_bytes,
        gpu_vram_mb=vram,
        gpu_available=available,
    )


def capture_resource_snapshot(process: Any = None, gpu_index: int | None = 0) -> ResourceSnapshot:
    """A process (itself, a pid, or anything with a ``pid``) with all its descendants, now.

    ``gpu_index`` None adds up all GPUs. Raises ProcessLookupError if there is no such process.
    """
    return _snapshot(measure_tree(_pid_of(process)), gpu_index)


def calculate_resource_usage(
    start: ResourceSnapshot, end: ResourceSnapshot, peak_bytes: int | None = None
) -> ResourceUsage:
    """The difference of two snapshots. Without ``peak_bytes`` the larger of both stands, a lower bound."""
    peak = max(start.rss_bytes, end.rss_bytes) if peak_bytes is None else peak_bytes
    return ResourceUsage(
        cpu_time_seconds=max(0.0, end.cpu_time_seconds - start.cpu_time_seconds),
        wall_clock_seconds=max(0.0, end.wall_clock - start.wall_clock),
        peak_memory_mb=peak / MEBIBYTE,
        gpu_vram_used_mb=end.gpu_vram_mb,
        gpu_available=end.gpu_available,
    )


def resource_usage_to_dict(usage: ResourceUsage) -> dict[str, float | None]:
    """JSON values: seconds to the millisecond, MiB to two digits."""
    vram = usage.gpu_vram_used_mb
    return {
        "cpu_time_seconds": round(usage.cpu_time_seconds, 3),
        "wall_clock_seconds": round(usage.wall_clock_seconds, 3),
        "peak_memory_mb": round(usage.peak_memory_mb, 2),
        "gpu_vram_used_mb": None if vram is None else round(vram, 2),
    }


_active: list[ResourceTracker] = []
_marking = threading.Lock()


def _note_marks() -> None:
    """Each tracker of this process takes note of the mark before somebody starts it anew."""
    mark = high_water_bytes(os.getpid())
    for tracker in _active:
        if mark is not None and tracker.pid == os.getpid():
            tracker.note_mark(mark)


class ResourceTracker:
    """Measures what happens inside ``with`` or ``async with``; `get_usage` tells it afterwards.

    ``process``: whose tree, by default this process's. Trackers may be nested. ``start_bytes`` is its memory
    at the start, ``peak_bytes`` the most it had since then.
    """

    def __init__(self, process: Any = None, gpu_index: int | None = 0) -> None:
        self.pid = _pid_of(process)
        self.start_bytes = self.peak_bytes = 0
        self._started: float | None = None
        self._marks_before: dict[int, int] = {}
        self._gpu_index = gpu_index
        self._gpu_peak: float | None = None
        self._usage: ResourceUsage | None = None
        self._start: ResourceSnapshot | None = None
        self._last: ResourceSnapshot | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Raises ProcessLookupError if the process has ended, also if its parent has not waited for it."""
        with _marking:
            if self.pid == os.getpid():
                _note_marks()
                reset_high_water()
            _active.append(self)
        try:
            self._begin()
        except BaseException:
            self._leave()
            raise
        return self

    def _begin(self) -> None:
        self._usage, self._done = None, threading.Event()
        self._started = started_at(self.pid)
        use = measure_tree(self.pid)
        if use.sizes[self.pid] == 0:
            raise ProcessLookupError(
                f"process {self.pid} has ended and its parent has not waited for it: what memory it had is "
                "not known any more"
            )
        # A mark that was reached before this began is none of its own; only one that rises is.
        self._marks_before = dict(use.marks)
        self._start = self._last = _snapshot(use, self._gpu_index)
        self.start_bytes = self.peak_bytes = _known_bytes(use, shared=True)
        self._gpu_peak = self._start.gpu_vram_mb
        self._thread = threading.Thread(target=self._watch, name="grd-resources", daemon=True)
        self._thread.start()

    def _leave(self) -> None:
        with _marking:
            _note_marks()
            if self in _active:
                _active.remove(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        self._sample(shared=True, gpu=True)
        self._leave()
        if self._start is not None and self._last is not None:
            usage = calculate_resource_usage(self._start, self._last, self.peak_bytes)
            self._usage = ResourceUsage(**{**vars(usage), "gpu_vram_used_mb": self._gpu_peak})

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)

    def get_usage(self) -> ResourceUsage:
        """What was used. Raises RuntimeError before the end of the ``with``."""
        if self._usage is None:
            raise RuntimeError("the resource tracker has not ended yet: ask after its `with`")
        return self._usage

    def note_mark(self, mark: int) -> None:
        """Take the high-water mark of this process for the peak, if it rose since the start."""
        if mark > self._marks_before.get(self.pid, 0):
            self.peak_bytes = max(self.peak_bytes, mark)

    def _watch(self) -> None:
        shared_at = gpu_at = time.monotonic()
        while not self._done.wait(SAMPLE_SECONDS):
            now = time.monotonic()
            shared, gpu = now - shared_at >= SHARED_SECONDS, now - gpu_at >= GPU_SECONDS
            shared_at, gpu_at = (now if shared else shared_at), (now if gpu else gpu_at)
            self._sample(shared=shared, gpu=gpu)

    def _sample(self, *, shared: bool, gpu: bool) -> None:
        try:
            use = measure_tree(self.pid)
        except (OSError, ValueError):
            return  # it has ended: what was seen last stands
        if started_at(self.pid) != self._started:
            return  # its pid is another process's now
        risen = [mark for pid, mark in use.marks.items() if mark > self._marks_before.get(pid, 0)]
        self.peak_bytes = max([self.peak_bytes, _known_bytes(use, shared=shared), *risen])
        last = self._last
        if gpu or last is None:
            vram, available = _gpu_memory(use.pids, self._gpu_index)
            if vram is not None:
                self._gpu_peak = max(self._gpu_peak or 0.0, vram)
        else:
            vram, available = last.gpu_vram_mb, last.gpu_available
        self._last = ResourceSnapshot(
            wall_clock=time.monotonic(),
            cpu_time_seconds=max(use.cpu_seconds, last.cpu_time_seconds if last else 0.0),
            rss_bytes=use.rss_bytes,
            vms_bytes=use.vms_bytes,
            gpu_vram_mb=vram,
            gpu_available=available,
        )
