"""One step of a loop's cycle: its run is started, or gone on with, and seen to its end, or asked to stop."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grd import contract
from grd.batch.loop_state import Entry, LoopMemory
from grd.errors import ApprovalRequired, GrdError, ResourceUnavailable
from grd.execution.notebooks import read_notebook
from grd.runs.changes import Changes
from grd.runs.retry import BY_REQUEST
from grd.runs.stop_request import ask_to_stop
from grd.steps.researcher import research
from grd.steps.resuming import resume
from grd.steps.run import Run, status

DONE, STOPPED, FAILURES, APPROVAL, BUDGET = "done", "stopped", "failures", "approval_required", "budget"
"""Why a loop ends."""


class Ends(Exception):
    """The loop can not, or must not, go on."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class TryFailed(Exception):
    """This try of the cycle is over; the same cycle is tried again."""


class Stopping:
    """Whether somebody has asked the loop to stop, and whatever waits and must hear of it."""

    def __init__(self) -> None:
        self.asked = False
        self.reason = contract.STOPPED
        self.at_once = False
        self._waits: list[Changes] = []

    def ask(self, reason: str, *, now: bool) -> None:
        """Ask; the first reason stays. Safe in a signal handler and in any thread."""
        if not self.asked:
            self.reason = reason
        self.at_once = self.at_once or now
        self.asked = True
        for wait in list(self._waits):
            wait.wake()

    def end_if_asked(self) -> None:
        """Raises Ends."""
        if self.asked:
            because = "" if self.reason == contract.STOPPED else f" ({self.reason})"
            raise Ends(STOPPED, f"stopped{because}; the same command goes on with this cycle")

    @contextlib.contextmanager
    def waiting(self, *folders: Path) -> Iterator[Changes]:
        """Something to wait on that ends when somebody asks."""
        with Changes(*folders) as changes:
            self._waits.append(changes)
            try:
                yield changes
            finally:
                self._waits.remove(changes)


class StepMaker:
    """Makes the runs of a loop's steps; ``guard`` is held while the loop's memory changes."""

    def __init__(
        self,
        memory: LoopMemory,
        guard: threading.RLock,
        stopping: Stopping,
        runs_dir: Path,
        say: Callable[[str], None],
    ) -> None:
        self.stopping = stopping
        self._memory = memory
        self._guard = guard
        self._runs_dir = runs_dir
        self._say = say

    def make(self, entry: Entry, cycle: int, seconds_left: float) -> None:
        """Bring one run to its completion. Raises TryFailed where it ended otherwise, Ends."""
        self.stopping.end_if_asked()
        began = time.monotonic()
        until = began + max(0.0, seconds_left)
        self._memory.tell("step_start", cycle=cycle, step=entry["name"], phase=entry["phase"])
        try:
            run = self._start(entry, cycle)
            self._note(
                entry, run_id=run.id, folder=str(run.folder), state=contract.RUNNING, cause=None, detail=None
            )
            self._say(f"cycle {cycle}: {entry['name']} is run {run.id}")
            in_time = self._see_to_end(run, until)
        except ApprovalRequired as error:
            raise Ends(APPROVAL, f"{entry['name']}: {error}") from None
        except GrdError as error:
            raise TryFailed(f"{entry['name']}: {error}") from None
        record = run.record
        seconds = round(entry["seconds"] + time.monotonic() - began, 3)
        self._note(entry, state=record.state, cause=record.cause, detail=record.detail, seconds=seconds)
        self._memory.tell(
            "step_end", cycle=cycle, step=entry["name"], run_id=run.id, state=record.state,
            cause=record.cause, seconds=seconds,
        )  # fmt: skip
        if record.state == contract.COMPLETED:
            return
        self.stopping.end_if_asked()
        because = f" ({record.cause})" if record.cause else ""
        told = f"{entry['name']}: run {run.id} is {record.state}{because}"
        if not in_time:
            raise TryFailed(f"{told}: the time of the cycle was up")
        if record.cause in (contract.APPROVAL_REQUIRED, contract.BUDGET):
            reason = APPROVAL if record.cause == contract.APPROVAL_REQUIRED else BUDGET
            raise Ends(reason, f"{told}; a person types: {record.resume_command}")
        if record.cause in BY_REQUEST:
            raise Ends(STOPPED, f"{told}: somebody stopped it")
        raise TryFailed(f"{told}: {record.detail}" if record.detail else told)

    def _start(self, entry: Entry, cycle: int) -> Run:
        """The run of an entry: started, attached to, or resumed, whichever applies."""

        def say(text: str) -> None:
            self._say(f"cycle {cycle}: {entry['name']}: {text}")

        failed = self._failed_before(entry)
        if failed is not None:
            edited = None
            with contextlib.suppress(GrdError):
                if read_notebook(entry["notebook"]).sha256 != failed.record.notebook_sha256:
                    edited = entry["notebook"]
            return resume(failed, notebook=edited, wait=False, on_note=say)
        return research(
            entry["notebook"],
            entry["parameters"],
            timeout=entry["timeout"],
            budget=entry["budget"],
            max_attempts=entry["max_attempts"],
            kernel=entry["kernel"],
            name=entry["name"],
            key=entry["key"],
            runs_dir=self._runs_dir,
            wait=False,
            on_note=say,
        )

    def _failed_before(self, entry: Entry) -> Run | None:
        """The entry's run, if it has failed since an earlier try: a key alone would only show it again."""
        if entry["run_id"] is None:
            return None
        with contextlib.suppress(GrdError):
            run = status(entry["run_id"], runs_dir=self._runs_dir)
            if run.state == contract.FAILED:
                return run
        return None

    def _see_to_end(self, run: Run, until: float) -> bool:
        """Wait until no attempt is under way or to come; False if the cycle's time was up before."""
        asked = killed = False
        in_time = True
        with self.stopping.waiting(run.folder) as changes:
            while not run.wait(0.0):
                if time.monotonic() >= until and not self.stopping.asked:
                    in_time = False
                if (self.stopping.asked or not in_time) and not asked:
                    self._ask(run, self.stopping.reason if self.stopping.asked else contract.STOPPED)
                    asked = True
                if self.stopping.at_once and not killed:
                    self._ask(run, self.stopping.reason, at_once=True)
                    killed = True
                left = until - time.monotonic() if in_time else 1.0
                changes.wait(min(1.0, max(0.05, left)), run.record.runner)
        run.reap()
        return in_time

    def _ask(self, run: Run, reason: str, *, at_once: bool = False) -> None:
        try:
            instead = ask_to_stop(run.run_folder, reason, at_once=at_once)
        except ResourceUnavailable as error:
            instead = str(error)
        if instead is not None:
            self._say(instead)

    def _note(self, entry: Entry, **values: Any) -> None:
        with self._guard:
            entry |= values
            self._memory.save()
