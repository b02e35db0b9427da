"""A training loop that survives: ``for epoch in training.epochs(20, model=model, ...)``.

``history`` is a list of one dictionary per epoch, those before a resume included, and ``state`` the user's
dictionary; both are of the loop that was started last.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from grd.errors import ResumeError, UsageError
from grd.experiment import rng
from grd.experiment.checkpoint_handler import AsyncSave
from grd.experiment.epoch import Epoch
from grd.experiment.events import run_id
from grd.experiment.schedule import Every
from grd.experiment.stage import Stage, stage
from grd.experiment.training_loop import Loop, Parts, make_handler

__all__ = ["Epoch", "Stage", "epochs", "history", "stage", "state", "verify_resume"]

history: list[dict[str, Any]] = []
state: dict[str, Any] = {}


def epochs(
    n: int,
    *,
    model: Any = None,
    optimizer: Any = None,
    scheduler: Any = None,
    scaler: Any = None,
    ema: Any = None,
    state: dict[str, Any] | None = None,
    checkpoint_dir: Path | str | None = None,
    resume: bool = False,
    every: str | int = "auto",
    seed: int | None = None,
    keep_bytes: int | str | None = None,
    allow_pickle: bool = False,
    async_save: AsyncSave = "auto",
) -> Iterator[Epoch]:
    """The epochs ``0 .. n - 1`` that are still to be trained; saves, resumes, reports and stops by itself.

    With ``resume`` the newest good checkpoint of ``checkpoint_dir`` comes back first: model, optimizer,
    scheduler, scaler, ema (objects with ``state_dict``, or dictionaries of them), ``state`` (updated in
    place), history, random generators and position. The last epoch is always saved, so that a resume of a
    finished training restores everything and trains nothing. After a ``break`` the epoch counts as not
    done; `Epoch.stop_early` ends a training for good.

    ``every``: ``"auto"`` (by measured cost), a number of epochs, or a duration such as ``"5m"``. ``seed``
    decides the data order of ``epoch.steps`` (default: torch's own seed). ``allow_pickle`` lets other
    objects into ``model`` and ``state``, and reads them back from this folder. With ``async_save`` the
    training goes on while a copy of its state is written, which takes the memory of a second state;
    ``"auto"``: for 32 MB and more, on a GPU or where torch leaves a core alone. What a stop request or the
    last epoch saves is always waited for.
    Without ``checkpoint_dir`` nothing is saved. Within a run of grd a second loop saves to a folder of its
    own below it; outside, two trainings that are both to be resumed need a ``checkpoint_dir`` each, and a
    warning says so.

    Raises ExperimentInterrupted once a stop request is honoured, UsageError for wrong arguments,
    ResumeError for a checkpoint that does not fit, CheckpointRefused for state that cannot be stored.
    """
    if isinstance(n, bool) or not hasattr(n, "__index__") or n.__index__() < 0:
        raise UsageError(f"epochs(n): n must be a whole number from 0 on, not {n!r}")
    if state is not None and not isinstance(state, dict):
        raise UsageError(f"epochs(state=...) must be a dictionary, not {type(state).__name__}")
    try:
        interval = Every.parse(every)
    except ValueError as error:
        raise UsageError(f"epochs(): {error}") from None
    if async_save not in (True, False, "auto"):
        raise UsageError(f"epochs(async_save=...) must be True, False or 'auto', not {async_save!r}")
    return _start(
        n.__index__(),
        Parts(model, optimizer, scheduler, scaler, ema, state),
        checkpoint_dir,
        resume=bool(resume),
        every=interval,
        seed=seed,
        keep_bytes=keep_bytes,
        allow_pickle=allow_pickle,
        async_save=async_save,
    )


def _start(
    total: int,
    parts: Parts,
    checkpoint_dir: Path | str | None,
    *,
    resume: bool,
    every: Every,
    seed: int | None,
    keep_bytes: int | str | None,
    allow_pickle: bool,
    async_save: AsyncSave,
) -> Iterator[Epoch]:
    global history, state
    handler = None
    if checkpoint_dir:
        handler = make_handler(checkpoint_dir, total=total, resume=resume, keep_bytes=keep_bytes)
    elif run_id() is not None:
        warnings.warn(
            "grd: this training has no checkpoint_dir, so it cannot be resumed: declare checkpoint_dir and "
            "resume in the parameters cell and pass them on",
            RuntimeWarning,
            stacklevel=3,
        )
    loop = Loop(total, parts, handler, resume, every, seed, allow_pickle, async_save)
    history = loop.history
    state = parts.state if parts.state is not None else {}
    return loop.run()


def verify_resume(
    compute_loss: Callable[[], Any], checkpoint: Mapping[str, Any] | float, *, tolerance: float = 1e-6
) -> float:
    """Compare a loss computed right after loading with the one in the checkpoint, and return it.

    ``compute_loss`` must compute what the saved ``loss`` was; ``tolerance`` is relative. Random generators
    are left as they were. Raises ResumeError if they differ, UsageError if the checkpoint holds no loss.
    """
    expected = checkpoint.get("loss") if isinstance(checkpoint, Mapping) else checkpoint
    if expected is None:
        raise UsageError("the checkpoint holds no loss to compare with: save it with loss=")
    with rng.untouched():
        actual = float(compute_loss())
    if not math.isclose(actual, float(expected), rel_tol=tolerance, abs_tol=tolerance):
        raise ResumeError(
            f"the loss after loading is {actual!r}, the checkpoint's was {float(expected)!r}: model, data or "
            "code are not what they were"
        )
    return actual
