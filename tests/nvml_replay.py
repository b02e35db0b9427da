"""NVML without a GPU: nvidia-ml-py's own names, errors and return shapes over recorded answers.

No GPU was at hand where these were written: the figures are of the kind that the named devices report, and
every function that a device has no answer for fails as the driver's library fails for it.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml

NOT_SUPPORTED = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
NO_PERMISSION = pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
LOST = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
NOT_FOUND = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
NOT_LOADED = pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

MIB = 1024**2


@dataclass
class Device:
    """Answers by function, without the leading ``nvmlDevice``; an exception as an answer is raised."""

    answers: dict[str, Any]
    instances: list[Device] = field(default_factory=list)

    def but(self, **answers: Any) -> Device:
        """The same device with some other answers."""
        return Device({**self.answers, **answers}, self.instances)


@dataclass
class Machine:
    """A driver and its devices."""

    devices: list[Device | Exception] = field(default_factory=list)
    version: Any = "550.54.15"
    cuda: Any = 12040
    init: Exception | None = None
    calls: list[str] = field(default_factory=list)

    def module(self) -> types.ModuleType:
        """What ``import pynvml`` gives on this machine."""
        nvml = types.ModuleType("pynvml")
        for name, value in vars(pynvml).items():
            if not name.startswith("nvml") or isinstance(value, int):
                setattr(nvml, name, value)
            elif name.startswith("nvmlDevice"):
                setattr(nvml, name, self._of_device(name.removeprefix("nvmlDevice")))
        whole = {
            "nvmlInit": lambda: self._told("init", self.init),
            "nvmlShutdown": lambda: self._told("shutdown", None),
            "nvmlSystemGetDriverVersion": lambda: self._told("driver", self.version),
            "nvmlSystemGetCudaDriverVersion_v2": lambda: self._told("cuda", self.cuda),
            "nvmlDeviceGetCount": lambda: self._told("count", len(self.devices)),
            "nvmlDeviceGetHandleByIndex": lambda index: self._told("handle", self.devices[index]),
            "nvmlDeviceGetHandleByUUID": self._by_uuid,
            "nvmlDeviceGetMigDeviceHandleByIndex": self._instance,
            "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": self._card_of,
            "nvmlDeviceIsMigDeviceHandle": lambda device: (
                not isinstance(device, str) and any(device in card.instances for card in self._cards())
            ),
        }
        for name, function in whole.items():
            assert hasattr(pynvml, name), name
            setattr(nvml, name, function)
        return nvml

    def _told(self, call: str, answer: Any) -> Any:
        self.calls.append(call)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _cards(self) -> list[Device]:
        return [device for device in self.devices if isinstance(device, Device)]

    def _by_uuid(self, uuid: str) -> Device:
        for card in self._cards():
            for device in (card, *card.instances):
                if uuid in (device.answers["GetUUID"], self._old_name(card, device)):
                    return device
        raise NOT_FOUND

    @staticmethod
    def _old_name(card: Device, device: Device) -> str:
        """How drivers before R470 name an instance; later ones take it too."""
        parts = [device.answers.get(f"Get{part}InstanceId") for part in ("Gpu", "Compute")]
        return f"MIG-{card.answers['GetUUID']}/{parts[0]}/{parts[1]}"

    def _instance(self, card: Device, index: int) -> Device:
        if index >= len(card.instances):
            raise NOT_FOUND
        return card.instances[index]

    def _card_of(self, instance: Device) -> Device:
        return next(card for card in self._cards() if instance in card.instances)

    def _of_device(self, name: str) -> Any:
        def answer(device: Device, *arguments: Any) -> Any:
            value = device.answers.get(name, NOT_SUPPORTED)
            if isinstance(value, dict):
                value = value.get(arguments[0], NOT_SUPPORTED)
            return self._told(name, value)

        return answer


def memory(total_mib: int, used_mib: int) -> SimpleNamespace:
    """nvmlMemory_t."""
    free = (total_mib - used_mib) * MIB
    return SimpleNamespace(total=total_mib * MIB, used=used_mib * MIB, free=free)


def process(pid: int, mib: int | None) -> SimpleNamespace:
    """nvmlProcessInfo_t; None is what nvidia-ml-py makes of "not available" (WDDM, no permission)."""
    used = None if mib is None else mib * MIB
    return SimpleNamespace(pid=pid, usedGpuMemory=used, gpuInstanceId=None, computeInstanceId=None)


V100 = Device(
    {
        "GetUUID": "GPU-f1d2d2f9-24e9-86ac-fe1e-000000000100",
        "GetName": "Tesla V100-SXM2-32GB",
        "GetMemoryInfo": memory(32768, 1045),
        "GetCudaComputeCapability": (7, 0),
        "GetArchitecture": pynvml.NVML_DEVICE_ARCH_VOLTA,
        "GetPciInfo": SimpleNamespace(busId=b"00000000:8A:00.0"),
        "GetVbiosVersion": "88.00.48.00.02",
        "GetCurrPcieLinkGeneration": 3,
        "GetMaxPcieLinkGeneration": 3,
        "GetCurrPcieLinkWidth": 16,
        "GetMaxPcieLinkWidth": 16,
        "GetNvLinkState": dict.fromkeys(range(6), 1),
        "GetEccMode": [1, 1],
        "GetTotalEccErrors": 0,
        "GetComputeMode": pynvml.NVML_COMPUTEMODE_DEFAULT,
        "GetPersistenceMode": 1,
        "GetEnforcedPowerLimit": 300000,
        "GetPowerManagementDefaultLimit": 300000,
        "GetMaxClockInfo": {pynvml.NVML_CLOCK_SM: 1530, pynvml.NVML_CLOCK_MEM: 877},
        "GetCurrentClocksThrottleReasons": 0x1,
        "GetTemperature": 38,
        "GetUtilizationRates": SimpleNamespace(gpu=0, memory=0),
        "GetPowerUsage": 44211,
        "GetComputeRunningProcesses": [process(4242, 1041)],
    }
)
"""Passively cooled: it has no fan to tell of, and no MIG."""

H200 = V100.but(
    GetUUID="GPU-8f6bc7a1-0000-0000-0000-000000000200",
    GetName="NVIDIA H200",
    GetMemoryInfo=memory(143771, 120411),
    GetCudaComputeCapability=(9, 0),
    GetArchitecture=pynvml.NVML_DEVICE_ARCH_HOPPER,
    GetMigMode=[0, 0],
    GetNvLinkState=dict.fromkeys(range(18), 1),
    GetNumaNodeId=NOT_SUPPORTED,
    GetEnforcedPowerLimit=700000,
    GetPowerManagementDefaultLimit=700000,
    GetCurrentClocksThrottleReasons=0x4,
    GetUtilizationRates=SimpleNamespace(gpu=98, memory=61),
    GetPowerUsage=699012,
    GetTemperature=66,
)

_SLICE = Device(
    {
        "GetUUID": "MIG-2b6a0c07-5dcd-5fb3-9b2c-000000000001",
        "GetName": "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "GetGpuInstanceId": 9,
        "GetComputeInstanceId": 0,
        "GetMemoryInfo": memory(4864, 3),
        "GetAttributes": SimpleNamespace(
            multiprocessorCount=14, gpuInstanceSliceCount=1, computeInstanceSliceCount=1, memorySizeMB=4864
        ),
    }
)
A100_SPLIT = V100.but(
    GetUUID="GPU-5c9e1d3a-0000-0000-0000-00000000a100",
    GetName="NVIDIA A100-SXM4-40GB",
    GetMemoryInfo=memory(40960, 24),
    GetCudaComputeCapability=(8, 0),
    GetArchitecture=pynvml.NVML_DEVICE_ARCH_AMPERE,
    GetMigMode=[1, 1],
    GetMaxMigDeviceCount=7,
    GetUtilizationRates=NOT_SUPPORTED,
)
A100_SPLIT.instances = [
    _SLICE,
    _SLICE.but(
        GetUUID="MIG-2b6a0c07-5dcd-5fb3-9b2c-000000000002",
        GetName="NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        GetGpuInstanceId=2,
        GetMemoryInfo=memory(19968, 10),
        GetAttributes=SimpleNamespace(
            multiprocessorCount=42, gpuInstanceSliceCount=3, computeInstanceSliceCount=3, memorySizeMB=19968
        ),
    ),
]
"""A card with MIG on: the driver tells no utilisation of the whole."""

LAPTOP = Device(
    {
        "GetUUID": "GPU-0a0a0a0a-0000-0000-0000-000000004090",
        "GetName": b"NVIDIA GeForce RTX 4090 Laptop GPU",
        "GetMemoryInfo": memory(16376, 812),
        "GetCudaComputeCapability": (8, 9),
        "GetArchitecture": pynvml.NVML_DEVICE_ARCH_ADA,
        "GetMigMode": NOT_SUPPORTED,
        "GetEnforcedPowerLimit": NOT_SUPPORTED,
        "GetPowerUsage": NOT_SUPPORTED,
        "GetTemperature": 51,
        "GetUtilizationRates": SimpleNamespace(gpu=3, memory=1),
        "GetFanSpeed": NOT_SUPPORTED,
        "GetComputeRunningProcesses": [process(977, None)],
    }
)
"""Its vendor drives the fan, and it tells no power; old bindings give its name as bytes."""

GUARDED = V100.but(
    GetUUID="GPU-99999999-0000-0000-0000-000000000100",
    GetUtilizationRates=NO_PERMISSION,
    GetPowerUsage=NO_PERMISSION,
    GetComputeRunningProcesses=NO_PERMISSION,
)

BUSY_WITH_HOST_PIDS = H200.but(
    GetComputeRunningProcesses=[process(3_900_001, 119_000), process(3_900_044, 500)]
)
"""As seen from a container: the driver knows nothing of its pids, and lists the host's."""
