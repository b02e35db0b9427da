"""Memory that a process had between two looks and gave back, from the system's own high-water mark of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from grd.tracking.tree_walk import ProcessUse, TreeLook

NOISE = 0.01
NOISE_BYTES = 1024**2
"""The system counts a process's pages on each processor for itself: the same mark is told a little lower and
higher from one look to the next."""

Key = tuple[int, int]
"""A pid and its start, since pids wrap."""


class Spikes:
    """Knows the marks of the last look; what they have risen by since then is new.

    A mark counts shared pages too. What a fork got from its parent (its RSS and its mark begin as those of
    the parent, fork(2)) and what a parent gave back while its forks may still have it was no memory of their
    own: it is never part of a spike, so that one may be told as too small, but not as too large.
    """

    def __init__(self) -> None:
        self._marks: dict[Key, int] = {}
        self._sizes: dict[Key, int] = {}
        self._shareable: dict[Key, int] = {}
        self._inherited: dict[Key, int] = {}

    def of(self, processes: Mapping[int, ProcessUse]) -> list[int]:
        """The spike of each of these that had one, in bytes above what it has now."""
        found = (self._spike(pid, process, processes) for pid, process in processes.items())
        return [spike for spike in found if spike > 0]

    def remember(self, processes: Mapping[int, ProcessUse]) -> None:
        """Take this look for the last one."""
        inherited = {
            (pid, process.started): min(self._inheritance(pid, process, processes), process.rss)
            for pid, process in processes.items()
        }
        self._inherited = inherited  # what was given back is never shared again
        self._marks = {
            (pid, process.started): process.mark
            if self._is_new(pid, process)
            else self._marks[pid, process.started]
            for pid, process in processes.items()
        }
        self._sizes = {(pid, process.started): process.rss for pid, process in processes.items()}
        self._shareable = {(pid, process.started): process.shareable for pid, process in processes.items()}

    def _spike(self, pid: int, process: ProcessUse, processes: Mapping[int, ProcessUse]) -> int:
        key = pid, process.started
        if not self._is_new(pid, process):
            return 0
        # Its libraries, which it gives back when it ends, are counted with the others that have them, too.
        had = max(self._shareable.get(key, 0), process.shareable + process.given_back)
        floor = max(process.rss + had - process.shareable, self._inheritance(pid, process, processes))
        if any(other.forked and other.parent == pid for other in processes.values()):
            floor = max(floor, self._sizes.get(key, 0))
        return process.mark - floor

    def _inheritance(self, pid: int, process: ProcessUse, processes: Mapping[int, ProcessUse]) -> int:
        """The most that a process may have of its parent's memory."""
        if not process.forked:
            return 0
        key = pid, process.started
        if key in self._inherited:
            return self._inherited[key]
        others = [(other, use) for other, use in processes.items() if other != pid]
        # The parent of one that was forked twice is gone: it may have been any of the others.
        parents = [(other, use) for other, use in others if other == process.parent] or others
        return max((self._had(other, use) for other, use in parents), default=process.mark)

    def _had(self, pid: int, process: ProcessUse) -> int:
        """The most that a process had since the last look."""
        key = pid, process.started
        had = max(process.rss, self._sizes.get(key, 0))
        return max(had, process.mark) if self._is_new(pid, process) else had

    def _is_new(self, pid: int, process: ProcessUse) -> bool:
        """Whether its mark is another than at the last look; a lower one was started anew (proc(5))."""
        last = self._marks.get((pid, process.started))
        return last is None or abs(process.mark - last) > _noise(last)


class MarksFromNowOn:
    """Leaves out of account what a process had before the look ``first``, which its mark tells of too."""

    def __init__(self, first: TreeLook) -> None:
        self._old = {(pid, process.started): process.mark for pid, process in first.processes.items()}

    def of(self, look: TreeLook) -> TreeLook:
        """The look with a mark that has not risen since then as what the process has now."""
        return TreeLook({pid: self._use(pid, process) for pid, process in look.processes.items()}, look.ended)

    def _use(self, pid: int, process: ProcessUse) -> ProcessUse:
        old = self._old.get((pid, process.started))
        if old is None or process.mark > old + _noise(old):
            return replace(process)
        if process.mark < old - _noise(old):  # it was started anew (proc(5)): from here on it counts
            self._old[pid, process.started] = process.mark
        return replace(process, mark=process.rss)


def _noise(mark: int) -> float:
    return max(NOISE_BYTES, NOISE * mark)
