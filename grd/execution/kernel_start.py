"""What a kernel said that did not come up, why, and whether another try with other ports is worth it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grd.execution.outcome import describe_exit
from grd.settings import format_duration

TRIES = 3
"""Starts of a kernel whose ports other processes take, all within the one start timeout."""

KEPT_BYTES = 1 << 16
"""Of a kernel's stderr, for telling why it did not come up."""

LAST_LINES = 3
LAST_CHARACTERS = 500
PORTS = ("shell_port", "iopub_port", "stdin_port", "hb_port", "control_port")
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class KernelStartError(RuntimeError):
    """The kernel died, or did not answer in time; ``said`` is the end of its stderr.

    A RuntimeError with the words of jupyter_client, as papermill and nbclient raise there.
    """

    def __init__(self, message: str, *, said: str = "", died: bool = False) -> None:
        super().__init__(message)
        self.said = said
        self.died = died


class LostPort(Exception):
    """The kernel says that another process has one of its ports, and has neither ended nor answered."""


class SharedLog:
    """The kernel writes into the same log as this process: what it said is what came since its start."""

    fd: int | None = None
    """What the kernel gets as its stderr; None for this process's own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = path.stat().st_size

    def started(self) -> None:
        """The kernel has the descriptor."""

    def text(self) -> str:
        """The end of what the kernel has written so far."""
        with contextlib.suppress(OSError), open(self._path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(self._position, size - KEPT_BYTES))
            return file.read(KEPT_BYTES).decode(errors="replace")
        return ""

    def close(self, wait_seconds: float = 0.0) -> None:
        """Nothing is open."""


class PassedOn:
    """What the kernel writes is passed on to this process's stderr, and the last of it is kept.

    A thread does that until the last process which holds the other end is gone.
    """

    def __init__(self) -> None:
        self._read, write = os.pipe()
        self.fd: int | None = write
        self._kept = b""
        self._keeping = True
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._pass_on, name="grd-kernel-stderr", daemon=True)
        self._thread.start()

    def _pass_on(self) -> None:
        while piece := os.read(self._read, 1 << 16):
            with contextlib.suppress(OSError):  # closed, or nobody reads it any more
                rest = piece
                while rest:
                    rest = rest[os.write(2, rest) :]
            with self._lock:
                if self._keeping:
                    self._kept = (self._kept + piece)[-KEPT_BYTES:]
        os.close(self._read)

    def started(self) -> None:
        """The kernel has the descriptor."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def text(self) -> str:
        """The end of what the kernel has written so far."""
        with self._lock:
            return self._kept.decode(errors="replace")

    def close(self, wait_seconds: float = 1.0) -> None:
        """Keep nothing any more; wait for what a kernel that has ended may still have in the pipe."""
        self.started()
        self._thread.join(wait_seconds)
        with self._lock:
            self._keeping = False


def listen(log: Path | None) -> SharedLog | PassedOn:
    """Where the stderr of a kernel that is about to start can be read; ``log`` is this process's own."""
    if log is not None:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(2), log.stat()):
                return SharedLog(log)
    return PassedOn()


def last_words(text: str) -> str:
    """The last lines of what a kernel said, on one line; empty if it said nothing."""
    lines = [" ".join(line.split()) for line in _ANSI.sub("", text).splitlines()]
    said = " / ".join([line for line in lines if line][-LAST_LINES:])
    return said if len(said) <= LAST_CHARACTERS else "..." + said[-LAST_CHARACTERS:]


def explain(said: str, *, returncode: int | None, waited: float | None) -> str:
    """Why a kernel did not come up: it ended, or did not answer within ``waited`` seconds."""
    if waited is None:
        what = f"Kernel died before replying to kernel_info ({describe_exit(returncode)})"
    else:
        what = f"Kernel didn't respond in {format_duration(waited)} (start timeout) and was killed"
    words = last_words(said)
    return f"{what}; its stderr ends: {words}" if words else f"{what}; it wrote nothing to stderr"


def describe(error: BaseException) -> str:
    """One line on why there is no kernel."""
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.EACCES, errno.ENOEXEC):
        return f"the kernel's program cannot be executed: {first}; see: jupyter kernelspec list"
    return first


def lost_a_port(said: str, ports: Iterable[int], taken: Iterable[int]) -> bool:
    """Whether a kernel that died at its start found one of its ``ports`` in another process's hands.

    ``taken`` are those that are so now; the other may have let go of it again, but then ``said`` names it.
    """
    if set(taken) & set(ports):
        return True
    lowered = said.lower()
    in_use = "address already in use" in lowered or "address in use" in lowered
    return in_use and any(re.search(rf"\b{port}\b", said) for port in ports)


def ports_of(connection: Mapping[str, Any]) -> list[int]:
    """The TCP ports of a connection file."""
    if connection.get("transport", "tcp") != "tcp":
        return []
    return [int(connection[name]) for name in PORTS if connection.get(name)]


def taken_ports(ip: str, ports: Iterable[int]) -> list[int]:
    """Which of ``ports`` cannot be bound now, by the rules that ZeroMQ binds by."""
    found = []
    for port in ports:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((ip, port))
                trial.listen(1)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    found.append(port)
    return found
