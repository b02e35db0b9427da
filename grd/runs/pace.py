"""How fast a loop goes, by its progress events: the facts that the time left is computed from.

A unit is what the loop counts: an epoch, or an item of a bar. Where steps inside a unit are told, time is
kept apart: between two steps, and at the end of a unit, where validation and checkpoints are.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

WARM_UP_REPORTS = 6
"""From so many reports on the first interval is left out: data loaders start in it, and code is compiled."""

SPACING = 1.1
"""Each moment that is kept is so many times as far from the start as the one before: 130 for ten days."""


class Moment(NamedTuple):
    """What had been seen at one report. Cumulative, of this attempt only."""

    t: float
    """POSIX seconds."""
    n: float
    """Units done, with the share of the one under way."""
    unit: int
    """The unit under way; after its last step that is still this one."""
    step_seconds: float = 0.0
    step_units: float = 0.0
    """Time between steps of the same unit, and the units done in it."""
    ends: int = 0
    """Ends of units seen."""
    reports: int = 1


@dataclass(kw_only=True)
class Pace:
    """One loop of one attempt, from its first report on."""

    first: Moment
    now: Moment
    warm: Moment | None = None
    """The second report."""
    steps: int | None = None
    """Steps in a unit, where they are told."""
    moments: list[Moment] = field(default_factory=list)
    """Some reports since the first, ever farther apart."""
    earlier_end: float | None = None
    """Seconds that the end of a unit took in an earlier attempt."""
    skips: bool = False
    """The loop was resumed inside a unit: its first report does not say where."""

    @classmethod
    def begin(
        cls, event: dict[str, Any], *, earlier_end: float | None = None, skips: bool = False
    ) -> Pace | None:
        """The pace after the first progress event of a loop; None if it says no number."""
        found = _position(event)
        if found is None:
            return None
        unit, share = found
        moment = Moment(t=_time_of(event), n=unit + share, unit=unit)
        return cls(first=moment, now=moment, earlier_end=earlier_end, skips=skips)

    def take(self, event: dict[str, Any]) -> bool:
        """Account for one more event; False if the loop has started again, and this is no part of it."""
        found, before = _position(event), self.now
        if found is None:
            return True
        unit, share = found
        if unit < before.unit:
            return False
        t = max(before.t, _time_of(event))
        # A second pass over data in the same unit, such as a validation, is part of the unit's end.
        n = max(before.n, unit + share)
        if n > before.n and isinstance(event.get("steps"), int) and event["steps"] > 0:
            self.steps = event["steps"]
        stepped = unit == before.unit < before.n < n
        self.now = Moment(
            t=t,
            n=n,
            unit=unit,
            step_seconds=before.step_seconds + (t - before.t if stepped else 0.0),
            step_units=before.step_units + (n - before.n if stepped else 0.0),
            ends=before.ends + unit - before.unit,
            reports=before.reports + 1,
        )
        if self.skips:
            self.skips = False
            self.first = self.now = self.now._replace(ends=0, reports=1)
        elif self.warm is None:
            self.warm = self.now
        elapsed = t - self.first.t
        last = self.moments[-1].t - self.first.t if self.moments else 0.0
        if elapsed >= 1.0 and elapsed >= SPACING * last:
            self.moments.append(self.now)
        return True

    def per_second(self) -> float | None:
        """Units a second since this attempt's first report."""
        done, elapsed = self.now.n - self.first.n, self.now.t - self.first.t
        return done / elapsed if done > 0 and elapsed > 0 else None

    def end_seconds(self, at: Moment | None = None) -> float | None:
        """What the end of a unit took on average beyond its steps: validation, checkpoint, a loader's start.

        None where steps are not told apart, or no end was seen in this attempt or an earlier one.
        """
        moment = at or self.now
        base = self._base(moment)
        ends = moment.ends - base.ends
        if moment.step_units <= 0 or ends <= 0:
            return self.earlier_end
        other_seconds = moment.t - base.t - (moment.step_seconds - base.step_seconds)
        other_units = moment.n - base.n - (moment.step_units - base.step_units)
        step = moment.step_seconds / moment.step_units
        return max(0.0, other_seconds - step * other_units) / ends

    def remaining(self, total: float, at: Moment | None = None) -> float | None:
        """Seconds from ``at`` (default: the newest report) to ``total``; None while nothing was measured.

        Means, not medians: what holds a training up now and then is part of its time.
        """
        moment = at or self.now
        left = max(0.0, total - moment.n)
        if moment.step_units > 0:
            step = moment.step_seconds / moment.step_units
            ends_left = max(0.0, total - moment.unit)
            return step * left + (self.end_seconds(moment) or 0.0) * ends_left
        base = self._base(moment)
        if moment.n <= base.n or moment.t <= base.t:
            return None
        return (moment.t - base.t) / (moment.n - base.n) * left

    def _base(self, moment: Moment) -> Moment:
        return self.warm if self.warm is not None and moment.reports >= WARM_UP_REPORTS else self.first

    def to_dict(self) -> dict[str, Any]:
        """JSON values that `from_dict` takes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Pace:
        """The pace that `to_dict` gave. Raises TypeError for anything else."""
        moments = {name: value[name] and Moment(*value[name]) for name in ("first", "now", "warm")}
        return cls(**{**value, **moments, "moments": [Moment(*moment) for moment in value["moments"]]})


def number_of(value: Any) -> int | float | None:
    """``value`` if it is a finite number that can be computed with: whole ones may be beyond every float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def _time_of(event: dict[str, Any]) -> float:
    t = event.get("t")
    return float(t) if isinstance(t, (int, float)) else 0.0


def _position(event: dict[str, Any]) -> tuple[int, float] | None:
    """The unit under way and the share of it that is done; None if ``n`` is no number."""
    n, step, steps = number_of(event.get("n")), event.get("step"), event.get("steps")
    if n is None:
        return None
    if isinstance(step, int) and isinstance(steps, int) and 0 < step <= steps:
        # ``n`` is rounded, and after the last step it is already that of the next unit.
        share = step / steps
        unit = round(n - share)
        if unit >= 0 and abs(unit + share - n) < 0.002:
            return unit, share
    return math.floor(n), n - math.floor(n)
