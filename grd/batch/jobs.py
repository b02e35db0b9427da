"""A job: all that is needed to start, attach to, or resume one run of a batch, as JSON values.

Starting one is idempotent wherever it is done, and however often: the run that has the job's key is looked
up under the key's lock, which is given its run before that exists under its name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grd import contract
from grd.agreement.grants import Place
from grd.batch.plan import Options, PlannedRun
from grd.errors import UsageError
from grd.execution.launch import StartRunner, start_runner
from grd.execution.notebooks import Source, parse_notebook
from grd.runs import recovery
from grd.runs.batch_folder import BatchFolder
from grd.runs.folder import RunFolder
from grd.runs.model import RunRecord
from grd.settings import find_project_root, load_settings
from grd.steps import keys
from grd.steps.agreeing import Wanted, agree
from grd.steps.creating import NewRun, create_run
from grd.steps.estimator import Estimator
from grd.steps.following import is_under_way
from grd.steps.request import Limits, Request, mlflow_of_settings, open_request, wanted_gpus
from grd.steps.resuming import resume_folder
from grd.steps.started import OnNote, Started, launch, tell

SCHEMA = "grd.job/1"
Job = dict[str, Any]

Action = Literal["start", "attach", "resume", "show"]


def make_job(
    folder: BatchFolder,
    run: PlannedRun,
    options: Options,
    *,
    working_dir: str,
    retry_failed: bool,
    environment: Mapping[str, str],
) -> Job:
    """The job of one run; ``environment`` is what its processes get besides that of the placement."""
    return {
        "schema": SCHEMA,
        "batch": folder.batch_id,
        "index": run.index,
        "key": run.key,
        "name": run.name,
        "notebook": run.notebook,
        "notebook_sha256": run.notebook_sha256,
        "notebook_copy": str(folder.notebook(run.notebook_sha256)),
        "kernel": run.kernel,
        "parameters": run.parameters,
        "timeout": run.timeout if options.timeout is None else options.timeout,
        "budget": run.budget if options.budget is None else options.budget,
        "grace": options.grace,
        "start_timeout": options.start_timeout,
        "max_output": options.max_output,
        "gpus": options.gpus,
        "gpu_pool": options.gpu_pool,
        "allow_unknown": options.allow_unknown,
        "force": options.force,
        "retry_failed": retry_failed,
        "runs_dir": str(folder.runs_dir),
        "working_dir": working_dir,
        "environment": dict(environment),
    }


@dataclass(frozen=True)
class Begun:
    """A job's run: what was done with it."""

    action: Action
    started: Started


class Starter:
    """Starts jobs; keeps the notebooks and estimates that many of them share."""

    def __init__(self, on_note: OnNote | None = None, start: StartRunner = start_runner) -> None:
        self._on_note = on_note
        self._start_runner = start
        self._opened: dict[tuple[str, str | None], Request] = {}
        self._estimators: dict[str, Estimator] = {}

    def start(self, job: Job) -> Begun:
        """The run of ``job``: started, resumed, attached to, or found to need nothing.

        Raises what `grd.research` and `grd.resume` raise.
        """
        runs_dir = Path(job["runs_dir"])
        with keys.held(runs_dir, job["key"]) as slot:
            known = slot.run()
            record = None if known is None else recovery.current_record(known)
            if known is None or record is None:
                return Begun("start", self._create(job, runs_dir, slot))
            action = decide(record, job, under_way=is_under_way(known))
            if action == "start":
                return Begun(action, self._create(job, runs_dir, slot))
            if action == "resume":
                return Begun(action, self._resume(job, known, record))
            return Begun(action, Started(known, None, 0))

    def _create(self, job: Job, runs_dir: Path, slot: keys.Slot) -> Started:
        request = self._request(job)
        working_dir = Path(job["working_dir"])
        root = find_project_root(working_dir)
        chosen = {name: job[name] for name in ("grace", "start_timeout", "max_output")}
        settings, _ = load_settings(root, chosen)
        agreed = agree(
            Wanted(
                place=Place(project=str(root), notebook=request.source.location, batch_id=job["batch"]),
                timeout=job["timeout"],
                budget=job["budget"],
                typed_now=False,
                grace=settings.grace,
            ),
            settings,
            environment={**os.environ, contract.ENV_NONINTERACTIVE: "1"},
        )
        estimator = self._estimators.setdefault(str(runs_dir), Estimator(runs_dir))
        new = NewRun(
            request=request,
            settings=settings,
            limits=Limits(job["timeout"], job["budget"]),
            agreed=agreed,
            estimate=estimator.estimate(request).to_record(),
            runs_dir=runs_dir,
            working_dir=working_dir,
            name=job["name"],
            key=job["key"],
            mlflow=mlflow_of_settings(settings, request.warnings),
            gpus=wanted_gpus(job["gpus"], job["gpu_pool"]),
            batch={"id": job["batch"], "index": job["index"]},
        )
        folder, lock = create_run(new, slot.assign)
        return launch(folder, 1, lock, job["environment"], start=self._start_runner)

    def _request(self, job: Job) -> Request:
        which = (job["notebook_copy"], job["kernel"])
        if which not in self._opened:
            try:
                text = Path(job["notebook_copy"]).read_text(encoding="utf-8")
            except OSError as error:
                raise UsageError(f"{job['notebook_copy']} cannot be read: {error.strerror}") from None
            source = Source(job["notebook"], text, parse_notebook(text, job["notebook"]))
            self._opened[which] = open_request(source, job["kernel"])
        return self._opened[which].given(job["parameters"], allow_unknown=job["allow_unknown"])

    def _resume(self, job: Job, folder: RunFolder, record: RunRecord) -> Started:
        tell(self._on_note, f"{folder.run_id} goes on")
        limits = changed_limits(record, job)
        return resume_folder(
            folder,
            {},
            None,
            None,
            limits["timeout"],
            limits["budget"],
            job["grace"],
            job["start_timeout"],
            job["max_output"],
            allow_unknown=True,
            gpus=job["gpus"],
            gpu_pool=job["gpu_pool"],
            environment=job["environment"],
            batch_id=job["batch"],
            start=self._start_runner,
            on_note=self._on_note,
        )


def changed_limits(record: RunRecord, job: Mapping[str, Any]) -> dict[str, float | None]:
    """The limits in seconds that a job gives its run anew; None where it says nothing new. Pure."""
    before = {"timeout": record.timeout, "budget": record.budget.get("typed")}
    return {name: job[name] if job[name] != before[name] else None for name in before}


def decide(record: RunRecord, job: Mapping[str, Any], *, under_way: bool) -> Action:
    """What a job does with the run that has its key. Pure.

    A failure of an earlier batch is tried again, one of this batch only where that was asked for.
    """
    ours = (record.batch or {}).get("id") == job["batch"]
    if job["force"] and not ours:
        return "start"
    if under_way or record.state in (contract.QUEUED, contract.RUNNING):
        return "attach"
    if record.state == contract.INTERRUPTED:
        return "resume"
    if record.state == contract.FAILED and (job["retry_failed"] or not ours):
        return "resume"
    if record.state in (contract.DECLINED, contract.CANCELLED):
        return "start"
    return "show"
