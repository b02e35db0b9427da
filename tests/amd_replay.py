"""AMD's libraries without a GPU: amdsmi's and pyrsmi's own names, errors and return shapes.

No AMD device was at hand where these were written. Names and shapes are those of the sources of amdsmi 7.0.2
and pyrsmi 1.1.0; the figures are made up, of the kind that the named devices report.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import pytest

MIB = 1024**2


class AmdSmiLibraryException(Exception):
    """amdsmi's error, with its text."""

    def __init__(self, code: int, info: str) -> None:
        super().__init__(code)
        self.info = f"Error code:\n\t{code} | {info}"

    def __str__(self) -> str:
        return self.info


NOT_SUPPORTED = AmdSmiLibraryException(2, "AMDSMI_STATUS_NOT_SUPPORTED - Feature not supported")
NO_PERMISSION = AmdSmiLibraryException(10, "AMDSMI_STATUS_NO_PERM - Permission Denied")
NOT_LOADED = AmdSmiLibraryException(34, "AMDSMI_STATUS_DRIVER_NOT_LOADED - Driver not loaded")


class AmdSmiTemperatureType(IntEnum):
    """Of the sensors."""

    EDGE = 0
    HOTSPOT = 1


class AmdSmiTemperatureMetric(IntEnum):
    """Of a sensor's values."""

    CURRENT = 0


class AmdSmiMemoryType(IntEnum):
    """Of a card's memories."""

    VRAM = 0


class AmdSmiClkType(IntEnum):
    """Of a card's clocks."""

    GFX = 1
    MEM = 5


@dataclass
class Card:
    """Answers by function, without the leading ``amdsmi_``; an exception as an answer is raised.

    A dict whose keys are enumeration members holds an answer for each value of the second argument.
    """

    answers: dict[str, Any]

    def but(self, **answers: Any) -> Card:
        """The same card with some other answers."""
        return Card({**self.answers, **answers})


@dataclass
class Machine:
    """ROCm's library and its devices, as amdsmi has them."""

    cards: list[Card] = field(default_factory=list)
    init: Exception | None = None
    calls: list[str] = field(default_factory=list)

    def module(self) -> types.ModuleType:
        """What ``import amdsmi`` gives on this machine."""
        amdsmi = types.ModuleType("amdsmi")
        for kind in (AmdSmiTemperatureType, AmdSmiTemperatureMetric, AmdSmiMemoryType, AmdSmiClkType):
            setattr(amdsmi, kind.__name__, kind)
        whole = {
            "init": lambda: self._told("init", self.init),
            "shut_down": lambda: self._told("shut_down", None),
            "get_processor_handles": lambda: self._told("handles", list(self.cards)),
        }
        for name in {name for card in (MI300X, *self.cards) for name in card.answers}:
            whole[name] = self._of_card(name)
        for name, function in whole.items():
            setattr(amdsmi, f"amdsmi_{name}", function)
        return amdsmi

    def _told(self, call: str, answer: Any) -> Any:
        self.calls.append(call)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _of_card(self, name: str) -> Any:
        def answer(card: Card, *arguments: Any) -> Any:
            value = card.answers.get(name, NOT_SUPPORTED)
            if isinstance(value, dict) and all(isinstance(key, IntEnum) for key in value):
                value = value.get(arguments[0], NOT_SUPPORTED)
            return self._told(name, value)

        return answer


def process(pid: int, vram_mib: int, name: str = "python3") -> dict[str, Any]:
    """One of a card's processes; what may not be seen is 0."""
    return {
        "name": name, "pid": pid, "mem": vram_mib * MIB, "engine_usage": {"gfx": 0, "enc": 0},
        "memory_usage": {"gtt_mem": 0, "cpu_mem": 0, "vram_mem": vram_mib * MIB}, "cu_occupancy": "N/A",
    }  # fmt: skip


def _power(current: Any, average: Any) -> dict[str, Any]:
    return {
        "socket_power": 0, "current_socket_power": current, "average_socket_power": average,
        "gfx_voltage": "N/A", "soc_voltage": "N/A", "mem_voltage": "N/A", "power_limit": 750_000_000,
    }  # fmt: skip


def _hip(number: int, serial: str) -> dict[str, Any]:
    return {"drm_render": 128 + number, "drm_card": number, "hsa_id": number + 2, "hip_id": number,
            "hip_uuid": f"GPU-{serial}"}  # fmt: skip


_ASIC = {
    "market_name": "AMD Instinct MI300X OAM", "vendor_id": "0x1002",
    "vendor_name": "Advanced Micro Devices Inc. [AMD/ATI]", "subvendor_id": "0x1002", "device_id": "0x74a1",
    "rev_id": "0x00", "asic_serial": "0x8F2B4E6D1C3A5790", "oam_id": 0, "num_compute_units": 304,
    "target_graphics_version": "gfx942", "subsystem_id": "0x74a1",
}  # fmt: skip
_LINK = {
    "pcie_static": {
        "max_pcie_width": 16, "max_pcie_speed": 32000, "pcie_interface_version": 5, "slot_type": "OAM"
    },
    "pcie_metric": {"pcie_width": 16, "pcie_speed": 32000, "pcie_bandwidth": "N/A"},
}  # fmt: skip

MI300X = Card(
    {
        "get_gpu_asic_info": _ASIC,
        "get_gpu_device_uuid": "8fff74a1-0000-1000-802b-4e6d1c3a5790",
        "get_gpu_enumeration_info": _hip(0, "8f2b4e6d1c3a5790"),
        "get_gpu_driver_info": {
            "driver_name": "amdgpu", "driver_version": "6.12.12", "driver_date": "2015/01/01 00:00"
        },
        "get_gpu_device_bdf": "0000:05:00.0",
        "get_gpu_vbios_info": {
            "name": "AMD MI300X_HW_SRIOV_CVS_1VF", "build_date": "2023/12/01 12:00",
            "part_number": "113-M3000100-102", "version": "022.040.003.041.000001",
        },
        "get_gpu_memory_total": {AmdSmiMemoryType.VRAM: 196592 * MIB},
        "get_gpu_memory_usage": {AmdSmiMemoryType.VRAM: 120284 * MIB},
        "get_gpu_activity": {"gfx_activity": 97, "umc_activity": 41, "mm_activity": "N/A"},
        "get_temp_metric": {AmdSmiTemperatureType.HOTSPOT: 61},
        "get_gpu_fan_speed": NOT_SUPPORTED,
        "get_gpu_fan_speed_max": NOT_SUPPORTED,
        "get_power_info": _power(702, "N/A"),
        "get_power_cap_info": {
            "power_cap": 750_000_000, "default_power_cap": 750_000_000, "dpm_cap": 0, "min_power_cap": 0,
            "max_power_cap": 750_000_000,
        },
        "get_clock_info": {
            AmdSmiClkType.GFX: {"clk": 2073, "min_clk": 132, "max_clk": 2100, "clk_locked": False},
            AmdSmiClkType.MEM: {"clk": 1300, "min_clk": 900, "max_clk": 1300, "clk_locked": False},
        },
        "get_pcie_info": _LINK,
        "get_gpu_total_ecc_count": {"correctable_count": 0, "uncorrectable_count": 0, "deferred_count": 0},
        "get_gpu_compute_partition": "SPX",
        "get_gpu_process_list": [process(4242, 120_000)],
        "topo_get_numa_node_number": 0,
    }
)  # fmt: skip
"""A data centre's card: no fan, no sensor at its edge, and what it draws is "current"."""

RADEON = MI300X.but(
    get_gpu_asic_info={
        **_ASIC, "market_name": "AMD Radeon RX 7900 XTX", "asic_serial": "0x00000000000000AB",
        "num_compute_units": 96, "target_graphics_version": "gfx1100",
    },
    get_gpu_enumeration_info=_hip(1, "00000000000000ab"),
    get_gpu_memory_total={AmdSmiMemoryType.VRAM: 24560 * MIB},
    get_gpu_memory_usage={AmdSmiMemoryType.VRAM: 26 * MIB},
    get_gpu_activity={"gfx_activity": 0, "umc_activity": 0, "mm_activity": 0},
    get_temp_metric={AmdSmiTemperatureType.EDGE: 34, AmdSmiTemperatureType.HOTSPOT: 37},
    get_gpu_fan_speed=51,
    get_gpu_fan_speed_max=255,
    get_power_info=_power("N/A", 18),
    get_gpu_compute_partition=NOT_SUPPORTED,
    get_gpu_total_ecc_count=NOT_SUPPORTED,
    get_gpu_process_list=[],
)  # fmt: skip
"""A desktop's card."""

GUARDED = MI300X.but(
    get_gpu_activity={"gfx_activity": "N/A", "umc_activity": "N/A", "mm_activity": "N/A"},
    get_power_info=_power("N/A", "N/A"),
    get_temp_metric=NO_PERMISSION,
    get_gpu_process_list=[process(77, 0, "N/A")],
    topo_get_numa_node_number=0xFFFFFFFF,
    get_gpu_enumeration_info=NOT_SUPPORTED,
)
"""As seen by somebody who may not see everything, with an amdsmi that does not number devices for HIP."""


def pyrsmi(*cards: dict[str, Any], error: Exception | None = None) -> dict[str, types.ModuleType]:
    """What ``import pyrsmi.rocml`` gives; a card answers by function, without ``smi_get_device_``.

    Where a card has no answer pyrsmi says -1.
    """
    package, rocml = types.ModuleType("pyrsmi"), types.ModuleType("pyrsmi.rocml")

    def initialize() -> None:
        if error is not None:
            raise error

    functions = {
        "smi_initialize": initialize,
        "smi_shutdown": lambda: None,
        "smi_get_device_count": lambda: len(cards),
        **{
            f"smi_get_device_{name}": lambda index, *_, name=name: cards[index].get(name, -1)
            for name in (*OF_PYRSMI, "uuid")
        },
    }
    for name, function in functions.items():
        setattr(rocml, name, function)
    return {"pyrsmi": package, "pyrsmi.rocml": rocml}


OF_PYRSMI = {
    "name": "AMD Instinct MI210", "memory_total": 65520 * MIB, "memory_used": 11 * MIB, "utilization": 3,
    "fan_speed": -1, "fan_speed_max": -1, "average_power": 41.0,
}  # fmt: skip


def install(monkeypatch: pytest.MonkeyPatch, modules: dict[str, types.ModuleType | None]) -> None:
    """Put modules in the place of the libraries; None stands for one that is not installed."""
    for name in ("pynvml", "amdsmi", "pyrsmi", "pyrsmi.rocml"):
        monkeypatch.setitem(sys.modules, name, modules.get(name))
