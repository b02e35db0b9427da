"""Going on with a run: what may change, whether there is something to go on with, and the next attempt."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import grd
from grd import contract
from grd.agreement import decision
from grd.agreement.grants import Place
from grd.agreement.person import who_can_answer
from grd.errors import (
    ApprovalRequired,
    NotebookError,
    NotFoundError,
    ResourceUnavailable,
    ResumeError,
    RunBusy,
    UsageError,
)
from grd.execution.launch import StartRunner, acquire, start_runner
from grd.execution.notebooks import find_kernel, read_notebook
from grd.execution.parameters import read_parameters_cell, resolve
from grd.files import atomic_write
from grd.runs import recovery, reserve, store
from grd.runs.folder import RunFolder
from grd.runs.liveness import needs_recovery
from grd.runs.model import Attempt, RunRecord, seconds_left
from grd.settings import find_project_root, format_duration, load_settings
from grd.steps.agreeing import Agreed, Answered, Asker, Wanted, agree, cap_of, give_back
from grd.steps.request import (
    adoption_warnings,
    check_language,
    defaults_of,
    injected_names,
    read_gpus,
    read_mlflow,
    read_retry,
    read_seconds,
    read_size,
)
from grd.steps.run import Run, status
from grd.steps.started import OnEvent, OnNote, Started, launch, see_to_end, tell
from grd.tracking.mlflow.follower import DEFAULT_INTERVAL_SECONDS


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
    mlflow: str | bool | None = None,
    mlflow_experiment: str | None = None,
    gpus: int | str | None = None,
    gpu_pool: str | None = None,
    max_attempts: int | str | None = None,
    retry_errors: bool | None = None,
    now: bool = False,
    ask: Asker | Answered | None = None,
    wait: bool = True,
    on_start: Callable[[Run], None] | None = None,
    on_event: OnEvent | None = None,
    on_note: OnNote | None = None,
) -> Run:
    """Go on with an interrupted or failed run, or with a completed one if something changed.

    ``notebook`` replaces the run's own copy, ``from_epoch`` goes back to the checkpoint after that epoch;
    with ``wait=False`` it returns once the attempt has been started. Where the runner was killed and its
    guardian still lets the kernel save, that is waited for; ``now`` kills the kernel instead. ``gpus`` and
    ``gpu_pool`` are as in `research`; without them it leases what the run was started with.
    ``max_attempts`` and ``retry_errors`` are as in `research`, counted from this attempt on; without them
    what the run was started with goes on.
    Raises RunNotFound, RunBusy, ResumeError, ApprovalRequired, and what `research` raises, before anything
    is started or changed.
    """
    started = resume_folder(
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
        mlflow=mlflow,
        mlflow_experiment=mlflow_experiment,
        gpus=gpus,
        gpu_pool=gpu_pool,
        max_attempts=max_attempts,
        retry_errors=retry_errors,
        now=now,
        ask=ask,
        on_note=on_note,
    )
    return see_to_end(started, wait, on_start, on_event, on_note)


def resume_folder(
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
    mlflow: str | bool | None = None,
    mlflow_experiment: str | None = None,
    gpus: int | str | None = None,
    gpu_pool: str | None = None,
    max_attempts: int | str | None = None,
    retry_errors: bool | None = None,
    retrying: bool = False,
    now: bool = False,
    ask: Asker | Answered | None = None,
    environment: Mapping[str, str] | None = None,
    start: StartRunner = start_runner,
    batch_id: str | None = None,
    on_note: OnNote | None,
) -> Started:
    """`resume` of the run in ``folder``, started, as ``start`` does, and not waited for; ``environment`` is
    its runner's, besides this process's. ``batch_id`` is the batch that wants it, and whose agreement counts.

    ``retrying`` is for who resumes it by itself: a stop that was asked for meanwhile holds, and attempts go
    on being counted.
    """
    _await_guardian(folder, now, on_note)
    record = recovery.current_record(folder)
    if record.state in (contract.RUNNING, contract.QUEUED):
        raise RunBusy(f"{record.run_id} is {record.state}; see: grd status {record.run_id}")
    lock = acquire(folder)
    cap, number = None, 0
    try:
        record = store.load(folder)
        if record.state in (contract.RUNNING, contract.QUEUED):
            raise OSError(errno.ENOSPC, "the end of its last attempt could not be written")
        changes = _apply_changes(
            folder, record, parameters, notebook, from_epoch, allow_unknown=allow_unknown
        )
        # What a person has typed for each attempt: an agent's shorter one is for its own attempt.
        typed_timeout = record.budget.get("typed_timeout", record.timeout)
        _apply_limits(record, changes, timeout, budget, grace)
        typed = batch_id is None and (timeout is not None or budget is not None)
        agreed = _agree(folder, record, typed, ask, batch_id, typed_timeout)
        if timeout is not None and (agreed.word != decision.TYPED or who_can_answer() is not None):
            typed_timeout = record.timeout
        used = float(record.budget.get("used_seconds") or 0.0)
        kept = {"typed": record.budget.get("typed"), "typed_timeout": typed_timeout}
        record.budget = {**agreed.budget(used), **kept}
        if start_timeout is not None:
            record.start_timeout = read_seconds("--start-timeout", start_timeout) or record.start_timeout
        if max_output is not None:
            record.max_output = read_size("--max-output", max_output)
        _apply_mlflow(record, mlflow, mlflow_experiment)
        settings, _ = load_settings(find_project_root(Path(record.working_dir)))
        record.gpus = read_gpus(gpus, gpu_pool, settings, before=record.gpus)
        number = record.attempt + 1
        if not retrying:
            _apply_retry(record, number, max_attempts, retry_errors)
        cap = cap_of(agreed, folder, number, used)
        _check_resumable(record, changes, cap)
        edited = changes.pop("text", None)
        attempt = Attempt(
            number=number,
            cap=cap,
            lineage=record.lineage + (1 if from_epoch is not None else 0),
            resume=True,
            parameters=dict(record.parameters),
            notebook_sha256=record.notebook_sha256,
            changes=changes,
        )
        record.attempt, record.lineage = attempt.number, attempt.lineage
        record.attempts.append(attempt)
        record.state, record.cause, record.detail = contract.QUEUED, None, None
        record.resumable, record.resume_command = False, None
        record.runner = None  # the last attempt's: this one has none yet, on whatever machine
        record.grd_version = grd.__version__
        # Before anything is changed: an attempt that finds no room could not even tell of its end.
        reserve.take(folder)
        paths = folder.attempt(attempt.number)
        paths.path.mkdir(parents=True, exist_ok=True)
        if edited is not None:
            atomic_write(paths.input, edited)
        _point_out_changed_original(record, edited is not None, on_note)
        _point_out_what_is_restored(record, changes, on_note)
        store.save(folder, record)
    except BaseException as error:
        give_back(cap, folder.run_id, number)
        reserve.give_back(folder)
        os.close(lock)
        if isinstance(error, OSError):
            raise ResourceUnavailable(
                f"{folder.run_id} cannot be resumed now: {error.strerror or error}; "
                f"make {folder.path} writable, with space left, then: grd resume {folder.run_id}"
            ) from None
        raise
    return launch(folder, attempt.number, lock, environment, forget=not retrying, start=start)


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
            tell(
                on_note,
                f"the kernel of attempt {record.attempt} has up to {format_duration(record.grace)} to save: "
                "waiting; --now kills it",
            )
        time.sleep(0.1)


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
    record.defaults = defaults_of(cell)
    record.declared = injected_names(cell)
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
    if total_cap is not None:
        changes["budget"] = {"from": record.budget.get("seconds"), "to": total_cap}
        record.budget = {**record.budget, "typed": total_cap}
    if grace_seconds is not None:
        record.grace = grace_seconds


def _agree(
    folder: RunFolder,
    record: RunRecord,
    typed_now: bool,
    ask: Asker | Answered | None,
    batch_id: str | None,
    typed_timeout: float | None,
) -> Agreed:
    budget = record.budget
    typed = budget.get("typed", budget.get("seconds") if budget.get("agreed") == "typed" else None)
    root = find_project_root(Path(record.working_dir))
    settings, _ = load_settings(root)
    if budget.get("agreed") == decision.DEFAULT and budget.get("seconds") is not None:
        settings = replace(settings, default_timeout=float(budget["seconds"]))  # as it was at the start
    wanted = Wanted(
        place=Place(
            project=str(root),
            notebook=record.notebook,
            run_id=folder.run_id,
            batch_id=batch_id or (None if record.batch is None else str(record.batch.get("id"))),
        ),
        timeout=record.timeout,
        budget=typed,
        typed_now=typed_now,
        grace=record.grace,
        used=float(budget.get("used_seconds") or 0.0),
        agreed_before=str(budget.get("agreed") or decision.DEFAULT),
        agreed_timeout=typed_timeout,
        agreed_total=budget.get("seconds"),
    )
    return agree(wanted, settings, asker=ask)


def _apply_mlflow(record: RunRecord, mlflow: str | bool | None, experiment: str | None) -> None:
    before = record.mlflow or {}
    if mlflow is None and experiment is None:
        return
    if mlflow is None:
        if record.mlflow is None:
            raise UsageError("--mlflow-experiment: this run is not sent to MLflow; add --mlflow")
        record.mlflow = {**before, "experiment": experiment}
        return
    interval = float(before.get("interval") or DEFAULT_INTERVAL_SECONDS)
    record.mlflow = read_mlflow(mlflow, experiment or before.get("experiment"), interval)


def _apply_retry(
    record: RunRecord, number: int, max_attempts: int | str | None, retry_errors: bool | None
) -> None:
    settings, _ = load_settings(find_project_root(Path(record.working_dir)))
    before = record.retry or {"max_attempts": 1}  # a setting of now is not for a run of before
    chosen = read_retry(max_attempts, retry_errors, settings, before=before)
    record.retry = None if chosen is None else {**chosen, "from_attempt": number}


def _check_resumable(record: RunRecord, changes: Mapping[str, Any], cap: dict[str, Any] | None) -> None:
    worth = set(changes) & {"notebook", "parameters", "from_epoch"}
    if record.state == contract.COMPLETED and not worth:
        raise ResumeError(
            f"{record.run_id} is completed and nothing changed; see: grd result {record.run_id} "
            "(or give --notebook, -p or --from)"
        )
    left, cause = seconds_left(record, cap)
    if left <= 0:
        agreed = format_duration(float(record.budget.get("seconds") or 0.0))
        flag = "--timeout 1h" if cause == contract.APPROVAL_REQUIRED else f"--budget {_more(record)}"
        raise ApprovalRequired(
            f"the {agreed} for all attempts of {record.run_id} are used up; "
            f"agree to more: grd resume {record.run_id} {flag}"
        )


def _more(record: RunRecord) -> str:
    """Twice as much as was agreed to, and more than was used."""
    hours = 2 * max(float(record.budget["seconds"]), float(record.budget.get("used_seconds") or 0.0)) / 3600
    return f"{max(1, round(hours))}h"


def _point_out_what_is_restored(
    record: RunRecord, changes: Mapping[str, Any], on_note: OnNote | None
) -> None:
    """A changed parameter may be a value that the checkpoint restores over it."""
    if changes.get("parameters") and (record.checkpoint or {}).get("epoch") is not None:
        names = ", ".join(sorted(changes["parameters"]))
        tell(
            on_note,
            f"{names} changed; what the checkpoint restores (learning rate and other values of the "
            "optimizer and the schedulers) goes on as saved all the same",
        )


def _point_out_changed_original(record: RunRecord, edited: bool, on_note: OnNote | None) -> None:
    if edited or "://" in record.notebook:
        return
    with contextlib.suppress(NotFoundError, NotebookError):
        if read_notebook(record.notebook).sha256 != record.notebook_sha256:
            changed = shlex.quote(record.notebook)
            tell(
                on_note,
                f"{record.notebook} has changed since; resuming the run's own copy. "
                f"To use the changed one: grd resume {record.run_id} --notebook {changed}",
            )
