"""What this process may use of the machine: limits set by cgroups (v1, v2), affinity, Slurm and rlimits.

A limit can stand on any level of the cgroup tree, and the innermost file often says "max": every level from
the process's own folder up to the mount is read, and the tightest wins. Everything takes its facts as
arguments, so that a folder built like /proc and /sys stands in for a machine.
"""

from __future__ import annotations

import math
import os
import posixpath
import re
import resource
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from grd.hardware.facts import describe
from grd.hardware.mounts import Mount, parse_mountinfo, read_mounts

V1_NO_LIMIT = 2**60
"""cgroup v1 says "no limit" with a number near 2^63, rounded down to a page."""

MEBIBYTE = 1024**2


@dataclass(frozen=True, kw_only=True)
class CoreLimit:
    """``cores`` this process may use at once (a fraction under a CPU quota), and who says so."""

    cores: float
    source: str


@dataclass(frozen=True, kw_only=True)
class MemoryLimit:
    """``limit`` in bytes, who says so, and the bytes already counted against it where that is known."""

    limit: int
    source: str
    used: int | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """All limits found, tightest first; ``unreadable``: what should have told of one and did not."""

    cores: tuple[CoreLimit, ...] = ()
    memory: tuple[MemoryLimit, ...] = ()
    unreadable: tuple[str, ...] = ()

    def usable_cores(self, logical: int | None) -> tuple[int | None, str | None]:
        """Cores that can work at once and what bounds them; a quota of 1.5 counts as 2. At least 1."""
        bounds = [(float(logical), "logical cores")] if logical else []
        bounds += [(limit.cores, limit.source) for limit in self.cores]
        if not bounds:
            return None, None
        cores, source = min(bounds, key=lambda bound: math.ceil(bound[0]))
        return max(1, math.ceil(cores)), source

    def whole_cores(self, logical: int | None) -> int | None:
        """Cores that can be given to work that takes a whole one; of a quota of 1.5 it is 1. At least 1."""
        bounds = [float(logical)] if logical else []
        bounds += [limit.cores for limit in self.cores]
        return max(1, math.floor(min(bounds))) if bounds else None

    def memory_limit(self, total: int | None) -> MemoryLimit | None:
        """The tightest limit that is below the machine's ``total`` bytes, or None."""
        tightest = self.memory[0] if self.memory else None
        return None if tightest is None or (total and tightest.limit >= total) else tightest

    def memory_available(self, available: int) -> int:
        """Bytes this process can still get when the machine has ``available`` to give; never below 0."""
        rooms = [max(0, limit.limit - (limit.used or 0)) for limit in self.memory]
        return min([available, *rooms])


_WHOLE = re.compile(r"-?[0-9]{1,20}")
"""What the system writes has 64 bits; a longer number is nonsense, and takes long to read."""


def _whole(text: str) -> int | None:
    return int(text) if _WHOLE.fullmatch(text) else None


def _read(path: Path) -> str:
    """A file as the system wrote it: names of cgroups may hold anything but a newline."""
    return path.read_bytes().decode("utf-8", "surrogateescape")


@dataclass
class _Reader:
    """Reads files under ``root`` and remembers those that exist and cannot be read."""

    root: Path
    unreadable: list[str] = field(default_factory=list)

    def text(self, path: str) -> str | None:
        try:
            return _read(self.root / path.lstrip("/"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.unreadable.append(f"{path} ({type(error).__name__})")
            return None

    def number(self, path: str) -> int | None:
        return _whole((self.text(path) or "").strip())

    def table(self, path: str) -> dict[str, int]:
        """Lines of ``name number``, as in memory.stat."""
        pairs = [line.split() for line in (self.text(path) or "").splitlines()]
        numbers = {pair[0]: _whole(pair[1]) for pair in pairs if len(pair) == 2}
        return {name: number for name, number in numbers.items() if number is not None}


def _own_groups(text: str) -> dict[str, str]:
    """Controller -> this process's path in its hierarchy, from /proc/self/cgroup; v2 has the name ""."""
    groups = {}
    for line in text.split("\n"):
        parts = line.split(":", 2)
        if len(parts) == 3:
            for controller in parts[1].split(","):
                groups[controller] = parts[2]
    return groups


def cgroup_levels(mounts: list[Mount], groups: Mapping[str, str], controller: str) -> list[str]:
    """The folders of this process's cgroup, innermost first; ``controller`` "" means the v2 hierarchy.

    Of several mounts that show the process's own path the one that shows most levels counts. Where none
    shows it (a container that sees the host's names), the mount point itself is the innermost folder known.
    """
    own = groups.get(controller)
    if own is None:
        return []
    if controller:
        hierarchy = [m for m in mounts if m.fs_type == "cgroup" and controller in m.options]
    else:
        hierarchy = [m for m in mounts if m.fs_type == "cgroup2"]
    if not hierarchy:
        return []
    path = PurePosixPath(own)
    below = [(m, path.relative_to(m.root)) for m in hierarchy if path.is_relative_to(m.root)]
    shown = [(m, inside) for m, inside in below if ".." not in inside.parts]
    mount, inside = min(
        reversed(shown), key=lambda each: len(PurePosixPath(each[0].root).parts), default=(hierarchy[-1], ".")
    )
    leaf = posixpath.join(mount.point, inside)
    levels = [posixpath.normpath(leaf)]
    while levels[-1] != posixpath.normpath(mount.point):
        levels.append(posixpath.dirname(levels[-1]))
    return levels


def _memory_v2(files: _Reader, folder: str) -> list[MemoryLimit]:
    found = []
    for name in ("memory.max", "memory.high"):  # above `high` nobody is killed, but everything crawls
        limit = files.number(f"{folder}/{name}")
        if limit is not None and limit >= 0:
            used = files.number(f"{folder}/memory.current")
            cache = files.table(f"{folder}/memory.stat").get("inactive_file", 0)
            found.append(
                MemoryLimit(
                    limit=limit,
                    source=f"cgroup {folder}/{name}",
                    used=None if used is None else max(0, used - cache),
                )
            )
    return found


def _memory_v1(files: _Reader, folder: str) -> list[MemoryLimit]:
    stat = files.table(f"{folder}/memory.stat")
    # The hierarchical figure also knows of levels above the mount, which a container cannot walk to.
    named = {
        "memory.limit_in_bytes": files.number(f"{folder}/memory.limit_in_bytes"),
        "memory.stat hierarchical_memory_limit": stat.get("hierarchical_memory_limit"),
    }
    usage = files.number(f"{folder}/memory.usage_in_bytes")
    used = None if usage is None else max(0, usage - stat.get("total_inactive_file", 0))
    return [
        MemoryLimit(limit=limit, source=f"cgroup {folder}/{name}", used=used)
        for name, limit in named.items()
        if limit is not None and 0 <= limit < V1_NO_LIMIT
    ]


def _quota(quota: int | None, period: int | None, source: str) -> list[CoreLimit]:
    if quota is None or quota <= 0 or period is None or period <= 0:
        return []
    return [CoreLimit(cores=quota / period, source=source)]


def _quota_v2(files: _Reader, folder: str) -> list[CoreLimit]:
    quota, _, period = (files.text(f"{folder}/cpu.max") or "").strip().partition(" ")
    return _quota(_whole(quota), _whole(period), f"cgroup {folder}/cpu.max")


def _quota_v1(files: _Reader, folder: str) -> list[CoreLimit]:
    quota = files.number(f"{folder}/cpu.cfs_quota_us")
    period = files.number(f"{folder}/cpu.cfs_period_us")
    return _quota(quota, period, f"cgroup {folder}/cpu.cfs_quota_us")


def _whole_number(environment: Mapping[str, str], name: str) -> int | None:
    number = _whole(environment.get(name, "").strip())
    return number if number is not None and number > 0 else None


def _folders(root: Path, process: int | str, controller: str) -> list[str]:
    mounts = read_mounts(root)
    groups = _own_groups(_read(root / "proc" / str(process) / "cgroup"))
    return cgroup_levels(mounts, groups, controller) or cgroup_levels(mounts, groups, "")


def _address_space(files: _Reader) -> int | None:
    """Bytes of address space that this process has; the first figure of statm is in pages (proc(5))."""
    pages = _whole((files.text("/proc/self/statm") or "").partition(" ")[0])
    return None if pages is None else pages * os.sysconf("SC_PAGE_SIZE")


def memory_folders(root: Path = Path("/"), process: int | str = "self") -> list[str]:
    """The folders of a process's memory cgroups, innermost first, of whichever version counts memory here.

    Raises OSError where there is no /proc or no such process.
    """
    return _folders(root, process, "memory")


def cpu_folders(root: Path = Path("/"), process: int | str = "self") -> list[str]:
    """The folders of the cgroups that hold back a process's processor time, innermost first.

    Raises OSError where there is no /proc or no such process.
    """
    return _folders(root, process, "cpu")


def memory_limits(folders: list[str], root: Path = Path("/")) -> list[MemoryLimit]:
    """The limits that stand in these cgroup folders, tightest first."""
    files = _Reader(root)
    found = [limit for folder in folders for limit in _memory_v2(files, folder) + _memory_v1(files, folder)]
    return sorted(found, key=lambda limit: limit.limit)


def slurm_limits(environment: Mapping[str, str]) -> Limits:
    """Limits a Slurm step was given; memory is in MiB there, and 0 means all of the node's (sbatch(1))."""
    cores, memory, unknown = [], [], []
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        count = _whole_number(environment, name)
        if count is not None:
            cores.append(CoreLimit(cores=count, source=name))
    # Slurm gives one of the three.
    for name, of in (
        ("SLURM_MEM_PER_NODE", None),
        ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"),
        ("SLURM_MEM_PER_GPU", "SLURM_GPUS_ON_NODE"),
    ):
        size = _whole_number(environment, name)
        count = 1 if of is None else _whole_number(environment, of)
        if size is None:
            continue
        if count is None:
            unknown.append(f"{name} (no {of} to multiply it by)")
        else:
            source = name if of is None else f"{name} times {of}"
            memory.append(MemoryLimit(limit=size * count * MEBIBYTE, source=source))
        break
    return Limits(cores=tuple(cores), memory=tuple(memory), unreadable=tuple(unknown))


def read_limits(
    *,
    root: Path = Path("/"),
    environment: Mapping[str, str] = os.environ,
    affinity: int | None = None,
    address_space: int | None = None,
) -> Limits:
    """All limits on this process, from files under ``root`` and the facts given.

    ``affinity`` is the number of CPUs the process may be scheduled on (a cpuset is in it: the kernel applies
    it to the affinity), ``address_space`` the soft RLIMIT_AS in bytes, None for none. Never raises.
    """
    files = _Reader(root)
    slurm = slurm_limits(environment)
    cores, memory = list(slurm.cores), list(slurm.memory)
    files.unreadable += slurm.unreadable
    mountinfo = files.text("/proc/self/mountinfo")
    cgroup = files.text("/proc/self/cgroup")
    if mountinfo is None or cgroup is None:
        files.unreadable.append("cgroups (no /proc/self/cgroup)")
    else:
        mounts, groups = parse_mountinfo(mountinfo), _own_groups(cgroup)
        for folder in cgroup_levels(mounts, groups, ""):
            memory += _memory_v2(files, folder)
            cores += _quota_v2(files, folder)
        for folder in cgroup_levels(mounts, groups, "memory"):
            memory += _memory_v1(files, folder)
        for folder in cgroup_levels(mounts, groups, "cpu"):
            cores += _quota_v1(files, folder)
    if affinity:
        cores.append(CoreLimit(cores=affinity, source="affinity"))
    if address_space is not None:
        memory.append(MemoryLimit(limit=address_space, source="RLIMIT_AS", used=_address_space(files)))
    return Limits(
        cores=tuple(sorted(cores, key=lambda limit: limit.cores)),
        memory=tuple(sorted(memory, key=lambda limit: limit.limit)),
        unreadable=tuple(files.unreadable),
    )


def current_limits(root: Path = Path("/")) -> Limits:
    """The limits on this very process. Never raises."""
    affinity, address_space = None, None
    try:
        # Not on macOS: there every core is usable, and the logical count is the bound.
        affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        address_space = None if soft == resource.RLIM_INFINITY else soft
    except (OSError, ValueError) as error:
        limits = read_limits(root=root, affinity=affinity)
        return Limits(
            cores=limits.cores, memory=limits.memory, unreadable=(*limits.unreadable, describe(error))
        )
    return read_limits(root=root, affinity=affinity, address_space=address_space)
