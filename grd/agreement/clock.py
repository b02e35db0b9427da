"""The time as agreements count it: a clock that was set back prolongs none of them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from grd.runs.processes import boot_id


@dataclass(frozen=True)
class Moment:
    """A time by the wall clock (POSIX seconds) and by the machine's own since its start (seconds)."""

    wall: float
    boot_id: str | None
    since_boot: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values that `from_dict` takes."""
        return {"t": self.wall, "boot_id": self.boot_id, "since_boot": self.since_boot}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Moment:
        """The moment that an entry of the log has. Raises KeyError, TypeError or ValueError."""
        try:
            wall, since_boot = float(value["t"]), float(value["since_boot"])
        except OverflowError as error:  # an integer with hundreds of digits
            raise ValueError(str(error)) from None
        if not (math.isfinite(wall) and math.isfinite(since_boot)):
            raise ValueError("a moment must be finite")
        return cls(wall, value.get("boot_id"), since_boot)


def now() -> Moment:
    """This moment; CLOCK_BOOTTIME goes on while the machine sleeps."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return Moment(time.time(), boot_id(), time.clock_gettime(clock))


def after(past: Moment | None, moment: Moment) -> Moment:
    """``moment`` with the time as agreements count it, where ``past`` is the latest that they know of."""
    return moment if past is None else replace(moment, wall=true_time(moment, [past]))


def true_time(moment: Moment, known: Iterable[Moment]) -> float:
    """The wall clock at ``moment``, but never before what is ``known`` to have passed.

    Since another moment of the same start of the machine so much has passed as its own clock says; of any
    moment the wall clock has been reached.
    """
    latest = moment.wall
    for past in known:
        latest = max(latest, past.wall)
        if past.boot_id and past.boot_id == moment.boot_id:
            latest = max(latest, past.wall + (moment.since_boot - past.since_boot))
    return latest
