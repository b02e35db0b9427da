"""The Researcher: run a training notebook with a deadline and a checkpoint folder (see also `resuming`).

Everything that can be wrong with the request is found before a kernel or a run folder exists.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grd
from grd import contract
from grd.agreement.grants import Place
from grd.errors import UsageError
from grd.execution.launch import acquire
from grd.files import atomic_write, write_json
from grd.runs import recovery, reserve, retry
from grd.runs.folder import RunFolder, new_run_id
from grd.runs.model import Attempt, RunRecord, now_iso
from grd.settings import Settings, find_project_root, load_settings
from grd.steps import keys
from grd.steps.agreeing import Agreed, Answered, Asker, Wanted, agree, cap_of, give_back
from grd.steps.estimator import estimate_request
from grd.steps.request import (
    Limits,
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

    def create() -> Started:
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
        folder, lock = _create(
            request,
            settings,
            limits,
            agreed,
            before.to_record(),
            place,
            name,
            checkpoint_dir,
            key,
            on_end,
            tracked,
            devices,
            retried,
        )
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
            started = create()
            slot.assign(started.folder)
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
    agreed: Agreed,
    estimate: dict[str, Any],
    runs_dir: Path,
    name: str | None,
    checkpoint_dir: str | Path | None,
    key: str | None,
    on_end: str | None,
    mlflow: dict[str, Any] | None,
    gpus: dict[str, Any] | None,
    retried: dict[str, Any] | None,
) -> tuple[RunFolder, int]:
    """Make the run folder whole or not at all; returns it with its lock already held.

    The lock is taken before the folder gets its name: there is no moment in which somebody could take the
    run for one whose runner is gone.
    """
    shown_name = name or Path(request.source.location.split("?")[0]).stem
    elsewhere = Path(checkpoint_dir).expanduser().resolve() if checkpoint_dir else None
    folder, staging = _reserve(runs_dir, shown_name)
    run_id = folder.run_id
    try:
        cap = cap_of(agreed, folder, 1, 0.0)
    except BaseException:
        staging.path.rmdir()
        raise
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
        defaults=request.defaults,
        working_dir=str(Path.cwd()),
        checkpoint_dir=str(checkpoints),
        created_at=now_iso(),
        timeout=limits.timeout,
        budget={**agreed.budget(0.0), "typed": limits.budget},
        grace=settings.grace,
        max_output=settings.max_output,
        start_timeout=settings.start_timeout,
        checkpointing={
            "max_lost_work": settings.max_lost_work,
            "checkpoint_budget": settings.checkpoint_budget,
        },
        warnings=list(request.warnings),
        folder=str(folder.path),
        mlflow=mlflow,
        gpus=gpus,
        retry=retried,
        estimate=estimate,
        key=key,
        on_end=on_end,
        grd_version=grd.__version__,
        attempts=[
            Attempt(
                number=1,
                lineage=1,
                resume=False,
                cap=cap,
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
        give_back(cap, run_id, 1)
        raise UsageError(f"no run folder can be made in {runs_dir}: {error.strerror or error}") from None
    return folder, lock
