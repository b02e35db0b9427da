"""Numbers that callers give: whole, finite, not negative, or a ValueError that names them."""

from __future__ import annotations

import math
import operator
from typing import Any

LARGEST = 1e200
"""Products of numbers beyond it could not be computed."""


def count(name: str, value: Any, least: int = 0) -> int:
    """``value`` as a whole number from ``least`` on. Raises ValueError."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, not {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be {least} or more, not {number}")
    return number


def positive(name: str, value: Any, *, zero: bool = False) -> float:
    """``value`` as a finite number above zero, or from ``zero`` on. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} must be finite and {'0 or more' if zero else 'above 0'}, not {value}")
    return float(value)


def product(*factors: float) -> float:
    """Their product. Raises ValueError where it is beyond every number."""
    try:
        found = math.prod(float(factor) for factor in factors)
    except OverflowError:
        found = math.inf
    if not found <= LARGEST:
        raise ValueError("that is more work than a number can hold")
    return found
