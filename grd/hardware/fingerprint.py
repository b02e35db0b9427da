"""One short name for "the same machine", made of what stays the same on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def stable_fields(profile: Mapping[str, Any]) -> dict[str, Any]:
    """What the fingerprint is made of.

    The processor's name, usable cores, the memory this process may have (rounded to GiB), each GPU's name,
    memory, MIG profile and driver branch, and torch with the CUDA it was built for. Free memory, clocks and
    disks change by the minute and are no part of it.
    """
    cpu, memory = profile.get("cpu") or {}, profile.get("memory") or {}
    software = profile.get("gpu_software") or {}
    limit = memory.get("limit_gb") or memory.get("total_gb")
    return {
        "cpu": cpu.get("brand"),
        "architecture": cpu.get("architecture"),
        "cores_usable": cpu.get("cores_usable"),
        "memory_gb": None if limit is None else round(limit),
        "gpus": [
            {
                "name": gpu.get("name"),
                "memory_gb": _rounded(gpu.get("total_memory_gb")),
                "mig_profile": gpu.get("mig_profile"),
                "driver": str(gpu.get("driver_version") or "").partition(".")[0] or None,
            }
            for gpu in profile.get("gpus") or []
        ],
        "torch": (profile.get("frameworks") or {}).get("torch"),
        "cuda": software.get("torch_cuda"),
        "hip": software.get("torch_hip"),
    }


def _rounded(number: float | None) -> int | None:
    return None if number is None else round(number)


def fingerprint(profile: Mapping[str, Any]) -> str:
    """sha256 (hexadecimal) over the profile's `stable_fields`: equal on machines that are equal in them."""
    canonical = json.dumps(stable_fields(profile), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
