"""A command's processes: started, ended, seen to the last of them.

`Guarded` has a guardian for that; `Unguarded`, where there cannot be one, misses what left the session and
wiped its environment besides.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

from grd.runs import processes

GUARDIAN = Path(__file__).with_name("command_guardian.py")
GRACE_SECONDS = 5.0
"""From SIGTERM to SIGKILL."""

START_SECONDS = 30.0
"""From the guardian's start to the command's exec; usually 0.1 s."""

SILENCE_SECONDS = 10.0
"""A guardian that is late with its end by so much was stopped, or hangs."""

MARK = "GRD_COMMAND"
"""Environment variable of the second net: what the guardian cannot end any more carries it."""


class Running(Protocol):
    """A command that was started."""

    streams: tuple[int, int]
    """Where its standard output and standard error can be read."""
    channel: int
    """Readable when there is news; -1 if there never is."""
    late: bool
    """Whether its time was up before it ended."""

    @property
    def returncode(self) -> int | None:
        """The command's exit status, negative for a signal."""

    def look(self) -> bool:
        """Do what is due; whether nothing of the command lives any more. Raises OSError if it never ran."""

    def terminate(self) -> None:
        """SIGTERM to all of it, and SIGKILL after the grace."""

    def kill(self) -> None:
        """SIGKILL to all of it."""

    def close(self) -> None:
        """Let go of everything but the streams."""


def start(arguments: list[str], seconds: float) -> Running:
    guarded = sys.platform == "linux" and bool(sys.executable) and Path("/proc/self/stat").exists()
    return Guarded(arguments, seconds) if guarded else Unguarded(arguments, seconds)


def _streams_of(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    # Descriptors of our own: what the Popen closes must not be closed twice.
    assert process.stdout is not None and process.stderr is not None
    streams = os.dup(process.stdout.fileno()), os.dup(process.stderr.fileno())
    process.stdout.close()
    process.stderr.close()
    for fd in streams:
        os.set_blocking(fd, False)
    return streams


class Guarded:
    """The command below its guardian, which does all that has to be done, also without us."""

    def __init__(self, arguments: list[str], seconds: float) -> None:
        self.returncode: int | None = None
        self.late = False
        self._over = False
        self._started = False
        self._failed: OSError | None = None
        self._heard = b""
        self._command = arguments
        self._pid, self._start_time = 0, 0.0
        self._guardian: tuple[int, float] = (0, 0.0)
        self._due = time.monotonic() + START_SECONDS
        self._seconds = seconds
        self._mark = secrets.token_hex(8)
        self._channel, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    str(GUARDIAN),
                    str(theirs.fileno()),
                    str(os.getpid()),
                    repr(GRACE_SECONDS),
                    repr(seconds),
                    *arguments,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, MARK: self._mark},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except BaseException:
            self._channel.close()
            raise
        finally:
            theirs.close()
        try:
            self._channel.setblocking(False)
            self.channel = self._channel.fileno()
            self.streams = _streams_of(self._process)
        except BaseException:
            self._channel.close()  # an interrupted caller: the guardian ends it all
            raise

    def look(self) -> bool:
        self._listen()
        if self._failed is not None:
            raise self._failed
        if not self._over and time.monotonic() > self._due:
            self._end_without_guardian()
        return self._over

    def terminate(self) -> None:
        self._say(b"terminate\n", GRACE_SECONDS)

    def kill(self) -> None:
        self._say(b"kill\n", 0.0)

    def close(self) -> None:
        self._channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(SILENCE_SECONDS)  # it has said its last; or it would stay a zombie

    def _say(self, word: bytes, grace: float) -> None:
        self._due = min(self._due, time.monotonic() + grace + SILENCE_SECONDS)
        with contextlib.suppress(OSError):
            self._channel.send(word)

    def _listen(self) -> None:
        while not self._over:
            try:
                said = self._channel.recv(4096)
            except BlockingIOError:
                break
            except OSError:
                said = b""
            if not said:
                if self._failed is None:
                    self._end_without_guardian()
                break
            *lines, self._heard = (self._heard + said).split(b"\n")
            for line in lines:
                self._understand(line.decode().split())

    def _understand(self, words: list[str]) -> None:
        match words:
            case ["started", pid, started, guardian, guardian_started]:
                self._started = True
                self._pid, self._start_time = int(pid), float(started)
                self._guardian = int(guardian), float(guardian_started)
                self._due = time.monotonic() + self._seconds + GRACE_SECONDS + SILENCE_SECONDS
            case ["failed", number]:
                self._failed = OSError(int(number), os.strerror(int(number)), self._command[0])
            case ["exited", code]:
                self.returncode = int(code)
                self._due = time.monotonic() + GRACE_SECONDS + SILENCE_SECONDS
            case ["late"]:
                self.late = True
            case ["over"]:
                self._over = True

    def _end_without_guardian(self) -> None:
        """The guardian was killed or does not answer: what can be found of the command is killed here."""
        if self._started and self.returncode is None and time.monotonic() > self._due:
            self.late = True
        processes.send_signal(*self._guardian, signal.SIGKILL)
        self._process.kill()
        session = self._pid or None
        processes.reap(f"{MARK}={self._mark}", session=session, session_started=self._start_time)
        self._over = True
        if not self._started:
            self._failed = OSError("the command's guardian ended, or did not answer, before the command ran")
        elif self.returncode is None:
            self.returncode = -signal.SIGKILL  # it dies with its guardian


class Unguarded:
    """The command in a session of its own, found by that and by its mark; the clock is kept here."""

    channel = -1

    def __init__(self, arguments: list[str], seconds: float) -> None:
        self.late = False
        self._mark = f"{MARK}={secrets.token_hex(8)}"
        name, _, value = self._mark.partition("=")
        self._process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, name: value},
            start_new_session=True,
        )
        self._late_at = time.monotonic() + seconds
        self._kill_at: float | None = None
        self._asked: set[tuple[int, float]] = set()
        self._started = processes.start_time(self._process.pid)
        self.streams = _streams_of(self._process)

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def look(self) -> bool:
        now = time.monotonic()
        exited = self._process.poll() is not None
        if not exited and not self.late and now >= self._late_at:
            self.late = True
        if exited or self.late:
            self.terminate()
        if self._kill_at is None:
            return False
        found = self._living()
        if now >= self._kill_at:
            session = self._process.pid
            processes.reap(self._mark, session=session, session_started=self._started)
            return self._process.poll() is not None
        for pid, started in found.items():
            if (pid, started) not in self._asked:
                self._asked.add((pid, started))
                for signum in (signal.SIGTERM, signal.SIGCONT):
                    with contextlib.suppress(PermissionError):
                        processes.send_signal(pid, started, signum)
        return exited and not found

    def terminate(self) -> None:
        if self._kill_at is None:
            self._kill_at = time.monotonic() + GRACE_SECONDS

    def kill(self) -> None:
        self._kill_at = time.monotonic()

    def close(self) -> None:
        self._process.poll()

    def _living(self) -> dict[int, float]:
        found = processes.carrying(self._mark)
        found |= processes.in_session(self._process.pid, self._started)
        for pid, started in list(found.items()):
            below = processes.descendants(pid)
            if processes.start_time(pid) == started:
                found |= below
        return found
