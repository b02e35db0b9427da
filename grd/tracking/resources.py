"""What a piece of work used: CPU and wall time, the true peak of its memory, GPU memory by process.

Memory is in MiB. The peak is that of the process with all its children: pages they share count once, and
what one of them had between two looks, 20 ms apart, is known from the kernel's own high-water marks. Of
several that had more between the same two looks one is counted with it: nobody knows whether it was at the
same time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Container
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from grd.hardware.monitor import get_gpu_monitor
from grd.tracking.peaks import Accumulator
from grd.tracking.process_tree import look_at_tree, reset_high_water
from grd.tracking.shared_pages import SharedPages
from grd.tracking.spikes import MarksFromNowOn
from grd.tracking.tree_walk import TreeLook

MEBIBYTE = 1024**2
SAMPLE_SECONDS = 0.02
SHARED_SECONDS = 0.2
SHARED_REST = 3.0
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


def _gpu_memory(pids: Container[int], gpu_index: int | None) -> tuple[float | None, bool]:
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


def _snapshot(look: TreeLook, gpu: tuple[float | None, bool]) -> ResourceSnapshot:
    everyone = (look.processes | look.ended).values()
    return ResourceSnapshot(
        wall_clock=time.monotonic(),
        cpu_time_seconds=sum(process.cpu_seconds + process.waited_seconds for process in everyone),
        rss_bytes=look.rss,
        vms_bytes=sum(process.vms for process in look.processes.values()),
        gpu_vram_mb=gpu[0],
        gpu_available=gpu[1],
    )


def capture_resource_snapshot(process: Any = None, gpu_index: int | None = 0) -> ResourceSnapshot:
    """A process (itself, a pid, or anything with a ``pid``) with all its descendants, now.

    ``gpu_index`` None adds up all GPUs. Raises ProcessLookupError if there is no such process.
    """
    look = look_at_tree(_pid_of(process))
    return _snapshot(look, _gpu_memory(look.processes, gpu_index))


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


class ResourceTracker:
    """Measures what happens inside ``with`` or ``async with``; `get_usage` tells it afterwards.

    ``process``: whose tree, by default this process's. Trackers may be nested. ``start_bytes`` is its memory
    at the start, ``peak_bytes`` the most it had since then.
    """

    def __init__(self, process: Any = None, gpu_index: int | None = 0) -> None:
        self.pid = _pid_of(process)
        self.start_bytes = self.peak_bytes = 0
        self._gpu_index = gpu_index
        self._usage: ResourceUsage | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Raises ProcessLookupError if the process has ended, also if its parent has not waited for it."""
        with _marking:
            if self.pid == os.getpid():
                for tracker in _active:
                    if tracker.pid == self.pid:
                        tracker.look()  # at the mark, before it is started anew
                reset_high_water()
            self._begin()
            _active.append(self)
        try:
            self._thread = threading.Thread(target=self._watch, name="grd-resources", daemon=True)
            self._thread.start()
        except BaseException:
            self._leave()
            raise
        return self

    def _begin(self) -> None:
        self._usage, self._thread, self._done = None, None, threading.Event()
        look = look_at_tree(self.pid)
        if self.pid not in look.processes:
            raise ProcessLookupError(
                f"process {self.pid} has ended and its parent has not waited for it: what memory it had is "
                "not known any more"
            )
        self._accumulator = Accumulator()
        self._shared = SharedPages(SHARED_SECONDS, rest=SHARED_REST)
        self._marks = MarksFromNowOn(look)
        self._first = self._last = look
        self._gpu = _gpu_memory(look.processes, self._gpu_index)
        self._gpu_peak = self._gpu[0]
        self._next_gpu = time.monotonic() + GPU_SECONDS
        self._start = self._end = _snapshot(look, self._gpu)
        self._shared.take(self._accumulator, self._marks.of(look), time.monotonic())
        self.start_bytes = self.peak_bytes = self._accumulator.totals.peak_bytes

    def _leave(self) -> None:
        with _marking:
            if self in _active:
                _active.remove(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        self.look(gpu=True)
        self._leave()
        usage = calculate_resource_usage(self._start, self._end, self.peak_bytes)
        self._usage = replace(
            usage,
            cpu_time_seconds=max(0.0, self._accumulator.totals.cpu_seconds - self._start.cpu_time_seconds),
            gpu_vram_used_mb=self._gpu_peak,
        )

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

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.look()

    def look(self, *, gpu: bool = False) -> None:
        """Take into account what the tree has now; ``gpu``: what it has of GPUs too, else that seldom."""
        with self._lock:
            now = time.monotonic()
            try:
                look = look_at_tree(self.pid, self._last)
            except (OSError, ValueError):
                return  # it has ended: what was seen last stands
            if _started(look, self.pid) != _started(self._first, self.pid):
                return  # its pid is another process's now
            self._last = look
            self._shared.take(self._accumulator, self._marks.of(look), now)
            self.peak_bytes = self._accumulator.totals.peak_bytes
            if gpu or now >= self._next_gpu:
                self._next_gpu = now + GPU_SECONDS
                self._gpu = _gpu_memory(look.processes, self._gpu_index)
                if self._gpu[0] is not None:
                    self._gpu_peak = max(self._gpu_peak or 0.0, self._gpu[0])
            self._end = _snapshot(look, self._gpu)


def _started(look: TreeLook, pid: int) -> int:
    return (look.processes | look.ended)[pid].started
