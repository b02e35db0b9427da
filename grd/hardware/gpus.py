"""Which GPUs this process could use: NVML, AMD's libraries, torch where that costs nothing, GPUtil."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grd.hardware.amd import EXPERIMENTAL, find_by_amd
from grd.hardware.amd import SOURCES as AMD_SOURCES
from grd.hardware.facts import Facts, describe, run_limited
from grd.hardware.frameworks import TorchBuild, installed_torch
from grd.hardware.nvml import GIBIBYTE, GpuFinding, find_by_nvml
from grd.hardware.nvml_details import unknown_details
from grd.hardware.peaks import peaks_of
from grd.hardware.visible import VARIABLE, visible_devices

GPUTIL_SECONDS = 10.0
"""nvidia-smi answers in about a second; on a wedged driver it never does."""

# A process of its own: GPUtil waits for nvidia-smi without a limit, and its import needs distutils, which
# warns on Python 3.11 and exists from 3.12 on only where setuptools is installed. getGPUs, not getAvailable:
# the latter leaves out GPUs that are busy.
_GPUTIL_PROGRAM = """
import json, GPUtil
print(json.dumps([
    {"index": g.id, "uuid": g.uuid, "name": g.name, "mebibytes": repr(g.memoryTotal), "driver": g.driver}
    for g in GPUtil.getGPUs()
]))
"""


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """The GPUs of this process and of which source they are; ``reason`` where there is none.

    Each device's facts hold index, uuid, name, total_memory_gb (GiB), compute_capability ("9.0"),
    driver_version and cuda_version: the installed torch's own, else the newest the driver supports, as
    cuda_version_source says; the fields of `grd.hardware.nvml_details`; and peak_tflops by number type with
    peak_source.
    """

    devices: tuple[Facts, ...] = ()
    source: str | None = None
    reason: str | None = None
    driver: str | None = None
    driver_cuda: str | None = None
    notes: tuple[str, ...] = field(default=())


def _torch_device(torch: Any, index: int) -> Facts:
    facts = Facts()
    properties = torch.cuda.get_device_properties(index)
    facts.put("index", index, "")
    facts.ask("uuid", lambda: _uuid(properties), "this torch does not tell")
    facts.put("name", properties.name, "torch does not tell")
    facts.ask("total_memory_gb", lambda: properties.total_memory / GIBIBYTE, "torch does not tell")
    facts.ask("compute_capability", lambda: f"{properties.major}.{properties.minor}", "torch does not tell")
    facts.add(unknown_details("NVML is not there to tell"))
    facts.ask("multi_processor_count", lambda: properties.multi_processor_count, "torch does not tell")
    return facts


def _uuid(properties: Any) -> str | None:
    uuid = getattr(properties, "uuid", None)
    if uuid is None:
        return None
    return str(uuid) if str(uuid).startswith("GPU-") else f"GPU-{uuid}"


def find_by_torch(build: TorchBuild | None, *, allow_import: bool) -> GpuFinding:
    """The devices torch sees; never raises. Imports torch only if allowed, and only a build that has GPUs."""
    if build is None:
        return GpuFinding(source="torch", reason="not installed")
    if not build.sees_gpus:
        return GpuFinding(source="torch", reason=f"{build.version} is a build without GPU support")
    if not allow_import and "torch" not in sys.modules:
        return GpuFinding(source="torch", reason="not asked, as it is not imported here")
    try:
        torch = importlib.import_module("torch")
        if not torch.cuda.is_available():
            return GpuFinding(source="torch", reason="torch.cuda.is_available() is False")
        devices = tuple(_torch_device(torch, index) for index in range(torch.cuda.device_count()))
    except Exception as error:
        return GpuFinding(source="torch", reason=describe(error))
    notes = (EXPERIMENTAL,) if build.hip else ()
    reason = None if devices else "it counts no device"
    return GpuFinding(source="torch", devices=devices, reason=reason, notes=notes)


def _gputil_device(answer: Mapping[str, Any]) -> Facts:
    facts = Facts()
    for name in ("index", "uuid", "name"):
        facts.put(name, answer[name], "nvidia-smi does not tell")
    facts.ask("total_memory_gb", lambda: float(answer["mebibytes"]) / 1024, "nvidia-smi does not tell")
    facts.put("compute_capability", None, "GPUtil does not tell")
    facts.add(unknown_details("NVML is not there to tell"))
    return facts


def find_by_gputil(environment: Mapping[str, str]) -> GpuFinding:
    """The devices nvidia-smi lists, through GPUtil, busy ones too; never raises."""
    if shutil.which("nvidia-smi", path=environment.get("PATH", os.defpath)) is None:
        return GpuFinding(source="gputil", reason="there is no nvidia-smi")
    try:
        output = run_limited([sys.executable, "-P", "-W", "ignore", "-c", _GPUTIL_PROGRAM], GPUTIL_SECONDS)
        answers = json.loads(output)
        devices = [_gputil_device(answer) for answer in answers]
    except Exception as error:
        return GpuFinding(source="gputil", reason=describe(error))
    chosen = visible_devices(environment.get(VARIABLE), [facts.values["uuid"] for facts in devices])
    found = tuple(devices[entry] for entry in chosen if isinstance(entry, int))
    reason = None
    if not found:
        setting = environment.get(VARIABLE)
        reason = f"{VARIABLE}={setting!r} selects none" if devices else "nvidia-smi lists no device"
    driver = answers[0]["driver"] if answers else None
    return GpuFinding(source="gputil", devices=found, reason=reason, driver=driver)


def _torch_build() -> TorchBuild | None:
    try:
        return installed_torch()
    except (OSError, SyntaxError, ValueError, ImportError):
        return None


def _peaks(device: Facts) -> Facts:
    """peak_tflops by number type, and the datasheet it is from; a part of a card has no datasheet."""
    facts = Facts()
    if device.values.get("mig_enabled"):
        reason, row = "a card that is split by MIG has no peak of its own", None
    else:
        name, memory = device.values["name"], device.values["total_memory_gb"]
        row = peaks_of(name, memory)
        reason = "no datasheet of a device of this name is on grd's list; see: grd benchmark"
        if row is None and peaks_of(name) is not None:
            reason = "its memory is not that of the whole card of this name"
    known = {} if row is None else {name: rate for name, rate in row.tflops.items() if rate is not None}
    facts.put("peak_tflops", known or None, reason)
    facts.put("peak_source", row.source if row else None, reason)
    return facts


def _complete(finding: GpuFinding, build: TorchBuild | None, driver: str | None) -> Gpus:
    """Add to each device what belongs to the machine: driver and CUDA version."""
    notes = list(finding.notes)
    amd = finding.source in AMD_SOURCES
    usable = build is not None and bool(build.hip if amd else build.sees_gpus)
    if build is not None and not usable:
        support = "ROCm" if amd else "GPU support"
        notes.append(f"torch {build.version} is a build without {support}: it cannot use this GPU")
    cuda, cuda_source = finding.driver_cuda, "driver"
    if build is not None and usable:
        cuda, cuda_source = build.cuda, "torch"
    no_cuda = "it is no CUDA device" if amd else "neither torch nor the driver tells it"
    for facts in finding.devices:
        facts.put("driver_version", finding.driver or driver, "no source tells it")
        facts.put("cuda_version", cuda, no_cuda)
        facts.put("cuda_version_source", cuda_source if cuda else None, "cuda_version is unknown")
        facts.add(_peaks(facts))
    return Gpus(
        devices=finding.devices,
        source=finding.source,
        driver=finding.driver or driver,
        driver_cuda=finding.driver_cuda,
        notes=tuple(notes),
    )


def find_gpus(
    *,
    allow_torch_import: bool = False,
    environment: Mapping[str, str] = os.environ,
    root: Path = Path("/"),
) -> Gpus:
    """The GPUs a program started here could use, with CUDA_VISIBLE_DEVICES honoured; never raises.

    AMD's libraries are asked where NVML has no device and AMD's driver is loaded, with ROCm's own variables
    honoured too. torch is asked only where it is imported already, or may be (``allow_torch_import``), and
    only a CUDA or ROCm build of it. GPUtil comes last: it parses nvidia-smi. ``root`` stands for "/" where
    /sys is read.
    """
    build = _torch_build()
    nvml = find_by_nvml(environment)
    findings = [nvml]
    if not nvml.devices and not nvml.final:
        amd = find_by_amd(environment, root)
        findings += [] if amd is None else [amd]
        if amd is None or not amd.final:
            findings.append(find_by_torch(build, allow_import=allow_torch_import))
            if not findings[-1].devices:
                findings.append(find_by_gputil(environment))
    last = findings[-1]
    if last.devices:
        return _complete(replace(last, driver=last.driver or nvml.driver), build, nvml.driver)
    reason = "; ".join(f"{finding.source}: {finding.reason}" for finding in findings)
    return Gpus(reason=reason, driver=nvml.driver or last.driver, driver_cuda=nvml.driver_cuda)
