"""What a process tree has used up to now, from one look after the other: decisions without any measuring."""

from __future__ import annotations

from dataclasses import dataclass

from grd.tracking.tree_walk import ProcessUse, TreeLook

ONE_PROCESS = "highest RSS of one process (VmHWM)"
TREE = "PSS of all processes, as sampled"

GROWTH = 1.02
GROWTH_BYTES = 4 * 1024**2
"""A tree that has grown by less since its shared pages were counted need not be counted anew."""


@dataclass
class Totals:
    """Of all looks so far. Bytes and seconds; ``peak_source`` says how the peak is known.

    ``pss_bytes`` is of the last look at which shared pages were counted once; None if that was never
    possible or needed.
    """

    peak_bytes: int = 0
    peak_source: str = ONE_PROCESS
    cpu_seconds: float = 0.0
    read_bytes: int | None = None
    written_bytes: int | None = None
    processes: int = 0
    most_processes: int = 0
    threads: int = 0
    rss_bytes: int = 0
    pss_bytes: int | None = None


class Accumulator:
    """Takes looks at a tree, or at one tree after the other.

    The keepers of a tree (guardian and watcher) reap what is left of it: the processor time of those whom
    they have waited for is the tree's, what they use themselves is not.
    """

    def __init__(self) -> None:
        self.totals = Totals()
        self._keepers: frozenset[int] = frozenset()
        self._marks: dict[tuple[int, int], int] = {}
        self._counted_at_rss = 0
        self._before = Totals()
        self._tree = Totals()

    def begin_tree(self, keepers: frozenset[int]) -> None:
        """What comes now is of another tree, which nothing of the last one belongs to."""
        self._keepers, self._counted_at_rss, self._marks = keepers, 0, {}
        self._before, self._tree = Totals(**vars(self.totals)), Totals()

    def own(self, look: TreeLook) -> dict[int, ProcessUse]:
        """The processes of the tree but for its keepers."""
        return {pid: process for pid, process in look.processes.items() if pid not in self._keepers}

    def wants_shared(self, look: TreeLook) -> bool:
        """Whether the tree may be at a peak that only counting its shared pages once can tell."""
        own = self.own(look)
        rss = sum(process.rss for process in own.values())
        if len(own) < 2 or rss <= self.totals.peak_bytes:
            return False
        return rss > self._counted_at_rss * GROWTH + GROWTH_BYTES

    def take(self, look: TreeLook, pss: int | None = None) -> None:
        """Take a look into account; ``pss``: that of the tree without its keepers, where it was counted."""
        own = self.own(look)
        totals, tree = self.totals, self._tree
        totals.processes = len(own)
        totals.most_processes = max(totals.most_processes, len(own))
        totals.threads = sum(process.threads for process in own.values())
        totals.rss_bytes = sum(process.rss for process in own.values())
        self._raise_peak(max((process.mark for process in own.values()), default=0), ONE_PROCESS)
        if pss is not None:
            self._counted_at_rss = max(self._counted_at_rss, totals.rss_bytes)
            totals.pss_bytes = pss
            # what one of them had between two looks, and the others have now
            spike = max((self._spike(pid, process) for pid, process in own.items()), default=0)
            self._raise_peak(pss + spike, TREE)
        self._marks = {(pid, process.started): process.mark for pid, process in own.items()}
        # The time of a process that ends goes to whoever waits for it: what is seen at once may only grow.
        seen = sum(process.cpu_seconds + process.waited_seconds for process in own.values())
        seen += sum(look.processes[pid].waited_seconds for pid in self._keepers if pid in look.processes)
        tree.cpu_seconds = max(tree.cpu_seconds, seen)
        totals.cpu_seconds = self._before.cpu_seconds + tree.cpu_seconds
        self._take_io(look)

    def _raise_peak(self, peak: int, source: str) -> None:
        if peak > self.totals.peak_bytes:
            self.totals.peak_bytes, self.totals.peak_source = peak, source

    def _spike(self, pid: int, process: ProcessUse) -> int:
        before = self._marks.get((pid, process.started), 0)
        return process.mark - process.rss if process.mark > before else 0

    def _take_io(self, look: TreeLook) -> None:
        told = [process for process in look.processes.values() if process.read is not None]
        if not told:
            return
        tree, totals = self._tree, self.totals
        tree.read_bytes = max(tree.read_bytes or 0, sum(process.read or 0 for process in told))
        tree.written_bytes = max(tree.written_bytes or 0, sum(process.written or 0 for process in told))
        totals.read_bytes = (self._before.read_bytes or 0) + tree.read_bytes
        totals.written_bytes = (self._before.written_bytes or 0) + tree.written_bytes
