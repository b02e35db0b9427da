"""NVIDIA GPUs as the driver's own library (NVML, through nvidia-ml-py) lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from grd.hardware.facts import Facts, describe
from grd.hardware.nvml_details import nvml_details, unknown_details
from grd.hardware.nvml_details import text as _text
from grd.hardware.visible import VARIABLE, enumerated_by_cuda, order_is_doubtful, visible_devices

GIBIBYTE = 1024**3


@dataclass(frozen=True, kw_only=True)
class GpuFinding:
    """What one source says: the devices, or the ``reason`` for none.

    ``final`` means that no other source need be asked; ``driver`` is known even where no device is.
    """

    source: str
    devices: tuple[Facts, ...] = ()
    reason: str | None = None
    final: bool = False
    driver: str | None = None
    driver_cuda: str | None = None
    notes: tuple[str, ...] = field(default=())


def _capability(nvml: Any, handle: Any) -> str:
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    except nvml.NVMLError:
        # A MIG instance has none of its own to tell; its card has.
        card = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(card)
    return f"{major}.{minor}"


def _device(nvml: Any, handle: Any, index: int | None) -> Facts:
    facts = Facts()
    unsaid = "NVML does not tell"
    facts.put("index", index, "a MIG instance is no device of the driver's list")
    facts.ask("uuid", lambda: _text(nvml.nvmlDeviceGetUUID(handle)), unsaid)
    facts.ask("name", lambda: _text(nvml.nvmlDeviceGetName(handle)), unsaid)
    facts.ask("total_memory_gb", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total / GIBIBYTE, unsaid)
    facts.ask("compute_capability", lambda: _capability(nvml, handle), unsaid)
    facts.add(nvml_details(nvml, handle))
    return facts


def _listed(nvml: Any, index: int) -> tuple[Any, Facts]:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
    except nvml.NVMLError as error:
        # It is there but does not answer (fallen off the bus, no permission): listed, with nothing known.
        facts = Facts()
        facts.put("index", index, "")
        for name in ("uuid", "name", "total_memory_gb", "compute_capability"):
            facts.put(name, None, describe(error))
        facts.add(unknown_details(describe(error)))
        return None, facts
    return handle, _device(nvml, handle, index)


def _cuda_version(nvml: Any) -> str | None:
    version = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
    return f"{version // 1000}.{version % 1000 // 10}" if version > 0 else None


def _select(nvml: Any, environment: Mapping[str, str], driver: Facts) -> GpuFinding:
    known = {"driver": driver.values["driver"], "driver_cuda": driver.values["driver_cuda"]}
    count = nvml.nvmlDeviceGetCount()
    if count == 0:
        return GpuFinding(source="nvml", reason="the driver lists no device", **known)
    devices = [_listed(nvml, index)[1] for index in range(count)]
    setting = environment.get(VARIABLE)
    chosen: list[Facts] = []
    named = visible_devices(setting, [facts.values["uuid"] for facts in devices])
    entries = enumerated_by_cuda(named)
    for entry in entries:
        if isinstance(entry, int):
            chosen.append(devices[entry])
            continue
        try:
            chosen.append(_device(nvml, nvml.nvmlDeviceGetHandleByUUID(entry), None))
        except nvml.NVMLError:
            break  # CUDA's list ends at the first entry that names nothing, too
    if not chosen:
        hidden = f"{VARIABLE}={setting!r} selects none of the {count} GPU(s) of this machine"
        if entries:
            hidden += "; write a MIG instance's name out as nvidia-smi -L does"
        return GpuFinding(source="nvml", reason=hidden, final=True, **known)
    notes = []
    if len(entries) < len(named):
        notes.append(
            f"{VARIABLE} names {len(named)} devices: a CUDA program sees the first MIG instance alone"
        )
    if order_is_doubtful(environment, [facts.values["name"] for facts in devices]):
        notes.append(
            f"{VARIABLE} counts GPUs in CUDA's order, which the driver cannot tell for mixed models: "
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
    for facts in chosen:
        if facts.values["mig_enabled"] and not (facts.values["uuid"] or "").startswith("MIG-"):
            notes.append(
                f"{facts.values['name']} ({facts.values['uuid']}) is split by MIG: a CUDA program sees "
                f"one of its instances; name one in {VARIABLE}"
            )
    return GpuFinding(source="nvml", devices=tuple(chosen), final=True, notes=tuple(notes), **known)


def find_by_nvml(environment: Mapping[str, str]) -> GpuFinding:
    """The devices NVML lists and CUDA_VISIBLE_DEVICES lets through; never raises.

    Touches no CUDA context and costs under a millisecond where there is no driver.
    """
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception as error:
        # Broad on purpose: a broken driver installation raises OSError, AttributeError and NVMLError alike.
        return GpuFinding(source="nvml", reason=describe(error))
    try:
        driver = Facts()
        driver.ask("driver", lambda: _text(nvml.nvmlSystemGetDriverVersion()), "NVML does not tell")
        driver.ask("driver_cuda", lambda: _cuda_version(nvml), "NVML does not tell")
        return _select(nvml, environment, driver)
    except Exception as error:
        return GpuFinding(source="nvml", reason=describe(error))
    finally:
        try:
            nvml.nvmlShutdown()
        except Exception:  # nothing is lost: the process's handle goes with it
            pass
