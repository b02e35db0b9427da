"""Moves a run whose runner died to its true end state and rebuilds its notebook.

Called by whoever looks next (status, list, wait, resume), under a lock of its own. On a folder that cannot
be written it only reports.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from grd import contract
from grd.errors import ConfigurationError, RunNotFound
from grd.files import LOCKS_UNSUPPORTED, atomic_write, take_lock
from grd.runs import last_word, leftovers, notebook_journal, reserve, resource_samples, store
from grd.runs.events import EventLog, view_of
from grd.runs.folder import RunFolder, process_marker
from grd.runs.liveness import HEARTBEAT_SECONDS, heartbeat_age, needs_recovery
from grd.runs.model import RunRecord, now_iso
from grd.runs.notebook_file import NotebookFile
from grd.runs.processes import boot_id, is_alive, reap
from grd.settings import LONGEST_DURATION_SECONDS

REAP_SECONDS = 0.3
"""Looking at a run must not take long: what does not die at once is met again by the next look."""


GUARDIAN_SLACK_SECONDS = 10.0
"""Beyond the grace: for a busy machine, and processes that are slow to die."""


def current_record(folder: RunFolder, record: RunRecord | None = None, *, at_once: bool = False) -> RunRecord:
    """The record as it truly is now: recovered first if its runner is gone.

    While the dead runner's guardian gives the kernel its grace the end is told, but not stored: the kernel
    may still save. ``at_once`` kills it instead. ``record`` is what was read of it just now, where the
    caller has done so. Raises RunNotFound or ConfigurationError.
    """
    if record is None:
        record = store.load(folder)
    if not needs_recovery(folder, record):
        return record
    if not at_once and guardian_is_at_work(folder, record):
        return _as_lost(folder, record, " yet; its guardian gives the kernel the grace to save")
    try:
        lock = take_lock(folder.recovery_lock, wait_seconds=0.5)
    except OSError as error:
        if error.errno not in LOCKS_UNSUPPORTED:
            return _as_lost(folder, record)  # a read-only folder: the truth is told, but not stored
        return _recover(folder, record)  # two at once write the same
    if lock is None:
        return _as_lost(folder, store.load(folder))
    try:
        record = store.load(folder)
        if needs_recovery(folder, record):
            record = _recover(folder, record)
        return record
    finally:
        os.close(lock)


def all_current(runs_dir: os.PathLike[str]) -> list[tuple[RunFolder, RunRecord]]:
    """All runs in ``runs_dir`` as they truly are, newest first."""
    found = []
    for folder, record in store.load_all(Path(runs_dir)):
        with contextlib.suppress(RunNotFound, ConfigurationError):
            found.append((folder, current_record(folder, record)))
    return found


def guardian_is_at_work(folder: RunFolder, record: RunRecord) -> bool:
    """Whether a guardian of this machine still sees to the kernel of a runner that is gone.

    No longer believed of one that is beyond the grace: it was stopped, or hangs.
    """
    if not any(is_alive(record.processes.get(name)) for name in ("guardian", "watcher")):
        return False
    silent = heartbeat_age(folder)
    return silent is None or silent < HEARTBEAT_SECONDS + record.grace + GUARDIAN_SLACK_SECONDS


def end_at_once(folder: RunFolder) -> None:
    """Kill what the guardian of a dead runner still lets live; a run with a living runner is left to that."""
    with contextlib.suppress(RunNotFound, ConfigurationError):
        current_record(folder, at_once=True)


def _as_lost(folder: RunFolder, record: RunRecord, remark: str = "") -> RunRecord:
    if not needs_recovery(folder, record):
        return record
    told = last_word.find(folder, record)
    if told is not None:
        return told
    cause, detail = _what_was_lost(record)
    detail += remark
    record.state, record.cause, record.detail = contract.INTERRUPTED, cause, detail
    record.resumable = True
    record.ended_at = record.ended_at or _last_sign_of_life(folder)
    record.resume_command = resume_command(record)
    attempt = record.current
    attempt.state, attempt.cause, attempt.detail = record.state, cause, detail
    attempt.ended_at = record.ended_at
    attempt.seconds = max(attempt.seconds, _seconds_between(attempt.started_at, record.ended_at))
    used = float(record.budget.get("used_seconds") or 0.0)
    record.budget["used_seconds"] = round(used + attempt.seconds, 3)
    view = view_of(folder)
    record.progress, record.checkpoint = view.progress, view.checkpoint or record.checkpoint
    record.metrics = view.metrics
    return record


def _recover(folder: RunFolder, record: RunRecord) -> RunRecord:
    # The dead runner's kernel and its children first: a notebook that still runs may still write.
    if record.runner is None or record.runner.get("boot_id") == boot_id():
        reap(process_marker(record.run_id, record.attempt), wait_seconds=REAP_SECONDS)
    leftovers.sweep_checkpoints(Path(record.checkpoint_dir))
    leftovers.sweep_exchanges(folder)
    told = last_word.find(folder, record)
    record = told or _as_lost(folder, record)
    attempt = record.current
    record.note_processes({})
    paths = folder.attempt(record.attempt)
    if attempt.resources is None:
        attempt.resources = resource_samples.of_lost_attempt(paths.resources)
    with contextlib.suppress(OSError, ValueError, KeyError):
        notebook = notebook_journal.mark_lost(notebook_journal.rebuild(paths.output, paths.journal))
        notebook["metadata"].setdefault("grd", {}).update(
            state=record.state, cause=record.cause, attempt=record.attempt, complete=True
        )
        attempt.cells = notebook_journal.count_cells(notebook)
        atomic_write(paths.output, NotebookFile(notebook))
        paths.journal.unlink(missing_ok=True)
    reserve.give_back(folder)
    with contextlib.suppress(OSError):
        log = EventLog(folder.events, record.attempt)
        log.write(contract.EVENT_STATE, state=record.state, cause=record.cause, recovered=True)
        log.close()
        store.save(folder, record)
        last_word.forget(folder)
    return record


def _what_was_lost(record: RunRecord) -> tuple[str, str]:
    if record.runner is None:
        return contract.RUNNER_LOST, "the runner never started"
    pid = record.runner.get("pid")
    if record.runner.get("boot_id") != boot_id():
        return contract.HOST_LOST, f"the machine was restarted, or runner {pid} was on another one"
    still = " (it is stopped or cut off from its lock)" if is_alive(record.runner) else ""
    return contract.RUNNER_LOST, f"runner {pid} is gone without having written its end{still}"


def _last_sign_of_life(folder: RunFolder) -> str:
    newest = 0.0
    for path in (folder.events, folder.heartbeat, folder.record):
        with contextlib.suppress(OSError):
            newest = max(newest, path.stat().st_mtime)
    if newest == 0.0:
        return now_iso()
    from datetime import UTC

    return datetime.fromtimestamp(newest, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _seconds_between(start: str | None, end: str | None) -> float:
    if not start or not end:
        return 0.0
    with contextlib.suppress(ValueError):
        return max(0.0, (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds())
    return 0.0


def resume_command(record: RunRecord) -> str | None:
    """What to type to go on with this run; None if there is nothing to go on with."""
    if not contract.is_resumable(record.state, record.cause):
        return None
    command = f"grd resume {record.run_id}"
    if record.cause in (contract.APPROVAL_REQUIRED, contract.BUDGET):
        left = _seconds_left(record.progress or {})
        if record.cause == contract.BUDGET:  # for all attempts, those that were made too
            flag, left = "--budget", left + float(record.budget.get("used_seconds") or 0.0)
        else:
            flag = "--timeout"
        seconds = max(3600.0, 4 * float(record.budget.get("seconds") or 0.0), left)
        return f"{command} {flag} {math.ceil(min(seconds, LONGEST_DURATION_SECONDS - 3600) / 3600)}h"
    return command


def _seconds_left(progress: Mapping[str, Any]) -> float:
    """The most that the loop may still take as it was measured, half as much again where only its middle is
    known; 0 if nothing is."""
    for name, factor in (("eta_high_seconds", 1.0), ("eta_seconds", 1.5)):
        seconds = progress.get(name)
        if isinstance(seconds, int | float) and not isinstance(seconds, bool) and seconds > 0:
            return min(seconds, LONGEST_DURATION_SECONDS) * factor
    return 0.0
