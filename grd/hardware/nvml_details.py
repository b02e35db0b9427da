"""What NVML tells of one device beyond its name and memory: link, limits, health, partitioning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from grd.hardware.facts import Facts

GIBIBYTE = 1024**3

NAMES = (
    "memory_free_gb", "architecture", "pci_bus_id", "vbios", "pcie_generation", "pcie_generation_max",
    "pcie_width", "pcie_width_max", "nvlinks_active", "numa_node", "ecc_enabled",
    "ecc_uncorrected_errors", "compute_mode", "persistence", "power_limit_w", "power_default_w",
    "clock_sm_max_mhz", "clock_memory_max_mhz", "throttled_by", "temperature_c", "mig_enabled",
    "mig_profile", "mig_instances", "multi_processor_count",
)  # fmt: skip
"""All fields, in the order they are recorded; every source's devices have all of them."""

_UNSAID = "NVML does not tell"
_ARCHITECTURES = {
    2: "Kepler", 3: "Maxwell", 4: "Pascal", 5: "Volta", 6: "Turing", 7: "Ampere", 8: "Ada", 9: "Hopper",
    10: "Blackwell",
}  # fmt: skip
_COMPUTE_MODES = {0: "default", 1: "exclusive_thread", 2: "prohibited", 3: "exclusive_process"}
# nvml.h, nvmlClocksEventReasons. An idle clock (1) is no throttling.
_THROTTLES = {
    0x2: "application_clocks", 0x4: "power_cap", 0x8: "hardware_slowdown", 0x10: "sync_boost",
    0x20: "thermal_slowdown", 0x40: "hardware_thermal_slowdown", 0x80: "power_brake", 0x100: "display_clocks",
}  # fmt: skip
_TEMPERATURE_GPU, _CLOCK_SM, _CLOCK_MEMORY = 0, 1, 2
_UNCORRECTED, _VOLATILE = 1, 0
_MIG_SLOTS = 7
"""No card makes more than seven instances; the driver is asked for its own number first."""


def text(value: Any) -> str:
    """What NVML calls a string: bytes from old bindings, str from newer ones."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _architecture(nvml: Any, handle: Any) -> str | None:
    number = int(nvml.nvmlDeviceGetArchitecture(handle))
    return _ARCHITECTURES.get(number)


def _throttled_by(nvml: Any, handle: Any) -> list[str]:
    mask = int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
    return [name for bit, name in _THROTTLES.items() if mask & bit]


def _nvlinks(nvml: Any, handle: Any) -> int:
    """Links that are up. Raises NVMLError for a device without NVLink."""
    active = int(nvml.nvmlDeviceGetNvLinkState(handle, 0))
    for link in range(1, 18):
        try:
            active += int(nvml.nvmlDeviceGetNvLinkState(handle, link))
        except nvml.NVMLError:
            break  # the device has no link of this number
    return active


def is_instance(nvml: Any, handle: Any) -> bool:
    """Whether this is a MIG instance, a part of a card."""
    try:
        return bool(nvml.nvmlDeviceIsMigDeviceHandle(handle))
    except Exception:
        # Drivers older than MIG do not have the function; such a device is a card.
        return False


def profile_name(nvml: Any, handle: Any) -> str:
    """A MIG instance's profile as NVIDIA writes it: slices, then memory, "1g.5gb" or "1c.3g.20gb".

    Memory is rounded up to whole GiB: a 1g.5gb instance has 4864 MiB.
    """
    told = nvml.nvmlDeviceGetAttributes(handle)
    compute, part = int(told.computeInstanceSliceCount), int(told.gpuInstanceSliceCount)
    shared = "" if compute == part else f"{compute}c."
    return f"{shared}{part}g.{math.ceil(int(told.memorySizeMB) / 1024)}gb"


def _instances(nvml: Any, handle: Any) -> list[dict[str, Any]]:
    """The instances a card is split into: uuid and profile of each."""
    found = []
    try:
        slots = int(nvml.nvmlDeviceGetMaxMigDeviceCount(handle))
    except nvml.NVMLError:
        slots = _MIG_SLOTS
    for index in range(slots):
        try:
            instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        except nvml.NVMLError:
            continue  # an empty slot
        facts = Facts()
        facts.ask("uuid", lambda each=instance: text(nvml.nvmlDeviceGetUUID(each)), _UNSAID)  # type: ignore[misc]
        facts.ask("profile", lambda each=instance: profile_name(nvml, each), _UNSAID)  # type: ignore[misc]
        found.append({name: value for name, value in facts.values.items() if value is not None})
    return found


def _limit(milliwatts: Any) -> float:
    return round(int(milliwatts) / 1000, 1)


def _positive(number: Any) -> int | None:
    return int(number) or None  # the driver says 0 where it does not know a clock or a link


def nvml_details(nvml: Any, handle: Any) -> Facts:
    """All of `NAMES` as far as NVML tells them; powers in W, clocks in MHz, memory in GiB. Never raises."""
    instance = is_instance(nvml, handle)
    facts = Facts()
    questions: dict[str, Callable[[], Any]] = {
        "memory_free_gb": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).free / GIBIBYTE,
        "architecture": lambda: _architecture(nvml, handle),
        "pci_bus_id": lambda: text(nvml.nvmlDeviceGetPciInfo(handle).busId),
        "vbios": lambda: text(nvml.nvmlDeviceGetVbiosVersion(handle)),
        "pcie_generation": lambda: _positive(nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)),
        "pcie_generation_max": lambda: _positive(nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)),
        "pcie_width": lambda: _positive(nvml.nvmlDeviceGetCurrPcieLinkWidth(handle)),
        "pcie_width_max": lambda: _positive(nvml.nvmlDeviceGetMaxPcieLinkWidth(handle)),
        "nvlinks_active": lambda: _nvlinks(nvml, handle),
        "numa_node": lambda: int(nvml.nvmlDeviceGetNumaNodeId(handle)),
        "ecc_enabled": lambda: bool(nvml.nvmlDeviceGetEccMode(handle)[0]),
        "ecc_uncorrected_errors": lambda: int(
            nvml.nvmlDeviceGetTotalEccErrors(handle, _UNCORRECTED, _VOLATILE)
        ),
        "compute_mode": lambda: _COMPUTE_MODES.get(int(nvml.nvmlDeviceGetComputeMode(handle))),
        "persistence": lambda: bool(nvml.nvmlDeviceGetPersistenceMode(handle)),
        "power_limit_w": lambda: _limit(nvml.nvmlDeviceGetEnforcedPowerLimit(handle)),
        "power_default_w": lambda: _limit(nvml.nvmlDeviceGetPowerManagementDefaultLimit(handle)),
        "clock_sm_max_mhz": lambda: _positive(nvml.nvmlDeviceGetMaxClockInfo(handle, _CLOCK_SM)),
        "clock_memory_max_mhz": lambda: _positive(nvml.nvmlDeviceGetMaxClockInfo(handle, _CLOCK_MEMORY)),
        "throttled_by": lambda: _throttled_by(nvml, handle),
        "temperature_c": lambda: int(nvml.nvmlDeviceGetTemperature(handle, _TEMPERATURE_GPU)),
    }
    for name, question in questions.items():
        facts.ask(name, question, _UNSAID)
    if instance:
        facts.put("mig_enabled", True, "")
        facts.ask("mig_profile", lambda: profile_name(nvml, handle), _UNSAID)
        facts.put("mig_instances", None, "it is an instance itself")
        facts.ask(
            "multi_processor_count",
            lambda: int(nvml.nvmlDeviceGetAttributes(handle).multiprocessorCount),
            _UNSAID,
        )
        return facts
    enabled = facts.ask("mig_enabled", lambda: bool(nvml.nvmlDeviceGetMigMode(handle)[0]), _UNSAID)
    facts.put("mig_profile", None, "it is a whole card")
    if enabled:
        facts.ask("mig_instances", lambda: _instances(nvml, handle), _UNSAID)
    else:
        facts.put("mig_instances", None, "it is not split")
    facts.put("multi_processor_count", None, "NVML tells it of MIG instances alone; torch knows it")
    return facts


def unknown_details(reason: str) -> Facts:
    """All of `NAMES` as None for one reason."""
    facts = Facts()
    for name in NAMES:
        facts.put(name, None, reason)
    return facts
