"""Deleting runs, and what ended runs no longer need."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from grd import contract
from grd.errors import ConfigurationError, RunBusy, RunNotFound
from grd.files import read_json, take_lock
from grd.runs import leftovers, retry, store
from grd.runs.batch_folder import BATCHES
from grd.runs.folder import RunFolder, run_folders
from grd.runs.handover import PAGE_LOCK, half_written_pages
from grd.runs.recovery import current_record, guardian_is_at_work
from grd.settings import find_project_root

ABANDONED_SECONDS = 3600.0
"""A start that is this old and has no name yet was killed in the middle."""


@dataclass(frozen=True)
class Removed:
    """One thing that was, or would be, deleted."""

    path: Path
    what: str
    bytes: int


def remove_run(folder: RunFolder, *, dry_run: bool) -> Removed:
    """Delete a run folder; checkpoints that lie elsewhere stay. Raises RunBusy if it is under way."""
    lock = take_lock(folder.lock)
    if lock is None:
        raise RunBusy(f"{folder.run_id} is under way; first: grd stop {folder.run_id}")
    try:
        with contextlib.suppress(RunNotFound, ConfigurationError):
            record = store.load(folder)
            if retry.is_pending(folder, record):
                raise RunBusy(f"{folder.run_id} waits for its next attempt; first: grd stop {folder.run_id}")
            if guardian_is_at_work(folder, record):
                raise RunBusy(f"{folder.run_id} is ending; first: grd stop {folder.run_id} --now")
        removed = Removed(folder.path, "run", _size(folder.path))
        if not dry_run:
            # Renamed first: half of a run must never look like a run.
            trash = folder.path.with_name(f".trash-{folder.run_id}")
            folder.path.rename(trash)
            shutil.rmtree(trash)
        return removed
    finally:
        os.close(lock)


def collect_garbage(runs_dir: Path, *, dry_run: bool) -> Iterator[Removed]:
    """Delete, and yield, what no resume and no reader needs any more."""
    for path, what in _abandoned(runs_dir):
        yield _delete(path, what, dry_run)
    yield from _half_written_pages(runs_dir, dry_run)
    for folder in list(run_folders(runs_dir)):
        try:
            record = current_record(folder)
        except (RunNotFound, ConfigurationError):
            continue
        if record.state not in contract.ENDED_STATES or retry.is_pending(folder, record):
            continue
        lock = take_lock(folder.lock)
        if lock is None:
            continue  # resumed just now
        try:
            for path, what in _leftovers(folder):
                yield _delete(path, what, dry_run)
        finally:
            os.close(lock)


def _abandoned(runs_dir: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(runs_dir.glob(".trash-*")):
        yield path, "half-deleted run"
    for path in sorted([*runs_dir.glob(".new-*"), *runs_dir.glob(f"{BATCHES}/.new-*")]):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                yield path, "start that never came to be"
    for path in sorted((runs_dir / ".keys").glob("*")):
        if path.suffix == ".lock" or path.name.startswith("."):
            continue
        lock = take_lock(path.with_name(f"{path.name}.lock"))
        if lock is None:
            continue  # a run is being started with it: the key is there before the run is
        try:
            if not RunFolder(runs_dir / path.read_text().strip()).record.exists():
                yield path, "key of a deleted run"
        finally:
            os.close(lock)


def _half_written_pages(runs_dir: Path, dry_run: bool) -> Iterator[Removed]:
    pages = list(half_written_pages(find_project_root(runs_dir) / ".planning"))
    lock = take_lock(runs_dir / PAGE_LOCK) if pages else None
    if lock is None:
        return  # nothing, or somebody writes the page just now, and sweeps
    try:
        for path in pages:
            if path.exists():
                yield _delete(path, "half-written by somebody who was killed", dry_run)
    finally:
        os.close(lock)


def _leftovers(folder: RunFolder) -> Iterator[tuple[Path, str]]:
    for path in (folder.heartbeat, folder.stop_file, folder.reserve, folder.recovery_lock):
        if path.exists():
            yield path, "of a runner that has ended"
    for attempt in sorted((folder.path / "attempts").glob("*")):
        journal, output = attempt / "journal.jsonl", attempt / "output.ipynb"
        if journal.exists() and _is_complete(output):
            yield journal, "journal that is in its notebook"
    for path in leftovers.half_written(folder):
        yield path, "half-written by somebody who was killed"
    for path in leftovers.exchanges(folder):
        yield path, "of a distributed training that was killed"
    record = store.load(folder)
    checkpoints = Path(record.checkpoint_dir)
    for path in leftovers.half_written_checkpoints(checkpoints):
        yield path, "half-written by somebody who was killed"
    for path in sorted(checkpoints.glob("superseded-*")):
        if path.is_dir():
            yield path, "checkpoints of a replaced lineage"


def _is_complete(notebook: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return bool(read_json(notebook)["metadata"]["grd"]["complete"])
    return False


def _delete(path: Path, what: str, dry_run: bool) -> Removed:
    removed = Removed(path, what, _size(path))
    if not dry_run:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return removed


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.lstat().st_size
    return sum(p.lstat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())
