"""When the pages that the processes of a tree share are counted once, which holds them up."""

from __future__ import annotations

import time

from grd.tracking.peaks import Accumulator
from grd.tracking.process_tree import count_shared
from grd.tracking.tree_walk import SharedCount, TreeLook

SHARE = 0.001
"""Counting may take this share of the time, besides when a peak may be missed."""

IN_VAIN_SHARE = 0.005
"""And this where the last count, of a tree that seemed as large, has shown no higher peak."""


class SharedPages:
    """Counts each ``every_seconds``, but as seldom as `SHARE` asks for; and where a look may be at a peak.

    A count that may tell a peak waits for ``rest`` times as long as the last one took.
    """

    def __init__(self, every_seconds: float, *, rest: float = 0.0) -> None:
        self._every_seconds, self._rest = every_seconds, rest
        self._next = self._next_in_vain = self._rested = 0.0

    def take(self, accumulator: Accumulator, look: TreeLook, now: float) -> None:
        """Let ``accumulator`` take the look at ``now`` (seconds of a clock that only goes on)."""
        peak = accumulator.totals.peak_bytes
        accumulator.take(look, self._count(accumulator, look, now))
        if accumulator.totals.peak_bytes > peak:
            self._next_in_vain = now

    def _count(self, accumulator: Accumulator, look: TreeLook, now: float) -> SharedCount | None:
        own = accumulator.own(look)
        if len(own) < 2 or now < self._rested:
            return None
        affordable = now >= self._next_in_vain
        if now < self._next and not accumulator.wants_shared(look, affordable=affordable):
            return None
        before = time.thread_time()
        counted = count_shared(own)
        took = time.thread_time() - before
        self._next = now + max(self._every_seconds, took / SHARE)
        self._next_in_vain = now + took / IN_VAIN_SHARE
        self._rested = now + took * (1 + self._rest)
        return counted
