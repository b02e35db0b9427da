"""Making the folder of a new run, whole or not at all, with its lock held from its first moment on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grd
from grd.errors import UsageError
from grd.execution.launch import acquire
from grd.files import atomic_write, write_json
from grd.runs import reserve
from grd.runs.folder import RunFolder, new_run_id, staging_of
from grd.runs.model import Attempt, RunRecord, now_iso
from grd.settings import Settings
from grd.steps.agreeing import Agreed, cap_of, give_back
from grd.steps.request import Limits, Request


@dataclass(frozen=True, kw_only=True)
class NewRun:
    """A run that was checked and agreed to."""

    request: Request
    settings: Settings
    limits: Limits
    agreed: Agreed
    estimate: dict[str, Any]
    runs_dir: Path
    working_dir: Path
    name: str | None = None
    checkpoint_dir: str | Path | None = None
    key: str | None = None
    on_end: str | None = None
    mlflow: dict[str, Any] | None = None
    gpus: dict[str, Any] | None = None
    retry: dict[str, Any] | None = None
    batch: dict[str, Any] | None = None
    """id and index, where it is one of many."""


def _reserve(runs_dir: Path, name: str) -> tuple[RunFolder, RunFolder]:
    """A run folder that nobody else has or will take, and the one it is made in, which exists then."""
    while True:
        run_id = new_run_id(name)
        folder = RunFolder(runs_dir / run_id)
        staging = RunFolder(staging_of(folder.path))
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


def create_run(new: NewRun, on_named: Callable[[RunFolder], None] | None = None) -> tuple[RunFolder, int]:
    """Make the run folder whole or not at all; returns it with its lock already held.

    The lock is taken before the folder gets its name: there is no moment in which somebody could take the
    run for one whose runner is gone. ``on_named`` hears of it before that, so that what it writes down is
    true from the moment on in which the run exists, whoever is killed in between. Raises UsageError, and
    ApprovalRequired where another run has used up the grant meanwhile.
    """
    request, agreed, settings, runs_dir = new.request, new.agreed, new.settings, new.runs_dir
    shown_name = new.name or Path(request.source.location.split("?")[0]).stem
    elsewhere = Path(new.checkpoint_dir).expanduser().resolve() if new.checkpoint_dir else None
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
        working_dir=str(new.working_dir),
        checkpoint_dir=str(checkpoints),
        created_at=now_iso(),
        timeout=new.limits.timeout,
        budget={
            **agreed.budget(0.0),
            "typed": new.limits.budget,
            "typed_timeout": new.limits.timeout,
        },
        grace=settings.grace,
        max_output=settings.max_output,
        start_timeout=settings.start_timeout,
        checkpointing={
            "max_lost_work": settings.max_lost_work,
            "checkpoint_budget": settings.checkpoint_budget,
        },
        warnings=list(request.warnings),
        folder=str(folder.path),
        mlflow=new.mlflow,
        gpus=new.gpus,
        retry=new.retry,
        estimate=new.estimate,
        key=new.key,
        on_end=new.on_end,
        batch=new.batch,
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
        checkpoints_here = staging.checkpoints if new.checkpoint_dir is None else checkpoints
        checkpoints_here.mkdir(parents=True, exist_ok=True)
        atomic_write(staging.input, request.source.text)
        write_json(staging.record, record.to_dict())
        reserve.take(staging)
        lock = acquire(staging)
        try:
            if on_named is not None:
                on_named(folder)
            staging.path.rename(folder.path)
        except OSError:
            os.close(lock)
            raise
    except OSError as error:
        shutil.rmtree(staging.path, ignore_errors=True)
        give_back(cap, run_id, 1)
        raise UsageError(f"no run folder can be made in {runs_dir}: {error.strerror or error}") from None
    return folder, lock
