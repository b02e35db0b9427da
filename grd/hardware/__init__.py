"""What this machine is: profile, limits, GPUs, frameworks, peaks, benchmark, monitor, comparison."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "Limits": "grd.hardware.limits",
    "GPUMonitor": "grd.hardware.monitor",
    "GPUStats": "grd.hardware.monitor",
    "capture_hardware_profile": "grd.hardware.profile",
    "compare_profiles": "grd.hardware.comparison",
    "current_limits": "grd.hardware.limits",
    "find_gpus": "grd.hardware.gpus",
    "get_gpu_monitor": "grd.hardware.monitor",
    "get_pytorch_hardware_info": "grd.hardware.frameworks",
    "get_tensorflow_hardware_info": "grd.hardware.frameworks",
}

__all__ = [
    "GPUMonitor",
    "GPUStats",
    "Limits",
    "capture_hardware_profile",
    "compare_profiles",
    "current_limits",
    "find_gpus",
    "get_gpu_monitor",
    "get_pytorch_hardware_info",
    "get_tensorflow_hardware_info",
]

if TYPE_CHECKING:
    from grd.hardware.comparison import compare_profiles
    from grd.hardware.frameworks import get_pytorch_hardware_info, get_tensorflow_hardware_info
    from grd.hardware.gpus import find_gpus
    from grd.hardware.limits import Limits, current_limits
    from grd.hardware.monitor import GPUMonitor, GPUStats, get_gpu_monitor
    from grd.hardware.profile import capture_hardware_profile


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'grd.hardware' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
