"""Processes of a run: their identity, how to find all of them, how to end them.

A pid alone says nothing: it is reused. An identity is (pid, start time, boot id).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil


def boot_id(proc: Path = Path("/proc")) -> str:
    """Identifies this boot of this machine; the boot time where the kernel gives no id."""
    try:
        return (proc / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"boot-{int(psutil.boot_time())}"


def start_time(pid: int, proc: Path = Path("/proc")) -> float | None:
    """When ``pid`` was started, in clock ticks since boot (Linux) or POSIX seconds; None if there is none.

    A zombie has ended: it counts as no process.
    """
    try:
        # The command name may hold spaces and brackets: the fields start after the last one.
        text = (proc / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if text[0] in "ZX" else float(text[19])
    except (OSError, IndexError):
        if proc.is_dir() and (proc / "self").exists():
            return None
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).create_time()
    return None


def identity(pid: int | None = None) -> dict[str, Any]:
    """``{pid, started, host, boot_id}`` of a living process (this one by default)."""
    number = os.getpid() if pid is None else pid
    return {
        "pid": number,
        "started": start_time(number),
        "host": socket.gethostname(),
        "boot_id": boot_id(),
    }


def is_alive(who: dict[str, Any] | None) -> bool:
    """Whether the very process of `identity` still lives on this machine."""
    if not who or who.get("boot_id") != boot_id() or who.get("started") is None:
        return False
    return bool(start_time(int(who["pid"])) == who["started"])


def catches_signal(pid: int, signum: int, proc: Path = Path("/proc")) -> bool | None:
    """Whether ``pid`` has a handler for ``signum``, by its SigCgt mask; None where that cannot be read."""
    try:
        for line in (proc / str(pid) / "status").read_text(errors="replace").splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) & (1 << (signum - 1)))
    except (OSError, ValueError, IndexError):
        pass
    return None


def carrying(marker: str, proc: Path = Path("/proc")) -> list[int]:
    """Pids of living processes whose environment at exec held ``marker`` (``NAME=value``).

    Finds what left the process group and the session too. Processes of other users cannot be seen, nor
    those that wiped their environment.
    """
    wanted = marker.encode()
    found = []
    if not (proc / "self").exists():
        name, _, value = marker.partition("=")
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(name) == value:
                    found.append(process.pid)
        return found
    for entry in os.scandir(proc):
        if not entry.name.isdigit():
            continue
        try:
            environment = (proc / entry.name / "environ").read_bytes()
        except OSError:
            continue
        if wanted in environment.split(b"\0"):
            pid = int(entry.name)
            if start_time(pid, proc) is not None:
                found.append(pid)
    return found


def descendants(pid: int) -> list[int]:
    """Pids below ``pid`` in the process tree now."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def in_session(session: int) -> list[int]:
    """Pids whose session id is ``session``: a kernel's own session outlives it."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if os.getsid(pid) == session and start_time(pid) is not None:
                found.append(pid)
    return found


def kill_all(pids: Iterable[int], *, spare: Iterable[int] = (), signum: int = signal.SIGKILL) -> list[int]:
    """Send ``signum`` to each pid but ``spare`` and this process; returns those that were there."""
    kept = {os.getpid(), *spare}
    hit = []
    for pid in pids:
        if pid in kept or pid <= 1:
            continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signum)
            hit.append(pid)
    return hit


def reap(marker: str, *, session: int | None = None, wait_seconds: float = 2.0) -> list[int]:
    """Kill every process that carries ``marker`` or belongs to ``session``, until none is left.

    Repeats, since a process may fork while it is being looked for. Returns the pids that were killed;
    what is still there after ``wait_seconds`` (uninterruptible sleep) is left to the caller's next look.
    """
    killed: set[int] = set()
    give_up = time.monotonic() + wait_seconds
    while True:
        pids = set(carrying(marker))
        if session is not None:
            pids.update(in_session(session))
        for pid in list(pids):
            pids.update(descendants(pid))
        pids -= {os.getpid(), os.getppid()}
        if not pids:
            return sorted(killed)
        killed.update(kill_all(pids))
        if time.monotonic() > give_up:
            return sorted(killed)
        time.sleep(0.02)
