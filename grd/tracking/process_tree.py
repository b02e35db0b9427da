"""Memory and CPU time of a process and all its descendants, from /proc; psutil where there is none."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

KIBIBYTE = 1024


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
            threads = [folder.name for folder in Path(f"/proc/{pid}/task").iterdir()]
        except OSError:
            continue
        for thread in threads:
            try:
                waiting += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text("ascii").split())
            except OSError:
                continue
    return found


def started_at(pid: int) -> float | None:
    """When ``pid`` was started, in a unit of the system's; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return float(stat[19])
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def high_water_bytes(pid: int) -> int | None:
    """The highest RSS of one process since its start, or since `reset_high_water`; None if unknown."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text("utf-8", "replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * KIBIBYTE
    except (OSError, ValueError, IndexError):
        pass
    return None


def reset_high_water() -> bool:
    """Start this process's high-water mark anew from its present RSS (proc(5)); False if refused."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def shared_out_bytes(pids: tuple[int, ...]) -> int | None:
    """PSS of all: pages that several of them share are counted once. None if any cannot be read."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii", "replace")
        except FileNotFoundError:
            continue  # it has ended
        except OSError:
            return None
        total += next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0)
    return total * KIBIBYTE


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process and of the children it has waited for."""
    stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    return sum(int(ticks) for ticks in stat[11:15]) / os.sysconf("SC_CLK_TCK")


def _by_psutil(root: int) -> TreeUse:
    import psutil

    rss = vms = 0
    cpu = 0.0
    sizes: dict[int, int] = {}
    marks: dict[int, int] = {}
    top = psutil.Process(root)
    for process in [top, *top.children(recursive=True)]:
        try:
            memory, times = process.memory_info(), process.cpu_times()
        except psutil.Error:
            continue
        sizes[process.pid] = memory.rss
        rss, vms = rss + memory.rss, vms + memory.vms
        cpu += times.user + times.system + getattr(times, "children_user", 0.0)
        cpu += getattr(times, "children_system", 0.0)
    return TreeUse(pids=tuple(sizes), rss_bytes=rss, vms_bytes=vms, sizes=sizes, marks=marks, cpu_seconds=cpu)


def measure_tree(root: int) -> TreeUse:
    """The tree of ``root`` now. Raises ProcessLookupError if it is gone, and psutil's error without /proc."""
    if not Path("/proc/self/statm").exists():
        return _by_psutil(root)
    page = os.sysconf("SC_PAGE_SIZE")
    rss = vms = 0
    cpu = 0.0
    sizes: dict[int, int] = {}
    marks: dict[int, int] = {}
    for pid in tree_pids(root):
        try:
            told = Path(f"/proc/{pid}/statm").read_text("ascii").split()
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
