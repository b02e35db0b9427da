"""The Researcher: run a training notebook with a deadline and a checkpoint folder, and resume it.

Everything that can be wrong with the request is found before a kernel or a run folder exists.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grd
from grd import contract
from grd.errors import (
    ApprovalRequired,
    NotebookError,
    NotFoundError,
    ResourceUnavailable,
    ResumeError,
    RunBusy,
    UsageError,
)
from grd.execution.launch import acquire, start_runner
from grd.execution.notebooks import find_kernel, read_notebook
from grd.execution.parameters import read_parameters_cell, resolve
from grd.files import atomic_write, write_json
from grd.runs import recovery, reserve, store
from grd.runs.folder import RunFolder, new_run_id
from grd.runs.liveness import needs_recovery
from grd.runs.model import Attempt, RunRecord, now_iso, seconds_left
from grd.runs.stop_request import forget_request
from grd.settings import Settings, find_project_root, format_duration, load_settings
from grd.steps import keys
from grd.steps.following import follow
from grd.steps.request import (
    Limits,
    Request,
    adoption_warnings,
    check,
    check_language,
    read_limits,
    read_seconds,
    read_size,
)
from grd.steps.run import Run, runs_folder, status


@dataclass(frozen=True)
class Started:
    """A run that is under way, or was found to need nothing."""

    folder: RunFolder
    process: subprocess.Popen[bytes] | None
    """The runner, where this process started it."""
    position: int
    """Byte of events.jsonl from which on the events are news."""


OnEvent = Callable[[dict[str, Any]], None]
OnNote = Callable[[str], None]


def research(
    notebook: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    timeout: float | str | None = None,
    budget: float | str | None = None,
    name: str | None = None,
    kernel: str | None = None,
    checkpoint_dir: str | Path | None = None,
    grace: float | str | None = None,
    start_timeout: float | str | None = None,
    max_output: int | str | None = None,
    runs_dir: str | Path | None = None,
    allow_unknown: bool = False,
    key: str | None = None,
    on_end: str | None = None,
    wait: bool = True,
    on_start: Callable[[Run], None] | None = None,
    on_event: OnEvent | None = None,
    on_note: OnNote | None = None,
) -> Run:
    """Run ``notebook`` to its end, or to an interruption; the `Run` tells which.

    ``timeout`` (one attempt), ``budget`` (all attempts together), ``grace`` and ``start_timeout`` (for the
    kernel to answer after its start) are seconds or ``"30m"``.
    ``max_output`` is how much output the notebook keeps, in bytes or as ``"100MB"``.
    With ``wait=False`` it returns once the run has been started; the run outlives this process either way.
    ``key`` makes the call idempotent: the run that was started with it is attached to, resumed, or just
    returned, whichever applies. ``on_end`` is a shell command the runner executes when the run has ended.
    Raises NotebookNotFound, NotebookError, ParameterError, KernelUnavailable or UsageError before anything
    is started or written.
    """
    root = find_project_root(Path.cwd())
    typed = {
        "grace": read_seconds("--grace", grace),
        "max_output": None if max_output is None else read_size("--max-output", max_output),
        "start_timeout": read_seconds("--start-timeout", start_timeout),
    }
    settings, _ = load_settings(root, typed)
    request = check(str(notebook), parameters or {}, kernel=kernel, allow_unknown=allow_unknown)
    limits = read_limits(timeout, budget, settings)
    place = runs_folder(runs_dir)

    def create() -> Started:
        folder, lock = _create(request, settings, limits, place, name, checkpoint_dir, key, on_end)
        for warning in request.warnings:
            _note(on_note, warning)
        return _launch(folder, 1, lock)

    if key is None:
        key = keys.scheduler_key(request.source.location, request.parameters, os.environ)
    if key is None:
        return _see_to_end(create(), wait, on_start, on_event, on_note)
    with keys.held(place, key) as slot:
        known = slot.run()
        if known is None:
            started = create()
            slot.assign(started.folder)
        else:
            started = _go_on(known, request, key, timeout, budget, grace, start_timeout, max_output, on_note)
    return _see_to_end(started, wait, on_start, on_event, on_note)


def _go_on(
    folder: RunFolder,
    request: Request,
    key: str,
    timeout: float | str | None,
    budget: float | str | None,
    grace: float | str | None,
    start_timeout: float | str | None,
    max_output: int | str | None,
    on_note: OnNote | None,
) -> Started:
    """What an idempotent call does with the run that has its key."""
    record = recovery.current_record(folder)
    # The same words again: those of the start, or those that a resume has changed them to.
    if request.parameters not in (record.parameters, record.attempts[0].parameters):
        raise UsageError(
            f"key {key!r} belongs to {record.run_id}, which has other parameters; take another key, or: "
            f"grd resume {record.run_id} -p NAME VALUE"
        )
    changed = request.source.sha256 != record.notebook_sha256
    action = keys.decide(record.state, record.cause, notebook_changed=changed)
    if action == "attach":
        _note(on_note, f"{record.run_id} has key {key!r} and is under way: attached")
        return Started(folder, None, 0)
    if action == "show":
        _note(on_note, f"{record.run_id} has key {key!r} and is {record.state}: nothing to do")
        return Started(folder, None, folder.events.stat().st_size if folder.events.exists() else 0)
    edited = request.source.location if record.state == contract.FAILED else None
    # The caps are the same words typed again, not new ones: only what differs is a change.
    more_time = timeout if read_seconds("--timeout", timeout) != record.timeout else None
    more_budget = budget if read_seconds("--budget", budget) != record.budget.get("seconds") else None
    return _resume(
        folder,
        {},
        edited,
        None,
        more_time,
        more_budget,
        grace,
        start_timeout,
        max_output,
        allow_unknown=True,
        on_note=on_note,
    )


def resume(
    run: str | Run,
    parameters: Mapping[str, Any] | None = None,
    *,
    notebook: str | Path | None = None,
    from_epoch: int | None = None,
    timeout: float | str | None = None,
    budget: float | str | None = None,
    grace: float | str | None = None,
    start_timeout: float | str | None = None,
    max_output: int | str | None = None,
    runs_dir: str | Path | None = None,
    allow_unknown: bool = False,
    now: bool = False,
    wait: bool = True,
    on_start: Callable[[Run], None] | None = None,
    on_event: OnEvent | None = None,
    on_note: OnNote | None = None,
) -> Run:
    """Go on with an interrupted or failed run, or with a completed one if something changed.

    ``notebook`` replaces the run's own copy, ``from_epoch`` goes back to the checkpoint after that epoch;
    with ``wait=False`` it returns once the attempt has been started. Where the runner was killed and its
    guardian still lets the kernel save, that is waited for; ``now`` kills the kernel instead.
    Raises RunNotFound, RunBusy, ResumeError, ApprovalRequired, and what `research` raises, before anything
    is started or changed.
    """
    started = _resume(
        status(run, runs_dir=runs_dir).run_folder,
        parameters or {},
        notebook,
        from_epoch,
        timeout,
        budget,
        grace,
        start_timeout,
        max_output,
        allow_unknown=allow_unknown,
        now=now,
        on_note=on_note,
    )
    return _see_to_end(started, wait, on_start, on_event, on_note)


def _resume(
    folder: RunFolder,
    parameters: Mapping[str, Any],
    notebook: str | Path | None,
    from_epoch: int | None,
    timeout: float | str | None,
    budget: float | str | None,
    grace: float | str | None,
    start_timeout: float | str | None,
    max_output: int | str | None,
    *,
    allow_unknown: bool,
    now: bool = False,
    on_note: OnNote | None,
) -> Started:
    _await_guardian(folder, now, on_note)
    record = recovery.current_record(folder)
    if record.state in (contract.RUNNING, contract.QUEUED):
        raise RunBusy(f"{record.run_id} is {record.state}; see: grd status {record.run_id}")
    lock = acquire(folder)
    try:
        record = store.load(folder)
        if record.state in (contract.RUNNING, contract.QUEUED):
            raise OSError(errno.ENOSPC, "the end of its last attempt could not be written")
        changes = _apply_changes(
            folder, record, parameters, notebook, from_epoch, allow_unknown=allow_unknown
        )
        _apply_limits(record, changes, timeout, budget, grace)
        if start_timeout is not None:
            record.start_timeout = read_seconds("--start-timeout", start_timeout) or record.start_timeout
        if max_output is not None:
            record.max_output = read_size("--max-output", max_output)
        _check_resumable(record, changes)
        edited = changes.pop("text", None)
        attempt = Attempt(
            number=record.attempt + 1,
            lineage=record.lineage + (1 if from_epoch is not None else 0),
            resume=True,
            parameters=dict(record.parameters),
            notebook_sha256=record.notebook_sha256,
            changes=changes,
        )
        record.attempt, record.lineage = attempt.number, attempt.lineage
        record.attempts.append(attempt)
        record.state, record.cause, record.detail = contract.QUEUED, None, None
        record.runner = None  # the last attempt's: this one has none yet, on whatever machine
        record.grd_version = grd.__version__
        # Before anything is changed: an attempt that finds no room could not even tell of its end.
        reserve.take(folder)
        paths = folder.attempt(attempt.number)
        paths.path.mkdir(parents=True, exist_ok=True)
        if edited is not None:
            atomic_write(paths.input, edited)
        _point_out_changed_original(record, edited is not None, on_note)
        store.save(folder, record)
    except BaseException as error:
        reserve.give_back(folder)
        os.close(lock)
        if isinstance(error, OSError):
            raise ResourceUnavailable(
                f"{folder.run_id} cannot be resumed now: {error.strerror or error}; "
                f"make {folder.path} writable, with space left, then: grd resume {folder.run_id}"
            ) from None
        raise
    return _launch(folder, attempt.number, lock)


def _await_guardian(folder: RunFolder, now: bool, on_note: OnNote | None) -> None:
    """Two kernels must never train one run: the old one ends first."""
    if now:
        recovery.end_at_once(folder)
        return
    noted = False
    while recovery.guardian_is_at_work(folder, record := store.load(folder)):
        if not needs_recovery(folder, record):
            return  # its runner lives: the run is busy
        if not noted:
            noted = True
            _note(
                on_note,
                f"the kernel of attempt {record.attempt} has up to {format_duration(record.grace)} to save: "
                "waiting; --now kills it",
            )
        time.sleep(0.1)


def _reserve(runs_dir: Path, name: str) -> tuple[RunFolder, RunFolder]:
    """A run folder that nobody else has or will take, and the one it is made in, which exists then."""
    while True:
        run_id = new_run_id(name)
        folder, staging = RunFolder(runs_dir / run_id), RunFolder(runs_dir / f".new-{run_id}")
        try:
            staging.path.mkdir(parents=True)
        except FileExistsError:
            if not runs_dir.is_dir():
                raise UsageError(f"no run folder can be made in {runs_dir}: it is no folder") from None
            continue
        except OSError as error:
            raise UsageError(f"no run folder can be made in {runs_dir}: {error.strerror or error}") from None
        # Whoever has the staging folder has the name, until it becomes the run folder; then that is there.
        if not folder.path.exists():
            return folder, staging
        staging.path.rmdir()


def _create(
    request: Request,
    settings: Settings,
    limits: Limits,
    runs_dir: Path,
    name: str | None,
    checkpoint_dir: str | Path | None,
    key: str | None,
    on_end: str | None,
) -> tuple[RunFolder, int]:
    """Make the run folder whole or not at all; returns it with its lock already held.

    The lock is taken before the folder gets its name: there is no moment in which somebody could take the
    run for one whose runner is gone.
    """
    shown_name = name or Path(request.source.location.split("?")[0]).stem
    elsewhere = Path(checkpoint_dir).expanduser().resolve() if checkpoint_dir else None
    folder, staging = _reserve(runs_dir, shown_name)
    run_id = folder.run_id
    checkpoints = elsewhere or folder.checkpoints
    record = RunRecord(
        run_id=run_id,
        name=shown_name,
        notebook=request.source.location,
        notebook_sha256=request.source.sha256,
        kernel_name=request.kernel.name,
        language=request.kernel.language,
        parameters=request.parameters,
        declared=request.declared,
        working_dir=str(Path.cwd()),
        checkpoint_dir=str(checkpoints),
        created_at=now_iso(),
        timeout=limits.timeout,
        budget=dict(limits.budget),
        grace=settings.grace,
        max_output=settings.max_output,
        start_timeout=settings.start_timeout,
        checkpointing={
            "max_lost_work": settings.max_lost_work,
            "checkpoint_budget": settings.checkpoint_budget,
        },
        warnings=list(request.warnings),
        folder=str(folder.path),
        key=key,
        on_end=on_end,
        grd_version=grd.__version__,
        attempts=[
            Attempt(
                number=1,
                lineage=1,
                resume=False,
                parameters=dict(request.parameters),
                notebook_sha256=request.source.sha256,
            )
        ],
    )
    try:
        staging.attempt(1).path.mkdir(parents=True)
        checkpoints_here = staging.checkpoints if checkpoint_dir is None else checkpoints
        checkpoints_here.mkdir(parents=True, exist_ok=True)
        atomic_write(staging.input, request.source.text)
        write_json(staging.record, record.to_dict())
        reserve.take(staging)
        lock = acquire(staging)
        try:
            staging.path.rename(folder.path)
        except OSError:
            os.close(lock)
            raise
    except OSError as error:
        shutil.rmtree(staging.path, ignore_errors=True)
        raise UsageError(f"no run folder can be made in {runs_dir}: {error.strerror or error}") from None
    return folder, lock


def _apply_changes(
    folder: RunFolder,
    record: RunRecord,
    parameters: Mapping[str, Any],
    notebook: str | Path | None,
    from_epoch: int | None,
    *,
    allow_unknown: bool,
) -> dict[str, Any]:
    """Check what is to be different in the next attempt and put it into ``record``; returns what changed."""
    changes: dict[str, Any] = {}
    location = str(notebook) if notebook is not None else str(folder.newest_input(record.attempt))
    source = read_notebook(location)
    kernel = find_kernel(source.notebook, None if notebook is not None else record.kernel_name)
    cell = read_parameters_cell(source.notebook, kernel.language or "python")
    merged = resolve({**record.parameters, **parameters}, cell, allow_unknown=allow_unknown)
    check_language(kernel, merged, cell)
    if notebook is not None and source.sha256 != record.notebook_sha256:
        changes["notebook"] = {"from": record.notebook_sha256, "to": source.sha256, "path": source.location}
        changes["text"] = source.text
        record.notebook_sha256 = source.sha256
        record.notebook = source.location
        record.warnings = adoption_warnings(cell)
    record.kernel_name, record.language = kernel.name, kernel.language
    record.declared = [name for name in contract.INJECTED_PARAMETERS if cell.declares(name)]
    different = {
        name: {"from": record.parameters.get(name), "to": value}
        for name, value in merged.items()
        if name not in record.parameters or record.parameters[name] != value
    }
    if different:
        changes["parameters"] = different
    record.parameters = merged
    if from_epoch is not None:
        _check_epoch(record, from_epoch)
        changes["from_epoch"] = from_epoch
    if not Path(record.working_dir).is_dir():
        raise ResumeError(
            f"the run's working folder {record.working_dir} is gone; make it again, then resume"
        )
    return changes


def _check_epoch(record: RunRecord, epoch: int) -> None:
    from grd.experiment.checkpoint_folder import available_epochs, scan

    folder = Path(record.checkpoint_dir)
    have = available_epochs(folder)
    if epoch not in have or scan(folder, epoch=epoch).found is None:
        listed = ", ".join(str(number) for number in have) or "none"
        raise ResumeError(f"{record.run_id} has no good checkpoint of epoch {epoch} (there are: {listed})")


def _apply_limits(
    record: RunRecord,
    changes: dict[str, Any],
    timeout: float | str | None,
    budget: float | str | None,
    grace: float | str | None,
) -> None:
    attempt_cap, total_cap = read_seconds("--timeout", timeout), read_seconds("--budget", budget)
    grace_seconds = read_seconds("--grace", grace)
    if attempt_cap is not None:
        changes["timeout"] = {"from": record.timeout, "to": attempt_cap}
        record.timeout = attempt_cap
        if record.budget.get("agreed") == "default":
            record.budget = {**record.budget, "seconds": None, "agreed": "typed"}
    if total_cap is not None:
        changes["budget"] = {"from": record.budget.get("seconds"), "to": total_cap}
        record.budget = {**record.budget, "seconds": total_cap, "agreed": "typed"}
    if grace_seconds is not None:
        record.grace = grace_seconds


def _check_resumable(record: RunRecord, changes: Mapping[str, Any]) -> None:
    worth = set(changes) & {"notebook", "parameters", "from_epoch"}
    if record.state == contract.COMPLETED and not worth:
        raise ResumeError(
            f"{record.run_id} is completed and nothing changed; see: grd result {record.run_id} "
            "(or give --notebook, -p or --from)"
        )
    left, cause = seconds_left(record)
    if left <= 0:
        cap = format_duration(float(record.budget["seconds"]))
        flag = "--timeout 1h" if cause == contract.APPROVAL_REQUIRED else f"--budget {_more(record)}"
        raise ApprovalRequired(
            f"the {cap} for all attempts of {record.run_id} are used up; "
            f"agree to more: grd resume {record.run_id} {flag}"
        )


def _more(record: RunRecord) -> str:
    return f"{max(1, round(float(record.budget['seconds']) * 2 / 3600))}h"


def _point_out_changed_original(record: RunRecord, edited: bool, on_note: OnNote | None) -> None:
    if edited or "://" in record.notebook:
        return
    with contextlib.suppress(NotFoundError, NotebookError):
        if read_notebook(record.notebook).sha256 != record.notebook_sha256:
            _note(
                on_note,
                f"{record.notebook} has changed since; resuming the run's own copy. "
                f"To use the changed one: grd resume {record.run_id} --notebook {record.notebook}",
            )


def _note(on_note: OnNote | None, text: str) -> None:
    if on_note is not None:
        on_note(text)


def _launch(folder: RunFolder, attempt: int, lock: int) -> Started:
    forget_request(folder)
    position = folder.events.stat().st_size if folder.events.exists() else 0
    return Started(folder, start_runner(folder, attempt, lock), position)


def _see_to_end(
    started: Started,
    wait: bool,
    on_start: Callable[[Run], None] | None,
    on_event: OnEvent | None,
    on_note: OnNote | None,
) -> Run:
    run = Run(started.folder, process=started.process)
    if on_start is not None:
        on_start(run)
    if wait:
        follow(started.folder, started.process, since=started.position, on_event=on_event, on_note=on_note)
    return run
