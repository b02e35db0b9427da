"""Putting one checkpoint into its folder: written, vouched for, renamed, made the latest, old ones pruned."""

from __future__ import annotations

import math
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grd import contract
from grd.errors import CheckpointError, CheckpointFenced
from grd.experiment import checkpoint_file, checkpoint_folder
from grd.experiment.events import attempt_number, run_id
from grd.experiment.manifest import Entry, append_entry, process_id, read_entries
from grd.files import fsync_folder
from grd.settings import Settings, parse_size

_lock = threading.RLock()
_lineages: dict[str, int] = {}
_known_good: dict[str, set[str]] = {}
_work_began: dict[str, float] = {}


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()  # the thread that held it was not forked


os.register_at_fork(after_in_child=_after_fork_in_child)


@dataclass(frozen=True)
class Job:
    """One checkpoint to be written: what goes into the file, and what the manifest says of it.

    ``named_epoch`` is the epoch in the file's name, ``epoch`` the last completed one; ``began`` (seconds of
    the monotonic clock) is when the state was looked at, ``stall`` how long the training then stood still
    (None: until the file is there).
    """

    name: str
    content: Any
    named_epoch: int
    epoch: int
    step: int | None
    loss: float | None
    total_epochs: int | None
    stop: str | None
    began: float
    work_seconds: float
    stall: float | None = None


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is there: its size in bytes, and the seconds since the look at the state."""

    path: Path
    size: int
    seconds: float


class CheckpointWriter:
    """Writes into one folder, in any thread; all writers of a process take turns."""

    def __init__(self, folder: Path, keep_bytes: int) -> None:
        self.folder = folder
        self.keep_bytes = keep_bytes
        self._key = os.path.realpath(folder)
        _work_began.setdefault(self._key, time.monotonic())

    def write(self, job: Job) -> Saved:
        """Write ``job``; the versions before are untouched until it is there.

        Raises CheckpointError if it cannot be written, CheckpointFenced if a newer attempt owns the folder.
        """
        with _lock:
            return self._write(job)

    def _write(self, job: Job) -> Saved:
        path = self.folder / job.name
        lineage = self._lineage(job.named_epoch, job.step)
        try:
            with checkpoint_folder.temporary_name(self.folder, job.name) as temporary:
                # Should its line in the manifest ever be damaged, the file itself says where it belongs.
                written = checkpoint_file.write(temporary, {"lineage": lineage, **job.content})
                check_fence(self.folder)
                # The entry comes before the rename: a crash between them leaves the old file, which matches
                # its own older entry, and never a file of ours that nobody vouches for.
                append_entry(
                    self.folder,
                    Entry(
                        name=job.name,
                        size=written.size,
                        xxh3_128=written.xxh3_128,
                        epoch=job.epoch,
                        step=job.step,
                        loss=job.loss,
                        lineage=lineage,
                        attempt=attempt_number(),
                        run_id=run_id(),
                        process=process_id(),
                        format=written.format,
                        total_epochs=job.total_epochs,
                        t=time.time(),
                        seconds=round(time.monotonic() - job.began, 6),
                        stall_seconds=None if job.stall is None else round(job.stall, 6),
                        work_seconds=round(job.work_seconds, 6),
                        stop=job.stop,
                    ),
                )
                check_fence(self.folder)
                temporary.replace(path)
                fsync_folder(self.folder)
        except OSError as error:
            raise CheckpointError(
                f"{path} could not be saved: {error.strerror or error}; the versions before it are untouched"
            ) from error
        good = _known_good.setdefault(self._key, set())
        good.add(job.name)
        present = checkpoint_folder.versions(self.folder)
        checkpoint_folder.point_latest(checkpoint_folder.newest_good(present, good) or path)
        checkpoint_folder.prune(present, self.keep_bytes, good)
        return Saved(path, written.size, time.monotonic() - job.began)

    def _lineage(self, epoch: int, step: int | None) -> int:
        if self._key in _lineages:
            return _lineages[self._key]
        present = checkpoint_folder.versions(self.folder)
        ours = [version.lineage for version in present if version.is_ours]
        position = (epoch, math.inf if step is None else step)
        if ours:
            lineage = max(ours)
        elif present and present[0].position < position:
            lineage = max(1, present[0].lineage)
        else:
            # Nothing there, or somebody's later epochs, which must not win over the ones that come now.
            lineage = self._next_lineage()
        _lineages[self._key] = lineage
        return lineage

    def _next_lineage(self) -> int:
        known = [entry.lineage for entry in read_entries(self.folder)]
        known += [version.lineage for version in checkpoint_folder.versions(self.folder)]
        return max(known, default=0) + 1

    def begin_lineage(self) -> None:
        """Let what is written from now on win over everything in the folder, whatever its epoch."""
        with _lock:
            _lineages[self._key] = self._next_lineage()

    def begin_work(self) -> None:
        """Count what the next checkpoint makes safe from here: a training begins, or was just looked at."""
        _work_began[self._key] = time.monotonic()

    @property
    def work_began(self) -> float:
        """Since when nothing is safe, on the monotonic clock."""
        return _work_began[self._key]

    def move_aside_what_is_not_ours(self) -> None:
        """A fresh start: checkpoints of earlier attempts must not win over ours. Raises CheckpointFenced."""
        check_fence(self.folder)
        with _lock:
            checkpoint_folder.move_aside(
                self.folder, lambda version: not version.is_ours, reason="a fresh start"
            )


def budget_of(keep_bytes: int | str | None) -> int:
    """Bytes that versions may take: as asked for, as the run was told, or the default. Raises ValueError."""
    if keep_bytes is not None:
        return parse_size(keep_bytes)
    try:
        return parse_size(os.environ["GRD_CHECKPOINT_BUDGET"])
    except (KeyError, ValueError):
        return Settings().checkpoint_budget


def check_fence(folder: Path) -> None:
    """Raise CheckpointFenced if GRD_FENCE names a newer attempt than ours."""
    fence = os.environ.get(contract.ENV_FENCE)
    if not fence:
        return
    try:
        newest = int(Path(fence).read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return
    if newest > attempt_number():
        raise CheckpointFenced(
            f"attempt {newest} of this run owns {folder}; attempt {attempt_number()} wrote nothing"
        )
