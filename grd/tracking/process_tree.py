"""Memory and CPU time of a process and all its descendants, from /proc; psutil where there is none."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KIBIBYTE = 1024

PROC = Path("/proc")
"""Where the system tells of processes; where it does not, psutil and getrusage are asked."""


@dataclass(frozen=True, kw_only=True)
class TreeUse:
    """A tree at one moment, in bytes and seconds.

    ``sizes``: RSS by pid; ``marks``: the highest RSS by pid since its start or the last `reset_high_water`.
    """

    pids: tuple[int, ...]
    rss_bytes: int
    vms_bytes: int
    sizes: dict[int, int]
    marks: dict[int, int]
    cpu_seconds: float


def tree_pids(root: int) -> list[int]:
    """``root`` and its living descendants. A process that ends meanwhile is left out."""
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        try:
            threads = [folder.name for folder in (PROC / f"{pid}/task").iterdir()]
        except OSError:
            continue
        for thread in threads:
            try:
                waiting += map(int, (PROC / f"{pid}/task/{thread}/children").read_text("ascii").split())
            except OSError:
                continue
    return found


def started_at(pid: int) -> float | None:
    """When ``pid`` was started, in a unit of the system's; None if there is no such process."""
    try:
        stat = (PROC / f"{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return float(stat[19])
    except (OSError, IndexError):
        if (PROC / "self/stat").exists():
            return None
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def high_water_bytes(pid: int) -> int | None:
    """The highest RSS of one process since its start, or since `reset_high_water`; None if unknown.

    Without /proc it is known of this process alone, and is then never less than that of its parent when it
    was forked.
    """
    try:
        for line in (PROC / f"{pid}/status").read_text("utf-8", "replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * KIBIBYTE
    except (OSError, ValueError, IndexError):
        pass
    if pid != os.getpid() or (PROC / "self/status").exists():
        return None
    # getrusage(2) counts KiB, on macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else KIBIBYTE)


def reset_high_water() -> bool:
    """Start this process's high-water mark anew from its present RSS (proc(5)); False if refused."""
    try:
        (PROC / "self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def shared_out_bytes(pids: tuple[int, ...]) -> int | None:
    """PSS of all: pages that several of them share are counted once. None if any cannot be read.

    Without /proc: what each has for itself, and the most that one of them shares.
    """
    if not (PROC / "self/stat").exists():
        return _shared_out_by_psutil(pids)
    total = 0
    for pid in pids:
        try:
            text = (PROC / f"{pid}/smaps_rollup").read_text("ascii", "replace")
        except FileNotFoundError:
            continue  # it has ended
        except OSError:
            return None
        total += next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0)
    return total * KIBIBYTE


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process and of the children it has waited for."""
    stat = (PROC / f"{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    return sum(int(ticks) for ticks in stat[11:15]) / os.sysconf("SC_CLK_TCK")


def _shared_out_by_psutil(pids: tuple[int, ...]) -> int | None:
    import psutil

    own = shared = 0
    for pid in pids:
        try:
            told = psutil.Process(pid).memory_full_info()
        except psutil.NoSuchProcess:
            continue
        except psutil.Error:
            return None
        own, shared = own + told.uss, max(shared, told.rss - told.uss)
    return own + shared


def _waited_seconds(pid: int, times: Any) -> float:
    """Of ended children: psutil does not tell on macOS, where it is known of this process's alone."""
    if pid == os.getpid():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime
    return float(getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0))


def _by_psutil(root: int) -> TreeUse:
    import psutil

    rss = vms = 0
    cpu = 0.0
    sizes: dict[int, int] = {}
    marks: dict[int, int] = {}
    try:
        top = psutil.Process(root)
        tree = [top, *top.children(recursive=True)]
    except psutil.Error:
        raise ProcessLookupError(f"there is no process {root} that may be seen") from None
    for process in tree:
        try:
            memory, times = process.memory_info(), process.cpu_times()
        except psutil.Error:
            continue
        sizes[process.pid] = memory.rss
        mark = high_water_bytes(process.pid)
        if mark is not None:
            marks[process.pid] = mark
        rss, vms = rss + memory.rss, vms + memory.vms
        cpu += times.user + times.system + _waited_seconds(process.pid, times)
    if root not in sizes:
        raise ProcessLookupError(f"there is no process {root} that may be seen")
    return TreeUse(pids=tuple(sizes), rss_bytes=rss, vms_bytes=vms, sizes=sizes, marks=marks, cpu_seconds=cpu)


def measure_tree(root: int) -> TreeUse:
    """The tree of ``root`` now. Raises ProcessLookupError if it is gone."""
    if not (PROC / "self/statm").exists():
        return _by_psutil(root)
    page = os.sysconf("SC_PAGE_SIZE")
    rss = vms = 0
    cpu = 0.0
    sizes: dict[int, int] = {}
    marks: dict[int, int] = {}
    for pid in tree_pids(root):
        try:
            told = (PROC / f"{pid}/statm").read_text("ascii").split()
            seconds = _cpu_seconds(pid)
        except (OSError, IndexError, ValueError):
            if pid == root:
                raise ProcessLookupError(f"there is no process {root}") from None
            continue
        sizes[pid] = int(told[1]) * page
        vms, rss = vms + int(told[0]) * page, rss + sizes[pid]
        mark = high_water_bytes(pid)
        if mark is not None:
            marks[pid] = mark
        cpu += seconds
    return TreeUse(pids=tuple(sizes), rss_bytes=rss, vms_bytes=vms, sizes=sizes, marks=marks, cpu_seconds=cpu)
