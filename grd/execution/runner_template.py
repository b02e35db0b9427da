"""Runners forked from a process that has imported already what all of them import.

A batch starts many runners, and for each of them importing papermill takes longer than a small notebook does.
Whoever starts them keeps a `RunnerTemplate`: a process that has done so, and forks on request. What comes out
is a runner as `launch.start_runner` starts it: in a session of its own, with the run's lock, its log, its
environment, and nothing of its starter's. A template that cannot be had costs only the time that it saves.

Each request takes three descriptors along: the run's lock, its log, and a pipe on which the new process waits
until its starter knows of it. So nobody starts a run a second time because an answer was lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grd import contract
from grd.execution.launch import RunnerProcess, runner_command, runner_environment, start_runner
from grd.runs.folder import RunFolder
from grd.runs.processes import die_with_parent

READY_SECONDS = 20.0
"""So long the first runner waits for what a template imports, which takes it a second or two; until it is
ready others do without."""

STOPPED_SECONDS = 2.0
"""How soon somebody sees that it was stopped, and will not get ready."""

IMPORT_SECONDS = 60.0
"""A template that is not ready by then, perhaps from a slow network drive, is given up."""

ANSWER_SECONDS = 5.0
"""How long a template that is ready may take to fork: one that was stopped must not hold its starter."""

LARGEST_REQUEST = 128 * 1024
"""Bytes, below what a socket takes in one piece; a larger environment is started without a template."""

NAME_ROOM = "-" * 255
"""Where a runner writes its run's name, in the environment that the system shows of it."""

COMMAND_ROOM = "-" * 1024
"""Makes room for its command line."""

GO = b"go"
READY = b"ready"


class ForkedRunner:
    """A runner that is no child of this process; the part of Popen that is asked of it."""

    def __init__(self, pid: int) -> None:
        """Raises OSError if there is no such process."""
        self.pid = pid
        self._handle: int | None = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """None as long as it lives; then 0, for nobody can know more."""
        return self._look(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended. Raises subprocess.TimeoutExpired."""
        ended = self._look(timeout)
        if ended is None:
            raise subprocess.TimeoutExpired(["runner"], timeout or 0.0)
        return ended

    def _look(self, seconds: float | None) -> int | None:
        if self._handle is not None:
            poll = select.poll()
            poll.register(self._handle, select.POLLIN)
            if not poll.poll(None if seconds is None else seconds * 1000):
                return None
            self.close()
        return 0

    def close(self) -> None:
        """Stop watching it."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def __del__(self) -> None:
        self.close()


class RunnerTemplate:
    """Starts runners by forking them from one process, which is made when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._ready = False
        self._give_up = 0.0
        self._useless = sys.platform != "linux"

    @property
    def pid(self) -> int | None:
        """The process that is forked, where there is one."""
        return None if self._process is None else self._process.pid

    def start(
        self, folder: RunFolder, attempt: int, lock: int, environment: Mapping[str, str] | None = None
    ) -> RunnerProcess:
        """What `launch.start_runner` does, sooner. Raises what that raises."""
        if not self._useless:
            variables = runner_environment(folder, environment)
            # surrogates stand for the bytes of an environment that is not UTF-8
            request = json.dumps({"folder": str(folder.path), "attempt": attempt, "environment": variables})
            if len(request) <= LARGEST_REQUEST and self._is_ready():
                try:
                    return self._fork(folder, attempt, lock, request.encode())
                except (OSError, ValueError):
                    self.close()  # the next runner gets a new one
        return start_runner(folder, attempt, lock, environment)

    def _is_ready(self) -> bool:
        """Whether there is one that has imported all; waits for that once, when it is made."""
        try:
            seconds = 0.0
            if self._socket is None:
                self._begin()
                seconds = READY_SECONDS
            if self._ready or self._socket is None:
                return self._ready
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            until = time.monotonic() + seconds
            while not (told := poll.poll(min(STOPPED_SECONDS, seconds) * 1000)):
                if time.monotonic() >= until or self._is_stopped():
                    break
            if told:
                self._ready = self._socket.recv(64) == READY
                if not self._ready:
                    self.close()  # it has ended
            elif time.monotonic() > self._give_up or self._is_stopped():
                self.close()
        except OSError:
            self.close()
        return self._ready

    def _is_stopped(self) -> bool:
        with contextlib.suppress(OSError):
            # proc(5): the state follows the name, which may hold spaces and brackets
            stat = Path(f"/proc/{self.pid}/stat").read_text(errors="replace")
            return stat.rpartition(")")[2].split()[0] in ("T", "t")
        return False

    def close(self) -> None:
        """End the process. Its runners go on."""
        self._ready = False
        if self._socket is not None:
            self._socket.close()  # it ends by that
            self._socket = None
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5.0)
            self._process = None

    def _fork(self, folder: RunFolder, attempt: int, lock: int, request: bytes) -> RunnerProcess:
        channel = self._socket
        assert channel is not None
        paths = folder.attempt(attempt)
        paths.path.mkdir(parents=True, exist_ok=True)
        told, tell = os.pipe2(os.O_CLOEXEC)
        try:
            with open(paths.log, "ab") as log:
                socket.send_fds(channel, [request], [lock, log.fileno(), told])
            answer = channel.recv(64)
            runner = ForkedRunner(int(answer))  # also raises where there was no answer
            os.write(tell, GO)
        finally:
            os.close(told)
            os.close(tell)
        os.close(lock)
        return runner

    def _begin(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(ANSWER_SECONDS)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", contract.ENV_RUNNER: NAME_ROOM}
        module = "grd.execution.runner_template"
        command = [sys.executable, "-P", "-m", module, str(theirs.fileno()), COMMAND_ROOM]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            raise
        self._socket = ours
        self._give_up = time.monotonic() + IMPORT_SECONDS


# --- in the template ------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """Fork until the other side is gone; in each fork, be its runner."""
    assignment = serve(socket.socket(fileno=int(arguments[0])))
    if assignment is None:
        return 0
    from grd.execution import runner

    return runner.main(assignment)


def serve(channel: socket.socket) -> list[str] | None:
    """None in the template, at its end; in a fork, the arguments of its runner."""
    die_with_parent()  # also where it is stopped, and sees no end of the channel
    _import_all()
    shown = _Shown()
    gc.freeze()  # or collecting would copy every page that is shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks here
    with contextlib.suppress(OSError):
        channel.send(READY)
    while True:
        message, fds, _, _ = socket.recv_fds(channel, LARGEST_REQUEST, 3, socket.MSG_CMSG_CLOEXEC)
        if not message:
            return None
        pid = os.fork()
        if pid == 0:
            channel.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _become(json.loads(message), fds, shown)
        for fd in fds:
            os.close(fd)
        with contextlib.suppress(OSError):  # the other side has gone: the next message says so
            channel.send(str(pid).encode())


def _import_all() -> None:
    from grd.execution import runner  # noqa: F401
    from grd.execution.slow_imports import import_jsonschema

    import_jsonschema()
    import grd.execution.attempt
    import grd.execution.client
    import grd.hardware.comparison  # noqa: F401


def _become(request: dict[str, Any], fds: list[int], shown: _Shown) -> list[str]:
    """Be what the request wants, once its sender knows of it."""
    lock, log, told = fds
    if os.read(told, len(GO)) != GO:
        os._exit(0)  # the sender is gone, or does it otherwise
    os.close(told)
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for source, target in ((nowhere, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(nowhere)
    os.close(log)
    os.chdir(request["folder"])
    arguments = [request["folder"], str(request["attempt"]), str(lock)]
    shown.change(request["environment"][contract.ENV_RUNNER], runner_command(*arguments))
    os.environ.clear()
    os.environ.update(request["environment"])
    random.seed()
    return arguments


class _Shown:
    """What the system shows of this process, and of its forks: fixed when a program begins, but in memory.

    Others tell by its environment which run a process belongs to, and people by its command line.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        libc.getenv.restype = ctypes.c_void_p
        self._name = int(libc.getenv(contract.ENV_RUNNER.encode()))
        # proc(5): arg_start and arg_end are the fields 48 and 49; the second field may hold spaces
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        self._command, end = int(fields[45]), int(fields[46])
        self._room = end - self._command

    def change(self, name: str, command: list[str]) -> None:
        """Show this, as far as it fits."""
        _write(self._name, os.fsencode(name), len(NAME_ROOM))
        _write(self._command, b"\0".join(map(os.fsencode, command)), self._room - 1)


def _write(address: int, value: bytes, room: int) -> None:
    ctypes.memmove(address, value[:room].ljust(room, b"\0"), room)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
