"""A process tree seen often and cheaply: memory, processor time, bytes read and written, from /proc.

Bare system calls, for a look several times a second must cost next to nothing. `process_tree` has the same
for a single look, also where there is no /proc.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICK = os.sysconf("SC_CLK_TCK")
KIBIBYTE = 1024

PROC = "/proc"


@dataclass
class ProcessUse:
    """One process, in bytes and seconds. ``mark``: its highest RSS so far; ``waited_seconds``: processor time
    of children that it has waited for; ``read`` and ``written`` None where they may not be seen."""

    started: int
    rss: int
    mark: int
    cpu_seconds: float
    waited_seconds: float
    threads: int
    read: int | None = None
    written: int | None = None


@dataclass
class TreeLook:
    """A tree at one moment, by pid."""

    processes: dict[int, ProcessUse] = field(default_factory=dict)

    @property
    def rss(self) -> int:
        """Sum of all; pages that several share are counted for each."""
        return sum(process.rss for process in self.processes.values())


def read(path: str) -> bytes:
    """The whole of a small file of /proc. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(descriptor, 65536):
            parts.append(part)
            if len(part) < 4096:
                break
        return b"".join(parts)
    finally:
        os.close(descriptor)


def descendants(root: int, *, every_thread: bool) -> list[int]:
    """``root`` and what stems from it. Without ``every_thread`` only children of main threads are found."""
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        threads = [str(pid)]
        if every_thread:
            try:
                threads = os.listdir(f"{PROC}/{pid}/task")  # noqa: PTH208 - several times a second
            except OSError:
                continue
        for thread in threads:
            try:
                waiting += map(int, read(f"{PROC}/{pid}/task/{thread}/children").split())
            except OSError:
                continue
    return found


def look_at(pid: int, *, io: bool) -> ProcessUse | None:
    """One process now; None if it has ended, or is a zombie."""
    folder = f"{PROC}/{pid}"
    try:
        stat = read(f"{folder}/stat").rpartition(b")")[2].split()
        if stat[0] in (b"Z", b"X"):
            return None
        status = read(f"{folder}/status")
    except (OSError, IndexError):
        return None
    use = ProcessUse(
        started=int(stat[19]),
        rss=int(stat[21]) * _PAGE,
        mark=_kibibytes(status, b"VmHWM:"),
        cpu_seconds=(int(stat[11]) + int(stat[12])) / _TICK,
        waited_seconds=(int(stat[13]) + int(stat[14])) / _TICK,
        threads=int(stat[17]),
    )
    if io:
        try:
            told = dict(line.split(b": ") for line in read(f"{folder}/io").splitlines())
            use.read, use.written = int(told[b"read_bytes"]), int(told[b"write_bytes"])
        except (OSError, ValueError, KeyError):
            pass
    return use


def _kibibytes(text: bytes, name: bytes) -> int:
    at = text.find(name)
    return int(text[at + len(name) :].split(maxsplit=1)[0]) * KIBIBYTE if at >= 0 else 0


def proportional_bytes(pids: list[int]) -> int | None:
    """PSS of all: pages that several of them share are counted once; None if one of them may not be seen.

    It holds up each process for as long as it is counted, some milliseconds for a gigabyte.
    """
    total = 0
    for pid in pids:
        try:
            total += _kibibytes(read(f"{PROC}/{pid}/smaps_rollup"), b"\nPss:")
        except FileNotFoundError:
            continue  # it has ended
        except ProcessLookupError:
            continue
        except OSError:
            return None
    return total
