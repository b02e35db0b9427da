"""What this machine really does: matrix products, memory, and writing to disk, measured in a few seconds.

Figures are kept in grd's state folder under the machine's fingerprint, so that each machine is measured
once.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grd import settings
from grd.errors import GrdError, ResourceUnavailable
from grd.files import read_json, take_lock, write_json
from grd.hardware import matmul_program
from grd.hardware.facts import describe, run_limited
from grd.hardware.mounts import mount_of, read_mounts
from grd.hardware.peaks import peak_tflops

SCHEMA = "grd.benchmark/1"
PRODUCT_SECONDS = 3.0
DISK_SECONDS = 1.5
"""Measuring takes 5 s at most. Importing torch and starting CUDA, which take longer, are not counted."""
LIMIT_SECONDS = 120.0
"""For a process that hangs; a first use of CUDA takes up to half a minute on large machines."""
MACHINES_KEPT = 32

BUSY = 0.5
"""The share of the processors that others may use: of a machine busier than that, nothing is kept."""

FIRST_BYTES = 1024**2
CHUNK_BYTES = 16 * 1024**2
WRITE_BYTES = 128 * 1024**2
FSYNCS = 5


def _cache_file() -> Path:
    return settings.state_dir() / "benchmarks.json"


def _kept(cache: Path) -> dict[str, dict[str, Any]]:
    try:
        machines = read_json(cache)["machines"].items()
        return {str(key): value for key, value in machines if _is_whole(value)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _is_whole(entry: Any) -> bool:
    """Whether this is what `benchmark` keeps: anybody may have written into the file."""
    if not isinstance(entry, dict) or not entry.keys() >= {"measured_at", "seconds", "load"}:
        return False
    compute, disks = entry.get("compute"), entry.get("disks")
    return (
        isinstance(compute, dict)
        and compute.keys() >= _COMPUTE
        and _rows_are_whole(compute["matmul"], _PRODUCT)
        and isinstance(disks, dict)
        and _rows_are_whole(list(disks.values()), _DISK)
    )


_COMPUTE = {"matmul", "memory_bandwidth_gbs", "device", "library", "threads"}
_PRODUCT = {"dtype", "tflops", "peak_tflops", "share_of_peak"}
_DISK = {"path", "write_mbs", "fsync_ms"}


def _rows_are_whole(rows: Any, names: set[str]) -> bool:
    return isinstance(rows, list) and all(isinstance(row, dict) and row.keys() >= names for row in rows)


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _too_busy(load: Any) -> bool:
    """Whether others kept the machine so busy that what was measured says little of it.

    The load average counts the whole machine, in a container too, and so does the number of processors.
    """
    return isinstance(load, int | float) and load > BUSY * (os.cpu_count() or 1)


def last_benchmark(fingerprint: str | None, cache: Path | None = None) -> dict[str, Any] | None:
    """What was measured on the machine of this fingerprint while it was quiet: compute, disks by mount."""
    with contextlib.suppress(GrdError, OSError, ImportError, RuntimeError):
        found = _kept(cache or _cache_file()).get(fingerprint or "")
        return None if found is None or _too_busy(found["load"]) else found
    return None


def _keep(fingerprint: str, found: dict[str, Any], cache: Path) -> None:
    # A state folder that cannot be written costs a measurement next time, nothing else.
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        lock = take_lock(cache.with_suffix(".lock"), wait_seconds=5.0)
        try:
            machines = _kept(cache)
            machines.pop(fingerprint, None)
            kept = dict(list(machines.items())[1 - MACHINES_KEPT :])
            write_json(cache, {"schema": "grd.benchmarks/1", "machines": {**kept, fingerprint: found}})
        finally:
            if lock is not None:
                os.close(lock)


def measure_compute(seconds: float = PRODUCT_SECONDS) -> dict[str, Any]:
    """TFLOP/s of matrix products by number type and GB/s of a copy in memory, from a process of its own.

    With torch on its first GPU, else on the CPU; with numpy where torch is not installed. Never raises: what
    could not be measured has a ``reason``.
    """
    program = [sys.executable, "-P", matmul_program.__file__, repr(seconds)]
    try:
        found: dict[str, Any] = json.loads(run_limited(program, LIMIT_SECONDS))
    except (OSError, RuntimeError, ValueError) as error:  # TimeoutError is an OSError
        return {"matmul": [], "memory_bandwidth_gbs": None, "reason": describe(error)}
    for row in found.setdefault("matmul", []):
        peak = peak_tflops(found["device"], row["dtype"], _gibibytes(found)) if found["device"] else None
        row["peak_tflops"] = peak
        row["share_of_peak"] = round(row["tflops"] / peak, 3) if peak and row["tflops"] else None
    found.setdefault("memory_bandwidth_gbs", None)
    return found


def _gibibytes(found: Mapping[str, Any]) -> float | None:
    total = found.get("device_memory_bytes")
    return total / 1024**3 if total else None


def measure_disk(folder: Path, seconds: float = DISK_SECONDS) -> dict[str, Any]:
    """MB/s of writing random data with fsync, and the milliseconds of one small fsync, in ``folder``.

    128 MiB are written, or as much as ``seconds`` allow; nothing stays, whatever ends this process. Never
    raises: what could not be measured has a ``reason``.
    """
    told: dict[str, Any] = {"path": str(folder.resolve()), "write_mbs": None, "fsync_ms": None, "bytes": 0}
    try:
        usage = os.statvfs(folder)
        if usage.f_bavail * usage.f_frsize < 4 * WRITE_BYTES:
            return {**told, "reason": "too little room on the disk to measure"}
        # Random, or a file system that compresses would write next to nothing.
        block = memoryview(os.urandom(CHUNK_BYTES))
        give_up = time.perf_counter() + seconds
        with tempfile.TemporaryFile(dir=folder, prefix=".grd-benchmark-", buffering=0) as file:
            latencies: list[float] = []
            for _ in range(FSYNCS):
                began = time.perf_counter()
                if latencies and began + latencies[-1] > give_up - seconds / 2:
                    break
                file.write(block[:4096])
                os.fsync(file.fileno())
                latencies.append(time.perf_counter() - began)
            written, began = 0, time.perf_counter()
            size = FIRST_BYTES
            while size >= FIRST_BYTES and written < WRITE_BYTES:
                view = block[:size]
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())
                written += size
                elapsed = time.perf_counter() - began
                # No more than what is written until then, at the rate up to now.
                left = give_up - time.perf_counter()
                size = min(CHUNK_BYTES, WRITE_BYTES - written, int(written / elapsed * left))
    except OSError as error:
        return {**told, "reason": describe(error)}
    return {
        **told,
        "write_mbs": written / elapsed / 1e6,
        "fsync_ms": statistics.median(latencies) * 1000,
        "bytes": written,
    }


def _mount_point(folder: Path) -> str:
    try:
        mount = mount_of(folder.resolve(), read_mounts())
    except OSError:
        mount = None
    return mount.point if mount else str(folder.resolve().anchor)


def benchmark(
    folder: Path,
    *,
    profile: Mapping[str, Any] | None = None,
    again: bool = False,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Measure this machine and the disk of ``folder``, or say what was measured on it before.

    ``again`` measures in any case. The answer has fingerprint, measured_at, seconds (of measuring), load
    (the higher load average of before and after), compute, disk, cached, and a warning where the machine
    was so busy that nothing was kept, else None. Raises ResourceUnavailable if the machine has no
    fingerprint.
    """
    if profile is None:
        from grd.hardware.profile import capture_hardware_profile

        profile = capture_hardware_profile(folder)
    fingerprint = profile.get("fingerprint")
    if not isinstance(fingerprint, str):
        raise ResourceUnavailable("this machine cannot be told from others, so nothing is kept: grd explore")
    place = cache or _cache_file()
    mount = _mount_point(folder)
    known = None if again else last_benchmark(fingerprint, place)
    found: dict[str, Any] = known or {"disks": {}}
    cached = known is not None and mount in known["disks"]
    warning = None
    if not cached:
        load, seconds = _load(), 0.0
        if known is None:
            found = {"disks": {}, "compute": measure_compute()}
            seconds = found["compute"].get("seconds") or 0.0
        began = time.monotonic()
        found["disks"][mount] = measure_disk(folder)
        seconds = round(seconds + time.monotonic() - began, 2)
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        load = max((each for each in (load, _load()) if each is not None), default=None)
        found["disks"][mount]["measured_at"] = moment
        if known is None:  # else the products and the first disk stay what they were, and when
            found |= {"seconds": seconds, "measured_at": moment, "load": load}
        if load is not None and _too_busy(load):
            warning = (
                f"the machine was busy (load {load:.1f} on {os.cpu_count()} processors): these "
                "figures are too low, and are not kept; measure again when it is quiet: grd benchmark"
            )
        elif "reason" not in found["compute"]:
            _keep(fingerprint, found, place)
    return {
        "schema": SCHEMA,
        "fingerprint": fingerprint,
        "cached": cached,
        "measured_at": found["measured_at"],
        "seconds": found["seconds"],
        "load": found["load"],
        "warning": warning,
        "compute": found["compute"],
        "disk": {**found["disks"][mount], "mount": mount},
    }
