"""Checkpoint folders that another library writes file by file: sealed when whole, checked before use.

``checkpoint-STEP`` is the name that Hugging Face's Trainer gives them. A seal is a file in the folder that
has the size and the hash of every other one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from grd.errors import CheckpointError
from grd.experiment.checkpoint_file import digest
from grd.experiment.checkpoint_folder import NEVER_FEWER_THAN
from grd.experiment.checkpoint_writer import check_fence
from grd.experiment.events import attempt_number, run_id
from grd.files import atomic_write, fsync_folder

SEAL = "grd-seal.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Sealed:
    """A folder ``checkpoint-STEP`` with its seal; ``files`` are names with size (bytes) and xxh3_128."""

    path: Path
    step: int
    lineage: int
    files: dict[str, tuple[int, str]]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())

    def problem(self) -> str | None:
        """What is wrong with it, or None; reads every byte."""
        for name, (size, expected) in self.files.items():
            path = self.path / name
            try:
                if path.stat().st_size != size:
                    return f"{name} has {path.stat().st_size} bytes instead of {size}"
                if digest(path)[1] != expected:
                    return f"the bytes of {name} are not those that were written"
            except OSError as error:
                return f"{name} cannot be read: {error.strerror or error}"
        return None


def sealed(folder: Path) -> list[Sealed]:
    """The folders with a seal, newest first: by lineage, then by step. Their files are not read."""
    found = []
    for path in _folders(folder):
        try:
            seal = json.loads((path / SEAL).read_text(encoding="utf-8"))
            files = {str(name): (int(size), str(value)) for name, (size, value) in seal["files"].items()}
            found.append(Sealed(path, _step(path), int(seal["lineage"]), files))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return sorted(found, key=lambda item: (item.lineage, item.step), reverse=True)


def newest_good(folder: Path) -> tuple[Sealed | None, list[str]]:
    """The newest sealed folder whose bytes are right, and what is wrong with each that seems newer."""
    passed_over: list[str] = []
    present = sealed(folder)
    found = None
    for item in present:
        reason = item.problem()
        if reason is None:
            found = item
            break
        passed_over.append(f"{item.path} is damaged: {reason}")
    known = {item.path for item in present}
    for path in _folders(folder):
        if path not in known and (found is None or _step(path) > found.step):
            passed_over.append(f"{path} was never finished")
    return found, passed_over


def seal(path: Path, *, step: int, epoch: int, lineage: int) -> int:
    """Make ``path`` durable and vouch for it; returns its bytes.

    Raises CheckpointFenced if a newer attempt owns the folder around it, CheckpointError if it cannot be
    written.
    """
    check_fence(path.parent)
    try:
        files = {}
        for file in sorted(item for item in path.rglob("*") if item.is_file() and item.name != SEAL):
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
            files[str(file.relative_to(path))] = digest(file)
        for folder in [item for item in path.rglob("*") if item.is_dir()]:
            fsync_folder(folder)
        facts = {
            "format": "grd.sealed/1",
            "step": step,
            "epoch": epoch,
            "lineage": lineage,
            "attempt": attempt_number(),
            "run_id": run_id(),
            "t": time.time(),
            "files": files,
        }
        atomic_write(path / SEAL, json.dumps(facts))
        fsync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be sealed: {error.strerror or error}; those before it are untouched"
        ) from error
    return sum(size for size, _ in files.values())


def prune(folder: Path, keep_bytes: int, *, good: Collection[Path], spared: Collection[Path]) -> None:
    """Remove the oldest sealed folders beyond ``keep_bytes``, never the last two good ones, nor ``spared``.

    ``good``: those that need not be read to know it.
    """
    kept = count = 0
    for item in sealed(folder):
        if count >= NEVER_FEWER_THAN and kept + item.size > keep_bytes and item.path not in spared:
            (item.path / SEAL).unlink(missing_ok=True)  # first: half a folder must not look whole
            shutil.rmtree(item.path, ignore_errors=True)
            continue
        kept += item.size
        count += item.path in good or item.problem() is None


def set_aside(folder: Path) -> None:
    """Move what earlier trainings have left, sealed or not, to ``superseded-N``."""
    moving = _folders(folder)
    if not moving:
        return
    for number in itertools.count(1):
        target = folder / f"superseded-{number}"
        with contextlib.suppress(FileExistsError):
            target.mkdir()
            break
    for path in moving:
        path.replace(target / path.name)


def _folders(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(path for path in folder.iterdir() if path.is_dir() and _FOLDER.fullmatch(path.name))
    return []


def _step(path: Path) -> int:
    match = _FOLDER.fullmatch(path.name)
    assert match is not None
    return int(match[1])
