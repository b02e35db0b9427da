"""Leases of GPUs: what keeps two runs of a user on this machine from using one GPU at the same time.

A lease is a flock on a file of the device in the user's state folder. The operating system keeps it, so it
ends with the last process that holds it, however that dies; what stands in the file is only for people. With
``gpu_slots`` above 1 a device has so many files, and as many runs share it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grd import contract
from grd.errors import ConfigurationError, ResourceUnavailable, UsageError
from grd.files import is_locked, take_lock
from grd.hardware.monitor import GPUMonitor, GPUStats, wants_mock
from grd.hardware.pools import INFERENCE, POOLS, TRAINING
from grd.hardware.visible import VARIABLE
from grd.settings import Settings, state_dir

DEVICE_FILES = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg", "/dev/nvhost-gpu")
"""One of these exists where NVIDIA's driver runs (the third under WSL, the fourth on a Jetson). Looking costs
nothing; asking NVML takes a tenth of a second, also to hear that there is none."""

CHOOSING_SECONDS = 10.0


@dataclass(frozen=True)
class Wanted:
    """What somebody asks for. ``count`` None: nobody asked, which means one where this machine has GPUs."""

    count: int | None = None
    pool: str = TRAINING

    @classmethod
    def read(cls, count: int | str | None, pool: str | None) -> Wanted:
        """What was typed. Raises UsageError."""
        if pool is not None and pool not in POOLS:
            raise UsageError(f"--gpu-pool: {pool!r} is none of {', '.join(POOLS)}")
        if count is not None:
            try:
                number = -1 if isinstance(count, bool) else int(count)
            except (TypeError, ValueError):
                number = -1
            if number < 0 or number != float(count):
                raise UsageError(f"--gpus: {count!r} is no number of GPUs; write 0, 1, 2, ...")
            count = number
        return cls(count, pool or TRAINING)


@dataclass(frozen=True)
class Device:
    """A card, or an instance of one, that work can be given to."""

    uuid: str
    card: int
    """The driver's number of the card."""
    is_instance: bool
    memory_used_mb: int | None
    leases: int


class Lease:
    """Devices that this process holds, and whoever it hands ``descriptors`` to; `close` gives them back."""

    def __init__(self, devices: Sequence[Device] = (), descriptors: Sequence[int] = ()) -> None:
        self.devices = tuple(devices)
        self.descriptors = tuple(descriptors)

    @property
    def uuids(self) -> list[str]:
        """Their UUIDs, as CUDA_VISIBLE_DEVICES takes them."""
        return [device.uuid for device in self.devices]

    def describe(self) -> list[dict[str, Any]]:
        """What a run's record keeps: ``gpu`` (the card's number) and ``uuid``."""
        return [{"gpu": device.card, "uuid": device.uuid} for device in self.devices]

    def close(self) -> None:
        """Give them back; once more does no harm."""
        descriptors, self.descriptors = self.descriptors, ()
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def folder() -> Path:
    """Where the files of the leases lie. Nothing is created by asking."""
    return state_dir() / "gpus"


def may_have_gpus() -> bool:
    """Whether asking NVML is worth its time."""
    return any(os.path.exists(path) for path in DEVICE_FILES)  # noqa: PTH110


def is_unasked_for_nothing(wanted: Wanted, environment: Mapping[str, str]) -> bool:
    """Whether no lease is to be taken: none is wanted, or nobody asked and there is nothing to keep apart.

    Who sets CUDA_VISIBLE_DEVICES (a person, or a scheduler) has chosen.
    """
    if wanted.count is not None:
        return wanted.count == 0
    return VARIABLE in environment or wants_mock(None, environment) or not may_have_gpus()


def check(wanted: Wanted, settings: Settings, environment: Mapping[str, str] = os.environ) -> None:
    """Raise what a start should end with at once.

    ResourceUnavailable: the machine has not so many GPUs, or they are invented; where nobody asked for one,
    also that none is free now. ConfigurationError: a pool names a device that is not there.
    """
    if is_unasked_for_nothing(wanted, environment):
        return
    with GPUMonitor(environment=environment) as monitor:
        devices = _devices(monitor, wanted, settings)
        own = {each.partition(":")[2] for each in environment.get(contract.ENV_GPUS, "").split(",")}
        if (wanted.count or 0) > sum(device.uuid not in own for device in devices):
            raise ResourceUnavailable(
                f"--gpus {wanted.count}: the run that types this has leased these GPUs itself, and would "
                "wait for its own end; leave --gpus out, and they are shared"
            )
        if devices and wanted.count is None and not _free(devices, settings):
            who = holders()
            names = "; ".join(describe_holder(each) for each in who) or "others"
            waiting = next((f"grd wait {each['run_id']}" for each in who if each.get("run_id")), "grd gpus")
            raise ResourceUnavailable(
                f"no GPU is free ({names}); wait for one: {waiting}; or queue for it: --gpus 1; "
                "or run without: --gpus 0"
            )


def take(
    wanted: Wanted,
    settings: Settings,
    owner: Mapping[str, Any],
    environment: Mapping[str, str] = os.environ,
) -> Lease | None:
    """Lease what is wanted, all of it or nothing; None if too little is free now.

    The least loaded first: fewest leases, then least memory in use. Raises as `check` does for what can never
    be had, and ResourceUnavailable where no lease can be written.
    """
    if is_unasked_for_nothing(wanted, environment):
        return Lease()
    # One chooses at a time: of two at once each might get a part of what either wants.
    with GPUMonitor(environment=environment) as monitor, _choosing():
        devices = _devices(monitor, wanted, settings)
        if not devices:
            return Lease()
        return _lease(devices, wanted.count or 1, settings, owner)


def _lease(devices: list[Device], count: int, settings: Settings, owner: Mapping[str, Any]) -> Lease | None:
    taken: list[Device] = []
    descriptors: list[int] = []
    try:
        for device in sorted(devices, key=_load):
            slots = range(settings.gpu_slots) if len(taken) < count else ()
            for slot in slots:
                descriptor = take_lock(_file(device.uuid, slot))
                if descriptor is None:
                    continue
                taken.append(device)
                descriptors.append(descriptor)
                _sign(descriptor, device, slot, owner)
                break
    except OSError as error:
        Lease(taken, descriptors).close()
        raise _cannot(error) from None
    lease = Lease(taken, descriptors)
    if len(taken) == count:
        return lease
    lease.close()
    return None


def _sign(descriptor: int, device: Device, slot: int, owner: Mapping[str, Any]) -> None:
    since = datetime.now(UTC).isoformat()[:19] + "Z"
    what = {"uuid": device.uuid, "gpu": device.card, "slot": slot, "pid": os.getpid(), "since": since}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({**owner, **what}).encode(), 0)


def _load(device: Device) -> tuple[int, int, int, str]:
    unknown = 2**40  # after those of which it is known
    used = unknown if device.memory_used_mb is None else device.memory_used_mb
    return device.leases, used, device.card, device.uuid


def _free(devices: Sequence[Device], settings: Settings) -> list[Device]:
    return [device for device in devices if device.leases < settings.gpu_slots]


def _devices(monitor: GPUMonitor, wanted: Wanted, settings: Settings) -> list[Device]:
    """What can be leased; empty only where nobody asked. Raises ResourceUnavailable, ConfigurationError."""
    asked = wanted.count is not None
    try:
        names = set(monitor.allocatable())
    except ResourceUnavailable:
        if asked:
            raise
        return []
    stats = [row for row in monitor.get_gpu_stats() if row.uuid in names]
    if not stats:
        if not asked:
            return []
        hidden = monitor.device_count > 0 and monitor.reason is None
        why = f"{VARIABLE} hides them" if hidden else monitor.reason or "none was found"
        raise ResourceUnavailable(f"there is no GPU to give to the run: {why}; see: grd gpus")
    pooled = _pooled(stats, wanted.pool, settings, monitor)
    devices = [_device(row, settings) for row in pooled]
    if wanted.count is not None and wanted.count > 1:
        devices = [device for device in devices if not device.is_instance]  # CUDA uses one instance a process
    if len(devices) < (wanted.count or 1):
        of_pool = f"the pool {wanted.pool!r}" if _pool(wanted.pool, settings) else "this machine"
        instances = any(row.instance for row in pooled)
        besides = " (instances of a split card are given one at a time)" if instances else ""
        raise ResourceUnavailable(
            f"--gpus {wanted.count or 1}: {of_pool} has {len(devices)} to give{besides}; see: grd gpus"
        )
    return devices


def _device(row: GPUStats, settings: Settings) -> Device:
    uuid = str(row.uuid)
    held = sum(_is_held(_file(uuid, slot)) for slot in range(settings.gpu_slots))
    return Device(uuid, row.gpu_id, row.instance, row.memory_used_mb, held)


def _pool(name: str, settings: Settings) -> tuple[str, ...]:
    return settings.inference_gpus if name == INFERENCE else settings.training_gpus


def _pooled(stats: Sequence[GPUStats], name: str, settings: Settings, monitor: GPUMonitor) -> list[GPUStats]:
    pool = _pool(name, settings)
    if not pool:
        return list(stats)
    every = monitor.get_gpu_stats()  # those too that CUDA_VISIBLE_DEVICES hides: they exist
    for entry in pool:
        if not any(_is_named(row, entry) for row in every):
            raise ConfigurationError(
                f"{name}_gpus names GPU {entry}, and this machine has {monitor.device_count}; see: grd gpus"
            )
    return [row for row in stats if any(_is_named(row, entry) for entry in pool)]


def _is_named(row: GPUStats, entry: str) -> bool:
    return row.gpu_id == int(entry) if entry.isdigit() else (row.uuid or "").startswith(entry)


def visible_count(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many GPUs a program started here would see; None where that is not known (AMD's, Apple's)."""
    if sys.platform == "darwin":
        return None
    if wants_mock(None, environment):
        return 0  # nothing can run on them
    if not may_have_gpus() and not os.path.exists("/dev/kfd"):  # noqa: PTH110
        return 0
    with GPUMonitor(environment=environment) as monitor:
        try:
            return len(monitor.allocatable())
        except ResourceUnavailable:
            return None


# --- the files -------------------------------------------------------------------------------------------


def _file(uuid: str, slot: int) -> Path:
    # A UUID of old MIG instances has slashes: MIG-GPU-.../1/0.
    return folder() / f"{uuid.replace('/', '_')}.{slot}.lease"


def _is_held(path: Path) -> bool:
    try:
        return is_locked(path)
    except OSError:
        return False


@contextlib.contextmanager
def _choosing() -> Iterator[None]:
    try:
        folder().mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder() / "choosing.lock", wait_seconds=CHOOSING_SECONDS)
    except OSError as error:
        raise _cannot(error) from None
    if lock is None:
        raise ResourceUnavailable("another process has been choosing a GPU for long; see: grd gpus")
    try:
        yield
    finally:
        os.close(lock)


def _cannot(error: OSError) -> ResourceUnavailable:
    return ResourceUnavailable(
        f"no GPU can be leased in {folder()}: {error.strerror or error}; choose one yourself: "
        f"{VARIABLE}=0 grd ..."
    )


def holders() -> list[dict[str, Any]]:
    """Who holds which device on this machine now: uuid, gpu, slot, and what they said of themselves
    (run_id, attempt, folder, pid, since)."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(folder().glob("*.lease")):
            if not _is_held(path):
                continue
            try:
                said = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                said = None
            name, slot = path.name.removesuffix(".lease").rsplit(".", 1)
            found.append({"uuid": name, "slot": int(slot), **(said if isinstance(said, dict) else {})})
    return found


def describe_holder(holder: Mapping[str, Any]) -> str:
    """One holder in a line."""
    device = f"GPU {holder['gpu']}" if holder.get("gpu") is not None else str(holder["uuid"])
    who = holder.get("run_id") or (f"process {holder['pid']}" if holder.get("pid") else "somebody")
    return f"{device} is leased by {who}"


def gpu_loads(gpu_ids: Sequence[int] | None = None) -> dict[int, int]:
    """How many leases each card has, by the driver's number; of those in ``gpu_ids``, or of all there are.

    Empty where this machine has no GPU, or only invented ones.
    """
    with GPUMonitor(False) as monitor:
        numbers = range(monitor.device_count) if gpu_ids is None else gpu_ids
        loads = dict.fromkeys(numbers, 0)
    for holder in holders():
        if holder.get("gpu") in loads:
            loads[holder["gpu"]] += 1
    return loads
