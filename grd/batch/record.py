"""The record of a batch: what batch.json holds, its plan, and its events."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import grd
from grd import contract
from grd.batch.plan import Plan, PlannedRun
from grd.errors import ConfigurationError, NotFoundError, UsageError
from grd.files import JsonLines, atomic_write, fsync_folder, read_json, read_json_lines, take_lock, write_json
from grd.runs.batch_folder import BATCHES, BatchFolder
from grd.runs.folder import new_run_id
from grd.runs.model import now_iso

SCHEMA = "grd.batch/1"
COORDINATOR_LOST = "coordinator_lost"
"""The cause of a batch whose coordinator is gone without having written an end."""

EVENT_BATCH, EVENT_RUN, EVENT_NOTE = "batch", "run", "note"
STARTING, STARTED, ENDED, REFUSED = "starting", "started", "ended", "refused"
"""Steps of a run in the batch's events. STARTING is written before anything is done."""


@dataclass(kw_only=True)
class BatchRecord:
    """What batch.json holds. Times are ISO 8601 in UTC, durations seconds."""

    schema: str = SCHEMA
    batch_id: str
    name: str
    state: str = contract.QUEUED
    cause: str | None = None
    detail: str | None = None
    spec: str
    """The file as it was named, or what stands for it."""
    total: int
    options: dict[str, Any] = field(default_factory=dict)
    working_dir: str
    created_at: str
    started_at: str | None = None
    ended_at: str | None = None
    starts: int = 0
    """How often a coordinator has begun."""
    coordinator: dict[str, Any] | None = None
    """pid, started (clock ticks since boot), host, boot_id of the newest coordinator."""
    jobs: int | None = None
    """How many runs the coordinator lets be under way at once."""
    threads: int | None = None
    """What each of them may use of the processors."""
    grant: str | None = None
    """The grant that a person gave for this batch, or None."""
    retry_failed: bool = False
    """Whether the newest start takes failed runs up again."""
    counts: dict[str, int] = field(default_factory=dict)
    """Runs by state at the end."""
    grd_version: str = ""


def new_batch_id(name: str) -> str:
    """A sortable id in the form of a run's."""
    return new_run_id(name)


def load(folder: BatchFolder) -> BatchRecord:
    """batch.json as it is. Raises NotFoundError or ConfigurationError."""
    try:
        value = read_json(folder.record)
        known = {each.name for each in fields(BatchRecord)}
        if not str(value.get("schema", "")).startswith("grd.batch/"):
            raise ValueError(f"its schema is {value.get('schema')!r}")
        return BatchRecord(**{name: item for name, item in value.items() if name in known})
    except FileNotFoundError:
        raise NotFoundError(f"no batch in {folder.path}; see: grd batch list") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{folder.record} cannot be read: {error}") from None


def save(folder: BatchFolder, record: BatchRecord) -> None:
    """Replace batch.json atomically. Raises OSError."""
    write_json(folder.record, asdict(record))


def planned_runs(folder: BatchFolder) -> Iterator[PlannedRun]:
    """The runs of a batch in order. Raises ConfigurationError for a damaged plan."""
    try:
        for _, value in read_json_lines(folder.plan):
            yield PlannedRun.from_dict(value)
    except (TypeError, OSError) as error:
        raise ConfigurationError(f"{folder.plan} cannot be read: {error}") from None


class BatchEvents:
    """Appends the events of a batch; one writer, who holds the lock."""

    def __init__(self, folder: BatchFolder) -> None:
        self._lines = JsonLines(folder.events)

    def write(self, kind: str, *, durable: bool = False, **values: Any) -> None:
        """Append one event. Raises OSError: what cannot be written down is not begun."""
        self._lines.append(
            {"v": contract.EVENT_VERSION, "t": round(time.time(), 3), "pid": os.getpid(), "kind": kind}
            | values
        )
        if durable:
            self._lines.sync()

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def create_batch(
    plan: Plan, record: BatchRecord, runs_dir: Path, spec_text: str, suffix: str
) -> tuple[BatchFolder, int]:
    """Make the batch's folder whole or not at all; returns it with its lock held. Raises UsageError."""
    folder = BatchFolder(runs_dir / BATCHES / record.batch_id)
    staging = BatchFolder(folder.path.with_name(f".new-{record.batch_id}"))
    lock = None
    try:
        staging.notebooks.mkdir(parents=True)
        for opened in plan.requests.values():
            copy = staging.notebook(opened.source.sha256)
            if not copy.exists():
                atomic_write(copy, opened.source.text)
        atomic_write(staging.path / f"spec{suffix}", spec_text)
        lines = JsonLines(staging.plan)
        for run in plan.runs:
            lines.append(run.to_dict())
        lines.sync()
        lines.close()
        save(staging, record)
        lock = take_lock(staging.lock)
        if folder.path.exists():
            raise FileExistsError(17, "it is there already")
        staging.path.rename(folder.path)
        fsync_folder(folder.path.parent)
    except OSError as error:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(staging.path, ignore_errors=True)
        raise UsageError(f"no batch can be made in {runs_dir}: {error.strerror or error}") from None
    if lock is None:
        raise UsageError(f"no batch can be made in {runs_dir}: its lock is held")
    return folder, lock


def fresh_record(plan: Plan, batch_id: str, name: str) -> BatchRecord:
    """The record of a batch that is about to be made."""
    return BatchRecord(
        batch_id=batch_id,
        name=name,
        spec=plan.spec.origin,
        total=len(plan.runs),
        options=asdict(plan.options),
        working_dir=str(Path.cwd()),
        created_at=now_iso(),
        grd_version=grd.__version__,
    )


_OF_LAST_EVENT = ("step", "state", "cause", "detail")


def last_events(folder: BatchFolder) -> dict[int, dict[str, Any]]:
    """By index: the newest event of each run that the coordinator has taken up; what the run's own record
    has too is left out."""
    found: dict[int, dict[str, Any]] = {}
    for _, event in read_json_lines(folder.events):
        if event.get("kind") == EVENT_RUN and isinstance(event.get("index"), int):
            known = found.get(event["index"], {})
            run_id = event.get("run_id") or known.get("run_id")
            kept = {name: event[name] for name in _OF_LAST_EVENT if event.get(name) is not None}
            found[event["index"]] = {**kept, "run_id": run_id}
    return found


def forget_request(folder: BatchFolder) -> None:
    """Before a coordinator begins: what stopped the last one must not stop this one."""
    with contextlib.suppress(FileNotFoundError):
        folder.stop_file.unlink()
