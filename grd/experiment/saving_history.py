"""What a folder's manifest tells about saving: what it costs, what a kill would lose, how often one came."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from grd.experiment.manifest import Entry

RECENT = 50
"""Saves that are looked at: older ones may be of another pace."""


def newest_lineage(entries: Sequence[Entry]) -> list[Entry]:
    """The entries of the chain of resumes that was written last, oldest first."""
    newest = max((entry.lineage for entry in entries), default=0)
    return [entry for entry in entries if entry.lineage == newest]


def expected_lost_seconds(entries: Sequence[Entry]) -> float | None:
    """Seconds of training that a kill without warning loses on average; None before the second save.

    A kill falls into a gap x between two saves with a chance that grows with its length, and on average into
    its middle: sum(x^2) / (2 sum(x)), the mean age of a renewal process. What is saved in the background is
    at risk until it is there, which is that much later.
    """
    measured = _measured(entries)
    gaps = [save.work + save.stall for save in measured]
    total = sum(gaps)
    if len(gaps) < 2 or total <= 0:
        return None
    late = sum(save.total - save.stall for save in measured) / len(measured)
    return sum(gap * gap for gap in gaps) / (2 * total) + late


def expected_overhead(entries: Sequence[Entry]) -> float | None:
    """Seconds that the training stood still for each second of training, as measured; None before the second
    save. What a save in the background slows the training down is not in it."""
    measured = _measured(entries)
    work = sum(save.work for save in measured)
    return sum(save.stall for save in measured) / work if len(measured) > 1 and work > 0 else None


@dataclass(frozen=True)
class _Save:
    """Seconds of training before a save, in which it stood still for it, and until the file was there."""

    work: float
    stall: float
    total: float


def _measured(entries: Sequence[Entry]) -> list[_Save]:
    # A save that a stop asked for comes early, and the pace of the others is the question.
    known = [
        _Save(entry.work_seconds, _stall(entry, entry.seconds), entry.seconds)
        for entry in newest_lineage(entries)
        if entry.work_seconds is not None and entry.seconds is not None and entry.stop is None
    ]
    return known[-RECENT:]


def _stall(entry: Entry, seconds: float) -> float:
    return seconds if entry.stall_seconds is None else entry.stall_seconds


def seconds_between_interruptions(entries: Iterable[Entry]) -> float | None:
    """Mean training time from one end without warning to the next; None while there was none.

    A process that another one continued ended without warning, unless its last save was for a stop request
    or of the last epoch: known deadlines are no accidents.
    """
    last: dict[str, Entry] = {}
    trained = 0.0
    for entry in newest_lineage(list(entries)):
        last.pop(entry.process, None)
        last[entry.process] = entry
        trained += (entry.work_seconds or 0.0) + _stall(entry, entry.seconds or 0.0)
    continued = list(last.values())[:-1]
    interruptions = sum(entry.stop is None and not _is_final(entry) for entry in continued)
    return trained / interruptions if interruptions and trained > 0 else None


def _is_final(entry: Entry) -> bool:
    return entry.total_epochs is not None and entry.epoch + 1 >= entry.total_epochs
