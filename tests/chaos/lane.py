"""A project in which chaos runs grd: commands as processes, and every process that stems from them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

LANE_VARIABLE = "CHAOS_LANE"
_ANY_LANE = LANE_VARIABLE.encode() + b"="
COMMAND_SECONDS = 120.0
"""Longer than any command takes on a busy machine."""


class Violation(Exception):
    """Something that grd promises did not hold."""


def wait_for(condition: Callable[[], T], seconds: float, *, every: float = 0.1) -> T:
    """The first true value of ``condition``, or its last one after ``seconds``."""
    give_up = time.monotonic() + seconds
    while True:
        value = condition()
        if value or time.monotonic() > give_up:
            return value
        time.sleep(every)


class Pulse:
    """How late this machine lets a process come to its turn: the promises in seconds are of a machine that
    has a processor to give."""

    BEAT_SECONDS = 0.05

    def __init__(self) -> None:
        self._beats: deque[tuple[float, float]] = deque(maxlen=4_000)
        threading.Thread(target=self._go_on, name="pulse", daemon=True).start()

    def _go_on(self) -> None:
        due = time.monotonic()
        while True:
            time.sleep(self.BEAT_SECONDS)
            late = time.monotonic() - due - self.BEAT_SECONDS
            due = time.monotonic()
            self._beats.append((time.time(), max(0.0, late)))

    def late(self, since: float, until: float) -> float:
        """Seconds in which nothing came to its turn between two times, where those of a beat were noticed."""
        return sum(late for t, late in list(self._beats) if since <= t <= until and late > self.BEAT_SECONDS)


pulse = Pulse()


@dataclass(frozen=True)
class Member:
    """A living process of a lane. ``role``: runner, kernel, guardian, watcher, command, or child."""

    pid: int
    started: int
    parent: int
    role: str
    command: str

    def kill(self) -> bool:
        """SIGKILL to this very process; False if it had ended."""
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(self.pid)
            try:
                stat = _stat(self.pid)  # once: it may end between two looks
                if stat is not None and stat[1] == self.started:
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                    return True
            finally:
                os.close(handle)
        return False


def _stat(pid: int) -> tuple[int, int] | None:
    """Parent and start of a process; None if there is none, or only its zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (int(fields[1]), int(fields[19]))


_strangers: set[tuple[int, int]] = set()
"""Processes, by pid and start, that belong to no lane: what they were started with never changes that."""


def _all_members(lane: str) -> Iterator[Member]:
    wanted = f"{LANE_VARIABLE}={lane}".encode()
    found: dict[int, tuple[int, int, list[str]]] = {}
    for name in (entry.name for entry in os.scandir("/proc")):
        if not name.isdigit():
            continue
        stat = _stat(int(name))
        if stat is None or (int(name), stat[1]) in _strangers:
            continue
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
            if variables != [b""] and not any(v.startswith(_ANY_LANE) for v in variables):
                _strangers.add((int(name), stat[1]))
            if wanted in variables:
                words = Path(f"/proc/{name}/cmdline").read_bytes().decode(errors="replace").split("\0")
                found[int(name)] = (*stat, words)

    def is_guard(pid: int) -> bool:
        return pid in found and any(word.endswith("guardian.py") for word in found[pid][2])

    for pid, (parent, started, words) in found.items():
        if "grd.execution.runner" in words:
            role = "runner"
        elif is_guard(pid):
            role = "watcher" if not is_guard(parent) else "guardian"
        elif "ipykernel_launcher" in words:
            role = "kernel"
        elif words[1:3] == ["-m", "grd"]:
            role = "command"
        else:
            role = "child"
        yield Member(pid, started, parent, role, " ".join(words)[:120])


@dataclass
class Command:
    """A grd command that was started; its output goes to files, so that nothing ever blocks it."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path
    words: list[str]

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def finish(self, seconds: float = COMMAND_SECONDS) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Violation(f"`grd {' '.join(self.words)}` hangs for {seconds:.0f} s") from None

    @property
    def said(self) -> str:
        return self.err.read_text(errors="replace")

    @property
    def json(self) -> Any:
        try:
            return json.loads(self.out.read_text())
        except ValueError:
            raise Violation(f"`grd {' '.join(self.words)}` printed no JSON: {self.said[-500:]!r}") from None


@dataclass
class Lane:
    """One project folder; ``runs_dir`` may lie on another disk."""

    path: Path
    runs_dir: Path
    environment: dict[str, str] = field(default_factory=dict)
    commands: int = 0

    @classmethod
    def make(cls, path: Path, runs_dir: Path | None = None) -> Lane:
        (path / "project" / ".planning").mkdir(parents=True)
        for name in ("printed", "commands", "config", "config/grd"):
            (path / name).mkdir()
        (path / "config/grd/config.toml").write_text("[approval]\nallow_noninteractive = true\n")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GRD_")}
        environment |= {
            "GRD_STATE_DIR": str(path.parent / "state"),  # shared, as by the projects of a user
            "XDG_CONFIG_HOME": str(path / "config"),
            "IPYTHONDIR": str(path / "ipython"),
            LANE_VARIABLE: str(path),
        }
        return cls(path, runs_dir or path / "project" / "experiments", environment)

    @property
    def project(self) -> Path:
        return self.path / "project"

    @property
    def printed(self) -> Path:
        return self.path / "printed"

    def start(self, *arguments: str | Path) -> Command:
        """Start ``grd ARGUMENTS`` in a session of its own."""
        self.commands += 1
        words = [*map(str, arguments), "--runs-dir", str(self.runs_dir)]
        out = self.path / "commands" / f"{self.commands:05d}.out"
        err = out.with_suffix(".err")
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "grd", *words],
                cwd=self.project,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        return Command(process, out, err, words)

    def grd(self, *arguments: str | Path) -> Command:
        """Run ``grd ARGUMENTS`` to its end; a traceback is a violation."""
        command = self.start(*arguments)
        command.finish()
        self.expect_no_traceback(command)
        return command

    def expect_no_traceback(self, command: Command) -> None:
        if "Traceback" in command.said:
            raise Violation(f"`grd {' '.join(command.words)}` shows a traceback: {command.said[-1500:]}")

    def cast(self, roles: Iterable[str] | None = None) -> list[Member]:
        """The living processes of this lane, or those of some roles."""
        return [m for m in _all_members(str(self.path)) if roles is None or m.role in roles]

    def run_folders(self) -> list[Path]:
        """All folders of runs, oldest first."""
        with contextlib.suppress(OSError):
            names = sorted(entry.name for entry in os.scandir(self.runs_dir) if entry.is_dir())
            return [self.runs_dir / name for name in names if not name.startswith(".")]
        return []

    def end(self) -> None:
        """Kill whatever is left."""
        for _ in range(50):
            left = self.cast()
            if not left:
                return
            for member in left:
                member.kill()
            time.sleep(0.05)
