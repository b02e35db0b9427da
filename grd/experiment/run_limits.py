"""What the run told its notebook about time: how much work may be at risk, and when it must have ended."""

from __future__ import annotations

import os

from grd import contract
from grd.settings import Settings, parse_duration


def max_lost_work() -> float:
    """Seconds of training that may be lost, as the run was told."""
    try:
        return parse_duration(os.environ[contract.ENV_MAX_LOST_WORK])
    except (KeyError, ValueError):
        return Settings().max_lost_work


def deadline_of_run() -> float | None:
    """When the run must have ended, on the monotonic clock; None without a deadline."""
    try:
        return float(os.environ[contract.ENV_DEADLINE])
    except (KeyError, ValueError):
        return None
