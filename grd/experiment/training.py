"""A training loop that survives: ``for epoch in training.epochs(20, model=model, ...)``.

``history`` is a list of one dictionary per epoch, those before a resume included, and ``state`` the user's
dictionary; both are of the loop that was started last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from grd.errors import ResumeError, UsageError
from grd.experiment import rng
from grd.experiment.checkpoint_handler import AsyncSave
from grd.experiment.epoch import Epoch
from grd.experiment.live_state import Parts
from grd.experiment.loop_folder import make_handler, warn_without_folder
from grd.experiment.schedule import Every
from grd.experiment.stage import Stage, stage
from grd.experiment.training_loop import Loop
from grd.experiment.training_state import UserState, can_be_put_back

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
    scheduler, scaler, ema (objects with ``state_dict``, tensors, arrays, or dictionaries and lists of them),
    ``state``, history, random generators and position. Tensors, arrays, dictionaries, lists and sets are
    changed in place. Every value of ``state`` keeps its type; an object in it comes back only where the
    notebook has one from the beginning, and keys that the notebook gives anew stay. The last epoch is always
    saved, so that a resume of a finished training restores everything and trains nothing. After a ``break``
    the epoch counts as not done; `Epoch.stop_early` ends a training for good.

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
    if isinstance(resume, str):
        raise UsageError(f"epochs(resume=...) must be True or False, not the text {resume!r}")
    if seed is not None and not hasattr(seed, "__index__"):
        raise UsageError(f"epochs(seed=...) must be a whole number, not {seed!r}")
    kept: Any = None if state is None else UserState(state)
    parts = Parts(model, optimizer, scheduler, scaler, ema, kept)
    for name, part in parts.items() if checkpoint_dir else ():
        if not can_be_put_back(part):
            raise UsageError(
                f"epochs({name.removesuffix('_state')}=...): a {type(part).__name__} could be saved but not "
                "be put back; pass an object with state_dict() and load_state_dict(), or a dictionary"
            )
    return _start(
        n.__index__(),
        parts,
        state,
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
    user_state: dict[str, Any] | None,
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
    else:
        warn_without_folder(stacklevel=3)
    loop = Loop(total, parts, handler, resume, every, seed, allow_pickle, async_save)
    history = loop.history
    state = user_state if user_state is not None else {}
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
    both_nan = math.isnan(actual) and math.isnan(float(expected))
    if not both_nan and not math.isclose(actual, float(expected), rel_tol=tolerance, abs_tol=tolerance):
        raise ResumeError(
            f"the loss after loading is {actual!r}, the checkpoint's was {float(expected)!r}: model, data or "
            "code are not what they were"
        )
    return actual
