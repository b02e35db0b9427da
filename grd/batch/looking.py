"""A batch as a Python object, and looking at batches."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grd import contract
from grd.batch import record as records
from grd.batch import view
from grd.batch.following import follow, wait_for_stop
from grd.batch.plan import PlannedRun
from grd.batch.record import BatchRecord
from grd.batch.stopping import ask_batch_to_stop
from grd.batch.table import Table
from grd.batch.view import BatchRow
from grd.errors import ConfigurationError, NotFoundError
from grd.runs.batch_folder import BatchFolder, batch_folders, find_batch
from grd.steps.run import Run, runs_folder

SETTLING_SECONDS = 20.0
"""Beyond the grace, for the ends of runs to be written."""


class Batch:
    """One batch. What it says is read anew each time, so that it is true when it is asked for."""

    def __init__(
        self,
        folder: BatchFolder | Path | str,
        *,
        process: subprocess.Popen[bytes] | None = None,
        since: int = 0,
    ) -> None:
        self._folder = folder if isinstance(folder, BatchFolder) else BatchFolder(Path(folder).resolve())
        self.process = process
        """The coordinator, where this process started it: it must be waited for."""
        self.since = since
        """Byte of events.jsonl from which on the events are news."""
        self._plan: list[PlannedRun] | None = None

    @property
    def batch_folder(self) -> BatchFolder:
        """The folder with its named places."""
        return self._folder

    @property
    def id(self) -> str:
        """The batch id."""
        return self._folder.batch_id

    @property
    def folder(self) -> Path:
        """The batch's folder."""
        return self._folder.path

    @property
    def record(self) -> BatchRecord:
        """The record as it truly is now."""
        self._reap()
        return view.current_record(self._folder, self.rows)

    @property
    def rows(self) -> list[BatchRow]:
        """Every run of the batch as it is now, in the order of the spec."""
        if self._plan is None:
            self._plan = list(records.planned_runs(self._folder))
        return list(view.look(self._folder, records.load(self._folder), self._plan))

    @property
    def state(self) -> str:
        """running (its coordinator lives), completed, failed or interrupted."""
        return self.record.state

    @property
    def runs(self) -> list[Run]:
        """Those of its runs that exist, in the order of the spec."""
        return [Run(self._folder.runs_dir / row.run_id) for row in self.rows if row.run_id is not None]

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended; False if ``timeout`` seconds ran out before."""
        size = self._folder.events.stat().st_size if self._folder.events.exists() else 0
        return follow(self._folder, self.process, since=size, seconds=timeout, listen=False)

    def stop(self, *, now: bool = False, wait: bool = True) -> bool:
        """Ask all its runs to save and stop; ``now`` kills them. Whether they have ended, where ``wait``."""
        ask_batch_to_stop(self._folder, contract.STOPPED, at_once=now)
        if not wait:
            return False
        graces = [run.record.grace for run in self.runs] or [contract.DEFAULT_GRACE_SECONDS]
        ended = wait_for_stop(self._folder, (0.0 if now else max(graces)) + SETTLING_SECONDS, at_once=now)
        self._reap()
        return ended

    def resume(self, **options: Any) -> Batch:
        """Go on with it; see `grd.batch.submitting.resume_batch`."""
        from grd.batch.submitting import resume_batch

        return resume_batch(self, **options)

    def to_dict(self) -> dict[str, Any]:
        """What ``grd batch status BATCH --json`` prints."""
        self._reap()
        rows = self.rows
        record = view.current_record(self._folder, rows)
        shown = asdict(record)
        shown["counts"] = view.count_states(view.ends_of(rows))
        shown["resumable"] = record.state != contract.RUNNING and view.is_resumable(rows)
        shown["resume_command"] = f"grd batch resume {self.id}" if shown["resumable"] else None
        shown["folder"] = str(self._folder.path)
        shown["runs"] = [row.to_dict() for row in rows]
        return shown

    @property
    def table(self) -> Table:
        """A row for each run: parameters, metrics, times, causes."""
        return Table(self.to_dict())

    @property
    def df(self) -> Any:
        """The table as a pandas DataFrame. Needs pandas."""
        return self.table.df

    def _reap(self) -> None:
        if self.process is not None:
            self.process.poll()

    def __repr__(self) -> str:
        shown = self.to_dict()
        counts = ", ".join(f"{count} {state}" for state, count in shown["counts"].items())
        return f"<Batch {self.id} {shown['state']}: {counts}>"

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self) if cycle else "\n".join(self.table.lines()))


def batch_status(batch: str | Batch = "last", *, runs_dir: str | Path | None = None) -> Batch:
    """The batch called ``batch`` (an id, a unique part of one, a folder, ``last``). Raises NotFoundError."""
    if isinstance(batch, Batch):
        return batch
    place = runs_folder(runs_dir)
    readable = next(_readable(place), None) if batch == "last" else None
    return Batch(readable or find_batch(place, batch))


def list_batches(*, runs_dir: str | Path | None = None) -> list[Batch]:
    """This project's batches, newest first; a damaged one hides only itself."""
    return [Batch(folder) for folder in _readable(runs_folder(runs_dir))]


def _readable(runs_dir: Path) -> Iterator[BatchFolder]:
    for folder in batch_folders(runs_dir):
        with contextlib.suppress(ConfigurationError, NotFoundError):
            records.load(folder)
            yield folder
