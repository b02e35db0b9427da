"""Processor time of a process tree, from one look after the other: nothing is lost with what has ended.

The time of a process that ends goes to whoever waits for it, and to nobody where its parent ignores
SIGCHLD (wait(2)). So what was seen of a process that is gone is owed, until the time that others got by
waiting has grown by as much.
"""

from __future__ import annotations

from grd.tracking.tree_walk import TreeLook


class ProcessorTime:
    """``seconds`` of all processes that the looks have seen; of ``keepers`` only what they have waited for.

    A look is no single moment: whoever waited for a process may have been read before it did. So a debt is
    given up as lost at the second look after the process was seen, not at the first. Where it is not clear
    whose time has grown, the smaller sum stands.
    """

    def __init__(self, keepers: frozenset[int] = frozenset()) -> None:
        self.seconds = 0.0
        self._keepers = keepers
        self._last: dict[tuple[int, int], tuple[float, float]] = {}
        self._owed = self._lost = 0.0

    def take(self, look: TreeLook) -> None:
        """Take a look into account, zombies too: they keep their time until somebody waits for them."""
        now = {
            (pid, process.started): (
                0.0 if pid in self._keepers else process.cpu_seconds,
                process.waited_seconds,
            )
            for pid, process in (look.processes | look.ended).items()
        }
        grown = sum(max(0.0, now[key][1] - waited) for key, (_, waited) in self._last.items() if key in now)
        paid = min(self._owed, grown)
        self._lost += self._owed - paid
        gone = sum(own + waited for key, (own, waited) in self._last.items() if key not in now)
        self._owed = max(0.0, gone - (grown - paid))
        self._last = now
        seen = sum(own + waited for own, waited in now.values())
        self.seconds = max(self.seconds, seen + self._lost + self._owed)
