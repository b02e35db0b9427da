"""CUDA_VISIBLE_DEVICES and its likes: which of the machine's GPUs a program started here would see."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

VARIABLE = "CUDA_VISIBLE_DEVICES"
ROCR, HIP = "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"
AMD_VARIABLES = (ROCR, HIP, VARIABLE)


def visible_devices(setting: str | None, uuids: Sequence[str | None]) -> list[int | str]:
    """What ``setting`` selects of the devices whose UUIDs are given, in its order.

    Entries are positions in ``uuids``; a MIG instance stays its own UUID, since it is no whole device. None
    selects all. As in CUDA (programming guide, "CUDA Environment Variables"): the list ends at the first
    entry that names no device, so that "-1" and "" select none, and naming a device twice selects none.
    """
    if setting is None:
        return list(range(len(uuids)))
    chosen: list[int | str] = []
    for raw in setting.split(","):
        entry = raw.strip()
        if entry.startswith("MIG-"):
            device: int | str = entry
        elif entry.startswith("GPU-"):
            matches = [i for i, uuid in enumerate(uuids) if uuid is not None and uuid.startswith(entry)]
            if len(matches) != 1:
                break
            device = matches[0]
        else:
            digits = re.match(r"0*([0-9]{1,9})(?![0-9])", entry)
            if digits is None or int(digits[1]) >= len(uuids):
                break
            device = int(digits[1])
        if device in chosen:
            return []
        chosen.append(device)
    return chosen


def resolved(chosen: Sequence[int | str], uuid_of: Callable[[str], str | None]) -> list[int | str]:
    """`visible_devices` with each MIG instance by its UUID, up to the first that names none.

    ``uuid_of``: the driver's answer, which knows the spelling "MIG-<UUID of the card>/<GPU instance>/<compute
    instance>" too, as the programming guide has it. An abbreviated name is documented of whole GPUs alone.
    """
    found: list[int | str] = []
    for entry in chosen:
        device = uuid_of(entry) if isinstance(entry, str) else entry
        if device is None:
            break
        found.append(device)
    return found


def enumerated_by_cuda(chosen: Sequence[int | str]) -> list[int | str]:
    """What one CUDA process makes of `visible_devices`: of several MIG instances the first, and it alone.

    As in NVIDIA's MIG user guide, "CUDA Device Enumeration": a process enumerates a single compute
    instance, and beside one no whole GPU.
    """
    instance = next((entry for entry in chosen if isinstance(entry, str)), None)
    return list(chosen) if instance is None else [instance]


def visible_amd_devices(
    environment: Mapping[str, str], uuids: Sequence[str | None], order: Sequence[int]
) -> list[int]:
    """Which AMD devices a HIP program would see: positions in ``uuids``, in that program's order.

    ``order``: the positions as HIP counts them when nothing is set. ROCm's runtime hides first
    (ROCR_VISIBLE_DEVICES, positions or UUIDs); HIP counts what is left, and hides in its turn
    (HIP_VISIBLE_DEVICES, or without it CUDA_VISIBLE_DEVICES). ROCm documentation, "GPU isolation techniques".
    """
    seen = list(order)
    for setting in (environment.get(ROCR), environment.get(HIP, environment.get(VARIABLE))):
        if setting is not None:
            setting = re.sub(r"GPU-[0-9A-Fa-f-]+", lambda found: "GPU-" + found[0][4:].lower(), setting)
        names = [uuids[index] for index in seen]
        lower = [None if name is None else "GPU-" + name[4:].lower() for name in names]
        seen = [seen[entry] for entry in visible_devices(setting, lower) if isinstance(entry, int)]
    return seen


def order_is_doubtful(environment: Mapping[str, str], names: Sequence[str | None]) -> bool:
    """Whether positions in CUDA_VISIBLE_DEVICES may count otherwise than the driver's list does.

    CUDA puts the fastest device first unless CUDA_DEVICE_ORDER=PCI_BUS_ID; the driver lists by PCI bus.
    Between equal models that makes no difference worth a word.
    """
    setting = environment.get(VARIABLE, "")
    return (
        bool(re.search(r"(^|,)\s*\d", setting))
        and len(set(names)) > 1
        and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"
    )
