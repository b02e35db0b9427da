"""Keys that make ``grd research`` idempotent: one key, one run, however often the command is typed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from grd import contract
from grd.errors import ResourceUnavailable, UsageError
from grd.files import atomic_write, take_lock
from grd.runs.folder import RunFolder, is_run_id, staging_of

LOCK_WAIT_SECONDS = 30.0
"""A start takes about a second; whoever calls at the same moment waits for it and then attaches."""

Action = Literal["attach", "resume", "show"]


@dataclass(frozen=True)
class Slot:
    """The place of one key while its lock is held."""

    runs_dir: Path
    path: Path

    def run(self) -> RunFolder | None:
        """The run that has this key; None if there is none, or it was removed.

        One that was being made by somebody who was killed never came to be: what there is of it is swept.
        """
        found = _run_in(self.runs_dir, self.path)
        if found is None:
            with contextlib.suppress(OSError):
                name = self.path.read_text(encoding="utf-8").strip()
                if is_run_id(name):
                    shutil.rmtree(staging_of(self.runs_dir / name), ignore_errors=True)
        return found

    def assign(self, folder: RunFolder) -> None:
        """Give the key to ``folder``."""
        atomic_write(self.path, folder.run_id + "\n")


def run_of(runs_dir: Path, key: str) -> RunFolder | None:
    """The run that has ``key`` at this moment, for those who only look."""
    return _run_in(runs_dir, runs_dir / ".keys" / _name_of(key))


def _run_in(runs_dir: Path, slot: Path) -> RunFolder | None:
    try:
        name = slot.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    folder = RunFolder(runs_dir / name)
    return folder if name and folder.record.exists() else None


def _name_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:32]


@contextlib.contextmanager
def held(runs_dir: Path, key: str) -> Iterator[Slot]:
    """The slot of ``key``, exclusively. Raises UsageError for an empty key, ResourceUnavailable if stuck."""
    if not key.strip():
        raise UsageError("--key must not be empty")
    folder = runs_dir / ".keys"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"no run folder can be made in {runs_dir}: {error.strerror or error}") from None
    name = _name_of(key)
    lock = take_lock(folder / f"{name}.lock", wait_seconds=LOCK_WAIT_SECONDS)
    if lock is None:
        raise ResourceUnavailable(
            f"another call with key {key!r} has been starting for long; see: grd status"
        )
    try:
        yield Slot(runs_dir, folder / name)
    finally:
        os.close(lock)


def decide(state: str, cause: str | None, *, notebook_changed: bool) -> Action:
    """What to do with the run that has the key.

    A failure is not run again by itself, unless the notebook was edited since: then that is the answer.
    """
    if state in (contract.QUEUED, contract.RUNNING):
        return "attach"
    if state == contract.INTERRUPTED:
        return "resume"
    if state == contract.FAILED and (notebook_changed or cause == contract.START_FAILED):
        return "resume"
    return "show"


def scheduler_key(
    notebook: str, parameters: Mapping[str, object], environment: Mapping[str, str]
) -> str | None:
    """The default key inside a Slurm job: a requeued script goes on where it was. None elsewhere.

    Job id and array index, and what is run: one job may run two notebooks.
    """
    job = environment.get("SLURM_ARRAY_JOB_ID") or environment.get("SLURM_JOB_ID")
    if not job:
        return None
    task = environment.get("SLURM_ARRAY_TASK_ID")
    what = hashlib.sha256(repr((notebook, sorted(parameters.items()))).encode()).hexdigest()[:8]
    return f"slurm-{job}{f'_{task}' if task else ''}-{what}"
