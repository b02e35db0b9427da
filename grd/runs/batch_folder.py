"""Where everything of a batch lies: the one owner of the paths in its folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grd.errors import NotFoundError
from grd.files import is_locked
from grd.runs.folder import is_there, names_in

BATCHES: Final = "batches"
"""The folder of the batches, among those of the runs. No run: it has no run.json."""


@dataclass(frozen=True)
class BatchFolder:
    """The folder of one batch. Nothing is created by asking for a path."""

    path: Path

    @property
    def batch_id(self) -> str:
        """The batch's id is its folder's name."""
        return self.path.name

    @property
    def runs_dir(self) -> Path:
        """Where its runs lie."""
        return self.path.parent.parent

    @property
    def record(self) -> Path:
        """batch.json, replaced atomically by whoever holds the lock."""
        return self.path / "batch.json"

    @property
    def plan(self) -> Path:
        """runs.jsonl: the runs of the batch, a line each; written once."""
        return self.path / "runs.jsonl"

    @property
    def events(self) -> Path:
        """events.jsonl: what the coordinator was about to do, and what came of it."""
        return self.path / "events.jsonl"

    @property
    def notebooks(self) -> Path:
        """The notebooks as submitted, each under the sha256 of its text."""
        return self.path / "notebooks"

    def notebook(self, sha256: str) -> Path:
        """The copy of a notebook."""
        return self.notebooks / f"{sha256}.ipynb"

    @property
    def lock(self) -> Path:
        """coordinator.lock, flocked by the coordinator for its whole life."""
        return self.path / "coordinator.lock"

    @property
    def log(self) -> Path:
        """stdout and stderr of the coordinator."""
        return self.path / "coordinator.log"

    @property
    def stop_file(self) -> Path:
        """Exists once somebody asked the batch to stop; JSON with the reason."""
        return self.path / "stop"

    def has_coordinator(self) -> bool:
        """Whether one lives: on this machine, and where the file system has locks."""
        try:
            return is_locked(self.lock)
        except OSError:
            return False


def batch_folders(runs_dir: Path) -> Iterator[BatchFolder]:
    """The batches among the runs in ``runs_dir``, newest first."""
    place = runs_dir / BATCHES
    for name in sorted(names_in(place), reverse=True):
        folder = BatchFolder(place / name)
        if is_there(folder.record):
            yield folder


def find_batch(runs_dir: Path, name: str) -> BatchFolder:
    """The batch called ``name``: an id, an unambiguous part of one, a folder, or ``last``.

    Raises NotFoundError with what to type next.
    """
    if "/" in name and is_there(BatchFolder(Path(name).resolve()).record):
        return BatchFolder(Path(name).resolve())
    found = list(batch_folders(runs_dir))
    if name == "last":
        if found:
            return found[0]
        raise NotFoundError(f"no batches in {runs_dir} yet; start one: grd batch SPEC, or grd sweep NOTEBOOK")
    exact = [folder for folder in found if folder.batch_id == name]
    matches = exact or [folder for folder in found if name and name in folder.batch_id]
    if len(matches) == 1:
        return matches[0]
    if matches:
        listed = ", ".join(folder.batch_id for folder in matches[:4])
        more = ", ..." if len(matches) > 4 else ""
        raise NotFoundError(f"{name!r} fits {len(matches)} batches ({listed}{more}); type more of it")
    raise NotFoundError(f"no batch {name!r} in {runs_dir}; see: grd batch list")
