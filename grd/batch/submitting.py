"""Submitting a batch, and going on with one: everything is checked and agreed to before anything exists."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from grd import contract
from grd.batch import documents
from grd.batch import record as records
from grd.batch.agreeing import BatchAsker, agree_in_advance
from grd.batch.coordinator import launch_coordinator
from grd.batch.following import OnEvent, OnNote, follow
from grd.batch.looking import Batch, batch_status
from grd.batch.plan import Plan, make_plan
from grd.batch.spec import read_spec
from grd.batch.view import look
from grd.errors import ResourceUnavailable, RunBusy, UsageError
from grd.files import take_lock
from grd.hardware import leases
from grd.hardware.leases import Wanted as Leased
from grd.hardware.limits import current_limits
from grd.hardware.pools import TRAINING
from grd.runs import recovery
from grd.runs.batch_folder import BatchFolder
from grd.settings import Settings, find_project_root, load_settings
from grd.steps import keys
from grd.steps.request import read_seconds
from grd.steps.run import runs_folder
from grd.steps.started import tell

LOCK_WAIT_SECONDS = 2.0


def batch(
    spec: str | Path | Mapping[str, Any],
    *,
    force: bool = False,
    runs_dir: str | Path | None = None,
    ask: BatchAsker | None = None,
    wait: bool = True,
    on_start: Callable[[Batch], None] | None = None,
    on_event: OnEvent | None = None,
    on_note: OnNote | None = None,
    **more: Any,
) -> Batch:
    """Run many notebooks: a grid, a list or a file of parameters, so many at once as the machine has cores.

    ``spec`` is a file (YAML, JSON, or CSV with ``notebook=``) or a mapping with the same keys: ``notebook``,
    ``parameters``, ``grid``, ``zip``, ``list``, ``file``, ``runs``, ``jobs``, ``timeout`` and more; ``more``
    has such keys too, which win. A run that is completed already (the same code cells, kernel, parameters
    and inputs) is not run again, unless ``force``. With ``wait=False`` it returns once the batch has been
    started; it outlives this process either way.
    Raises UsageError with the place in the spec, NotFoundError, KernelUnavailable or ApprovalRequired
    before anything is started or written.
    """
    plan = plan_of(spec, more, force=force)
    place = runs_folder(runs_dir)
    root = find_project_root(Path.cwd())
    settings = check_machine(plan)
    name = str(plan.spec.settings.get("name") or _name_of(plan))
    batch_id = records.new_batch_id(name)
    done = already_completed(plan, place)
    grant = agree_in_advance(
        plan,
        [run for run in plan.runs if run.index not in done],
        settings,
        batch_id=batch_id,
        project=root,
        runs_dir=place,
        typed=bool({"timeout", "budget"} & {key for key, value in more.items() if value is not None}),
        asker=ask,
    )
    record = records.fresh_record(plan, batch_id, name)
    record.grant = grant
    folder, lock = records.create_batch(plan, record, place, *_document_of(plan, spec, more))
    for warning in plan.warnings:
        tell(on_note, warning)
    process = launch_coordinator(folder, lock, record.working_dir)
    return _see_to_end(Batch(folder, process=process), wait, on_start, on_event, on_note)


def check_machine(plan: Plan) -> Settings:
    """See that each run could be begun here; returns the settings in force.

    Raises ResourceUnavailable or ConfigurationError.
    """
    common = {name: getattr(plan.options, name) for name in ("grace", "start_timeout", "max_output")}
    settings, _ = load_settings(find_project_root(Path.cwd()), common)
    _check_gpus(plan, settings)
    _check_memory(plan.options.memory)
    return settings


def _check_memory(needed: int | None) -> None:
    """Raises ResourceUnavailable where no run could ever have what it needs."""
    total = psutil.virtual_memory().total
    limit = current_limits().memory_limit(total)
    most = total if limit is None else limit.limit
    if needed is not None and needed > most:
        raise ResourceUnavailable(
            f"each run needs {needed / 1e9:.3g} GB of memory, and there are {most / 1e9:.3g} GB here in all; "
            "give --memory less, or take a larger machine"
        )


def _check_gpus(plan: Plan, settings: Settings) -> None:
    """Raises ResourceUnavailable or ConfigurationError where no run could ever have its GPUs."""
    asked = plan.options.gpus is not None or plan.options.gpu_pool is not None
    try:
        count = (plan.options.gpus or 0) if asked else None
        leases.check(Leased(count, plan.options.gpu_pool or TRAINING), settings)
    except ResourceUnavailable:
        if asked:
            raise  # else the runs of a batch wait for each other's


def plan_of(
    spec: str | Path | Mapping[str, Any], more: Mapping[str, Any] | None = None, *, force: bool = False
) -> Plan:
    """What `batch` would run, checked whole. Starts and writes nothing; raises as `batch` does."""
    return make_plan(read_spec(spec, more), force=force)


def resume_batch(
    which: str | Batch = "last",
    *,
    failed: bool = False,
    jobs: int | None = None,
    timeout: float | str | None = None,
    budget: float | str | None = None,
    runs_dir: str | Path | None = None,
    wait: bool = True,
    on_start: Callable[[Batch], None] | None = None,
    on_event: OnEvent | None = None,
    on_note: OnNote | None = None,
) -> Batch:
    """Go on with a batch: runs that are under way are found again, interrupted ones resumed, those that were
    never begun are; completed ones are not touched. ``failed`` takes failed ones up again too.

    ``jobs`` is another number at once; ``timeout`` and ``budget`` (seconds, or text such as "2h") are other
    caps on one attempt, and on all attempts, of each of these runs. Raises NotFoundError, RunBusy where its
    coordinator lives, UsageError, and ApprovalRequired before anything is started where somebody must agree
    to the time.
    """
    caps = {"timeout": read_seconds("--timeout", timeout), "budget": read_seconds("--budget", budget)}
    caps = {name: seconds for name, seconds in caps.items() if seconds is not None}
    if jobs is not None and (isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1):
        raise UsageError(f"--jobs is a number from 1 on, not {jobs!r}")
    folder = batch_status(which, runs_dir=runs_dir).batch_folder
    lock = take_lock(folder.lock, wait_seconds=LOCK_WAIT_SECONDS)
    if lock is None:
        raise RunBusy(f"{folder.batch_id} is running; see: grd batch status {folder.batch_id}")
    try:
        record = records.load(folder)
        if not Path(record.working_dir).is_dir():
            raise UsageError(f"the batch's working folder {record.working_dir} is gone; make it again")
        records.forget_request(folder)
        record.state, record.cause, record.detail = contract.QUEUED, None, None
        record.retry_failed = failed
        record.starts = max(1, record.starts)
        if jobs is not None:
            record.options["jobs"] = jobs
        if caps:
            record.options |= caps
            record.grant = _agree_to_resume(folder, record) or record.grant
        records.save(folder, record)
        size = folder.events.stat().st_size if folder.events.exists() else 0
    except BaseException:
        os.close(lock)
        raise
    process = launch_coordinator(folder, lock, record.working_dir)
    return _see_to_end(Batch(folder, process=process, since=size), wait, on_start, on_event, on_note)


def _agree_to_resume(folder: BatchFolder, record: records.BatchRecord) -> str | None:
    """Somebody's agreement to other caps, as `agree_in_advance` has it."""
    timeout, budget = record.options.get("timeout"), record.options.get("budget")
    ended = {contract.COMPLETED} if record.retry_failed else {contract.COMPLETED, contract.FAILED}
    rows = look(folder, record, records.planned_runs(folder))
    runs = [
        replace(row.run, timeout=timeout or row.run.timeout, budget=budget or row.run.budget)
        for row in rows
        if row.state not in ended
    ]
    root = find_project_root(Path(record.working_dir))
    settings, _ = load_settings(root, {"grace": record.options.get("grace")})
    if not runs:
        return None
    return agree_in_advance(
        None,
        runs,
        settings,
        batch_id=folder.batch_id,
        project=root,
        runs_dir=folder.runs_dir,
        typed=True,
        asker=None,
    )


def already_completed(plan: Plan, runs_dir: Path) -> dict[int, str]:
    """By index: the completed run that makes a planned one needless."""
    found = {}
    for run in plan.runs if not plan.options.force else ():
        folder = keys.run_of(runs_dir, run.key)
        if folder is not None and recovery.current_record(folder).state == contract.COMPLETED:
            found[run.index] = folder.run_id
    return found


def _see_to_end(
    made: Batch,
    wait: bool,
    on_start: Callable[[Batch], None] | None,
    on_event: OnEvent | None,
    on_note: OnNote | None,
) -> Batch:
    if on_start is not None:
        on_start(made)
    if wait:
        follow(made.batch_folder, made.process, since=made.since, on_event=on_event, on_note=on_note)
    return made


def _name_of(plan: Plan) -> str:
    if isinstance(plan.spec.origin, str) and plan.spec.origin.endswith(documents.SUFFIXES):
        return Path(plan.spec.origin).stem
    return Path(plan.runs[0].notebook.split("?")[0]).stem


def _document_of(
    plan: Plan, submitted: str | Path | Mapping[str, Any], more: Mapping[str, Any]
) -> tuple[str, str]:
    """The spec as submitted: the file's own text, or what was typed as JSON that can be submitted again."""
    typed = any(value is not None for value in more.values())
    if not isinstance(submitted, Mapping) and not typed:
        path = Path(submitted)
        return documents.read_text(path, str(submitted)), path.suffix.lower()
    document = dict(plan.spec.document)
    if document.get("parameters"):
        # Text from a command line has the notebook's type by now; as text it would be another value.
        common = dict(document["parameters"])
        document["parameters"] = {name: plan.runs[0].parameters.get(name, common[name]) for name in common}
    return json.dumps(document, indent=2, default=str, ensure_ascii=False) + "\n", ".json"
