"""Memory and CPU time of a process and all its descendants, from /proc; psutil where there is none."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

KIBIBYTE = 1024
SHARING_FACTOR = 1.5
"""From a sum of RSS this much above the largest process on, forks that share pages are likely: PSS is read."""


@dataclass(frozen=True, kw_only=True)
class TreeUse:
    """A tree at one moment, in bytes and seconds. ``largest_bytes`` is the highest RSS of any one process yet."""

    pids: tuple[int, ...]
    rss_bytes: int
    vms_bytes: int
    largest_bytes: int
    cpu_seconds: float


def tree_pids(root: int) -> list[int]:
    """``root`` and its living descendants. A process that ends meanwhile is left out."""
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:
            continue
        for thread in threads:
            try:
                waiting += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text("ascii").split())
            except OSError:
                continue
    return found


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
    """Start this process's high-water mark anew from its present RSS (proc(5), clear_refs); False if refused."""
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

    rss = vms = largest = 0
    cpu, pids = 0.0, []
    top = psutil.Process(root)
    for process in [top, *top.children(recursive=True)]:
        try:
            memory, times = process.memory_info(), process.cpu_times()
        except psutil.Error:
            continue
        pids.append(process.pid)
        rss, vms, largest = rss + memory.rss, vms + memory.vms, max(largest, memory.rss)
        cpu += times.user + times.system + getattr(times, "children_user", 0.0)
        cpu += getattr(times, "children_system", 0.0)
    return TreeUse(pids=tuple(pids), rss_bytes=rss, vms_bytes=vms, largest_bytes=largest, cpu_seconds=cpu)


def measure_tree(root: int) -> TreeUse:
    """The tree of ``root`` now. Raises ProcessLookupError if it is gone, and psutil's error without /proc."""
    if not Path("/proc/self/statm").exists():
        return _by_psutil(root)
    page = os.sysconf("SC_PAGE_SIZE")
    rss = vms = largest = 0
    cpu, pids = 0.0, []
    for pid in tree_pids(root):
        try:
            sizes = Path(f"/proc/{pid}/statm").read_text("ascii").split()
            seconds = _cpu_seconds(pid)
        except (OSError, IndexError, ValueError):
            if pid == root:
                raise ProcessLookupError(f"there is no process {root}") from None
            continue
        pids.append(pid)
        vms, rss = vms + int(sizes[0]) * page, rss + int(sizes[1]) * page
        largest = max(largest, high_water_bytes(pid) or int(sizes[1]) * page)
        cpu += seconds
    return TreeUse(pids=tuple(pids), rss_bytes=rss, vms_bytes=vms, largest_bytes=largest, cpu_seconds=cpu)
