"""What a process tree has used up to now, from one look after the other: decisions without any measuring."""

from __future__ import annotations

from dataclasses import dataclass

from grd.tracking.processor_time import ProcessorTime
from grd.tracking.spikes import Spikes
from grd.tracking.tree_walk import ProcessUse, SharedCount, TreeLook

ONE_PROCESS = "highest RSS of one process (VmHWM)"
TREE = "all processes, shared pages once, as sampled"
TREE_AND_SPIKE = (
    "all processes, shared pages once, and what one of them had besides between two samples (VmHWM)"
)
AT_LEAST = (
    "at least: all processes, shared pages once, and the most that one of them had besides between two "
    "samples (VmHWM); others had more too, maybe not at the same time"
)

GROWTH = 1.01
GROWTH_BYTES = 4 * 1024**2
"""A peak that is higher by less than this is not worth counting shared pages for."""


def _and_more(size: int) -> float:
    return max(size * GROWTH, size + GROWTH_BYTES)


@dataclass
class Totals:
    """Of all looks so far. Bytes and seconds; ``peak_source`` says how the peak is known.

    ``pss_bytes`` is of the last look at which shared pages were counted; None if that was never possible or
    needed.
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
        # What the tree had when it was last counted, and the RSS of each process then
        self._counted: tuple[SharedCount, dict[tuple[int, int], int]] | None = None
        self.begin_tree(frozenset())

    def begin_tree(self, keepers: frozenset[int]) -> None:
        """What comes now is of another tree, which nothing of the last one belongs to."""
        self._keepers, self._spikes, self._time = keepers, Spikes(), ProcessorTime(keepers)
        self._counted, self._counted_at = None, 0
        self._before, self._tree = Totals(**vars(self.totals)), Totals()

    def own(self, look: TreeLook) -> dict[int, ProcessUse]:
        """The processes of the tree but for its keepers."""
        return {pid: process for pid, process in look.processes.items() if pid not in self._keepers}

    def wants_shared(self, look: TreeLook, *, affordable: bool = False) -> bool:
        """Whether the tree may be at a peak that only counting its shared pages once can tell.

        Processes that share much may look so at every look, and counting holds them up: what seemed as large
        when it was last counted is counted anew only where that is ``affordable``.
        """
        own = self.own(look)
        if len(own) < 2:
            return False
        spike = max(self._spikes.of(own), default=0)
        low, high = self._bounds(own)
        if high + spike <= _and_more(self.totals.peak_bytes):
            return False
        if self._counted is not None and high <= _and_more(low):
            return False
        return affordable or sum(process.rss for process in own.values()) + spike > _and_more(
            self._counted_at
        )

    def take(self, look: TreeLook, shared: SharedCount | None = None) -> None:
        """Take a look into account; ``shared``: of the tree without its keepers, where it was counted."""
        own = self.own(look)
        totals = self.totals
        totals.processes = len(own)
        totals.most_processes = max(totals.most_processes, len(own))
        totals.threads = sum(process.threads for process in own.values())
        totals.rss_bytes = sum(process.rss for process in own.values())
        self._take_memory(own, shared)
        self._time.take(look)
        totals.cpu_seconds = self._before.cpu_seconds + self._time.seconds
        self._take_io(look)

    def _take_memory(self, own: dict[int, ProcessUse], shared: SharedCount | None) -> None:
        self._raise_peak(max((process.mark for process in own.values()), default=0), ONE_PROCESS)
        spikes = sorted(self._spikes.of(own))
        self._spikes.remember(own)
        spike, others = (spikes[-1], sum(spikes[:-1])) if spikes else (0, 0)
        if shared is not None:
            self.totals.pss_bytes = shared.pss
            self._counted = shared, {(pid, process.started): process.rss for pid, process in own.items()}
            if shared.unsure <= GROWTH_BYTES:
                self._counted_at = max(self._counted_at, self.totals.rss_bytes + spike)
            self._raise_peak(shared.once, TREE)
        if len(own) > 1 and spike > 0:
            least = self._bounds(own)[0]  # what one of them had between two looks, and the others have now
            source = TREE if least + spike <= _and_more(least) else TREE_AND_SPIKE
            surely = least + spike + others <= _and_more(least + spike)
            self._raise_peak(least + spike, source if surely else AT_LEAST)

    def _bounds(self, own: dict[int, ProcessUse]) -> tuple[int, int]:
        """Between what the memory of the tree lies now, by how each RSS has changed since it was counted."""
        rss = {(pid, process.started): process.rss for pid, process in own.items()}
        largest, together = max(rss.values(), default=0), sum(rss.values())
        if self._counted is None:
            return largest, together
        last, counted = self._counted
        shrunk = sum(max(0, size - rss.get(key, 0)) for key, size in counted.items())
        grown = sum(max(0, size - counted.get(key, 0)) for key, size in rss.items())
        low = max(largest, last.once - shrunk)
        return low, max(low, min(together, last.once + last.unsure + grown))

    def _raise_peak(self, peak: int, source: str) -> None:
        if peak > self.totals.peak_bytes:
            self.totals.peak_bytes, self.totals.peak_source = peak, source

    def _take_io(self, look: TreeLook) -> None:
        told = [process for process in look.processes.values() if process.read is not None]
        if not told:
            return
        tree, totals = self._tree, self.totals
        tree.read_bytes = max(tree.read_bytes or 0, sum(process.read or 0 for process in told))
        tree.written_bytes = max(tree.written_bytes or 0, sum(process.written or 0 for process in told))
        totals.read_bytes = (self._before.read_bytes or 0) + tree.read_bytes
        totals.written_bytes = (self._before.written_bytes or 0) + tree.written_bytes
