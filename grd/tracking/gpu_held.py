"""GPU memory that this very process holds: a run that wants the same device will lack it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from grd.hardware.monitor import MEBIBYTE, GPUMonitor, GPUStats


def held_by(pid: int, rows: Sequence[GPUStats]) -> dict[str, int | None]:
    """MiB that ``pid`` holds, by the device's name and UUID; None where the driver does not tell how much.

    In a container the driver lists the host's pids: then nothing is found, which does not mean that nothing
    is held.
    """
    held: dict[str, int | None] = {}
    for row in rows:
        for process in row.processes or []:
            if process["pid"] == pid and not row.mock:
                held[f"{row.name or 'a GPU'} ({row.uuid or row.gpu_id})"] = process["memory_mb"]
    return held


def held_by_torch() -> dict[str, int | None]:
    """MiB that torch has reserved in this process, by device; empty where it has touched none."""
    torch = sys.modules.get("torch")  # a process that has not imported it holds nothing through it
    try:
        if torch is None or not torch.cuda.is_initialized():
            return {}
        reserved = {
            f"{torch.cuda.get_device_name(index)} (cuda:{index})": torch.cuda.memory_reserved(index)
            for index in range(torch.cuda.device_count())
        }
    except Exception:
        return {}  # half an import, or a driver that went away: nothing is known then
    return {name: size // MEBIBYTE for name, size in reserved.items() if size}


def warning_about(held: dict[str, int | None]) -> str | None:
    """What to tell a person whose kernel holds this; None where there is nothing to tell."""
    if not held:
        return None
    told = ", ".join(
        f"{name}: {'how much is not known' if size is None else f'{size} MiB'}" for name, size in held.items()
    )
    return (
        f"this kernel holds GPU memory that the run may want ({told}); to free it: delete what is on the GPU "
        "and call torch.cuda.empty_cache(), or restart the kernel"
    )


def warning_of_this_process() -> str | None:
    """The warning about what this process holds now, by the driver, else by torch. Never raises."""
    with GPUMonitor(mock_mode=False) as monitor:
        held = held_by(os.getpid(), monitor.get_gpu_stats())
    return warning_about(held or held_by_torch())
