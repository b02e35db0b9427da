"""What the kernel says of a process's cgroup: memory, its peak, and how long the group was held back."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from grd.hardware.limits import cpu_folders, memory_folders


@dataclass(frozen=True)
class Group:
    """``folder``: of the cgroup that counts a process's memory, None where there is none.

    ``cpu_folders``: of those that may hold back its processor time, innermost first. A quota often stands on
    a level further up, which tells alone of what it holds back; version 1 has a hierarchy of its own for it.
    """

    folder: str | None
    cpu_folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class CgroupUse:
    """Of everything in the group, page cache included; what is not told is None.

    ``throttled_seconds``: by all levels together, each of which counts every core that it holds back.
    """

    folder: str | None
    memory_bytes: int | None = None
    peak_bytes: int | None = None
    throttled_seconds: float | None = None
    oom_kills: int | None = None
    """Processes of the group that the OOM killer has ended, ever."""


def find(pid: int, root: Path = Path("/")) -> Group | None:
    """The cgroup of ``pid``; None where there is none. Never raises."""
    with contextlib.suppress(OSError, ValueError):
        memory, cpu = memory_folders(root, pid), cpu_folders(root, pid)
        return Group(memory[0] if memory else None, tuple(cpu)) if memory or cpu else None
    return None


def look(group: Group, root: Path = Path("/")) -> CgroupUse:
    """The group now. Never raises."""
    told = [_throttled_seconds(root / folder.lstrip("/")) for folder in group.cpu_folders]
    throttled = [seconds for seconds in told if seconds is not None]
    throttled_seconds = sum(throttled) if throttled else None
    if group.folder is None:
        return CgroupUse(None, throttled_seconds=throttled_seconds)
    place = root / group.folder.lstrip("/")

    def number(*names: str) -> int | None:
        for name in names:
            with contextlib.suppress(OSError, ValueError):
                return int((place / name).read_text())
        return None

    return CgroupUse(
        group.folder,
        number("memory.current", "memory.usage_in_bytes"),
        number("memory.peak", "memory.max_usage_in_bytes"),
        throttled_seconds,
        _oom_kills(place),
    )


def _throttled_seconds(place: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        stat = dict(line.split() for line in (place / "cpu.stat").read_text().splitlines())
        for name, unit in (("throttled_usec", 1e6), ("throttled_time", 1e9)):  # versions 2 and 1
            if name in stat:
                return int(stat[name]) / unit
    return None


def _oom_kills(place: Path) -> int | None:
    for name in ("memory.events.local", "memory.events", "memory.oom_control"):
        with contextlib.suppress(OSError, ValueError):
            for line in (place / name).read_text().splitlines():
                word, _, count = line.partition(" ")
                if word == "oom_kill":
                    return int(count)
    return None
