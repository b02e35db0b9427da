"""Where the runs of a batch execute. A placement is given jobs and gives handles, both JSON values.

The batch decides what is started and when, and what is done about an end; a placement only executes. Those
of other modules here are siblings, and none imports another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from grd.batch.jobs import Job

Handle = dict[str, Any]
"""At least ``placement``, ``run_id``, ``folder`` and ``action`` (start, attach, resume, show)."""


class Placement(Protocol):
    """What the coordinator needs of a place."""

    name: str

    def start(self, job: Job) -> Handle:
        """Begin a job, idempotently by its key. Raises GrdError where it cannot be begun."""

    def is_under_way(self, handle: Handle) -> bool:
        """Whether somebody still works on it. Never waits."""

    def stop(self, handle: Handle, reason: str, *, at_once: bool) -> None:
        """Ask its run to save and stop, or kill it. Raises ResourceUnavailable where it is out of reach."""

    def close(self) -> None:
        """Let go of what only helps to start jobs. They go on."""

    def wait(self, handles: Sequence[Handle], seconds: float) -> None:
        """Until one of them has ended, or ``seconds`` are over."""
