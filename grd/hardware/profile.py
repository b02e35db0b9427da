"""The hardware profile: one dict of what this machine is, with a reason for everything that is unknown."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grd.hardware.code_version import code_version
from grd.hardware.cpu import cpu_facts, cpuinfo_answer, read_boot_id
from grd.hardware.disks import disk_facts
from grd.hardware.facts import Facts, describe
from grd.hardware.fingerprint import fingerprint
from grd.hardware.frameworks import framework_versions, gpu_software
from grd.hardware.gpus import Gpus, find_gpus
from grd.hardware.limits import Limits, current_limits
from grd.hardware.memory import memory_facts
from grd.hardware.numerics import numerics_environment, torch_switches
from grd.hardware.surroundings import surroundings

SCHEMA = "grd.hardware/1"

_NOT_TOLD = "the platform does not tell"


def system_facts(root: Path = Path("/")) -> Facts:
    """hostname, os, python, boot_id. Never raises."""
    facts = Facts()
    facts.ask("hostname", platform.node, _NOT_TOLD)
    facts.ask("os", platform.platform, _NOT_TOLD)
    facts.ask("python", platform.python_version, _NOT_TOLD)
    facts.ask("boot_id", lambda: read_boot_id(root), _NOT_TOLD)
    return facts


class _Cpuinfo:
    """py-cpuinfo's answer, asked for beside the other probes: the first time in a boot it takes 1.2 s."""

    def __init__(self, root: Path) -> None:
        self._told: Mapping[str, Any] = {"reason": "py-cpuinfo was not asked"}
        self._thread = threading.Thread(target=self._ask, args=(root,), name="grd-cpuinfo", daemon=True)
        self._thread.start()

    def _ask(self, root: Path) -> None:
        try:
            self._told = cpuinfo_answer(root=root)
        except Exception as error:
            self._told = {"reason": f"py-cpuinfo: {describe(error)}"}

    def answer(self) -> Mapping[str, Any]:
        """Wait for it; what it asks has limits of its own."""
        self._thread.join()
        return self._told


def _limits(root: Path) -> Limits:
    try:
        return current_limits(root)
    except Exception as error:  # as every other probe: it must not cost the profile
        return Limits(unreadable=(describe(error),))


def _add(profile: dict[str, Any], group: str | None, facts: Facts) -> None:
    target = profile if group is None else profile[group]
    target.update(facts.values)
    prefix = "" if group is None else f"{group}."
    profile["reasons"].update({f"{prefix}{name}": reason for name, reason in facts.reasons.items()})


def _add_disks(profile: dict[str, Any], project: Path, checkpoints: Path | None, root: Path) -> None:
    _add(profile, "disk", disk_facts(project, root=root))
    reasons = profile["reasons"]
    for name, folder in (("root", Path("/")), ("checkpoints", checkpoints)):
        if folder is None:
            profile["disk"][name] = None
            reasons[f"disk.{name}"] = "no folder for checkpoints was named"
            continue
        facts = disk_facts(folder, root=root)
        profile["disk"][name] = facts.values
        reasons.update({f"disk.{name}.{key}": reason for key, reason in facts.reasons.items()})


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
    _add(profile, "gpu_software", gpu_software(gpus.driver, gpus.driver_cuda))


def _add_numerics(profile: dict[str, Any]) -> None:
    profile["numerics"]["environment"] = numerics_environment()
    _add(profile, "numerics", torch_switches())


def _add_measured(profile: dict[str, Any]) -> None:
    from grd.hardware.benchmark import last_benchmark

    profile["measured"] = last_benchmark(profile["fingerprint"])
    if profile["measured"] is None:
        profile["reasons"]["measured"] = "nothing was measured on this machine yet; see: grd benchmark"


def capture_hardware_profile(
    project_dir: Path | None = None,
    *,
    checkpoint_dir: Path | None = None,
    code_dir: Path | None = None,
    allow_torch_import: bool = False,
    root: Path = Path("/"),
) -> dict[str, Any]:
    """What this machine is and what of it this process may use, as a dict that JSON can hold; never raises.

    Keys: cpu, memory and disk (GiB), gpu (the first device, or None), gpus (all), gpu_software, frameworks,
    system, numerics (variables and switches that change results), code (git), measured (`grd benchmark`'s
    figures), fingerprint, notes, and reasons, which maps the path of every value that is None
    ("cpu.frequency_mhz") to why. disk is that of ``project_dir`` (default: the current folder), disk.root
    that of "/", disk.checkpoints that of ``checkpoint_dir``; code is that of ``code_dir`` (default:
    ``project_dir``). ``allow_torch_import`` lets torch be imported to ask it for GPUs, which takes seconds.
    ``root`` stands for "/" where /proc and /sys are read.
    """
    project = project_dir or Path()
    profile: dict[str, Any] = {
        "schema": SCHEMA,
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": None,
        "cpu": {},
        "memory": {},
        "disk": {"root": {}, "checkpoints": {}},
        "gpu": None,
        "gpus": [],
        "gpu_source": None,
        "gpu_software": {},
        "frameworks": {},
        "system": {},
        "numerics": {"environment": {}},
        "code": {},
        "measured": None,
        "reasons": {},
        "notes": [],
    }
    cpuinfo = _Cpuinfo(root)
    limits = _limits(root)
    groups: dict[str, Callable[[], None]] = {
        "hostname": lambda: _add(profile, None, system_facts(root)),
        "memory": lambda: _add(profile, "memory", memory_facts(limits, root)),
        "disk": lambda: _add_disks(profile, project, checkpoint_dir, root),
        "gpu": lambda: _add_gpus(profile, find_gpus(allow_torch_import=allow_torch_import, root=root)),
        "frameworks": lambda: _add(profile, "frameworks", framework_versions()),
        "system": lambda: _add(profile, "system", surroundings(root)),
        "numerics": lambda: _add_numerics(profile),
        "code": lambda: _add(profile, "code", code_version(code_dir or project)),
        "cpu": lambda: _add(profile, "cpu", cpu_facts(limits, cpuinfo.answer(), root=root)),
        "fingerprint": lambda: profile.update(fingerprint=fingerprint(profile)),
        "measured": lambda: _add_measured(profile),
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
