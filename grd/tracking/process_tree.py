"""Memory and CPU time of a process and all its descendants, from /proc; psutil where there is none."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grd.tracking import tree_walk
from grd.tracking.tree_walk import ProcessUse, SharedCount, TreeLook

KIBIBYTE = 1024

PROC = Path("/proc")
"""Where the system tells of processes; where it does not, psutil and getrusage are asked."""


def look_at_tree(root: int, before: TreeLook | None = None) -> TreeLook:
    """``root`` and its living descendants, and of the look ``before`` what lives on without being found.

    Raises ProcessLookupError if there is no process ``root``.
    """
    if (PROC / "self/stat").exists():
        look = tree_walk.look_at_tree(root, before or TreeLook(), every_thread=True, io=False)
    else:
        look = _by_psutil(root)
    if root not in look.processes and root not in look.ended:
        raise ProcessLookupError(f"there is no process {root} that may be seen")
    return look


def high_water_bytes() -> int:
    """The highest RSS of this process where there is no /proc, where it cannot be started anew.

    It is never less than that of its parent when it was forked.
    """
    # getrusage(2) counts KiB, on macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else KIBIBYTE)


def reset_high_water() -> bool:
    """Start this process's high-water mark anew from its present RSS (proc(5)); False if refused."""
    try:
        (PROC / "self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def count_shared(processes: Mapping[int, ProcessUse]) -> SharedCount | None:
    """What these have, with pages that several of them share counted once; None if one may not be seen.

    Without /proc: what each has for itself, and the most that one of them shares.
    """
    if (PROC / "self/stat").exists():
        return tree_walk.count_shared(processes)
    import psutil

    own = shared = 0
    for pid in processes:
        try:
            told = psutil.Process(pid).memory_full_info()
        except psutil.NoSuchProcess:
            continue
        except psutil.Error:
            return None
        own, shared = own + told.uss, max(shared, told.rss - told.uss)
    return SharedCount(own + shared, own + shared)


def _waited_seconds(pid: int, times: Any) -> float:
    """Of ended children: psutil does not tell on macOS, where it is known of this process's alone."""
    if pid == os.getpid():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime
    return float(getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0))


def _by_psutil(root: int) -> TreeLook:
    """Without marks but that of this process, and without what was forked and has made no exec(2)."""
    import psutil

    look = TreeLook()
    try:
        top = psutil.Process(root)
        tree = [top, *top.children(recursive=True)]
    except psutil.Error:
        return look
    for process in tree:
        try:
            memory, times, parent = process.memory_info(), process.cpu_times(), process.ppid()
            ended = process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            continue
        (look.ended if ended else look.processes)[process.pid] = ProcessUse(
            started=int(process.create_time() * 1e6),
            rss=memory.rss,
            vms=memory.vms,
            mark=high_water_bytes() if process.pid == os.getpid() else memory.rss,
            cpu_seconds=times.user + times.system,
            waited_seconds=_waited_seconds(process.pid, times),
            threads=1,
            parent=parent,
            ended=ended,
        )
    return look
