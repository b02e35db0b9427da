"""The time left of a run under way: its first steps are the probe, and every later one makes it better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grd.estimation.interval import PRIOR_PROBE, Factor
from grd.runs.events import LiveView
from grd.runs.pace import Moment, Pace

PROBE_SHARE = 0.05
PROBE_STEPS = 20
PROBE_SECONDS = 10.0
"""The probe is over when all three are reached."""

PROBE_LONGEST_SECONDS = 60.0
"""Whoever is to agree to a long run must not wait longer, whatever the steps take."""


SHORTEST_REST_SECONDS = 1.0
"""Reports are a quarter of a second apart: how long a shorter rest took is not known well enough."""


def is_probed(pace: Pace, moment: Moment, total: float) -> bool:
    """Whether the first steps up to ``moment`` are enough to speak of the rest."""
    elapsed, done = moment.t - pace.first.t, moment.n - pace.first.n
    if done <= 0:
        return False
    if elapsed >= PROBE_LONGEST_SECONDS:
        return True
    steps = done * (pace.steps or 1)
    enough = done >= PROBE_SHARE * (total - pace.first.n)
    return enough and steps >= PROBE_STEPS and elapsed >= PROBE_SECONDS


def probe_of(pace: Pace, total: float) -> Moment | None:
    """The moment at which the probe was over; None while it goes on."""
    return next((m for m in (*pace.moments, pace.now) if is_probed(pace, m, total)), None)


def progress_with_interval(view: LiveView, estimate: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The view's progress with eta_low_seconds, eta_high_seconds and eta_basis.

    ``estimate`` is that of the run's record: it holds the factor that earlier runs have taught. The time
    left is that of the loop; what the notebook does after it is not in it. While the probe goes on the
    interval is null, and the basis says so.
    """
    progress = view.progress
    if progress is None:
        return None
    pace, total = view.paces.get(progress["name"]), progress["total"]
    if not isinstance(total, int | float):
        return {**progress, "eta_basis": "how much there is to do was not told"}
    if pace is None:
        # What was left by an earlier attempt's pace is no time left of this one.
        return {**progress, "eta_seconds": None, "eta_basis": "this attempt has not told its progress yet"}
    left = pace.remaining(total)
    if left is None:
        return {**progress, "eta_basis": "nothing was measured yet"}
    elapsed = pace.now.t - pace.first.t
    if left == 0:
        return {**progress, "eta_low_seconds": 0.0, "eta_high_seconds": 0.0, "eta_basis": "it is done"}
    if probe_of(pace, total) is None:
        basis = f"the first {elapsed:.0f} s; too little for an interval yet"
        return {**progress, "eta_basis": basis}
    factor = _factor(estimate)
    low, high = factor.around(left)
    basis = f"{_what_was_seen(pace, elapsed)}; {factor.how}"
    return {
        **progress,
        "eta_low_seconds": round(low, 1),
        "eta_high_seconds": round(high, 1),
        "eta_basis": basis,
    }


def probe_result(view: LiveView) -> dict[str, Any] | None:
    """What the probe of the loop that was shown last has predicted, and what came of it.

    None unless the loop went to its end, and was longer than its probe by a second. Keys: name,
    after_seconds (from the attempt's first report), remaining_seconds (predicted), took_seconds (real).
    """
    progress = view.progress
    if progress is None or not isinstance(progress["total"], int | float):
        return None
    pace, total = view.paces.get(progress["name"]), float(progress["total"])
    if pace is None or pace.now.n < total:
        return None
    moment = probe_of(pace, total)
    predicted = None if moment is None else pace.remaining(total, moment)
    if moment is None or predicted is None or predicted < SHORTEST_REST_SECONDS:
        return None
    return {
        "name": progress["name"],
        "after_seconds": round(moment.t - pace.first.t, 3),
        "remaining_seconds": round(predicted, 3),
        "took_seconds": round(pace.now.t - moment.t, 3),
    }


def _factor(estimate: Mapping[str, Any] | None) -> Factor:
    stored = estimate or {}
    value, n = stored.get("live_factor"), stored.get("live_runs")
    if isinstance(value, int | float) and isinstance(n, int) and value >= 1:
        return Factor(value=float(value), n=n)
    return Factor(value=PRIOR_PROBE, n=0)


def _what_was_seen(pace: Pace, elapsed: float) -> str:
    done = pace.now.n - pace.first.n
    seen = f"{done:.3g} done in {elapsed:.0f} s of this attempt"
    if pace.now.step_units <= 0:
        return seen
    end = pace.end_seconds()
    if end is None:
        return f"{seen}, the end of an epoch (validation, checkpoint) not seen yet"
    return f"{seen}, {end:.2g} s at the end of each epoch"
