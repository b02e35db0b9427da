"""Reading and writing records, and listing runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from grd.errors import ConfigurationError, RunNotFound
from grd.files import read_json, write_json
from grd.runs.folder import RunFolder, run_folders
from grd.runs.model import RunRecord


def load(folder: RunFolder) -> RunRecord:
    """The record of a run. Raises RunNotFound or ConfigurationError (a damaged run.json)."""
    try:
        value = read_json(folder.record)
    except FileNotFoundError:
        raise RunNotFound(f"no run in {folder.path}; see: grd list") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{folder.record} cannot be read: {error}") from None
    record = RunRecord.from_dict(value)
    # A project that was moved, or mounted elsewhere, is still the same project.
    record.folder = str(folder.path)
    return record


def save(folder: RunFolder, record: RunRecord, *, durable: bool = True) -> None:
    """Replace run.json atomically. Raises OSError."""
    write_json(folder.record, record.to_dict(), durable=durable)


def load_all(runs_dir: Path) -> Iterator[tuple[RunFolder, RunRecord]]:
    """All readable runs, newest first; a damaged record hides only its own run."""
    for folder in run_folders(runs_dir):
        try:
            yield folder, load(folder)
        except (ConfigurationError, RunNotFound):
            continue


def link_output(folder: RunFolder, attempt: int) -> None:
    """Point output.ipynb at the newest attempt's notebook; a copy is no link, so links it is, or nothing."""
    temporary = folder.path / f".output.{os.getpid()}.tmp"
    try:
        temporary.symlink_to(folder.attempt(attempt).output.relative_to(folder.path))
        temporary.replace(folder.output)
    except OSError:
        temporary.unlink(missing_ok=True)  # file systems without links: the attempt's folder has it
