"""A memory cgroup of the test's own, where the machine lets one be made."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
from pathlib import Path

from conftest import Project, cannot_be_had, wait_until

from grd.hardware.limits import memory_folders

MIB = 1024**2


class MemoryCgroup:
    """A new cgroup with a limit of ``mib``; processes started in it stay in it."""

    def __init__(self, mib: int) -> None:
        self.folder, self.why = _make()
        if self.folder is None:
            return
        name = "memory.max" if (self.folder / "memory.max").exists() else "memory.limit_in_bytes"
        (self.folder / name).write_text(str(mib * MIB))
        with contextlib.suppress(OSError):  # no swap: the end of memory is the end
            (self.folder / "memory.swap.max").write_text("0")

    def enter(self, pid: int) -> None:
        """Move a process in."""
        assert self.folder is not None
        (self.folder / "cgroup.procs").write_text(str(pid))

    def start(self, project: Project, *command: str | Path) -> subprocess.Popen[str]:
        """Start ``python COMMAND`` in it; it is in before its first instruction."""
        process = subprocess.Popen(
            [
                "sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"',
                str(self.folder), sys.executable, *map(str, command),
            ],
            cwd=project.path, env=project.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        project.started.append(process)
        return process

    def remove(self) -> None:
        """Take it away once its processes have ended."""
        folder = self.folder
        if folder is not None:
            wait_until(lambda: not (folder / "cgroup.procs").read_text().strip(), "an empty cgroup", 30)
            folder.rmdir()


def _make() -> tuple[Path | None, str]:
    try:
        folders = memory_folders()
    except OSError as error:
        return None, str(error)
    why = "no memory controller"
    for parent in [*folders[:1], *folders[-1:]]:
        made = Path(parent) / f"grd-test-{os.getpid()}-{secrets.token_hex(3)}"
        try:
            made.mkdir()
        except OSError as error:
            why = str(error)
            continue
        limits = (made / "memory.max", made / "memory.limit_in_bytes")
        if any(limit.exists() and os.access(limit, os.W_OK) for limit in limits):
            return made, ""
        why = f"{parent} gives its children no limit of memory"
        made.rmdir()
    return None, why


def require(cgroup: MemoryCgroup) -> MemoryCgroup:
    """Skip the test where no cgroup can be made; fail it where GRD_REQUIRE_FAULTS=1 says one must be."""
    if cgroup.folder is None:
        cannot_be_had(f"no memory cgroup can be made here: {cgroup.why}")
    return cgroup
