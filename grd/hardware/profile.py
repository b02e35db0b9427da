"""The hardware profile: one dict of what this machine is, with a reason for everything that is unknown."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grd.hardware.cpu import cpu_facts, cpuinfo_answer, read_boot_id
from grd.hardware.facts import Facts, describe
from grd.hardware.frameworks import framework_versions
from grd.hardware.gpus import Gpus, find_gpus
from grd.hardware.limits import Limits, current_limits
from grd.hardware.mounts import mount_of, read_mounts

SCHEMA = "grd.hardware/1"
GIBIBYTE = 1024**3

_NOT_TOLD = "the platform does not tell"


def _gib(number_of_bytes: float | None) -> float | None:
    return None if number_of_bytes is None else number_of_bytes / GIBIBYTE


def memory_facts(limits: Limits) -> Facts:
    """total_gb, available_gb, limit_gb, limit_source, swap_total_gb, in GiB. Never raises.

    total_gb is the machine's; limit_gb the tightest limit below it; available_gb what this process can still
    get under both. Swap of 0 is a machine without swap.
    """
    facts = Facts()
    try:
        import psutil

        memory = psutil.virtual_memory()
        total, available = int(memory.total), int(memory.available)
    except Exception as error:
        total, available, unknown = None, None, f"psutil: {describe(error)}"
    else:
        unknown = _NOT_TOLD
    facts.put("total_gb", _gib(total or None), unknown)
    facts.put(
        "available_gb", _gib(None if available is None else limits.memory_available(available)), unknown
    )
    limit = limits.memory_limit(total)
    unlimited = "no limit below the machine's memory was found"
    if limits.unreadable:
        unlimited = f"not every limit could be read: {', '.join(limits.unreadable[:3])}"
    facts.put("limit_gb", _gib(limit.limit) if limit else None, unlimited)
    facts.put("limit_source", limit.source if limit else None, unlimited)
    facts.ask("swap_total_gb", _swap_total, _NOT_TOLD)
    return facts


def _swap_total() -> float | None:
    import psutil

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # psutil warns where /proc/vmstat is missing
        return _gib(psutil.swap_memory().total)


def _nearest_folder(path: Path) -> Path:
    path = Path(os.path.realpath(path))
    return next(folder for folder in (path, *path.parents) if folder.exists())


def disk_facts(path: Path, *, root: Path = Path("/")) -> Facts:
    """total_gb, free_gb (GiB this user may fill), path, mount, fs_type of the disk that holds ``path``.

    A path that does not exist yet stands for its nearest folder that does. Never raises.
    """
    facts = Facts()
    facts.ask("path", lambda: str(_nearest_folder(path)), _NOT_TOLD)
    folder = facts.values["path"]
    try:
        usage = os.statvfs(_nearest_folder(path))
    except OSError as error:
        facts.put("total_gb", None, describe(error))
        facts.put("free_gb", None, describe(error))
    else:
        # Some network file systems answer 0 blocks: they do not know their size.
        known = usage.f_blocks > 0
        facts.put("total_gb", usage.f_blocks * usage.f_frsize / GIBIBYTE if known else None, _NOT_TOLD)
        facts.put("free_gb", usage.f_bavail * usage.f_frsize / GIBIBYTE if known else None, _NOT_TOLD)
    try:
        mount = mount_of(Path(folder), read_mounts(root)) if folder else None
        unknown = "no mount is listed for it"
    except OSError as error:
        mount, unknown = None, describe(error)
    facts.put("mount", mount.point if mount else None, unknown)
    facts.put("fs_type", mount.fs_type if mount else None, unknown)
    return facts


def system_facts(root: Path = Path("/")) -> Facts:
    """hostname, os, python, boot_id. Never raises."""
    facts = Facts()
    facts.ask("hostname", platform.node, _NOT_TOLD)
    facts.ask("os", platform.platform, _NOT_TOLD)
    facts.ask("python", platform.python_version, _NOT_TOLD)
    facts.ask("boot_id", lambda: read_boot_id(root), _NOT_TOLD)
    return facts


def _add(profile: dict[str, Any], group: str | None, facts: Facts) -> None:
    target = profile if group is None else profile[group]
    target.update(facts.values)
    prefix = "" if group is None else f"{group}."
    profile["reasons"].update({f"{prefix}{name}": reason for name, reason in facts.reasons.items()})


def _add_disk(profile: dict[str, Any], folder: Path, root: Path) -> None:
    _add(profile, "disk", disk_facts(folder, root=root))
    facts = disk_facts(Path("/"), root=root)
    profile["disk"]["root"] = facts.values
    profile["reasons"].update({f"disk.root.{name}": reason for name, reason in facts.reasons.items()})


def _add_gpus(profile: dict[str, Any], gpus: Gpus) -> None:
    reasons = profile["reasons"]
    profile["gpus"] = [facts.values for facts in gpus.devices]
    profile["gpu_source"] = gpus.source
    if not gpus.devices:
        reasons["gpu"] = reasons["gpu_source"] = gpus.reason or "no source lists one"
    else:
        profile["gpu"] = {**gpus.devices[0].values, "device_count": len(gpus.devices)}
    for index, facts in enumerate(gpus.devices):
        for name, reason in facts.reasons.items():
            reasons[f"gpus.{index}.{name}"] = reason
            if index == 0:
                reasons[f"gpu.{name}"] = reason
    profile["notes"] += gpus.notes


def capture_hardware_profile(
    project_dir: Path | None = None, *, allow_torch_import: bool = False, root: Path = Path("/")
) -> dict[str, Any]:
    """What this machine is and what of it this process may use, as a dict that JSON can hold; never raises.

    Keys: cpu, memory and disk (GiB), gpu (the first device, or None), gpus (all), frameworks, notes, and
    reasons, which maps the path of every value that is None ("cpu.frequency_mhz") to why. disk is that of
    ``project_dir`` (default: the current folder), disk.root that of "/". ``allow_torch_import`` lets torch be
    imported to ask it for GPUs, which takes seconds. ``root`` stands for "/" where /proc and /sys are read.
    """
    profile: dict[str, Any] = {
        "schema": SCHEMA,
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": {},
        "memory": {},
        "disk": {"root": {}},
        "gpu": None,
        "gpus": [],
        "gpu_source": None,
        "frameworks": {},
        "reasons": {},
        "notes": [],
    }
    limits = current_limits(root)
    groups: dict[str, Callable[[], None]] = {
        "system": lambda: _add(profile, None, system_facts(root)),
        "cpu": lambda: _add(profile, "cpu", cpu_facts(limits, cpuinfo_answer(root=root), root=root)),
        "memory": lambda: _add(profile, "memory", memory_facts(limits)),
        "disk": lambda: _add_disk(profile, project_dir or Path(), root),
        "gpu": lambda: _add_gpus(profile, find_gpus(allow_torch_import=allow_torch_import)),
        "frameworks": lambda: _add(profile, "frameworks", framework_versions()),
    }
    for name, add in groups.items():
        try:
            add()
        except Exception as error:
            # The probes catch what they expect; a machine nobody has seen yet must not cost the profile.
            profile["reasons"][name] = describe(error)
            if name == "gpu":
                profile["reasons"]["gpu_source"] = describe(error)
    return profile
