"""What checkpoints there are, whether they are good, and which one a resume goes on from."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from grd.errors import ConfigurationError, RunBusy
from grd.experiment import checkpoint_folder
from grd.experiment.checkpoint_folder import LATEST_NAME, Version
from grd.experiment.manifest import Entry
from grd.files import take_lock
from grd.runs.folder import RunFolder
from grd.runs.model import RunRecord
from grd.runs.recovery import current_record

GOOD, DAMAGED, UNVERIFIED = "good", "damaged", "unverified"


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One checkpoint. ``epoch`` is the last completed one, ``step`` counts inside the next (None: at its
    beginning), ``size`` is in bytes, ``saved_at`` in seconds since 1970.

    What only the manifest knows is None for files that came from elsewhere.
    """

    path: Path
    epoch: int | None
    step: int | None
    loss: float | None
    size: int
    saved_at: float
    lineage: int | None
    attempt: int | None
    run_id: str | None
    verdict: str
    """good, damaged or unverified."""
    reason: str | None
    """What is wrong with a damaged one."""
    used_next: bool
    """Whether a resume of its loop would go on from it."""
    loop: int = 1
    """Which training loop of the run saved it."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "path": str(self.path)}


def list_checkpoints(
    folder: Path, *, verify: bool = False, on_file: Callable[[Path, int], None] = lambda path, size: None
) -> list[Listed]:
    """The checkpoints in ``folder``, newest first, and after them those of each further loop.

    Without ``verify`` only what is needed to find the ones that a resume goes on from is read; with it every
    byte of all. ``on_file`` hears of every file, and its size in bytes, before it is read.
    """
    listed = []
    for place in checkpoint_folder.loop_folders(folder):
        loop = 1 if place == folder else int(place.name.rpartition("-")[2])
        listed += [replace(item, loop=loop) for item in _list_folder(place, verify, on_file)]
    return listed


def _list_folder(folder: Path, verify: bool, on_file: Callable[[Path, int], None]) -> list[Listed]:
    present = checkpoint_folder.versions(folder)
    latest = folder / LATEST_NAME
    known: dict[Path, tuple[str | None, Entry | None]] = {}
    scanned = checkpoint_folder.scan(folder)
    known.update({path: (reason, None) for path, reason in scanned.damaged})
    found = scanned.found
    if found is not None:
        known[found.path] = (None, found.entry)
    listed = []
    for version in present:
        row = _listed(version, known, found.path if found else None, verify, on_file)
        if row is not None:
            listed.append(row)
    if latest in known and not any(_same(latest, row.path) for row in listed):
        reason, entry = known[latest]
        used = found is not None and found.path == latest
        listed.insert(0, _row(latest, None, entry, reason, known_good=reason is None, used=used))
    return listed


def _listed(
    version: Version,
    known: dict[Path, tuple[str | None, Entry | None]],
    used: Path | None,
    verify: bool,
    on_file: Callable[[Path, int], None],
) -> Listed | None:
    path = version.path
    try:
        size = path.stat().st_size
    except OSError:
        return None  # pruned just now by the training
    if path not in known and (verify or _has_other_size(version, size)):
        on_file(path, size)
        known[path] = checkpoint_folder.check_version(version)
    reason, entry = known.get(path, (None, None))
    if entry is None:
        entry = next((item for item in version.entries if item.size == size), None)
    return _row(path, version, entry, reason, known_good=path in known and reason is None, used=path == used)


def _row(
    path: Path,
    version: Version | None,
    entry: Entry | None,
    reason: str | None,
    *,
    known_good: bool,
    used: bool,
) -> Listed:
    status = path.stat()
    named = (version.epoch, version.step) if version is not None else (None, None)
    return Listed(
        path=path,
        epoch=entry.epoch if entry is not None else named[0],
        step=entry.step if entry is not None else named[1],
        loss=entry.loss if entry is not None else None,
        size=status.st_size,
        saved_at=entry.t if entry is not None else status.st_mtime,
        lineage=entry.lineage if entry is not None else None,
        attempt=entry.attempt if entry is not None else None,
        run_id=entry.run_id if entry is not None else None,
        verdict=DAMAGED if reason is not None else GOOD if known_good else UNVERIFIED,
        reason=reason,
        used_next=used,
    )


def _has_other_size(version: Version, size: int) -> bool:
    return bool(version.entries) and all(entry.size != size for entry in version.entries)


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def prune_checkpoints(run: RunFolder, *, keep: int | None = None, dry_run: bool = False) -> list[Path]:
    """Delete the oldest checkpoints of a run beyond ``keep`` bytes, never leaving fewer than two good ones.

    Each of its loops may keep so much. ``keep`` is the run's own budget unless given. Returns what was, or
    with ``dry_run`` would be, deleted. Raises RunBusy while the run is under way: its training keeps house
    itself; ConfigurationError where its record does not say the budget.
    """
    record = current_record(run)
    lock = take_lock(run.lock)
    if lock is None:
        raise RunBusy(f"{run.run_id} is under way and prunes by itself; first: grd stop {run.run_id}")
    try:
        budget = keep if keep is not None else _own_budget(record)
        pruned = []
        for folder in checkpoint_folder.loop_folders(Path(record.checkpoint_dir)):
            if not dry_run:
                checkpoint_folder.sweep(folder)
            pruned += checkpoint_folder.prune(checkpoint_folder.versions(folder), budget, (), dry_run=dry_run)
        return pruned
    finally:
        os.close(lock)


def _own_budget(record: RunRecord) -> int:
    try:
        return int(record.checkpointing["checkpoint_budget"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ConfigurationError(
            f"run.json of {record.run_id} does not say what its checkpoints may take: add --keep SIZE"
        ) from None
