"""How long looking at a table takes: only a measured sample of it can tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grd.contract import LONG_RUNNING_SECONDS
from grd.estimation.checked import LARGEST, count, measured, positive, product
from grd.estimation.estimate import LOW, UNKNOWN, in_units
from grd.estimation.interval import PRIOR_PROBE, Factor

BYTES_PER_VALUE = 8
"""A number of a table in memory."""


def estimate_eda_duration(
    num_rows: int,
    num_columns: int,
    hardware_profile: Mapping[str, Any] | None = None,
    *,
    sample_rows: int | None = None,
    sample_seconds: float | None = None,
    threshold_seconds: float = LONG_RUNNING_SECONDS,
) -> dict[str, Any]:
    """How long the exploration of a table of ``num_rows`` x ``num_columns`` values takes.

    What is done to a table decides, and its size does not tell that: so it is unknown until the same was
    done to ``sample_rows`` of its rows, in ``sample_seconds``. Then it is in proportion to the rows, within
    a factor of 2, as for every probe. Without a sample ``low_seconds`` is one pass over the values at the
    memory bandwidth that `grd benchmark` measured (the profile's), or 0.

    Keys as of `estimate_training_duration`, without the operations: estimated_seconds, estimated_minutes,
    estimated_hours, low_seconds, high_seconds, is_long_running, requires_user_confirmation, confidence
    (LOW with a sample, UNKNOWN without), basis, reasons.
    Raises ValueError for numbers that are no counts, for one half of a sample without the other, and for a
    profile of another form.
    """
    rows, columns = count("num_rows", num_rows), count("num_columns", num_columns)
    threshold = positive("threshold_seconds", threshold_seconds)
    if (sample_rows is None) != (sample_seconds is None):
        raise ValueError("a sample is sample_rows and sample_seconds together")
    seconds = high = None
    reasons: dict[str, str] = {}
    low, basis = _one_pass(rows, columns, hardware_profile)
    if sample_rows is not None:
        sampled = count("sample_rows", sample_rows, least=1)
        took = positive("sample_seconds", sample_seconds)
        seconds = product(took, rows) / sampled
        low, high = Factor(value=PRIOR_PROBE, n=0).around(seconds)
        basis = f"{sampled} rows took {took:g} s, and all {rows} are taken to be like them"
    else:
        reason = "nothing was measured; do the same to some rows, and give sample_rows and sample_seconds"
        names = ("estimated_seconds", "estimated_minutes", "estimated_hours", "high_seconds")
        reasons = dict.fromkeys(names, reason)
    return {
        **in_units(seconds, high, threshold),
        "low_seconds": low,
        "high_seconds": high,
        "confidence": UNKNOWN if seconds is None else LOW,
        "basis": basis,
        "reasons": reasons,
    }


def _one_pass(rows: int, columns: int, profile: Mapping[str, Any] | None) -> tuple[float, str]:
    """Seconds in which all values can be read once at best, and where that is from."""
    compute = measured(profile)
    bandwidth = compute.get("memory_bandwidth_gbs")
    if (
        compute.get("kind") != "cpu"
        or not isinstance(bandwidth, int | float)
        or not (0 < bandwidth <= LARGEST)
    ):
        return 0.0, "nothing was measured"
    seconds = product(rows, columns, BYTES_PER_VALUE) / (float(bandwidth) * 1e9)
    return seconds, f"one pass over all values at {bandwidth:.3g} GB/s, as `grd benchmark` measured"
