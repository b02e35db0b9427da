"""One epoch as a notebook sees it: an int with steps, metrics, and state of its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from grd.experiment.reporting import as_number, log_metrics
from grd.experiment.training_state import PuttingBack

T = TypeVar("T")


class Training(Protocol):
    """What an epoch needs of the loop that handed it out."""

    def steps(self, epoch: Epoch, loader: Iterable[T]) -> Iterator[T]:
        """The batches, with stops and saves between them."""

    def note(self, epoch: Epoch) -> None:
        """Put the epoch's record into the history."""


@dataclass
class Inside:
    """A position inside an epoch: which call of ``steps``, how many steps in it, and what was gathered."""

    call: int
    call_steps: int
    step: int
    loader: dict[str, Any]
    rng: dict[str, Any]
    """Right before the next batch is drawn."""

    record: dict[str, Any]
    state: dict[str, Any]
    means: dict[str, Any]
    outside: list[dict[str, Any]] = field(default_factory=list)
    """What was found (`outside.found`) at the epoch's beginning and at the end of each pass before."""

    rng_at_epoch: dict[str, Any] | None = None
    """In older checkpoints, instead of ``outside``."""


class Epoch(int):
    """One epoch of a training; everywhere an int, counted from 0.

    ``state`` is saved inside the epoch too, and empty at its beginning: running sums belong there, since
    local variables of an interrupted epoch are lost. Code before the first pass over batches and between two
    passes runs again at a resume inside the epoch. It finds the random generators, the scheduler, the scaler
    and the small values of the training's ``state`` as it found them at first. Model and optimizer are those
    of the epoch's beginning at its top, if there is still a checkpoint of that. Else, and between passes,
    they are already those of the interruption, as ``epoch.state`` always is. What that code does to any of
    them is undone where the interrupted pass goes on.
    """

    state: dict[str, Any]
    _loop: Training
    _record: dict[str, Any]
    _means: dict[str, Any]
    _call: int
    _step: int
    _in_steps: bool
    _ends_training: bool
    _resumed: Inside | None
    _outside: list[dict[str, Any]]

    @classmethod
    def begin(cls, loop: Training, index: int, resumed: Inside | None) -> Epoch:
        """Epoch ``index``, or the rest of it if it was ``resumed`` inside."""
        epoch = cls(index)
        epoch._loop = loop
        epoch._resumed = resumed
        epoch._call = -1
        epoch._in_steps = epoch._ends_training = False
        epoch._step = 0
        epoch.state = {}
        epoch._means = {}
        epoch._record = {"epoch": index}
        epoch._outside = []
        if resumed is not None:
            epoch._step = resumed.step
            epoch._gathered(resumed)
        return epoch

    def _gathered(self, resumed: Inside) -> None:
        """Make what the epoch has gathered what it was when ``resumed`` was saved."""
        putting = PuttingBack()
        putting.put(self.state, copy.deepcopy(resumed.state), "epoch.state")
        putting.put(self._means, dict(resumed.means), "means")
        putting.put(self._record, dict(resumed.record), "record")

    @property
    def index(self) -> int:
        """The epoch's number, from 0."""
        return int(self)

    @property
    def step(self) -> int:
        """Steps done in this epoch, those before a resume included."""
        return self._step

    def steps(self, loader: Iterable[T]) -> Iterator[T]:
        """The batches of ``loader``, so that a stop or a resume can fall between any two of them.

        A torch DataLoader over a map-style dataset comes in an order that depends on the seed and the epoch
        only, whatever its workers. Other iterables are replayed up to the position, from the random numbers
        that they began with, and go on with those of the interruption: make them anew for each pass. Where
        that may not be exact, and where a loader's order cannot be repeated, so that the epoch is resumed at
        its beginning, a warning says so once. A generator of random numbers that a dataset keeps for itself
        is not restored: draw from the global ones, or make it from the sample's index.

        A call within the loop over another one's batches (a validation every 100 steps) is part of that
        step. What counts the batches goes on with ``enumerate(epoch.steps(loader), epoch.step)``. Raises
        UsageError if two passes are gone through side by side: zip the loaders instead.
        """
        if self._in_steps:
            return iter(loader)
        return self._loop.steps(self, loader)

    def log(self, **metrics: Any) -> None:
        """Add metrics of this epoch to ``training.history`` and report them; TypeError for no number.

        NaN and infinities stay what they are in the history; what is reported has null for them.
        """
        log_metrics(epoch=int(self), step=None, **metrics)
        self._record.update({name: _history_value(value) for name, value in metrics.items()})
        self._loop.note(self)

    def mean(self, name: str, value: Any = None, n: int = 1) -> float:
        """Add ``value``, standing for ``n`` samples, to this epoch's mean ``name``; returns the mean so far.

        Without ``value`` nothing is added. NaN before the first. Survives a resume inside the epoch.
        """
        total, count = self._means.get(name, (0.0, 0))
        if value is not None:
            total, count = total + float(value) * n, count + n
            self._means[name] = (total, count)
        return total / count if count else math.nan

    def stop_early(self) -> None:
        """Make this the last epoch; a resume then finds the training done."""
        self._ends_training = True


def _history_value(value: Any) -> Any:
    number = as_number(value)
    return float(value) if number is None else number  # NaN and infinities, which only the events cannot hold
