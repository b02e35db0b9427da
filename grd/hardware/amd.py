"""AMD GPUs, where NVIDIA's driver has none. Experimental: tested with replayed answers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from grd.hardware.amd_libraries import AmdLibrary, Amdsmi, Pyrsmi
from grd.hardware.facts import describe
from grd.hardware.nvml import GpuFinding
from grd.hardware.visible import AMD_VARIABLES, visible_amd_devices

EXPERIMENTAL = "AMD support is experimental"
SOURCES = (Amdsmi.source, Pyrsmi.source)
_DRIVER = "sys/module/amdgpu"


def open_amd(root: Path = Path("/")) -> tuple[AmdLibrary | None, str | None]:
    """A library that lists devices, or None and why; no reason where AMD's driver is not even loaded.

    Never raises. Close the library when done.
    """
    if not (root / _DRIVER).exists():
        return None, None
    libraries: tuple[Callable[[], AmdLibrary], ...] = (Amdsmi, Pyrsmi)
    reasons = []
    for source, make in zip(SOURCES, libraries, strict=True):
        try:
            library = make()
        except Exception as error:
            # Broad on purpose: it may be the package that is missing, ROCm's library, or the permission.
            reasons.append(f"{source}: {describe(error)}")
            continue
        if library.count > 0:
            return library, None
        library.close()
        reasons.append(f"{source}: it lists no device")
    return None, "; ".join(reasons)


def find_by_amd(environment: Mapping[str, str], root: Path = Path("/")) -> GpuFinding | None:
    """The AMD devices a HIP program started here would see, in its order; None without AMD's driver."""
    library, reason = open_amd(root)
    if library is None:
        return None if reason is None else GpuFinding(source="amd", reason=reason)
    try:
        seen = visible_amd_devices(environment, library.rocm_uuids(), library.hip_order())
        devices = tuple(library.device(index) for index in seen)
        source, driver, count = library.source, library.driver, library.count
    finally:
        library.close()
    if not devices:
        set_to = ", ".join(f"{each}={environment[each]!r}" for each in AMD_VARIABLES if each in environment)
        reason = f"{set_to} selects none of the {count} GPU(s) of this machine"
        return GpuFinding(source=source, reason=reason, final=True, driver=driver)
    return GpuFinding(source=source, devices=devices, final=True, driver=driver, notes=(EXPERIMENTAL,))
