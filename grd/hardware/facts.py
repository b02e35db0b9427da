"""Values that are known, and a reason for each one that is not."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

LONGEST_TEXT = 200
KILLED_SECONDS = 2.0


def one_line(value: object, longest: int = LONGEST_TEXT) -> str:
    """``value`` as one line of at most ``longest`` printable characters, runs of spaces collapsed.

    Control and format characters (categories C*) become spaces: a device's name is input from outside.
    """
    text = "".join(" " if unicodedata.category(char).startswith("C") else char for char in str(value))
    return " ".join(text.split())[:longest]


def describe(error: BaseException) -> str:
    """A short reason made of an exception."""
    message = one_line(error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


class Facts:
    """One group of a profile: ``values`` by name, ``reasons`` for the values that are None."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}

    def put(self, name: str, value: Any, reason: str) -> None:
        """Record ``value``, or where it is None, NaN, infinite or an empty text: None and the ``reason``."""
        if isinstance(value, float) and not math.isfinite(value):
            value = None
        elif isinstance(value, str):
            value = one_line(value) or None
        self.values[name] = value
        self.reasons.pop(name, None)
        if value is None:
            self.reasons[name] = reason

    def ask(self, name: str, question: Callable[[], Any], reason: str) -> Any:
        """`put` the answer of ``question``; what it raises becomes the reason. Returns the value recorded."""
        try:
            answer = question()
        except Exception as error:
            # Broad on purpose: drivers and probing libraries raise what they like, a profile never does.
            self.put(name, None, describe(error))
        else:
            self.put(name, answer, reason)
        return self.values[name]

    def add(self, others: Facts) -> None:
        """Take over all values and reasons of another group."""
        for name in others.values:
            self.values[name] = others.values[name]
            self.reasons.pop(name, None)
        self.reasons.update(others.reasons)


def run_limited(argv: Sequence[str], seconds: float) -> bytes:
    """Standard output of a command, which is killed with all its children after ``seconds``.

    Raises OSError if it cannot be started, TimeoutError, and RuntimeError if it fails.
    """
    # A session of its own: what probes spawn in turn (lscpu, nvidia-smi) must not outlive the limit.
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except BaseException as error:
        _end(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise TimeoutError(f"no answer within {seconds:g} s") from None
        raise
    if process.returncode != 0:
        lines = errors.decode("utf-8", "replace").strip().splitlines()
        raise RuntimeError(one_line(lines[-1]) if lines else f"it ended with {process.returncode}")
    return output


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the whole session; what hangs in its driver cannot even die, and is not waited for."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # not yet waited for: the pid is its own
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILLED_SECONDS)
