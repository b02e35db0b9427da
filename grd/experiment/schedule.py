"""When to save: pure decisions from what saves and steps were measured to cost."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

from grd.settings import parse_duration

OVERHEAD = 0.035
"""Share of the time that saving may take: CheckFreq (Mohan et al., FAST 2021) bounds it by 3.5 %."""
QUICK_EPOCH_SECONDS = 0.5
QUICK_EPOCH_OVERHEAD = 0.1
SMALL_STATE_BYTES = 32_000_000
"""Saving less than this costs a few syncs; repeating an epoch of half a second or more is worse,
and so is repeating several shorter ones where a save costs less than a tenth of one."""
UNMEASURED_SECONDS = 30.0
"""How long an epoch may go on before its first save, while nobody knows what one costs."""
CLOSEST_SECONDS = 1.0
"""Saves inside an epoch are at least this far apart: less work than a restart takes is not worth a file."""
BIG_MODEL_PARAMETERS = 100_000_000


def save_interval(
    cost: float, *, max_lost_work: float, step: float = 0.0, between_interruptions: float | None = None
) -> float:
    """Seconds of training between saves that cost ``cost`` seconds each.

    sqrt(2 cost M) with M seconds between interruptions (Young, CACM 17(9), 1974), which makes saving and
    repeating together cheapest; cost / 3.5 % while M is unknown. At most ``max_lost_work``; at least one
    ``step``, one save and one second.
    """
    wanted = cost / OVERHEAD
    if between_interruptions is not None:
        wanted = math.sqrt(2 * cost * between_interruptions)
    return max(min(wanted, max_lost_work), step, cost, CLOSEST_SECONDS)


def seed_interval(parameters: int) -> int:
    """Epochs between saves while nothing is measured: 5, from 100 M parameters on 1."""
    return 5 if parameters < BIG_MODEL_PARAMETERS else 1


@dataclass(frozen=True)
class Every:
    """What the user asked for: ``epochs``, ``seconds``, or neither for the measured rule."""

    epochs: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, value: str | int) -> Every:
        """From ``"auto"``, a number of epochs, or a duration such as ``"5m"``. Raises ValueError."""
        if value == "auto":
            return cls()
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 1:
                raise ValueError(f"every={value} must be at least 1 epoch")
            return cls(epochs=value)
        if isinstance(value, str):
            return cls(seconds=parse_duration(value))
        raise ValueError(f"every={value!r} must be 'auto', a number of epochs, or a duration such as '5m'")


class Schedule:
    """Decides after every step and epoch whether to save. Times are in seconds of one monotonic clock.

    The measured rule is `save_interval`; and once more before a known ``deadline``, two slow saves and a
    step ahead of it. ``between_interruptions``: mean training time between ends without warning, if known.
    """

    def __init__(
        self,
        every: Every,
        *,
        now: float,
        max_lost_work: float,
        parameters: int = 0,
        deadline: float | None = None,
        between_interruptions: float | None = None,
    ) -> None:
        self.every = every
        self.max_lost_work = max_lost_work
        self.parameters = parameters
        self.deadline = deadline
        self.between_interruptions = between_interruptions
        self._last_save = now
        self._last_step = now
        self._cost: float | None = None
        self._size = 0
        self._epochs_since_save = 0
        self._epochs_seen = 0
        self._steps_since_save = 0
        self._saves: deque[float] = deque(maxlen=50)
        self._steps: deque[float] = deque(maxlen=200)
        self._steps_beside_save: list[float] | None = None
        self._stall = 0.0
        self._in_background = 0.0

    def step_ended(self, now: float) -> None:
        """One step is done."""
        seconds = max(0.0, now - self._last_step)
        (self._steps_beside_save if self._steps_beside_save is not None else self._steps).append(seconds)
        self._last_step = now
        self._steps_since_save += 1

    def epoch_ended(self, now: float) -> None:
        """One epoch is done."""
        self._last_step = now
        self._epochs_since_save += 1
        self._epochs_seen += 1

    def save_ended(self, now: float, seconds: float, size: int | None) -> None:
        """A save took ``seconds`` for ``size`` bytes; None: it failed, and is not tried again at once."""
        self._last_save = self._last_step = now
        self._epochs_since_save = self._steps_since_save = 0
        if size is None:
            return
        self._in_background = 0.0
        self._saved(seconds, seconds, size)

    def background_save_began(self, now: float, stall: float) -> None:
        """A save stood in the way for ``stall`` seconds, and goes on beside the training."""
        self._last_save = self._last_step = now
        self._epochs_since_save = self._steps_since_save = 0
        self._stall, self._steps_beside_save = stall, []

    def background_save_ended(self, seconds: float, size: int | None) -> None:
        """It took ``seconds`` in all for ``size`` bytes; None: it failed."""
        beside, self._steps_beside_save = self._steps_beside_save or [], None
        if size is None:
            return
        # What it costs is the time that the training has lost: it stood still, and its steps took longer.
        slower = seconds - self._stall  # at most, for all that is known
        if self._steps and beside:
            slower = min(slower, max(0.0, sum(beside) - len(beside) * statistics.median(self._steps)))
        self._in_background = seconds
        self._saved(self._stall + slower, seconds, size)

    def _saved(self, cost: float, seconds: float, size: int) -> None:
        self._size = size
        self._saves.append(seconds)
        self._cost = cost if self._cost is None else 0.7 * self._cost + 0.3 * cost

    @property
    def _is_saving(self) -> bool:
        """Whether a save goes on beside the training: another one would wait for it."""
        return self._steps_beside_save is not None

    @property
    def interval(self) -> float | None:
        """Seconds between saves by the measured rule, or None while nothing is measured."""
        if self._cost is None:
            return None
        step = statistics.median(self._steps) if self._steps else 0.0
        wanted = save_interval(
            self._cost,
            max_lost_work=self.max_lost_work,
            step=step,
            between_interruptions=self.between_interruptions,
        )
        return max(wanted, self._in_background)  # sooner, the next save would wait for this one

    @property
    def expected_overhead(self) -> float | None:
        """Share of the time that saving at `interval` takes, or None while nothing is measured."""
        interval = self.interval
        return None if self._cost is None or not interval else self._cost / interval

    def _deadline_is_near(self, now: float) -> bool:
        if self.deadline is None or not (self._steps_since_save or self._epochs_since_save):
            return False
        start = self.deadline - (2 * _p95(self._saves) + _p95(self._steps))
        return now >= start and self._last_save < start

    def due_after_step(self, now: float) -> bool:
        """Whether to save inside the epoch."""
        if self._deadline_is_near(now):
            return True
        since = now - self._last_save
        if self.every.epochs is not None or self._is_saving:
            return False
        if self.every.seconds is not None:
            return since >= self.every.seconds
        interval = self.interval
        if interval is None:
            return since >= min(UNMEASURED_SECONDS, self.max_lost_work)
        return since >= interval

    def due_after_epoch(self, now: float, epoch: int) -> bool:
        """Whether to save now that ``epoch`` is complete; the last one is saved by the caller in any case."""
        if self._deadline_is_near(now):
            return True
        since = now - self._last_save
        if self.every.epochs is not None:
            return (epoch + 1) % self.every.epochs == 0
        if self._is_saving:
            return False
        if self.every.seconds is not None:
            return since >= self.every.seconds
        if self._cost is None:
            return (self._epochs_seen - 1) % seed_interval(self.parameters) == 0
        interval = self.interval
        return (
            self._cost <= OVERHEAD * since
            or (interval is not None and since >= interval)
            or (
                self._size <= SMALL_STATE_BYTES
                and (since >= QUICK_EPOCH_SECONDS or self._cost <= QUICK_EPOCH_OVERHEAD * since)
            )
        )


def _p95(values: deque[float]) -> float:
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
