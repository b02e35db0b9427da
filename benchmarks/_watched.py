"""A command from its start to the end of the last process it left: wall time, bytes written, peak memory."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36
_POLL_SECONDS = 0.002


@dataclass
class Measured:
    """One command, measured. Exact but for ``peak_bytes``, which is a high-water mark read every 2 ms."""

    seconds: float = 0.0
    """Until the command itself ended, as its user would see it."""
    written_bytes: int = 0
    """What the command and everything it started passed to write(): its processes' ``wchar``."""
    cpu_seconds: float = 0.0
    """User and system time of all its processes."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """VmHWM of each of its processes, by command line and pid; empty unless memory was asked for."""
    code: int = 0
    said: str = ""


class _Memory(threading.Thread):
    """Reads the high-water marks of all descendants until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, int] = {}
        self.over = threading.Event()
        self._names: dict[int, str] = {}

    def run(self) -> None:
        while not self.over.wait(_POLL_SECONDS):
            for pid in _descendants(os.getpid()):
                self._look(pid)

    def _look(self, pid: int) -> None:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            mark = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
            if mark is None:
                return  # a zombie
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            # the line changes with exec: what a process was before is another program's memory
            name = f"{pid} {b' '.join(words).decode(errors='replace').strip()}"
        except OSError:
            return
        if self._names.get(pid) != name:
            self.peaks.pop(self._names.get(pid, ""), None)
            self._names[pid] = name
        self.peaks[name] = max(self.peaks.get(name, 0), int(mark.split()[1]) * 1024)


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    waiting = [pid]
    while waiting:
        try:
            children = [
                int(child)
                for task in Path(f"/proc/{waiting[-1]}/task").iterdir()
                for child in (task / "children").read_text().split()
            ]
        except OSError:
            children = []
        waiting.pop()
        waiting += children
        found += children
    return found


def measure(
    command: list[str], folder: Path, environment: dict[str, str], *, memory: bool = False
) -> Measured:
    """Run ``command`` in ``folder`` and wait for every process it started.

    The counters of a process are read when it has ended and before it is forgotten: then they hold all that
    it did, and what its own children did that it waited for. Whoever is left behind by its parent comes to
    this process, which is a subreaper meanwhile.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this machine has no subreapers")
    measured = Measured()
    watcher = _Memory()
    log = folder / "said.txt"
    with open(log, "wb") as stream:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
        )
        if memory:
            watcher.start()
        while True:
            try:
                ended: Any = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            except ChildProcessError:
                break
            if ended.si_pid == process.pid:
                measured.seconds = time.perf_counter() - began
            measured.written_bytes += _written(ended.si_pid)
            _, status, usage = os.wait4(ended.si_pid, 0)
            measured.cpu_seconds += usage.ru_utime + usage.ru_stime
            if ended.si_pid == process.pid:
                measured.code = process.returncode = os.waitstatus_to_exitcode(status)
    if memory:
        watcher.over.set()
        watcher.join()
        measured.peak_bytes = watcher.peaks
    measured.said = log.read_text(errors="replace")
    return measured


def _written(pid: int) -> int:
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("wchar"):
            return int(line.split()[1])
    raise ValueError(f"/proc/{pid}/io has no wchar")
