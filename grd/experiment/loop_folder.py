"""Which folder a training saves to: a run's second one gets its own, or it would pass for the first."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from grd.experiment.checkpoint_handler import CheckpointHandler
from grd.experiment.events import run_id

_loops_here: dict[str, int] = {}


def folder_of_loop(checkpoint_dir: Path | str) -> Path:
    """``checkpoint_dir`` for the first training of a run that saves there, ``loop-2`` in it for the second.

    Outside of a run a cell that is executed again cannot be told from another training: both get the folder
    itself.
    """
    folder = Path(checkpoint_dir)
    if run_id() is not None:
        key = os.path.realpath(folder)
        _loops_here[key] = number = _loops_here.get(key, 0) + 1
        if number > 1:
            folder = folder / f"loop-{number}"
    return folder


def make_handler(
    checkpoint_dir: Path | str, *, total: int | None, resume: bool, keep_bytes: int | str | None
) -> CheckpointHandler:
    """The handler of a training in its `folder_of_loop`; without ``resume`` what it saves wins over all."""
    handler = CheckpointHandler(
        folder_of_loop(checkpoint_dir),
        total_epochs=total,
        keep_bytes=keep_bytes,
        install_signal_handlers=False,
        resume=resume,
    )
    if not resume:
        handler.begin_lineage()
    return handler


def warn_without_folder(stacklevel: int) -> None:
    """Say within a run that a training was given no folder, and what to write."""
    if run_id() is not None:
        warnings.warn(
            "grd: this training has no checkpoint_dir, so it cannot be resumed: declare checkpoint_dir and "
            "resume in the parameters cell and pass them on",
            RuntimeWarning,
            stacklevel=stacklevel + 1,
        )
