"""What callers give: numbers that are whole, finite, not negative, and profiles of the form that
`grd.hardware.capture_hardware_profile` gives them, or a ValueError that names what is not."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping, Sequence
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
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, not {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(f"{name} must be finite and {'0 or more' if zero else 'above 0'}, not {number}")
    return number


def table(name: str, value: Any) -> Mapping[str, Any]:
    """``value`` as a mapping, an empty one where it is None. Raises ValueError."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a mapping, not {type(value).__name__}")
    return value


def rows(name: str, value: Any) -> Sequence[Mapping[str, Any]]:
    """``value`` as a list of mappings, an empty one where it is None. Raises ValueError."""
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(row, Mapping) for row in value):
        raise ValueError(f"{name} must be a list of mappings")
    return value


def product(*factors: float) -> float:
    """Their product. Raises ValueError where it is beyond every number."""
    try:
        found = math.prod(float(factor) for factor in factors)
    except OverflowError:
        found = math.inf
    if not found <= LARGEST:
        raise ValueError("that is more work than a number can hold")
    return found


def measured(profile: Any) -> Mapping[str, Any]:
    """What `grd benchmark` measured, by the profile; empty where it did not. Raises ValueError."""
    whole = table("hardware_profile", profile)
    found = table("the profile's measured", whole.get("measured"))
    return table("the profile's measured compute", found.get("compute"))
