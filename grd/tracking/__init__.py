"""What a run, or a part of one, uses of the machine."""

from __future__ import annotations

from grd.tracking.resources import (
    ResourceSnapshot,
    ResourceTracker,
    ResourceUsage,
    calculate_resource_usage,
    capture_resource_snapshot,
    resource_usage_to_dict,
)

__all__ = [
    "ResourceSnapshot",
    "ResourceTracker",
    "ResourceUsage",
    "calculate_resource_usage",
    "capture_resource_snapshot",
    "resource_usage_to_dict",
]
