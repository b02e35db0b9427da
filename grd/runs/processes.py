"""Processes of a run: their identity, how to find all of them, how to end them.

A pid alone says nothing: it is reused. An identity is (pid, start time, boot id).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from grd import contract

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""prctl(2)."""


def boot_id(proc: Path = Path("/proc")) -> str:
    """Identifies this boot of this machine; the boot time where the kernel gives no id."""
    try:
        return (proc / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"boot-{int(psutil.boot_time())}"


def start_time(pid: int, proc: Path = Path("/proc")) -> float | None:
    """When ``pid`` was started, in clock ticks since boot (Linux) or POSIX seconds; None if there is none.

    A zombie has ended: it counts as no process, unless only its main thread has.
    """
    try:
        # The command name may hold spaces and brackets: the fields start after the last one.
        text = (proc / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        ended = text[0] == "X" or (text[0] == "Z" and int(text[17]) < 2)
        return None if ended else float(text[19])
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


def carrying(marker: str, proc: Path = Path("/proc")) -> dict[int, float]:
    """Living processes whose environment at exec held ``marker`` (``NAME=value``): start time by pid.

    Finds what left the process group and the session too. Processes of other users cannot be seen, nor
    those that wiped their environment.
    """
    wanted = marker.encode()
    found = {}
    if not (proc / "self").exists():
        name, _, value = marker.partition("=")
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(name) == value:
                    found[process.pid] = process.create_time()
        return found
    for entry in os.scandir(proc):
        if not entry.name.isdigit():
            continue
        # The start first: should the pid change hands meanwhile, the old start protects the new process.
        pid, started = int(entry.name), start_time(int(entry.name), proc)
        if started is None:
            continue
        if wanted in _environment(proc / entry.name):
            found[pid] = started
    return found


def _environment(process: Path) -> list[bytes]:
    """The variables a process was executed with; of any of its threads where the main one has ended."""
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except ProcessLookupError:
        for thread in _threads(process):
            with contextlib.suppress(OSError):
                return (thread / "environ").read_bytes().split(b"\0")
    except OSError:
        pass
    return []


def _threads(process: Path) -> list[Path]:
    try:
        return list((process / "task").iterdir())
    except OSError:
        return []


def open_process(pid: int, started: float | None) -> int:
    """A pidfd of the very process that started then, -1 if it has ended or the system has none."""
    if started is None or not hasattr(os, "pidfd_open"):
        return -1
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return -1
    if start_time(pid) == started:
        return handle
    os.close(handle)
    return -1


def send_signal(pid: int, started: float | None, signum: int) -> bool:
    """Signal the very process that started then; False if it has ended, whoever has its pid now.

    Raises PermissionError.
    """
    handle = open_process(pid, started)
    try:
        if handle >= 0:
            signal.pidfd_send_signal(handle, signum)
            return True
        if started is None or start_time(pid) != started:
            return False
        os.kill(pid, signum)
        return True
    except ProcessLookupError:
        return False
    finally:
        if handle >= 0:
            os.close(handle)


def runner_of(pid: int) -> str:
    """The run whose runner ``pid`` stems from, by its environment; empty if none or unknown."""
    if Path("/proc/self").exists():
        wanted = contract.ENV_RUNNER.encode() + b"="
        for entry in _environment(Path(f"/proc/{pid}")):
            if entry.startswith(wanted):
                return entry[len(wanted) :].decode(errors="replace")
        return ""
    with contextlib.suppress(psutil.Error):
        return str(psutil.Process(pid).environ().get(contract.ENV_RUNNER, ""))
    return ""


def descendants(pid: int) -> dict[int, float]:
    """Processes below ``pid`` in the process tree now: start time by pid.

    Without what a runner that was started in there has made: a run in its own right, with its own guardian.
    """
    own = runner_of(pid)
    found: dict[int, float] = {}
    with contextlib.suppress(psutil.Error):
        waiting = psutil.Process(pid).children()
        while waiting:
            process = waiting.pop()
            started = start_time(process.pid)
            if runner_of(process.pid) not in ("", own):
                continue
            if started is not None:
                found[process.pid] = started
            with contextlib.suppress(psutil.Error):
                waiting.extend(process.children())
    return found


def adopt_orphans() -> None:
    """From now on this process is the parent of what is orphaned below it (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0)


def die_with_parent() -> None:
    """From now on the end of the thread that started this process is its own end (Linux; elsewhere nothing).

    Not that of processes that it forks.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)


def children() -> set[int]:
    """Pids of this process's children, adopted ones too; empty where the system does not tell."""
    found: set[int] = set()
    for thread in _threads(Path("/proc/self")):
        with contextlib.suppress(OSError):
            found.update(map(int, (thread / "children").read_text().split()))
    return found


def end_children(wait_seconds: float = 2.0, *, spared: set[int]) -> list[int]:
    """SIGKILL to this process's children but the ``spared``, and to all below them, until none is left.

    Returns the pids that were killed.
    """
    killed: set[int] = set()
    give_up = time.monotonic() + wait_seconds
    while True:
        found: dict[int, float] = {}
        for pid in children() - spared:
            started = start_time(pid)
            if started is not None and runner_of(pid) in ("", runner_of(os.getpid())):
                found |= {pid: started, **descendants(pid)}
        if not found or time.monotonic() > give_up:
            return sorted(killed)
        for pid, started in found.items():
            with contextlib.suppress(PermissionError):
                if send_signal(pid, started, signal.SIGKILL):
                    killed.add(pid)
        time.sleep(0.02)


def in_session(session: int, leader_started: float | None = None) -> dict[int, float]:
    """Processes whose session id is ``session``, start time by pid: a kernel's session outlives it.

    Empty if the pid belongs to a process that started at another time: the session is somebody else's.
    """
    leader = start_time(session)
    if leader is not None and leader_started is not None and leader != leader_started:
        return {}
    found = {}
    for pid in psutil.pids():
        started = start_time(pid)
        with contextlib.suppress(OSError):
            if started is not None and os.getsid(pid) == session:
                found[pid] = started
    return found


def end_group(leader: int, started: float | None) -> None:
    """SIGKILL to the process group of ``leader``, if that is still the process that started then."""
    if started is not None and start_time(leader) == started:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(leader) == leader:
                os.killpg(leader, signal.SIGKILL)
            else:
                os.kill(leader, signal.SIGKILL)


def reap(
    marker: str,
    *,
    session: int | None = None,
    session_started: float | None = None,
    wait_seconds: float = 2.0,
) -> list[int]:
    """Kill every process that carries ``marker`` or belongs to ``session``, until none is left.

    Repeats, since a process may fork while it is being looked for. Returns the pids that were killed;
    what is still there after ``wait_seconds`` (uninterruptible sleep) is left to the caller's next look.
    """
    killed: set[int] = set()
    spared = {0, 1, os.getpid(), os.getppid()}
    give_up = time.monotonic() + wait_seconds
    while True:
        found = carrying(marker)
        if session is not None:
            found |= in_session(session, session_started)
        for pid, started in list(found.items()):
            below = descendants(pid)
            if start_time(pid) == started:  # or they may be below another one that has its pid now
                found |= below
        found = {pid: started for pid, started in found.items() if pid not in spared}
        if not found:
            return sorted(killed)
        for pid, started in found.items():
            with contextlib.suppress(PermissionError):
                if send_signal(pid, started, signal.SIGKILL):
                    killed.add(pid)
        if time.monotonic() > give_up:
            return sorted(killed)
        time.sleep(0.02)
