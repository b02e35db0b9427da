"""What is known of a duration: a value object with its interval, its basis, and how far to trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from grd.estimation.interval import Factor

UNKNOWN, LOW, MEDIUM, HIGH = "UNKNOWN", "LOW", "MEDIUM", "HIGH"

RUNS_FOR_HIGH, FACTOR_FOR_HIGH = 30, 1.5


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """How long a run will take, in seconds; ``seconds`` and ``high`` are None where nothing tells."""

    seconds: float | None
    low: float
    high: float | None
    method: str
    """history, similar (runs that differ in more than their size), or unknown."""
    basis: str
    """A sentence: what it was computed from."""
    confidence: str
    """UNKNOWN, LOW (an assumed interval), MEDIUM (one learned from ten runs or more), HIGH (from many)."""
    n_runs: int = 0
    """Earlier runs it was computed from."""

    def exceeds(self, threshold: float) -> bool | None:
        """Whether it may take longer than ``threshold`` seconds, by the upper end; None: nothing tells."""
        if self.high is None:
            return True if self.low > threshold else None
        return self.high > threshold

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "seconds": _rounded(self.seconds),
            "low_seconds": _rounded(self.low),
            "high_seconds": _rounded(self.high),
            "method": self.method,
            "basis": self.basis,
            "confidence": self.confidence,
            "n_runs": self.n_runs,
        }


def in_units(seconds: float | None, high: float | None, threshold: float) -> dict[str, Any]:
    """A time in three units, and whether somebody must agree: by its upper end, or where that is unknown."""
    long_running = high is None or high > threshold
    return {
        "estimated_seconds": seconds,
        "estimated_minutes": None if seconds is None else seconds / 60,
        "estimated_hours": None if seconds is None else seconds / 3600,
        "is_long_running": long_running,
        "requires_user_confirmation": long_running,
    }


def confidence_of(factor: Factor) -> str:
    """The word for an interval of this factor; never more than LOW without runs to learn from."""
    if not factor.n:
        return LOW
    return HIGH if factor.n >= RUNS_FOR_HIGH and factor.value <= FACTOR_FOR_HIGH else MEDIUM


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None or not math.isfinite(seconds) else round(seconds, 2)
