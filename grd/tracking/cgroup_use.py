"""What the kernel says of a process's cgroup: memory, its peak, and how long the group was held back."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from grd.hardware.limits import memory_folders


@dataclass(frozen=True)
class CgroupUse:
    """Of everything in the group, page cache included; what is not told is None."""

    folder: str
    memory_bytes: int | None = None
    peak_bytes: int | None = None
    throttled_seconds: float | None = None
    oom_kills: int | None = None
    """Processes of the group that the OOM killer has ended, ever."""


def find(pid: int, root: Path = Path("/")) -> str | None:
    """The folder of the cgroup that counts the memory of ``pid``; None where there is none."""
    with contextlib.suppress(OSError, ValueError):
        folders = memory_folders(root, pid)
        return folders[0] if folders else None
    return None


def look(folder: str, root: Path = Path("/")) -> CgroupUse:
    """The group now. Never raises."""
    place = root / folder.lstrip("/")

    def number(*names: str) -> int | None:
        for name in names:
            with contextlib.suppress(OSError, ValueError):
                return int((place / name).read_text())
        return None

    throttled = None
    with contextlib.suppress(OSError, ValueError, IndexError):
        stat = dict(line.split() for line in (place / "cpu.stat").read_text().splitlines())
        if "throttled_usec" in stat:
            throttled = int(stat["throttled_usec"]) / 1e6
        elif "throttled_time" in stat:  # version 1, in nanoseconds
            throttled = int(stat["throttled_time"]) / 1e9
    return CgroupUse(
        folder,
        number("memory.current", "memory.usage_in_bytes"),
        number("memory.peak", "memory.max_usage_in_bytes"),
        throttled,
        _oom_kills(place),
    )


def _oom_kills(place: Path) -> int | None:
    for name in ("memory.events.local", "memory.events", "memory.oom_control"):
        with contextlib.suppress(OSError, ValueError):
            for line in (place / name).read_text().splitlines():
                word, _, count = line.partition(" ")
                if word == "oom_kill":
                    return int(count)
    return None
