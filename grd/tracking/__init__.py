"""What a run, or a part of one, uses of the machine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "ResourceSnapshot",
    "ResourceTracker",
    "ResourceUsage",
    "calculate_resource_usage",
    "capture_resource_snapshot",
    "resource_usage_to_dict",
]

if TYPE_CHECKING:
    from grd.tracking.resources import (
        ResourceSnapshot,
        ResourceTracker,
        ResourceUsage,
        calculate_resource_usage,
        capture_resource_snapshot,
        resource_usage_to_dict,
    )


def __getattr__(name: str) -> Any:
    if name in __all__:
        value = getattr(importlib.import_module("grd.tracking.resources"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'grd.tracking' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
