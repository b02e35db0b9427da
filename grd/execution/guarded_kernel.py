"""A kernel behind its guardian, with the face of a `subprocess.Popen`.

What jupyter_client sends to "the process" is meant for the kernel: pid, signals and exit status here are the
kernel's, not those of the guardian that is between.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from jupyter_client.launcher import launch_kernel

from grd.files import above_the_streams
from grd.runs import processes

GUARDIAN = Path(__file__).with_name("guardian.py")
START_SECONDS = 30.0
"""From the guardian's start to the kernel's exec; usually 0.02 s."""

SILENCE_SECONDS = 5.0
"""A guardian that does not report its kernel's end for so long is taken for lost, a watcher after as much."""

LOST, SILENT = "guardian", "silence"


def can_be_guarded() -> bool:
    """Whether this machine has what a guardian needs: subreapers and /proc."""
    return sys.platform == "linux" and bool(sys.executable) and Path("/proc/self/stat").exists()


class GuardedKernel:
    """A running kernel and its guardian. Safe from several threads."""

    def __init__(self, command: list[str], watcher: subprocess.Popen[bytes], channel: socket.socket) -> None:
        self.args = command
        self.stdin, self.stdout, self.stderr = watcher.stdin, watcher.stdout, watcher.stderr
        self.pid = 0
        self.started: float | None = None
        self.guardians: list[dict[str, Any]] = []
        """Identities of the kernel's parent and of the watcher above it."""
        self.returncode: int | None = None
        self.ended_by: str | None = None
        """``exit``, ``asked``, ``deadline``, ``guardian``: that was lost and took the kernel along, or
        ``silence``: it had to be given up."""
        self._watcher = watcher
        self._channel = channel
        self._heard = b""
        self._failed: OSError | None = None
        self._handle = -1
        self._silent_since: float | None = None
        self._given_up = False
        self._lock = threading.RLock()

    async def wait_for_start(self) -> None:
        """Until the kernel was executed. Raises the OSError of an exec that failed, as Popen does."""
        give_up = time.monotonic() + START_SECONDS
        while not self.pid:
            with self._lock:
                self._listen()
            if self._failed is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._watcher.wait(2.0)  # it has nothing to guard
                raise self._failed
            if self.returncode is not None or time.monotonic() > give_up:
                self.end_tree()
                raise OSError("the kernel's guardian ended, or did not answer, before the kernel had started")
            await asyncio.sleep(0.002)

    def poll(self) -> int | None:
        """The kernel's exit status, negative for a signal; None while it, or what it started, lives."""
        with self._lock:
            if self.returncode is None:
                self._listen()
                self._miss_guardian()
            if self.returncode is not None:
                self._watcher.poll()  # or it would stay a zombie
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Block until the kernel has ended. Raises subprocess.TimeoutExpired."""
        give_up = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if give_up is not None and time.monotonic() >= give_up:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.01)
        return code

    def send_signal(self, signum: int) -> None:
        """Signal the kernel's process; nothing happens if it has ended, whoever has its pid now."""
        with self._lock, contextlib.suppress(ProcessLookupError, PermissionError):
            if self._handle >= 0:
                signal.pidfd_send_signal(self._handle, signum)
            elif self.returncode is None:
                processes.send_signal(self.pid, self.started, signum)

    def terminate(self) -> None:
        """SIGTERM to the kernel."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the kernel; the guardian ends what it leaves."""
        self.send_signal(signal.SIGKILL)

    def end_tree(self) -> None:
        """SIGKILL to the kernel and every process below it, and wait for their end."""
        with contextlib.suppress(OSError):
            self._channel.send(b"kill\n")
        self._wait_for_end(SILENCE_SECONDS)
        if self.returncode is None:
            with self._lock:
                self._give_up_guardian()
            self._wait_for_end(SILENCE_SECONDS)
        if self.returncode is None:
            with self._lock:
                self._give_up_watcher()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._watcher.wait(2.0)

    def _wait_for_end(self, seconds: float) -> None:
        give_up = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < give_up:
            time.sleep(0.005)

    def _listen(self) -> None:
        both_are_gone = False
        while not both_are_gone:
            try:
                said = self._channel.recv(4096)
            except BlockingIOError:
                break
            except OSError:
                said = b""
            both_are_gone = not said
            self._heard += said
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            self._understand(line.decode().split())
        if both_are_gone:
            self._end(-signal.SIGKILL, LOST)  # unless it was reported: the kernel dies with its guardian

    def _understand(self, words: list[str]) -> None:
        match words:
            case ["started", pid, started, guardian, guardian_started]:
                self.pid, self.started = int(pid), float(started)
                self.guardians = [
                    {**processes.identity(int(guardian)), "started": float(guardian_started)},
                    processes.identity(self._watcher.pid),
                ]
                self._handle = processes.open_process(self.pid, self.started)
            case ["failed", number]:
                self._failed = OSError(int(number), os.strerror(int(number)), self.args[0])
            case ["ended", code, why]:
                self._end(int(code), why)

    def _end(self, code: int, why: str) -> None:
        if self.returncode is None:
            self.returncode = code
            self.ended_by = SILENT if why == LOST and self._given_up else why

    def _miss_guardian(self) -> None:
        """A kernel that is dead and whose end nobody reports: its guardian was stopped, or hangs."""
        if self.returncode is not None or self._handle < 0:
            return
        poller = select.poll()
        poller.register(self._handle, select.POLLIN)
        if not poller.poll(0):
            return
        self._silent_since = self._silent_since or time.monotonic()
        silence = time.monotonic() - self._silent_since
        if silence > 2 * SILENCE_SECONDS:
            self._give_up_watcher()
        elif silence > SILENCE_SECONDS and not self._given_up:
            self._give_up_guardian()

    def _give_up_guardian(self) -> None:
        """SIGKILL to kernel and guardian alone: the watcher ends what they leave, and reports it."""
        self._given_up = True
        self.kill()
        for who in self.guardians[:1]:
            processes.send_signal(who["pid"], who["started"], signal.SIGKILL)

    def _give_up_watcher(self) -> None:
        """It is silent too. Whoever asked for the kernel sees to the rest."""
        self._given_up = True
        for who in self.guardians[1:]:
            processes.send_signal(who["pid"], who["started"], signal.SIGKILL)
        self._end(-signal.SIGKILL, LOST)

    def __del__(self) -> None:
        if self._handle >= 0:
            with contextlib.suppress(OSError):
                os.close(self._handle)
        self._channel.close()


async def start_guarded(
    command: list[str],
    *,
    grace: float,
    deadline: float | None,
    connection_file: str | None,
    held: tuple[int, ...] = (),
    **options: Any,
) -> GuardedKernel:
    """Start ``command`` behind a guardian, with Popen's ``options``; descriptors, folder, environment arrive.

    ``grace`` is in seconds, ``deadline`` in CLOCK_MONOTONIC seconds. The guardian holds the descriptors
    ``held`` as long as it lives, and the kernel does not get them. Raises OSError as Popen does.
    """
    ours, other = socket.socketpair()
    ours.setblocking(False)
    theirs = above_the_streams(other.detach())
    guarded = [
        sys.executable,
        "-I",
        "-S",
        str(GUARDIAN),
        ",".join(map(str, (theirs, *held))),
        str(os.getpid()),
        repr(grace),
        "-" if deadline is None else repr(deadline),
        str(Path(connection_file).absolute()) if connection_file else "-",
        *command,
    ]
    try:
        options["pass_fds"] = (*options.get("pass_fds", ()), theirs, *held)
        watcher = launch_kernel(guarded, **options)
    except BaseException:
        ours.close()
        raise
    finally:
        os.close(theirs)
    kernel = GuardedKernel(command, watcher, ours)
    await kernel.wait_for_start()
    return kernel
