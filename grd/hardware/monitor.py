"""What the GPUs are doing at this moment, through NVML; invented GPUs only for those who ask for them.

Where NVML has none AMD's libraries are asked, which is experimental.

A server without a driver has no GPUs here: numbers that nobody measured are never shown unless somebody
wants to try things out, and then every record says ``mock``.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from grd.errors import ResourceUnavailable
from grd.hardware.amd import open_amd
from grd.hardware.amd_libraries import AmdLibrary
from grd.hardware.facts import Facts, describe
from grd.hardware.nvml_details import is_instance, profile_name, text
from grd.hardware.visible import VARIABLE, resolved, visible_amd_devices, visible_devices

MOCK_VARIABLE = "GRD_GPU_MOCK"
SEED_VARIABLE = "GRD_GPU_MOCK_SEED"
MEBIBYTE = 1024**2
MOCK_COUNT, MOCK_NAME, MOCK_MEMORY_MB = 3, "NVIDIA A40 (Mock)", 45634

_UNSAID = "NVML does not tell"
_TEMPERATURE_GPU = 0
_SENSORS = (
    "name",
    "memory_used_mb",
    "memory_total_mb",
    "utilization_percent",
    "temperature_c",
    "fan_speed_percent",
    "power_usage_w",
    "uuid",
    "mig_profile",
    "processes",
)


@dataclass(frozen=True, kw_only=True)
class GPUStats:
    """One device, or one MIG instance of the card ``gpu_id``, at one moment; what is unknown is None.

    Memory in MiB. utilization_percent is the share of time in which at least one kernel ran: it says nothing
    of how much of the device that kernel used. processes lists ``{pid, memory_mb}`` as the driver sees them,
    which in a container are the host's pids. ``visible``: CUDA_VISIBLE_DEVICES (for AMD ROCm's variables
    too) lets a program started here use it. ``reasons``: why a value is None.
    """

    gpu_id: int
    name: str | None
    memory_used_mb: int | None
    memory_total_mb: int | None
    utilization_percent: int | None
    temperature_c: int | None
    fan_speed_percent: int | None
    power_usage_w: float | None
    mock: bool = False
    uuid: str | None = None
    mig_profile: str | None = None
    processes: list[dict[str, Any]] | None = None
    visible: bool = True
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def instance(self) -> bool:
        """Whether this is a MIG instance; the driver may not tell its profile, but names it so."""
        return self.mig_profile is not None or (self.uuid or "").startswith("MIG-")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def _processes(nvml: Any, handle: Any) -> list[dict[str, Any]]:
    return [
        {
            "pid": int(each.pid),
            # What the driver may not tell is not 0: another user's, or one under WDDM.
            "memory_mb": None if each.usedGpuMemory is None else int(each.usedGpuMemory) // MEBIBYTE,
        }
        for each in nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    ]


def _sense(nvml: Any, handle: Any) -> Facts:
    facts = Facts()
    facts.ask("name", lambda: text(nvml.nvmlDeviceGetName(handle)), _UNSAID)
    facts.ask("memory_used_mb", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used // MEBIBYTE, _UNSAID)
    facts.ask("memory_total_mb", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total // MEBIBYTE, _UNSAID)
    facts.ask("utilization_percent", lambda: int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu), _UNSAID)
    facts.ask("temperature_c", lambda: int(nvml.nvmlDeviceGetTemperature(handle, _TEMPERATURE_GPU)), _UNSAID)
    facts.ask("fan_speed_percent", lambda: int(nvml.nvmlDeviceGetFanSpeed(handle)), _UNSAID)
    facts.ask("power_usage_w", lambda: round(int(nvml.nvmlDeviceGetPowerUsage(handle)) / 1000, 1), _UNSAID)
    facts.ask("uuid", lambda: text(nvml.nvmlDeviceGetUUID(handle)), _UNSAID)
    facts.put("mig_profile", None, "it is a whole card")
    facts.ask("processes", lambda: _processes(nvml, handle), _UNSAID)
    if is_instance(nvml, handle):
        facts.ask("mig_profile", lambda: profile_name(nvml, handle), _UNSAID)
    return facts


def _nothing(reason: str) -> Facts:
    facts = Facts()
    for name in _SENSORS:
        facts.put(name, None, reason)
    return facts


class GPUMonitor:
    """The GPUs of this machine, all of them; close it with `shutdown`, or use it in a ``with``.

    ``mock_mode``: True invents three GPUs, False never does, None does where the variable GRD_GPU_MOCK is
    "1". ``seed`` (or GRD_GPU_MOCK_SEED) makes the invented numbers repeatable. Without a driver there are no
    devices, and ``reason`` says why. Making one never raises. ``root`` stands for "/" where /sys is read.
    """

    def __init__(
        self,
        mock_mode: bool | None = None,
        *,
        seed: int | str | None = None,
        environment: Mapping[str, str] = os.environ,
        root: Path = Path("/"),
    ) -> None:
        self.mock_mode = wants_mock(mock_mode, environment)
        self.device_count = 0
        self.reason: str | None = None
        self.driver: str | None = None
        self._environment = environment
        self._nvml: Any = None
        self._amd: AmdLibrary | None = None
        self._lock = threading.Lock()
        if self.mock_mode:
            self._random = random.Random(seed if seed is not None else environment.get(SEED_VARIABLE))
            self.device_count = MOCK_COUNT
        else:
            self._open()
            if self.device_count == 0:
                self._open_amd(root)

    def _open_amd(self, root: Path) -> None:
        self._amd, reason = open_amd(root)
        if self._amd is not None:
            self.device_count, self.driver, self.reason = self._amd.count, self._amd.driver, None
        elif reason is not None:
            self.reason = f"nvml: {self.reason}; {reason}"

    def _open(self) -> None:
        try:
            import pynvml as nvml

            nvml.nvmlInit()
        except Exception as error:
            # Broad on purpose: a broken driver raises OSError, AttributeError and NVMLError alike.
            self.reason = describe(error)
            return
        self._nvml = nvml
        try:
            self.driver = text(nvml.nvmlSystemGetDriverVersion())
        except Exception:
            self.driver = None
        try:
            self.device_count = int(nvml.nvmlDeviceGetCount())
        except Exception as error:
            self.reason = describe(error)
            return
        if self.device_count == 0:
            self.reason = "the driver lists no device"

    def get_gpu_stats(self) -> list[GPUStats]:
        """Every device now, MIG instances after their card; never raises. Empty once it is shut down."""
        with self._lock:
            if self.mock_mode:
                return [self._invent(index) for index in range(self.device_count)]
            if self._amd is not None:
                return self._of_amd(self._amd)
            if self._nvml is None:
                return []
            rows: list[tuple[int, Facts]] = []
            for index in range(self.device_count):
                rows += [(index, facts) for facts in self._card(index)]
            return self._with_visibility(rows)

    def _of_amd(self, library: AmdLibrary) -> list[GPUStats]:
        seen = visible_amd_devices(self._environment, library.rocm_uuids(), library.hip_order())
        rows = []
        for index in range(library.count):
            facts = library.sensors(index)
            rows.append(
                GPUStats(gpu_id=index, visible=index in seen, reasons=dict(facts.reasons), **facts.values)
            )
        return rows

    def _card(self, index: int) -> list[Facts]:
        nvml = self._nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
        except Exception as error:
            return [_nothing(describe(error))]  # fallen off the bus, or not ours to see: still listed
        found = [_sense(nvml, handle)]
        try:
            split = bool(nvml.nvmlDeviceGetMigMode(handle)[0])
            slots = int(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)) if split else 0
        except Exception:
            slots = 0  # older than MIG
        for slot in range(slots):
            try:
                instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, slot)
            except Exception:
                continue  # an empty slot
            found.append(_sense(nvml, instance))
        return found

    def _with_visibility(self, rows: list[tuple[int, Facts]]) -> list[GPUStats]:
        cards: dict[int, str | None] = {}
        for index, facts in rows:
            cards.setdefault(index, facts.values["uuid"])
        named = visible_devices(self._environment.get(VARIABLE), list(cards.values()))
        chosen = resolved(named, self._uuid_of)
        stats = []
        for index, facts in rows:
            values = dict(facts.values)
            row = GPUStats(gpu_id=index, reasons=dict(facts.reasons), **values)
            visible = index in chosen or (row.instance and row.uuid in chosen)
            stats.append(replace(row, visible=visible))
        return stats

    def _uuid_of(self, name: str) -> str | None:
        try:
            return text(self._nvml.nvmlDeviceGetUUID(self._nvml.nvmlDeviceGetHandleByUUID(name)))
        except Exception:
            return None  # it names nothing, or nothing of ours to see

    def _invent(self, index: int) -> GPUStats:
        light = index == MOCK_COUNT - 1
        pick = self._random.randint
        return GPUStats(
            gpu_id=index,
            name=MOCK_NAME,
            memory_used_mb=pick(2000, 10000) if light else pick(5000, 30000),
            memory_total_mb=MOCK_MEMORY_MB,
            utilization_percent=pick(0, 50) if light else pick(0, 100),
            temperature_c=pick(40, 65) if light else pick(40, 75),
            fan_speed_percent=pick(20, 60) if light else pick(30, 80),
            power_usage_w=round(self._random.uniform(30, 150) if light else self._random.uniform(50, 300), 1),
            mock=True,
            reasons=dict.fromkeys(("uuid", "mig_profile", "processes"), "an invented device has none"),
        )

    def allocatable(self) -> list[str]:
        """UUIDs of the devices that work may be given to here, in CUDA_VISIBLE_DEVICES' spelling.

        A card that is split is not among them, its instances are. Raises ResourceUnavailable for invented
        devices, on which nothing can run, and for AMD's, whose variable takes no UUIDs.
        """
        if self._amd is not None:
            raise ResourceUnavailable(
                "AMD support is experimental: grd gives no work to these GPUs; try HIP_VISIBLE_DEVICES"
            )
        if self.mock_mode:
            raise ResourceUnavailable(
                f"these GPUs are invented ({MOCK_VARIABLE} or --mock): nothing can run on them; unset it"
            )
        stats = [row for row in self.get_gpu_stats() if row.visible and row.uuid is not None]
        split = {row.gpu_id for row in stats if row.instance}
        return [str(row.uuid) for row in stats if row.instance or row.gpu_id not in split]

    def shutdown(self) -> None:
        """Let go of the driver; once more does no harm."""
        with self._lock:
            nvml, self._nvml = self._nvml, None
            amd, self._amd = self._amd, None
            self.device_count = 0
            if amd is not None:
                amd.close()
            if nvml is not None:
                try:
                    nvml.nvmlShutdown()
                except Exception:  # nothing is lost: the process's handle goes with it
                    pass

    @property
    def closed(self) -> bool:
        """Whether it was shut down, or never had anything to show."""
        return self._nvml is None and self._amd is None and not (self.mock_mode and self.device_count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


_monitors: dict[bool, GPUMonitor] = {}
_making = threading.Lock()


def wants_mock(mock_mode: bool | None, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether invented GPUs were asked for: by the argument, or where it is None by GRD_GPU_MOCK=1."""
    return environment.get(MOCK_VARIABLE) == "1" if mock_mode is None else mock_mode


def get_gpu_monitor(mock_mode: bool | None = None) -> GPUMonitor:
    """This process's monitor of that mode, made when it is first asked for and anew after its shutdown."""
    mode = wants_mock(mock_mode)
    with _making:
        known = _monitors.get(mode)
        if known is None or known.closed:
            known = _monitors[mode] = GPUMonitor(mode)
        return known
