"""What /proc/cpuinfo and /sys tell of a processor beyond its name: instruction sets, sockets, NUMA, caches.

Everything reads below ``root``, so that a folder built like /proc and /sys stands in for a machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from grd.hardware.facts import Facts

FLAGS = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimdhp", "asimddp", "sve",
    "sve2", "i8mm", "bf16",
)  # fmt: skip
"""The instruction sets that numeric kernels are chosen by, in Linux's spelling (x86, then ARM)."""

_SIZE = re.compile(r"(\d+)([KMG]?)")
_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}
_NOT_TOLD = "the platform does not tell"


def _records(root: Path) -> list[dict[str, str]]:
    """/proc/cpuinfo as one record for each logical processor."""
    records: list[dict[str, str]] = [{}]
    for line in (root / "proc/cpuinfo").read_text("utf-8", "replace").splitlines():
        name, colon, value = line.partition(":")
        if not line.strip():
            records.append({})
        elif colon:
            records[-1][name.strip()] = value.strip()
    return [record for record in records if "processor" in record]


def _flags(root: Path) -> list[str] | None:
    for record in _records(root):
        told = set((record.get("flags") or record.get("Features") or "").split())
        if told:
            return [flag for flag in FLAGS if flag in told]
    return None


def _sockets(root: Path) -> int | None:
    packages = {record["physical id"] for record in _records(root) if "physical id" in record}
    if packages:
        return len(packages)
    files = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology/physical_package_id")
    told = {file.read_text("ascii").strip() for file in files}
    return len(told - {"-1"}) or None  # -1: the firmware describes no packages


def _threads_per_core(root: Path) -> int | None:
    for record in _records(root):
        siblings, cores = record.get("siblings", ""), record.get("cpu cores", "")
        if siblings.isdecimal() and cores.isdecimal() and int(cores) > 0:
            return int(siblings) // int(cores) or None
    return None


def _numa_nodes(root: Path) -> int | None:
    return len(list((root / "sys/devices/system/node").glob("node[0-9]*"))) or None


def _l3_cache(root: Path) -> int | None:
    """Bytes of all third-level caches together; cores that share one count it once."""
    sizes: dict[str, int] = {}
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        match = _SIZE.fullmatch((folder / "size").read_text("ascii").strip())
        if match is not None:
            sizes[(folder / "shared_cpu_list").read_text("ascii").strip()] = int(match[1]) * _UNITS[match[2]]
    return sum(sizes.values()) or None


def _governor(root: Path) -> str | None:
    return (root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text("ascii").strip()


def cpu_details(root: Path = Path("/")) -> Facts:
    """flags, sockets, threads_per_core, numa_nodes, l3_cache_bytes, governor. Never raises."""
    facts = Facts()
    questions: dict[str, Callable[[Path], object]] = {
        "flags": _flags,
        "sockets": _sockets,
        "threads_per_core": _threads_per_core,
        "numa_nodes": _numa_nodes,
        "l3_cache_bytes": _l3_cache,
        "governor": _governor,
    }
    for name, question in questions.items():
        facts.ask(name, lambda ask=question: ask(root), _NOT_TOLD)  # type: ignore[misc]
    return facts
