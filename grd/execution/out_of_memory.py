"""Whether the kernel was killed for want of memory: what the OOM killer's count of its cgroup says.

Linux counts every process that its OOM killer ends in the cgroup of that process, whether a limit there, one
above or the whole machine was out of memory: ``oom_kill`` in memory.events.local (v2) and memory.oom_control
(v1). The count has no pids. It is evidence if it rose when the kernel died and nobody but the run was in that
cgroup. Killers that are programs themselves (earlyoom, systemd-oomd) are not counted.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import psutil

from grd.hardware.limits import MEBIBYTE, memory_folders, memory_limits
from grd.runs import processes

CONFIRMED, SUSPECTED = "confirmed", "suspected"

LOOK_SECONDS = 1.0
PF_EXITING = 0x4
"""In the flags of /proc/PID/stat (linux/sched.h): the process is on its way out."""


@dataclass(frozen=True)
class Look:
    """The kernel's memory cgroup at one moment."""

    folder: str
    kills: int
    """Processes of this cgroup that the OOM killer has ended since the cgroup was made."""
    strangers: int = 0
    """Processes in it that do not belong to the run."""


@dataclass(frozen=True)
class Verdict:
    """``oom`` is confirmed, suspected, or None where something else killed; ``detail`` says why."""

    oom: str | None
    detail: str


def decide(before: Look | None, after: Look | None, memory: str = "") -> Verdict:
    """What the looks before and after a death by SIGKILL say; ``memory`` tells limit and peak."""
    if before is None or after is None:
        return Verdict(SUSPECTED, "whether for want of memory cannot be seen here")
    if after.kills <= before.kills:
        return Verdict(None, "not by the system's OOM killer")
    if before.strangers or after.strangers:
        at_work = f"the OOM killer was at work in cgroup {after.folder}, which other processes share"
        return Verdict(SUSPECTED, at_work + memory)
    return Verdict(CONFIRMED, f"the OOM killer ended the kernel, in cgroup {after.folder}{memory}")


# --- reading ------------------------------------------------------------------------------------------------


def find_folder(folders: list[str], pid: int, root: Path = Path("/")) -> str | None:
    """Which of these cgroups, innermost first, counts the end of ``pid``; None where none says so."""
    for folder in folders:
        if read_kills(folder, root) is not None:
            # Where the mount does not show the process's own cgroup, the count would be another one's.
            return folder if pid in members(folder, root) else None
    return None


def read_kills(folder: str, root: Path = Path("/")) -> int | None:
    """The OOM killer's count of this cgroup; None where the system does not keep one."""
    for name in ("memory.events.local", "memory.events", "memory.oom_control"):
        with contextlib.suppress(OSError):
            for line in (root / folder.lstrip("/") / name).read_text().splitlines():
                words = line.split()
                if len(words) == 2 and words[0] == "oom_kill" and words[1].isdecimal():
                    return int(words[1])
    return None


def members(folder: str, root: Path = Path("/")) -> set[int]:
    """The processes that this cgroup counts; 0 stands for those of other pid namespaces."""
    place = root / folder.lstrip("/")
    lists = [place / "cgroup.procs"]
    if not (place / "memory.oom_control").exists():
        # v2: a cgroup below that does not count memory by itself is counted here
        lists += place.rglob("*/cgroup.procs")
    found: set[int] = set()
    for path in lists:
        with contextlib.suppress(OSError, ValueError):
            found |= {int(word) for word in path.read_text().split()}
    return found


def describe_memory(folders: list[str], root: Path = Path("/")) -> str:
    """The tightest limit that stands in these cgroups and the peak against it, to append to a sentence."""
    for limit in memory_limits(folders, root):
        if "memory.high" in limit.source:
            continue  # nobody is killed for that one
        folder = PurePosixPath(limit.source.removeprefix("cgroup ")).parent
        whose = "its limit" if str(folder) == folders[0] else f"the limit of {folder}"
        words = f"; {whose} is {limit.limit / MEBIBYTE:.0f} MiB"
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                peak = int((root / str(folder).lstrip("/") / name).read_text())
                return f"{words}, its peak was {peak / MEBIBYTE:.0f} MiB"
        return words
    return ""


def count_strangers(pids: set[int], marker: str) -> int:
    """How many of these are not the runner, an ancestor or descendant of it, and carry no ``NAME=value``."""
    here = psutil.Process()
    ours = {here.pid, *processes.carrying(marker)}
    with contextlib.suppress(psutil.Error):
        ours |= {process.pid for process in (*here.parents(), *here.children(recursive=True))}
    return sum(pid == 0 or processes.start_time(pid) is not None for pid in pids - ours)


def goes_on(pid: int, started: float | None) -> bool:
    """Whether the process lives and is not being killed: a big one takes seconds to give back memory."""
    if started is None or processes.start_time(pid) != started:
        return False
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        pending = 0
        for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
            if line.startswith(("SigPnd:", "ShdPnd:")):
                pending |= int(line.split()[1], 16)
    except (OSError, IndexError, ValueError):
        return False
    return not int(stat[6]) & PF_EXITING and not pending & 1 << (signal.SIGKILL - 1)


# --- the watch ----------------------------------------------------------------------------------------------


class OomWatch:
    """Knows the count of a kernel's cgroup from shortly before the kernel's death.

    ``marker`` is the ``NAME=value`` that the run's processes carry. A thread looks once a second: an older
    rise was the end of somebody else, such as a child of the kernel, and no evidence of anything.
    """

    def __init__(self, pid: int, marker: str) -> None:
        self._pid, self._marker = pid, marker
        self._started = processes.start_time(pid)
        self._over = threading.Event()
        self._folders: list[str] = []
        self._before: Look | None = None
        with contextlib.suppress(OSError):
            self._folders = memory_folders(process=pid)
        folder = find_folder(self._folders, pid)
        if folder is not None:
            self._before = self._look(folder)
        if self._before is not None:
            threading.Thread(target=self._keep_up, args=(self._before,), name="grd-oom", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._over.set()

    def verdict(self) -> Verdict:
        """What is known, now that the kernel was killed by SIGKILL."""
        self.close()
        before = self._before
        after = None if before is None else self._look(before.folder)
        return decide(before, after, describe_memory(self._folders))

    def _look(self, folder: str) -> Look | None:
        kills = read_kills(folder)
        return None if kills is None else Look(folder, kills, count_strangers(members(folder), self._marker))

    def _keep_up(self, first: Look) -> None:
        seen: int | None = first.kills
        while not self._over.wait(LOOK_SECONDS):
            if not goes_on(self._pid, self._started):
                return
            if seen is not None:
                self._before = replace(first, kills=seen)  # outlived by a whole look
            seen = read_kills(first.folder)
