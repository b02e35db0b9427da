"""What has become of a batch: each run as its own record tells, and what that means for the whole."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from grd import contract
from grd.batch import record as records
from grd.batch.plan import PlannedRun
from grd.batch.record import BatchRecord
from grd.errors import ConfigurationError, RunNotFound
from grd.runs import recovery
from grd.runs.batch_folder import BatchFolder
from grd.runs.folder import RunFolder
from grd.runs.model import RunRecord
from grd.steps import keys


@dataclass(frozen=True, kw_only=True)
class BatchRow:
    """One run of a batch as it is now. Times are seconds."""

    run: PlannedRun
    run_id: str | None = None
    state: str
    cause: str | None = None
    detail: str | None = None
    attempts: int = 0
    started_at: str | None = None
    ended_at: str | None = None
    seconds: float | None = None
    metrics: dict[str, Any] | None = None
    progress: dict[str, Any] | None = None
    own: bool = False
    """Whether this batch has started it, rather than found it."""
    next_command: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """A row of ``grd batch status --json``."""
        return {
            "index": self.run.index,
            "run_id": self.run_id,
            "state": self.state,
            "cause": self.cause,
            "detail": self.detail,
            "notebook": self.run.notebook,
            "parameters": self.run.parameters,
            "metrics": self.metrics or {},
            "progress": self.progress,
            "attempts": self.attempts,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "seconds": self.seconds,
            "found": self.run_id is not None and not self.own,
            "resume_command": self.next_command,
            "key": self.run.key,
        }


def look(
    folder: BatchFolder, record: BatchRecord, runs: Iterable[PlannedRun], *, ended: bool = False
) -> Iterator[BatchRow]:
    """Every run as it truly is now, one by one; runs whose runner is gone are recovered by looking at them.

    ``ended``: nobody starts those that were not started, also where the coordinator still has its lock.
    """
    events = records.last_events(folder)
    waiting = contract.QUEUED if not ended and folder.has_coordinator() else contract.CANCELLED
    for run in runs:
        yield _row(folder, record, run, events.get(run.index), waiting)


def _seconds(record: RunRecord) -> float | None:
    """What all attempts took, the one under way as far as it is."""
    used = record.budget.get("used_seconds")
    if record.state == contract.RUNNING and record.current.started_at is not None:
        began = datetime.fromisoformat(record.current.started_at)
        return float(used or 0.0) + max(0.0, round((datetime.now(UTC) - began).total_seconds(), 3))
    return None if used is None else float(used)


def _row(
    folder: BatchFolder, record: BatchRecord, run: PlannedRun, event: dict[str, Any] | None, waiting: str
) -> BatchRow:
    if event is None:
        return BatchRow(run=run, state=waiting)
    name = event.get("run_id")
    if event.get("step") == records.REFUSED and not name:
        return BatchRow(
            run=run, state=str(event["state"]), cause=event.get("cause"), detail=event.get("detail")
        )
    found = RunFolder(folder.runs_dir / name) if name else keys.run_of(folder.runs_dir, run.key)
    if found is None:
        return BatchRow(run=run, state=waiting)
    try:
        of_run = recovery.current_record(found)
    except RunNotFound:
        return BatchRow(run=run, state=contract.CANCELLED, detail=f"{found.run_id} was deleted")
    except ConfigurationError as error:
        return BatchRow(run=run, run_id=found.run_id, state=contract.FAILED, detail=str(error))
    own = (of_run.batch or {}).get("id") == folder.batch_id
    if not name and not own and record.options.get("force"):
        return BatchRow(run=run, state=waiting)  # the one before: this one has not been made yet
    return BatchRow(
        run=run,
        run_id=of_run.run_id,
        state=of_run.state,
        cause=of_run.cause,
        detail=of_run.detail,
        attempts=len(of_run.attempts),
        started_at=of_run.started_at,
        ended_at=of_run.ended_at,
        seconds=_seconds(of_run),
        metrics=of_run.metrics,
        progress=of_run.progress,
        own=own,
        next_command=of_run.resume_command,
    )


Ends = Mapping[tuple[str, str | None], int]
"""Number of runs by state and cause."""


def ends_of(rows: Iterable[BatchRow]) -> Ends:
    """How many have come to which end; no row is kept."""
    return Counter((row.state, row.cause) for row in rows)


def count_states(ends: Ends) -> dict[str, int]:
    """Number of runs by state."""
    counts: Counter[str] = Counter()
    for (state, _), number in ends.items():
        counts[state] += number
    return {state: counts[state] for state in contract.STATES if counts[state]}


def outcome(ends: Ends) -> tuple[str, str | None]:
    """State and cause of a batch that nobody coordinates any more. Pure.

    It failed if any run did; interrupted is what has runs that can go on, or were not started.
    """
    states = {state for state, _ in ends}
    if states <= {contract.COMPLETED}:
        return contract.COMPLETED, None
    if contract.FAILED in states:
        return contract.FAILED, None
    causes = {cause for state, cause in ends if state in (contract.INTERRUPTED, contract.DECLINED)}
    return contract.INTERRUPTED, causes.pop() if len(causes) == 1 else None


def current_record(folder: BatchFolder, rows: Sequence[BatchRow] | None = None) -> BatchRecord:
    """The record of a batch as it truly is: running only while its coordinator lives."""
    record = records.load(folder)
    if folder.has_coordinator():
        record.state, record.cause = contract.RUNNING, None
        return record
    record = records.load(folder)  # it may have ended between the two looks
    lost = record.state in (contract.QUEUED, contract.RUNNING)
    if rows is not None:
        state, cause = outcome(ends_of(rows))
        if state != record.state:
            record.cause = cause
        record.state = state
    elif lost:
        record.state = contract.INTERRUPTED
    if lost and record.state != contract.COMPLETED:
        pid = (record.coordinator or {}).get("pid")
        record.cause = records.COORDINATOR_LOST
        record.detail = (
            "its coordinator never started" if pid is None else f"coordinator {pid} is gone without an end"
        )
    return record


def is_resumable(rows: Sequence[BatchRow]) -> bool:
    """Whether ``grd batch resume`` has something to do: runs that are not at an end, or were never begun."""
    with contextlib.suppress(StopIteration):
        next(row for row in rows if row.state not in (contract.COMPLETED, contract.FAILED))
        return True
    return False
