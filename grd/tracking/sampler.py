"""Samples what the kernel of an attempt and everything it started use, from the runner, while it runs."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from grd.files import JsonLines
from grd.hardware.monitor import get_gpu_monitor
from grd.tracking import cgroup_use, tree_walk
from grd.tracking.gpu_use import GpuUse
from grd.tracking.host_use import HostUse
from grd.tracking.peaks import Accumulator
from grd.tracking.shared_pages import SharedPages
from grd.tracking.tree_walk import TreeLook, look_at_tree

SAMPLE_SECONDS = 0.25
THOROUGH_EVERY = 4
"""Each so many looks: children of all threads, bytes read and written."""

SHARED_SECONDS = 5.0

GPU_SECONDS = 2.0
LINE_SECONDS = 1.0
LINES_BEFORE_SLOWER = 3600
"""An hour of lines a second; then each line stands for twice the time, and so on."""

TURN_SECONDS = 5.0

KEEPERS = ("guardian", "watcher")


class ResourceSampler:
    """A thread that looks four times a second; a line goes to ``path`` each second, later more seldom.

    ``on_warning`` gets a text where a GPU is not made use of. Where there is no /proc nothing is sampled.
    """

    def __init__(self, path: Path, on_warning: Callable[[str], object] | None = None) -> None:
        self._path = path
        self._on_warning = on_warning
        self._accumulator = Accumulator()
        self._shared_pages = SharedPages(SHARED_SECONDS)
        self._gpus = GpuUse()
        self._host = HostUse()
        self._gpu_rows: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._root: int | None = None
        self._last_look = TreeLook()
        self._cgroup: cgroup_use.Group | None = None
        self._throttled_before: float | None = None
        self._cgroup_now: cgroup_use.CgroupUse | None = None
        self._began = time.monotonic()
        self._lines: JsonLines | None = None
        self._written = self._looks = 0
        self._failed = False
        self._line_seconds = LINE_SECONDS
        self._next_line = self._next_gpu = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="grd-resources", daemon=True)

    def start(self) -> None:
        """Begin; what is looked at is told by `watch`."""
        if Path(tree_walk.PROC, "self/stat").exists():
            self._thread.start()

    def watch(self, processes: Mapping[str, Mapping[str, Any]]) -> None:
        """Look at the tree of these processes (kernel, guardian, watcher) from now on; at none if empty."""
        with self._turn() as has_turn:
            if not has_turn:
                return
            if not processes:
                self._look(time.monotonic(), last=True)
                self._root = None
                return
            pids = {name: int(identity["pid"]) for name, identity in processes.items() if identity}
            keepers = frozenset(pid for name, pid in pids.items() if name in KEEPERS)
            root = pids.get("guardian", pids.get("kernel"))
            self._accumulator.begin_tree(keepers)
            self._root, self._last_look = root, TreeLook()
            self._cgroup = cgroup_use.find(pids.get("kernel", root or os.getpid()))
            self._look(time.monotonic(), last=True)

    def close(self) -> None:
        """Take a last look, write the last line, and end."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(TURN_SECONDS)
        with self._turn() as has_turn:
            if has_turn and self.summary() is not None:
                self._write(time.monotonic())
                if self._lines is not None:
                    self._lines.close()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[bool]:
        """Whether nothing else looks now: a look may hang in a driver, and the run must not wait for that."""
        has_turn = self._lock.acquire(timeout=TURN_SECONDS)
        try:
            yield has_turn
        finally:
            if has_turn:
                self._lock.release()

    def _go_on(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            try:
                with self._lock:
                    self._look(time.monotonic())
            except Exception as error:  # nothing that it finds may harm the run
                if not self._failed and self._on_warning is not None:
                    self._on_warning(f"what the run uses is not all known: {type(error).__name__}: {error}")
                self._failed = True

    def _look(self, now: float, *, last: bool = False) -> None:
        if self._root is None:
            return
        self._looks += 1
        thorough = last or self._looks % THOROUGH_EVERY == 1
        look = self._last_look = look_at_tree(self._root, self._last_look, every_thread=thorough, io=thorough)
        if not look.processes:
            return
        self._shared_pages.take(self._accumulator, look, now)
        if now >= self._next_gpu:
            self._next_gpu = now + GPU_SECONDS
            self._look_at_gpus(now, set(look.processes))
        if now >= self._next_line or last:
            self._write(now)

    def _look_at_gpus(self, now: float, pids: set[int]) -> None:
        monitor = get_gpu_monitor(mock_mode=False)
        if monitor.device_count == 0:
            self._next_gpu = float("inf")  # none will come while this runs
            return
        self._gpu_rows = self._gpus.take(now, monitor.get_gpu_stats(), pids)
        for warning in self._gpus.warnings(now):
            if self._on_warning is not None:
                self._on_warning(warning)

    def _write(self, now: float) -> None:
        self._next_line = now + self._line_seconds
        if self._cgroup is not None:
            self._cgroup_now = cgroup_use.look(self._cgroup)
            if self._throttled_before is None:
                self._throttled_before = self._cgroup_now.throttled_seconds
        with contextlib.suppress(OSError, ValueError):  # a full disk: the run's end is more important
            if self._lines is None:
                self._lines = JsonLines(self._path)
            now_only = {"gpu_now": self._gpu_rows, "host": self._host.look()}
            self._lines.append({"t": time.time(), **(self.summary(now) or {}), **now_only})
            self._written += 1
            if self._written % LINES_BEFORE_SLOWER == 0:
                self._line_seconds *= 2

    def summary(self, now: float | None = None) -> dict[str, Any] | None:
        """All that is known up to now, memory in bytes; None where no look has seen anything."""
        totals = self._accumulator.totals
        if totals.most_processes == 0:
            return None
        seconds = (time.monotonic() if now is None else now) - self._began
        cgroup = self._cgroup_now
        throttled = None
        if cgroup is not None and cgroup.throttled_seconds is not None and self._throttled_before is not None:
            throttled = round(cgroup.throttled_seconds - self._throttled_before, 3)
        return {
            "seconds": round(seconds, 3),
            "peak_memory_bytes": totals.peak_bytes or None,
            "peak_source": totals.peak_source if totals.peak_bytes else None,
            "rss_bytes": totals.rss_bytes,
            "pss_bytes": totals.pss_bytes,
            "processes": totals.processes,
            "most_processes": totals.most_processes,
            "threads": totals.threads,
            "cpu_seconds": round(totals.cpu_seconds, 2),
            "mean_cores": round(totals.cpu_seconds / seconds, 3) if seconds > 0 else None,
            "read_bytes": totals.read_bytes,
            "written_bytes": totals.written_bytes,
            "throttled_seconds": throttled,
            "cgroup": None if cgroup is None else cgroup.folder,
            "cgroup_memory_bytes": None if cgroup is None else cgroup.memory_bytes,
            "cgroup_peak_bytes": None if cgroup is None else cgroup.peak_bytes,
            "cgroup_oom_kills": None if cgroup is None else cgroup.oom_kills,
            "gpus": self._gpus.summary(),
        }
