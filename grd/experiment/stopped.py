"""What a training says when it stops because it was asked to."""

from __future__ import annotations

from grd.errors import ExperimentInterrupted


def stopped(
    where: str, reason: str, *, saves: bool, saved: bool, failure: str | None
) -> ExperimentInterrupted:
    """The exception for a stop that is honoured.

    ``saves``: whether there is a folder for checkpoints; ``saved``: whether this training has saved anything;
    ``failure``: why its last save failed.
    """
    if failure is not None:
        kept = f"and the state could not be saved: {failure}"
    elif not saves:
        kept = "nothing was saved, since the loop has no checkpoint_dir"
    elif not saved:
        kept = "there was nothing new to save: resume to go on"
    else:
        kept = "the state is saved: resume to go on"
    return ExperimentInterrupted(f"stopped {where} ({reason}); {kept}", reason=reason)
