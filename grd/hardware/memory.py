"""Memory: the machine's, the limit on this process, and the shared memory that data loaders work through."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from grd.hardware.facts import Facts, describe
from grd.hardware.limits import Limits

GIBIBYTE = 1024**3

_NOT_TOLD = "the platform does not tell"


def _gib(number_of_bytes: float | None) -> float | None:
    return None if number_of_bytes is None else number_of_bytes / GIBIBYTE


def _swap_total() -> float | None:
    import psutil

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # psutil warns where /proc/vmstat is missing
        return _gib(psutil.swap_memory().total)


def _huge_pages(root: Path) -> float | None:
    told = {}
    for line in (root / "proc/meminfo").read_text("ascii", "replace").splitlines():
        words = line.split()
        if len(words) >= 2 and words[1].isdecimal():
            told[words[0]] = int(words[1])
    if "HugePages_Total:" not in told:
        return None
    return _gib(told["HugePages_Total:"] * told.get("Hugepagesize:", 0) * 1024)


def memory_facts(limits: Limits, root: Path = Path("/")) -> Facts:
    """total_gb, available_gb, limit_gb, limit_source, swap_total_gb, huge_pages_gb, shm_gb, shm_free_gb.

    In GiB. total_gb is the machine's; limit_gb the tightest limit below it; available_gb what this process
    can still get under both. Swap of 0 is a machine without swap. shm is /dev/shm: workers of a DataLoader
    die where it is small, as the 64 MiB of a container by default are. Never raises.
    """
    facts = Facts()
    try:
        import psutil

        memory = psutil.virtual_memory()
        total, available = int(memory.total), int(memory.available)
    except Exception as error:
        total, available, unknown = None, None, f"psutil: {describe(error)}"
    else:
        unknown = _NOT_TOLD
    facts.put("total_gb", _gib(total or None), unknown)
    facts.put(
        "available_gb", _gib(None if available is None else limits.memory_available(available)), unknown
    )
    limit = limits.memory_limit(total)
    unlimited = "no limit below the machine's memory was found"
    if limits.unreadable:
        unlimited = f"not every limit could be read: {', '.join(limits.unreadable[:3])}"
    facts.put("limit_gb", _gib(limit.limit) if limit else None, unlimited)
    facts.put("limit_source", limit.source if limit else None, unlimited)
    facts.ask("swap_total_gb", _swap_total, _NOT_TOLD)
    facts.ask("huge_pages_gb", lambda: _huge_pages(root), _NOT_TOLD)
    shared = root / "dev/shm"
    facts.ask("shm_gb", lambda: _size(shared)[0], _NOT_TOLD)
    facts.ask("shm_free_gb", lambda: _size(shared)[1], _NOT_TOLD)
    return facts


def _size(folder: Path) -> tuple[float, float]:
    usage = os.statvfs(folder)
    return usage.f_blocks * usage.f_frsize / GIBIBYTE, usage.f_bavail * usage.f_frsize / GIBIBYTE
