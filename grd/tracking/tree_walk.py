"""A process tree seen often and cheaply: memory, processor time, bytes read and written, from /proc.

Bare system calls, for a look several times a second must cost next to nothing. `process_tree` has the same
also where there is no /proc.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICK = os.sysconf("SC_CLK_TCK")
KIBIBYTE = 1024

PROC = "/proc"

_FORKED = 0x40
"""PF_FORKNOEXEC of the flags in /proc/PID/stat (include/linux/sched.h)."""


@dataclass
class ProcessUse:
    """One process, in bytes and seconds. ``mark``: its highest RSS so far; ``waited_seconds``: processor time
    of children that it has waited for; ``read`` and ``written`` None where they may not be seen.

    ``forked``: it has made no exec(2) since its start, so that its mark began as its parent's RSS.
    ``ended``: it is a zombie, of which nothing is left but its times.
    """

    started: int
    rss: int
    mark: int
    cpu_seconds: float
    waited_seconds: float
    threads: int
    read: int | None = None
    written: int | None = None
    parent: int = 0
    vms: int = 0
    forked: bool = False
    ended: bool = False
    faults: int = 0
    """Page faults so far: without one more no page was added."""
    shareable: int = 0
    """Of its ``rss`` files and shared memory, when its mark was last read; others may have the same."""
    given_back: int = 0
    """Of those what it had at the look, and no longer when it was counted."""


@dataclass
class TreeLook:
    """A tree at one moment, by pid; ``ended`` are the zombies in it."""

    processes: dict[int, ProcessUse] = field(default_factory=dict)
    ended: dict[int, ProcessUse] = field(default_factory=dict)

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


def look_at_tree(root: int, before: TreeLook, *, every_thread: bool, io: bool) -> TreeLook:
    """``root`` and what stems from it, and of the look ``before`` what lives on without being found.

    ``every_thread``: also the children of other threads than the main one; ``io``: bytes read and written.
    """
    found = TreeLook()
    stemming = dict.fromkeys(descendants(root, every_thread=every_thread))
    known = before.processes | before.ended
    for pid in stemming | dict.fromkeys(known):
        process = look_at(pid, io=io, before=before.processes.get(pid))
        if process is None or (pid not in stemming and process.started != known[pid].started):
            continue
        (found.ended if process.ended else found.processes)[pid] = process
    return found


def look_at(pid: int, *, io: bool, before: ProcessUse | None = None) -> ProcessUse | None:
    """One process now, a zombie too; None if there is none.

    Its mark, which takes longest to read, is as ``before`` where it has had no page fault since.
    """
    folder = f"{PROC}/{pid}"
    try:
        stat = read(f"{folder}/stat").rpartition(b")")[2].split()
        use = ProcessUse(
            started=int(stat[19]),
            rss=int(stat[21]) * _PAGE,
            mark=0,
            cpu_seconds=(int(stat[11]) + int(stat[12])) / _TICK,
            waited_seconds=(int(stat[13]) + int(stat[14])) / _TICK,
            threads=int(stat[17]),
            parent=int(stat[1]),
            vms=int(stat[20]),
            forked=bool(int(stat[6]) & _FORKED),
            ended=stat[0] in (b"Z", b"X"),
            faults=int(stat[7]) + int(stat[9]),
        )
        if use.ended:
            return use
        same = before is not None and (before.started, before.faults) == (use.started, use.faults)
        if before is not None and same and not io:
            use.mark, use.shareable = before.mark, before.shareable
        else:
            status = read(f"{folder}/status")
            use.mark = _kibibytes(status, b"VmHWM:")
            use.shareable = _kibibytes(status, b"RssFile:") + _kibibytes(status, b"RssShmem:")
    except (OSError, IndexError):
        return None
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


@dataclass(frozen=True)
class SharedCount:
    """Of several processes together, in bytes.

    ``pss``: the sum of their PSS, which is less where others than these have the same pages. ``once``: what
    they have at least, with each page counted once; it may be more by up to ``unsure``, which they came to
    share while they were counted.
    """

    pss: int
    once: int
    unsure: int = 0


def count_shared(processes: Mapping[int, ProcessUse]) -> SharedCount | None:
    """What these have, with pages that several of them share counted once; None if one may not be seen.

    It holds up each process for as long as it is counted, some milliseconds for a gigabyte. Their ``rss``
    becomes what they had meanwhile, 0 where one has ended, so that both figures are of the same moment.

    Of anonymous and shared memory PSS is right, for only these have it. Files are libraries mostly, which any
    process of the machine may have too: of them the most that one of these has stands, if that is more.
    """
    files_and_shared = {pid: _files_and_shared(pid) for pid in processes}
    texts: dict[int, bytes] = {}
    pss = anonymous = shared = files = grown = 0
    for pid, process in processes.items():
        try:
            text = texts[pid] = read(f"{PROC}/{pid}/smaps_rollup")
        except (FileNotFoundError, ProcessLookupError):
            text = texts[pid] = b""
        except OSError:
            return None
        process.rss = _kibibytes(text, b"\nRss:")
        had, process.shareable = process.shareable, process.rss - _kibibytes(text, b"\nAnonymous:")
        process.given_back = max(0, had - process.shareable)
        if process.forked and text == texts.get(process.parent):
            continue  # after vfork(2), until its exec(2), it has not its parent's pages too, but its memory
        pss += _kibibytes(text, b"\nPss:")
        anonymous += _kibibytes(text, b"\nPss_Anon:")
        shared += _kibibytes(text, b"\nPss_Shmem:")
        files += _kibibytes(text, b"\nPss_File:")
        grown += max(0, process.shareable - sum(files_and_shared[pid]))
    if pss > 0 and anonymous + shared + files == 0:
        return SharedCount(pss, pss)  # Linux < 5.4 does not tell them apart
    most_files = max((of_files for of_files, _ in files_and_shared.values()), default=0)
    most_shared = max((of_shared for _, of_shared in files_and_shared.values()), default=0)
    # A page that one had alone when it was counted and another one when that was counts more than once.
    rest = shared + max(files, most_files)
    surely = max(rest - grown, most_shared + most_files)
    return SharedCount(pss, anonymous + surely, max(0, rest - surely))


def _files_and_shared(pid: int) -> tuple[int, int]:
    try:
        text = read(f"{PROC}/{pid}/status")
    except OSError:
        return 0, 0
    return _kibibytes(text, b"RssFile:"), _kibibytes(text, b"RssShmem:")
