"""Half-written files that a writer left which was killed before it could rename or remove them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from grd import contract
from grd.files import take_lock
from grd.runs.folder import RunFolder

STOP_SECONDS = 60.0
"""A stop request is written by whoever asks, without a lock: younger ones may still be under way."""

_TEMPORARY = re.compile(r"\..+\.tmp")
_REQUEST = re.compile(r"\.stop\..+\.tmp")


def half_written(folder: RunFolder) -> Iterator[Path]:
    """Temporary files in the run's folder and those of its attempts that nobody will rename any more.

    Only for the holder of the run's lock: its writers hold that, or the lock of recovery.
    """
    for place in (folder.path, *sorted((folder.path / "attempts").glob("*"))):
        with contextlib.suppress(OSError):
            for path in sorted(place.iterdir()):
                if _TEMPORARY.fullmatch(path.name) and not _may_be_in_use(path):
                    yield path


def _may_be_in_use(path: Path) -> bool:
    if not _REQUEST.fullmatch(path.name):
        return False
    try:
        return time.time() - path.lstat().st_mtime < STOP_SECONDS
    except OSError:
        return True


def exchanges(folder: RunFolder) -> Iterator[Path]:
    """Folders of distributed trainings of a run whose kernels were killed, for the holder of its lock, or of
    that of recovery, once no kernel is left."""
    yield from sorted((folder.path / "attempts").glob(f"*/{contract.EXCHANGE_PREFIX}*"))


def sweep_exchanges(folder: RunFolder) -> None:
    """Remove what `exchanges` finds. Never raises OSError."""
    with contextlib.suppress(OSError):
        for path in exchanges(folder):
            shutil.rmtree(path, ignore_errors=True)


def sweep(folder: RunFolder) -> None:
    """Remove what `half_written` finds, unless somebody recovers the run just now. Never raises OSError."""
    sweep_exchanges(folder)
    with contextlib.suppress(OSError):
        if not any(half_written(folder)):
            return
        lock = take_lock(folder.recovery_lock)
        if lock is None:
            return
        try:
            for path in half_written(folder):
                path.unlink(missing_ok=True)
        finally:
            os.close(lock)


def half_written_checkpoints(folder: Path) -> Iterator[Path]:
    """Temporary files of killed kernels in a folder of checkpoints, also of a run's further loops."""
    from grd.experiment.checkpoint_folder import abandoned, loop_folders

    for place in loop_folders(folder):
        yield from abandoned(place)


def sweep_checkpoints(folder: Path) -> None:
    """Remove what `half_written_checkpoints` finds: they may be what fills the disk. Never raises OSError."""
    with contextlib.suppress(OSError):
        for path in half_written_checkpoints(folder):
            path.unlink(missing_ok=True)
