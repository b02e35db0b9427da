"""The processor: brand and architecture from py-cpuinfo, counts and frequency from psutil."""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grd import settings
from grd.errors import GrdError
from grd.files import read_json, take_lock, write_json
from grd.hardware.cpu_details import cpu_details
from grd.hardware.facts import Facts, describe, run_limited
from grd.hardware.limits import Limits

CPUINFO_SECONDS = 10.0
"""py-cpuinfo takes 1.2 s on an idle machine; past this it is taken for hanging."""

BOOTS_KEPT = 16
"""A state folder in a shared home serves several machines; each has its own boot id."""

# The names py-cpuinfo has for what the kernel calls x86_64 and aarch64, for when py-cpuinfo says nothing.
_ARCHITECTURES = {"x86_64": "X86_64", "amd64": "X86_64", "aarch64": "ARM_8", "arm64": "ARM_8"}

_answers: dict[str, dict[str, Any]] = {}
_asking = threading.Lock()


def read_boot_id(root: Path = Path("/")) -> str:
    """What Linux calls this boot. Raises OSError where there is no /proc."""
    return (root / "proc/sys/kernel/random/boot_id").read_text("ascii").strip()


def _boot_key(root: Path) -> str:
    try:
        return read_boot_id(root)
    except (OSError, ValueError):
        # Not Linux: the start of the monotonic clock names the boot well enough, at the scale of ten minutes.
        return f"{platform.node()}-{round((time.time() - time.monotonic()) / 600)}"


def ask_cpuinfo() -> dict[str, Any]:
    """py-cpuinfo's ``brand_raw`` and ``arch``, or ``reason``, from a process of its own. Takes 1.2 s."""
    try:
        answer = json.loads(run_limited([sys.executable, "-P", "-m", "cpuinfo", "--json"], CPUINFO_SECONDS))
        return {"brand_raw": answer.get("brand_raw"), "arch": answer.get("arch")}
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        return {"brand_raw": None, "arch": None, "reason": f"py-cpuinfo: {describe(error)}"}


def _boots(cache: Path) -> dict[str, dict[str, Any]]:
    try:
        boots = read_json(cache)["boots"]
        return {str(key): dict(value) for key, value in boots.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _ask_once_a_boot(key: str, cache: Path, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    known = _boots(cache).get(key)
    if known is not None:
        return known
    lock, answer = None, None
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        # Ten kernels that start at once ask once: the others wait for the first one's answer.
        lock = take_lock(cache.with_suffix(".lock"), wait_seconds=CPUINFO_SECONDS + 1)
        boots = _boots(cache)
        answer = boots.pop(key, None)
        if answer is None:
            # A failure is kept too, or a machine where it hangs would wait for it at every profile.
            answer = ask()
            kept = dict(list(boots.items())[1 - BOOTS_KEPT :])
            write_json(cache, {"schema": "grd.cpuinfo/1", "boots": {**kept, key: answer}}, durable=False)
    except OSError:
        pass  # a state folder that cannot be written costs time, nothing else
    finally:
        if lock is not None:
            os.close(lock)
    return ask() if answer is None else answer


def cpuinfo_answer(
    *,
    root: Path = Path("/"),
    cache: Path | None = None,
    ask: Callable[[], dict[str, Any]] = ask_cpuinfo,
) -> Mapping[str, Any]:
    """py-cpuinfo's answer, asked at most once a boot; never raises.

    It is kept in ``cache`` (default: ``cpuinfo.json`` in grd's state folder) under the boot's id, and for the
    life of this process where that folder cannot be written.
    """
    if find_spec("cpuinfo") is None:
        return {"brand_raw": None, "arch": None, "reason": "py-cpuinfo is not installed"}
    try:
        cache = cache or settings.state_dir() / "cpuinfo.json"
    except (GrdError, OSError, ImportError, RuntimeError):
        return ask()
    key = _boot_key(root)
    with _asking:
        memory_key = f"{cache}:{key}"
        if memory_key not in _answers:
            _answers[memory_key] = _ask_once_a_boot(key, cache, ask)
        return _answers[memory_key]


def _proc_model_name(root: Path) -> str | None:
    for line in (root / "proc/cpuinfo").read_text("utf-8", "replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name" and value.strip():
            return value
    return None


def _brand(answer: Mapping[str, Any], root: Path) -> str | None:
    if isinstance(answer.get("brand_raw"), str) and answer["brand_raw"].strip():
        return str(answer["brand_raw"])
    try:
        return _proc_model_name(root) or platform.processor() or None
    except OSError:
        return platform.processor() or None


def _architecture(answer: Mapping[str, Any]) -> str | None:
    machine = platform.machine()
    return answer.get("arch") or _ARCHITECTURES.get(machine.lower(), machine)


def _frequency(psutil: Any) -> float | None:
    frequency = psutil.cpu_freq()
    # Virtual machines answer 0.0 and ARM boards None, and both mean that nobody knows.
    return round(float(frequency.current), 1) if frequency and frequency.current > 0 else None


def _highest_frequency(psutil: Any) -> float | None:
    frequency = psutil.cpu_freq()
    return round(float(frequency.max), 1) if frequency and frequency.max > 0 else None


def cpu_facts(limits: Limits, answer: Mapping[str, Any], *, root: Path = Path("/")) -> Facts:
    """brand, architecture, cores and what bounds them, frequencies, and `grd.hardware.cpu_details`' fields.

    cores_usable is the smallest of cores_logical and core_limits, which lists each limit with its source.
    frequency_mhz is the one of this moment. ``answer`` is `cpuinfo_answer`'s. Never raises.
    """
    facts = Facts()
    unnamed = str(answer.get("reason") or "the processor tells no name")
    facts.ask("brand", lambda: _brand(answer, root), unnamed)
    facts.ask("architecture", lambda: _architecture(answer), "the platform tells no architecture")
    try:
        import psutil
    except ImportError as error:
        reason = f"psutil: {describe(error)}"
        for name in ("cores_physical", "cores_logical", "frequency_mhz", "frequency_max_mhz"):
            facts.put(name, None, reason)
        logical = None
    else:
        facts.ask("cores_physical", lambda: psutil.cpu_count(logical=False), "the platform does not tell")
        logical = facts.ask(
            "cores_logical", lambda: psutil.cpu_count(logical=True), "the platform does not tell"
        )
        facts.ask("frequency_mhz", lambda: _frequency(psutil), "the platform reports no frequency")
        facts.ask(
            "frequency_max_mhz",
            lambda: _highest_frequency(psutil),
            "the platform reports no highest frequency",
        )
    usable, source = limits.usable_cores(logical)
    facts.put("cores_usable", usable, "neither the cores nor a limit on them is known")
    facts.put("cores_usable_source", source, "neither the cores nor a limit on them is known")
    facts.put(
        "core_limits", [{"cores": limit.cores, "source": limit.source} for limit in limits.cores], "unknown"
    )
    facts.add(cpu_details(root))
    return facts
