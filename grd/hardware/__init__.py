"""What this machine is: profile, limits, GPUs, frameworks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "Limits": "grd.hardware.limits",
    "capture_hardware_profile": "grd.hardware.profile",
    "current_limits": "grd.hardware.limits",
    "find_gpus": "grd.hardware.gpus",
    "get_pytorch_hardware_info": "grd.hardware.frameworks",
    "get_tensorflow_hardware_info": "grd.hardware.frameworks",
}

__all__ = [
    "Limits",
    "capture_hardware_profile",
    "current_limits",
    "find_gpus",
    "get_pytorch_hardware_info",
    "get_tensorflow_hardware_info",
]

if TYPE_CHECKING:
    from grd.hardware.frameworks import get_pytorch_hardware_info, get_tensorflow_hardware_info
    from grd.hardware.gpus import find_gpus
    from grd.hardware.limits import Limits, current_limits
    from grd.hardware.profile import capture_hardware_profile


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'grd.hardware' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
