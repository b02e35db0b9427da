"""Run a command with a limit on its time, and leave nothing of it behind.

On Linux the command runs below a guardian that no process of it can get away from, whatever session it
makes and whoever its parent is; elsewhere its session and a mark in the environment have to do.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import os
import selectors
from typing import Any

from grd.errors import CommandTimedOut
from grd.execution.command_process import Running, start

LOOK_SECONDS = 0.05
"""Where nothing tells us of the command's end."""


def run_with_timeout(command: list[Any], timeout_seconds: int = 600) -> dict[str, Any]:
    """Run ``command`` without a shell; ``returncode`` (negative: the signal), ``stdout`` and ``stderr``.

    The limit is in seconds from the command's start (fractions too). When it is over, when the command has
    ended, or when the call is interrupted (KeyboardInterrupt, SystemExit, anything), every process that the
    command made gets SIGTERM, and SIGKILL 5 s later: daemons, sessions of their own and all. Standard input
    is empty. Output is UTF-8; bytes that are not come as lone surrogates, so that nothing is lost and
    ``text.encode("utf-8", "surrogateescape")`` has the very bytes; line ends are left as they are.

    Raises `grd.errors.CommandTimedOut`, a TimeoutError with the output so far in ``stdout`` and ``stderr``;
    TypeError or ValueError before anything is started; and as `subprocess.Popen` does, FileNotFoundError or
    another OSError for a program that cannot be executed.
    """
    arguments = _checked_command(command)
    seconds = _checked_seconds(timeout_seconds)
    running = start(arguments, seconds)
    output = _Output(running)
    try:
        late = output.read_until_over(running)
    except BaseException:
        _end_early(running, output)
        raise
    finally:
        running.close()
        output.close()
    if late:
        raise CommandTimedOut(
            f"Command timed out after {timeout_seconds} seconds",
            stdout=output.text(0),
            stderr=output.text(1),
        )
    return {"returncode": running.returncode, "stdout": output.text(0), "stderr": output.text(1)}


def _checked_command(command: Any) -> list[str]:
    if not isinstance(command, (list, tuple)):
        raise TypeError(f"the command must be a list of program and arguments, not {type(command).__name__}")
    if not command:
        raise ValueError("the command is empty: it must at least name a program")
    arguments = []
    for index, word in enumerate(command):
        if not isinstance(word, (str, bytes, os.PathLike)):
            kind = type(word).__name__
            raise TypeError(f"the command's words must be text or paths; number {index} is of type {kind}")
        arguments.append(os.fsdecode(word))
        if "\0" in arguments[-1]:
            raise ValueError(f"the command's word number {index} holds a null byte")
    if not arguments[0]:
        raise ValueError("the command's first word is empty: it must name a program")
    return arguments


def _checked_seconds(seconds: Any) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, numbers.Real):
        raise TypeError(f"timeout_seconds must be a number of seconds, not {seconds!r}")
    with contextlib.suppress(OverflowError):
        value = float(seconds)
        if math.isfinite(value) and value > 0:
            return value
    raise ValueError(f"timeout_seconds must be finite and above zero, not {seconds!r}")


class _Output:
    """What the command has written so far."""

    def __init__(self, running: Running) -> None:
        self._streams = running.streams
        self._pieces: dict[int, list[bytes]] = {fd: [] for fd in self._streams}
        self._selector = selectors.DefaultSelector()
        for fd in self._streams:
            self._selector.register(fd, selectors.EVENT_READ)
        if running.channel >= 0:
            self._selector.register(running.channel, selectors.EVENT_READ)

    def read_until_over(self, running: Running) -> bool:
        """Read until nothing of the command lives; whether its time was up before."""
        while not running.look():
            self._read(LOOK_SECONDS if running.channel < 0 else 1.0)
        # All writers are dead: what they wrote is in the pipes, whoever else holds an end of them.
        while self._read(0.0):
            pass
        return running.late

    def _read(self, seconds: float) -> bool:
        """Wait up to ``seconds`` for output; whether some was read."""
        found = False
        for key, _ in self._selector.select(seconds):
            if key.fd not in self._pieces:
                continue
            try:
                piece = os.read(key.fd, 1 << 16)
            except BlockingIOError:
                continue
            if piece:
                found = True
                self._pieces[key.fd].append(piece)
            else:
                self._selector.unregister(key.fd)
        return found

    def text(self, which: int) -> str:
        """All of standard output (0) or standard error (1)."""
        return b"".join(self._pieces[self._streams[which]]).decode("utf-8", "surrogateescape")

    def close(self) -> None:
        self._selector.close()
        for fd in self._streams:
            os.close(fd)


def _end_early(running: Running, output: _Output) -> None:
    """End the command for a caller that was interrupted; whoever interrupts again will not wait."""
    try:
        running.terminate()
        output.read_until_over(running)
    except OSError:
        pass  # it never started
    except BaseException:
        running.kill()
        with contextlib.suppress(BaseException):
            output.read_until_over(running)
        raise
