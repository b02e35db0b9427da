"""From one number to an interval: a stated factor until there are runs to learn from, then their errors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

LEAST_RUNS = 10
"""Finished runs from which on their errors say more than a prior: nine of ten are covered from nine on."""

COVERAGE_TENTHS = 9
"""Nine of ten intervals hold the truth, of runs that are like those before."""

PRIOR_PROBE = 2.0
"""For what the first steps of a run predict. Probes of runs on a busy machine were off by up to 1.6."""

PRIOR_HISTORY = 3.0
"""For earlier runs of the same notebook. Repetitions on a busy machine differed by up to 2.6."""

PRIOR_SIMILAR = 5.0
"""For earlier runs that differ in more than their size: a stated guess, until some have come out."""


@dataclass(frozen=True, kw_only=True)
class Factor:
    """An interval is a prediction divided by ``value`` to the prediction times ``value``."""

    value: float
    """1 or more."""
    n: int
    """Finished runs it was learned from; 0 for a prior."""

    @property
    def how(self) -> str:
        """How it is known, for people."""
        if self.n:
            return f"nine of ten of the last {self.n} predictions were within a factor of {self.value:.2g}"
        return f"a factor of {self.value:.2g} is assumed until {LEAST_RUNS} predictions have come out"

    def around(self, seconds: float) -> tuple[float, float]:
        """The interval's lower and upper end."""
        return seconds / self.value, seconds * self.value


def factor_of(errors: Iterable[tuple[float, float]], prior: float) -> Factor:
    """The factor that predictions need, by ``errors``: pairs of predicted and real seconds.

    Split conformal prediction (Vovk et al. 2005) on abs(log(real / predicted)): of n errors the
    ceil((n + 1) * 0.9)-th smallest, which covers nine of ten new ones if they are like those. ``prior``
    with fewer than ten. Pairs that are not positive and finite are passed over.
    """
    off = sorted(
        abs(math.log(real) - math.log(predicted))
        for predicted, real in errors
        if 0 < predicted < math.inf and 0 < real < math.inf
    )
    if len(off) < LEAST_RUNS:
        return Factor(value=max(1.0, prior), n=0)
    rank = -(-(len(off) + 1) * COVERAGE_TENTHS // 10)
    return Factor(value=min(math.exp(off[rank - 1]), 1e6), n=len(off))
