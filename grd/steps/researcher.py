"""The Researcher: run a training notebook with a deadline and a checkpoint folder (see also `resuming`).

Everything that can be wrong with the request is found before a kernel or a run folder exists.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grd import contract
from grd.agreement.grants import Place
from grd.errors import UsageError
from grd.runs import recovery, retry
from grd.runs.folder import RunFolder
from grd.settings import find_project_root, load_settings
from grd.steps import keys
from grd.steps.agreeing import Answered, Asker, Wanted, agree
from grd.steps.creating import NewRun, create_run
from grd.steps.estimator import estimate_request
from grd.steps.request import (
    Request,
    check,
    mlflow_of_settings,
    read_gpus,
    read_limits,
    read_mlflow,
    read_retry,
    read_seconds,
    read_size,
)
from grd.steps.resuming import resume_folder
from grd.steps.run import Run, runs_folder
from grd.steps.started import OnEvent, OnNote, Started, launch, see_to_end, tell


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
    mlflow: str | bool | None = None,
    mlflow_experiment: str | None = None,
    max_attempts: int | str | None = None,
    retry_errors: bool | None = None,
    gpus: int | str | None = None,
    gpu_pool: str | None = None,
    ask: Asker | Answered | None = None,
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
    ``mlflow`` sends the run to MLflow while it runs: the URI of a store, or True for the one MLflow's own
    environment names; by default the settings decide. ``gpus`` is how many GPUs the run leases, and waits
    for (0: it sees none); where nobody says it, one, if this machine has any and CUDA_VISIBLE_DEVICES does
    not choose. ``gpu_pool`` is "training" or "inference". With ``max_attempts`` above 1 the run is resumed by
    itself after an interruption that nobody asked for, after a pause, until so many attempts are made; with
    ``retry_errors`` after an error of the notebook too. ``ask`` puts a question to whoever is there, or is
    the answer to one that was put before.
    Raises NotebookNotFound, NotebookError, ParameterError, KernelUnavailable, ResourceUnavailable (GPUs),
    ApprovalRequired or UsageError before anything is started or written.
    """
    root = find_project_root(Path.cwd())
    typed = {
        "grace": read_seconds("--grace", grace),
        "max_output": None if max_output is None else read_size("--max-output", max_output),
        "start_timeout": read_seconds("--start-timeout", start_timeout),
        "mlflow_experiment": mlflow_experiment,
    }
    settings, _ = load_settings(root, typed)
    request = check(str(notebook), parameters or {}, kernel=kernel, allow_unknown=allow_unknown)
    limits = read_limits(timeout, budget)
    if mlflow is None:
        tracked = mlflow_of_settings(settings, request.warnings)
    else:
        tracked = read_mlflow(mlflow, settings.mlflow_experiment, settings.mlflow_interval)
    retried = read_retry(max_attempts, retry_errors, settings)
    place = runs_folder(runs_dir)

    def create(on_named: Callable[[RunFolder], None] | None = None) -> Started:
        devices = read_gpus(gpus, gpu_pool, settings)
        before = estimate_request(request, place)
        agreed = agree(
            Wanted(
                place=Place(project=str(root), notebook=request.source.location),
                timeout=limits.timeout,
                budget=limits.budget,
                typed_now=limits.were_typed,
                grace=settings.grace,
                estimate=before.estimate,
            ),
            settings,
            asker=ask,
        )
        wanted = NewRun(
            request=request,
            settings=settings,
            limits=limits,
            agreed=agreed,
            estimate=before.to_record(),
            runs_dir=place,
            working_dir=Path.cwd(),
            name=name,
            checkpoint_dir=checkpoint_dir,
            key=key,
            on_end=on_end,
            mlflow=tracked,
            gpus=devices,
            retry=retried,
        )
        folder, lock = create_run(wanted, on_named)
        for warning in request.warnings:
            tell(on_note, warning)
        return launch(folder, 1, lock)

    if key is None:
        key = keys.scheduler_key(request.source.location, request.parameters, os.environ)
    if key is None:
        return see_to_end(create(), wait, on_start, on_event, on_note)
    with keys.held(place, key) as slot:
        known = slot.run()
        if known is None:
            started = create(slot.assign)
        else:
            started = _go_on(
                known, request, key, timeout, budget, grace, start_timeout, max_output, gpus, gpu_pool,
                max_attempts, retry_errors, on_note,
            )  # fmt: skip
    return see_to_end(started, wait, on_start, on_event, on_note)


def _go_on(
    folder: RunFolder,
    request: Request,
    key: str,
    timeout: float | str | None,
    budget: float | str | None,
    grace: float | str | None,
    start_timeout: float | str | None,
    max_output: int | str | None,
    gpus: int | str | None,
    gpu_pool: str | None,
    max_attempts: int | str | None,
    retry_errors: bool | None,
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
    if action == "resume" and retry.is_pending(folder, record):
        action = "attach"  # it goes on by itself
    if action == "attach":
        tell(on_note, f"{record.run_id} has key {key!r} and is under way: attached")
        return Started(folder, None, 0)
    if action == "show":
        tell(on_note, f"{record.run_id} has key {key!r} and is {record.state}: nothing to do")
        return Started(folder, None, folder.events.stat().st_size if folder.events.exists() else 0)
    edited = request.source.location if record.state == contract.FAILED else None
    # The caps are the same words typed again, not new ones: only what differs is a change.
    more_time = timeout if read_seconds("--timeout", timeout) != record.timeout else None
    more_budget = budget if read_seconds("--budget", budget) != record.budget.get("seconds") else None
    return resume_folder(
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
        gpus=gpus,
        gpu_pool=gpu_pool,
        max_attempts=max_attempts,
        retry_errors=retry_errors,
        on_note=on_note,
    )
