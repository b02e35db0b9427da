"""AMD's two Python libraries, amdsmi and pyrsmi, asked alike. Experimental: neither was seen on a device yet.

What was read in amdsmi 7.0.2 and pyrsmi 1.1.0: amdsmi raises its own errors, writes "N/A" for most of what is
unknown and lets all ones through for the rest; pyrsmi answers -1 or an empty text. None of that is a value.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
from collections.abc import Iterator
from typing import Any, Protocol

from grd.hardware.facts import Facts
from grd.hardware.nvml_details import unknown_details

GIBIBYTE = 1024**3
MEBIBYTE = 1024**2
_ALL_ONES = (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
_WHOLE = ("SPX", "N/A", "")
"""Compute partitions that are the whole card (SPX: a single one)."""

_LOGGER = logging.getLogger("pyrsmi")
_LOGGER.addHandler(logging.NullHandler())

_NO_CUDA = "it is no CUDA device; see architecture"
_NO_MIG = "AMD's devices have no MIG"


class AmdLibrary(Protocol):
    """The devices of one library, by their position; no method but the making of it raises."""

    source: str
    driver: str | None
    count: int

    def rocm_uuids(self) -> list[str | None]:
        """How ROCR_VISIBLE_DEVICES names each device, where that is known: "GPU-" and hexadecimal digits."""

    def hip_order(self) -> list[int]:
        """The positions in the order in which HIP counts the devices."""

    def device(self, index: int) -> Facts:
        """What the device is: as `grd.hardware.gpus.Gpus` has it."""

    def sensors(self, index: int) -> Facts:
        """What the device does now, under the names of `grd.hardware.monitor.GPUStats`."""

    def close(self) -> None:
        """Let go of the driver."""


def known(value: Any) -> Any:
    """``value``, or None where it is one of the ways in which the libraries say that they do not know."""
    if isinstance(value, str):
        return None if value.strip() in ("", "N/A") else value.strip()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return None if value < 0 or value in _ALL_ONES else value


def _positive(*values: Any) -> Any:
    """The first that is known and above zero: a link, a clock or a socket's power of 0 is unknown."""
    return next((value for value in map(known, values) if isinstance(value, int | float) and value > 0), None)


def _scaled(value: Any, unit: int) -> float | None:
    number = known(value)
    return None if number is None else number / unit


def _whole(value: Any, unit: int = 1) -> int | None:
    number = known(value)
    return None if number is None else int(number) // unit


def _share(part: Any, whole: Any) -> int | None:
    part, whole = known(part), _positive(whole)
    return None if part is None or whole is None else round(100 * part / whole)


def _watts(cap: Any) -> float | None:
    """A power cap is in microwatts, on hosts of virtual machines in watts (amdsmi.h); no card has 100 kW."""
    number = _positive(cap)
    return None if number is None else round(number / 1e6 if number > 1e5 else number, 1)


@contextlib.contextmanager
def _where_rocm_is_missing() -> Iterator[None]:
    """Importing amdsmi then prints on stdout and raises a KeyError; this makes an OSError of it, silently."""
    with contextlib.nullcontext() if "amdsmi" in sys.modules else contextlib.redirect_stdout(io.StringIO()):
        try:
            yield
        except KeyError as error:
            raise OSError(f"ROCm's library {error.args[0]} is not there") from None


class Amdsmi:
    """AMD's own library. Making it raises whatever keeps it from working."""

    source = "amdsmi"
    _UNSAID = "amdsmi does not tell"

    def __init__(self) -> None:
        with _where_rocm_is_missing():
            self._smi: Any = importlib.import_module("amdsmi")
        self._smi.amdsmi_init()
        try:
            self._handles = list(self._smi.amdsmi_get_processor_handles())
        except BaseException:
            self.close()
            raise
        self.count = len(self._handles)
        self.driver: str | None = None
        with contextlib.suppress(Exception):
            self.driver = known(self._smi.amdsmi_get_gpu_driver_info(self._handles[0])["driver_version"])

    def rocm_uuids(self) -> list[str | None]:
        """As amdsmi enumerates for HIP; before it did that (6.4), made of the serial number, as ROCm does."""
        return [self._rocm_uuid(handle) for handle in self._handles]

    def _rocm_uuid(self, handle: Any) -> str | None:
        with contextlib.suppress(Exception):
            told = known(self._smi.amdsmi_get_gpu_enumeration_info(handle)["hip_uuid"])
            if told:
                return str(told)
        with contextlib.suppress(Exception):
            serial = int(known(self._smi.amdsmi_get_gpu_asic_info(handle)["asic_serial"]), 16)
            return f"GPU-{serial:016x}" if serial else None
        return None

    def hip_order(self) -> list[int]:
        """By HIP's own numbers where each device has one, else as amdsmi lists them (by PCI bus)."""
        with contextlib.suppress(Exception):
            numbers = [
                known(self._smi.amdsmi_get_gpu_enumeration_info(handle)["hip_id"]) for handle in self._handles
            ]
            if None not in numbers and len(set(numbers)) == self.count:
                return sorted(range(self.count), key=lambda index: int(numbers[index]))
        return list(range(self.count))

    def device(self, index: int) -> Facts:
        """See `AmdLibrary`."""
        smi, handle, facts = self._smi, self._handles[index], Facts()
        facts.put("index", index, "")
        facts.ask("uuid", lambda: self._uuid(handle), self._UNSAID)
        facts.ask("name", lambda: self._name(handle), self._UNSAID)
        facts.ask(
            "total_memory_gb",
            lambda: _scaled(_positive(self._memory(handle, used=False)), GIBIBYTE),
            self._UNSAID,
        )
        facts.put("compute_capability", None, _NO_CUDA)
        facts.add(unknown_details(self._UNSAID))
        for name in ("mig_enabled", "mig_profile", "mig_instances"):
            facts.put(name, None, _NO_MIG)
        for name, question in {
            "memory_free_gb": lambda: self._free(handle),
            "architecture": lambda: known(smi.amdsmi_get_gpu_asic_info(handle)["target_graphics_version"]),
            "pci_bus_id": lambda: known(smi.amdsmi_get_gpu_device_bdf(handle)),
            "vbios": lambda: known(smi.amdsmi_get_gpu_vbios_info(handle)["version"]),
            "pcie_generation_max": lambda: _positive(
                self._link(handle)["pcie_static"]["pcie_interface_version"]
            ),
            "pcie_width": lambda: _positive(self._link(handle)["pcie_metric"]["pcie_width"]),
            "pcie_width_max": lambda: _positive(self._link(handle)["pcie_static"]["max_pcie_width"]),
            "numa_node": lambda: known(smi.amdsmi_topo_get_numa_node_number(handle)),
            "ecc_uncorrected_errors": lambda: known(
                smi.amdsmi_get_gpu_total_ecc_count(handle)["uncorrectable_count"]
            ),
            "power_limit_w": lambda: _watts(smi.amdsmi_get_power_cap_info(handle)["power_cap"]),
            "power_default_w": lambda: _watts(smi.amdsmi_get_power_cap_info(handle)["default_power_cap"]),
            "clock_sm_max_mhz": lambda: _positive(
                smi.amdsmi_get_clock_info(handle, smi.AmdSmiClkType.GFX)["max_clk"]
            ),
            "clock_memory_max_mhz": lambda: _positive(
                smi.amdsmi_get_clock_info(handle, smi.AmdSmiClkType.MEM)["max_clk"]
            ),
            "temperature_c": lambda: self._temperature(handle),
            "multi_processor_count": lambda: _positive(
                smi.amdsmi_get_gpu_asic_info(handle)["num_compute_units"]
            ),
        }.items():
            facts.ask(name, question, self._UNSAID)
        return facts

    def sensors(self, index: int) -> Facts:
        """See `AmdLibrary`."""
        smi, handle, facts = self._smi, self._handles[index], Facts()
        for name, question in {
            "name": lambda: self._name(handle),
            "memory_used_mb": lambda: _whole(self._memory(handle, used=True), MEBIBYTE),
            "memory_total_mb": lambda: _whole(_positive(self._memory(handle, used=False)), MEBIBYTE),
            "utilization_percent": lambda: _whole(smi.amdsmi_get_gpu_activity(handle)["gfx_activity"]),
            "temperature_c": lambda: self._temperature(handle),
            "fan_speed_percent": lambda: _share(
                smi.amdsmi_get_gpu_fan_speed(handle, 0), smi.amdsmi_get_gpu_fan_speed_max(handle, 0)
            ),
            "power_usage_w": lambda: self._power(handle),
            "uuid": lambda: self._uuid(handle),
            "processes": lambda: self._processes(handle),
        }.items():
            facts.ask(name, question, self._UNSAID)
        facts.put("mig_profile", None, _NO_MIG)
        return facts

    def close(self) -> None:
        """See `AmdLibrary`."""
        with contextlib.suppress(Exception):
            self._smi.amdsmi_shut_down()

    def _memory(self, handle: Any, *, used: bool) -> Any:
        smi = self._smi
        ask = smi.amdsmi_get_gpu_memory_usage if used else smi.amdsmi_get_gpu_memory_total
        return ask(handle, smi.AmdSmiMemoryType.VRAM)  # bytes

    def _free(self, handle: Any) -> float | None:
        total, used = _positive(self._memory(handle, used=False)), known(self._memory(handle, used=True))
        return None if total is None or used is None else (total - used) / GIBIBYTE

    def _link(self, handle: Any) -> Any:
        return self._smi.amdsmi_get_pcie_info(handle)

    def _uuid(self, handle: Any) -> Any:
        return self._rocm_uuid(handle) or known(self._smi.amdsmi_get_gpu_device_uuid(handle))

    def _name(self, handle: Any) -> str | None:
        name = known(self._smi.amdsmi_get_gpu_asic_info(handle)["market_name"])
        if name is None or name.startswith("0x"):
            return None  # without a table of names it is the device's number
        partition = _WHOLE[0]
        with contextlib.suppress(Exception):
            partition = str(self._smi.amdsmi_get_gpu_compute_partition(handle))
        # Each partition is a device of its own under the whole card's name, whose figures are not its own.
        return str(name) if partition in _WHOLE else f"{name} ({partition} partition)"

    def _temperature(self, handle: Any) -> int | None:
        kinds, now = self._smi.AmdSmiTemperatureType, self._smi.AmdSmiTemperatureMetric.CURRENT
        try:
            edge = _positive(self._smi.amdsmi_get_temp_metric(handle, kinds.EDGE, now))
        except Exception:
            edge = None  # Instinct cards have no sensor at the edge
        if edge is None:
            edge = _positive(self._smi.amdsmi_get_temp_metric(handle, kinds.HOTSPOT, now))
        return None if edge is None else int(edge)

    def _power(self, handle: Any) -> float | None:
        told = self._smi.amdsmi_get_power_info(handle)  # which of them a card has depends on its generation
        names = ("current_socket_power", "average_socket_power", "socket_power")
        watts = _positive(*(told.get(name) for name in names))
        return None if watts is None else round(float(watts), 1)

    def _processes(self, handle: Any) -> list[dict[str, Any]]:
        rows = []
        for each in self._smi.amdsmi_get_gpu_process_list(handle):
            # What may not be seen is told as 0; a process that computes on a card has some of its memory.
            vram = _positive(each["memory_usage"]["vram_mem"])
            rows.append(
                {"pid": int(each["pid"]), "memory_mb": None if vram is None else int(vram) // MEBIBYTE}
            )
        return rows


class Pyrsmi:
    """The smaller library, for where amdsmi is not installed. Making it raises what keeps it from working."""

    source = "pyrsmi"
    driver: str | None = None
    _UNSAID = "pyrsmi does not tell"

    def __init__(self) -> None:
        self._smi: Any = importlib.import_module("pyrsmi.rocml")
        # It logs by the functions of `logging` itself, and those set up the root logger where nobody has.
        setattr(self._smi, "logging", _LOGGER)  # noqa: B010 - mypy knows no such name in it
        with _where_rocm_is_missing():  # it tries amdsmi first
            self._smi.smi_initialize()
        self.count = int(self._smi.smi_get_device_count())

    def rocm_uuids(self) -> list[str | None]:
        """None of them: what pyrsmi calls a UUID is not what ROCm calls one."""
        return [None] * self.count

    def hip_order(self) -> list[int]:
        """As pyrsmi lists them."""
        return list(range(self.count))

    def device(self, index: int) -> Facts:
        """See `AmdLibrary`."""
        smi, facts = self._smi, Facts()
        facts.put("index", index, "")
        facts.ask("uuid", lambda: known(smi.smi_get_device_uuid(index)), self._UNSAID)
        facts.ask("name", lambda: known(smi.smi_get_device_name(index)), self._UNSAID)
        facts.ask(
            "total_memory_gb",
            lambda: _scaled(_positive(smi.smi_get_device_memory_total(index)), GIBIBYTE),
            self._UNSAID,
        )
        facts.put("compute_capability", None, _NO_CUDA)
        facts.add(unknown_details(self._UNSAID))
        for name in ("mig_enabled", "mig_profile", "mig_instances"):
            facts.put(name, None, _NO_MIG)
        return facts

    def sensors(self, index: int) -> Facts:
        """See `AmdLibrary`."""
        smi, facts = self._smi, Facts()
        for name, question in {
            "name": lambda: known(smi.smi_get_device_name(index)),
            "memory_used_mb": lambda: _whole(smi.smi_get_device_memory_used(index), MEBIBYTE),
            "memory_total_mb": lambda: _whole(_positive(smi.smi_get_device_memory_total(index)), MEBIBYTE),
            "utilization_percent": lambda: _whole(smi.smi_get_device_utilization(index)),
            "fan_speed_percent": lambda: _share(
                smi.smi_get_device_fan_speed(index), smi.smi_get_device_fan_speed_max(index)
            ),
            "power_usage_w": lambda: _positive(smi.smi_get_device_average_power(index)),
            "uuid": lambda: known(smi.smi_get_device_uuid(index)),
        }.items():
            facts.ask(name, question, self._UNSAID)
        for name in ("temperature_c", "processes"):
            facts.put(name, None, self._UNSAID)
        facts.put("mig_profile", None, _NO_MIG)
        return facts

    def close(self) -> None:
        """See `AmdLibrary`."""
        with contextlib.suppress(Exception):
            self._smi.smi_shutdown()
