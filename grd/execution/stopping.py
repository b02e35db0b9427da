"""Stopping an attempt, whoever asks: three stages within one grace period.

1. The stop file is written, and SIGTERM goes to the kernel if it has a handler: the training loop sees the
   flag at its next step, saves and raises.
2. KeyboardInterrupt in the cell, at once where nothing catches SIGTERM, else shortly before the end.
3. SIGKILL to the whole process tree when the grace is over.

`decide` is pure; `Stopper` is the thread that watches clocks, signals and the stop file and acts.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from grd import contract
from grd.files import atomic_write

LAST_CALL_SECONDS = 5.0
"""Stage 2 begins this long before the end of the grace (or at half of it, if the grace is short)."""

POLL_SECONDS = 0.1

SIGNAL_REASONS = {
    signal.SIGTERM: contract.SIGTERM,
    signal.SIGINT: contract.SIGINT,
    signal.SIGHUP: contract.SIGHUP,
    signal.SIGUSR1: contract.PREEMPTED,
    signal.SIGUSR2: contract.PREEMPTED,
}

Action = Literal["wait", "terminate", "interrupt", "kill"]


@dataclass(frozen=True)
class Facts:
    """What `decide` needs to know. Times are CLOCK_MONOTONIC seconds."""

    now: float
    requested_at: float
    grace: float
    any_cell: bool
    """Whether a cell was ever sent: before that there is nothing to save."""
    cell_running: bool
    catches_sigterm: bool | None
    terminated: bool
    interrupts: int
    last_interrupt_at: float | None
    at_once: bool


def decide(facts: Facts) -> Action:
    """The next action of a stop under way."""
    if facts.at_once or not facts.any_cell or facts.now >= facts.requested_at + facts.grace:
        return "kill"
    if not facts.cell_running:
        return "wait"  # an idle kernel is shut down by the client; a signal would only spoil that
    if not facts.terminated and facts.interrupts == 0:
        return "terminate" if facts.catches_sigterm else "interrupt"
    last_call = facts.requested_at + facts.grace - min(LAST_CALL_SECONDS, facts.grace / 2)
    if facts.now >= last_call and (facts.last_interrupt_at is None or facts.last_interrupt_at < last_call):
        return "interrupt"
    return "wait"


@dataclass
class StopRecord:
    """How a stop went, for the record: reason and the seconds since the request of each action."""

    reason: str
    requested_at: float
    actions: list[dict[str, Any]] = field(default_factory=list)
    killed: bool = False
    at_once: bool = False
    """Somebody asked for the kill itself; the grace did not run out."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "reason": self.reason,
            "actions": self.actions,
            "killed": self.killed,
            "at_once": self.at_once,
        }


@dataclass(frozen=True)
class KernelHandle:
    """What the stopper may do to the kernel; each callable is safe from another thread."""

    catches_sigterm: Callable[[], bool | None]
    terminate: Callable[[], None]
    interrupt: Callable[[], None]
    kill: Callable[[], None]


class Stopper:
    """Watches deadline, stop file and signals; stops the kernel in stages once somebody asks.

    ``deadline`` is in CLOCK_MONOTONIC seconds: time the machine slept does not count. Signals are caught in
    the main thread only; elsewhere deadline and stop file still work, and ``handles_signals`` is False.
    """

    def __init__(
        self,
        *,
        deadline: float | None,
        deadline_reason: str = contract.DEADLINE,
        grace: float = contract.DEFAULT_GRACE_SECONDS,
        stop_file: Path | None = None,
        signals: tuple[signal.Signals, ...] = (),
        on_event: Callable[..., Any] | None = None,
    ) -> None:
        self.deadline = deadline
        self.grace = grace
        self.record: StopRecord | None = None
        self.handles_signals = threading.current_thread() is threading.main_thread() and bool(signals)
        self._deadline_reason = deadline_reason
        self._stop_file = stop_file
        self._signals = signals
        self._previous: dict[signal.Signals, Any] = {}
        self._on_event = on_event
        self._kernel: KernelHandle | None = None
        self._any_cell = False
        self._cell_running = False
        self._cells_over = False
        self._terminated = False
        self._interrupts = 0
        self._last_interrupt_at: float | None = None
        self._at_once = False
        self._pending: list[str] = []
        self._closed = False
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._watch, name="grd-stopper", daemon=True)

    @property
    def requested(self) -> bool:
        """Whether somebody asked to stop; also true before the thread has acted on it."""
        return self.record is not None or bool(self._pending)

    @property
    def reason(self) -> str | None:
        """Why, or None."""
        if self.record is not None:
            return self.record.reason
        return self._pending[0] if self._pending else None

    @property
    def killed_at_once(self) -> bool:
        """Whether the kill was asked for."""
        return self.record is not None and self.record.at_once

    @property
    def grace_left(self) -> float | None:
        """Seconds until the kill, while a stop is under way."""
        if self.record is None:
            return self.grace if self._pending else None
        return max(0.0, self.record.requested_at + self.grace - time.monotonic())

    @property
    def interrupted(self) -> bool:
        """Whether the kernel was sent a signal that may interrupt its cell."""
        return self._terminated or self._interrupts > 0

    @property
    def last_call(self) -> bool:
        """Whether a cell that was asked to stop had to be interrupted, shortly before the kill."""
        return self._terminated and self._interrupts > 0

    @property
    def killed_at_exit(self) -> bool:
        """Whether the grace ran out after the last cell, while the kernel was still busy with its exit."""
        record = self.record
        return record is not None and not record.killed and any(a["action"] == "kill" for a in record.actions)

    @property
    def killed(self) -> bool:
        """Whether the tree was killed in a cell: the grace ran out, or the kill was asked for."""
        return self.record is not None and self.record.killed

    def start(self) -> None:
        """Begin to watch, and install the signal handlers if this is the main thread."""
        if self.handles_signals:
            for signum in self._signals:
                self._previous[signum] = signal.signal(signum, self._on_signal)
        self._thread.start()

    def close(self) -> None:
        """Stop watching and put the signal handlers back."""
        for signum, previous in self._previous.items():
            with contextlib.suppress(ValueError, TypeError):
                signal.signal(signum, previous)
        self._previous.clear()
        self._closed = True
        self._wake()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(5.0)
        if not self._thread.is_alive():
            for fd in (self._wake_read, self._wake_write):
                with contextlib.suppress(OSError):
                    os.close(fd)

    def request(self, reason: str) -> None:
        """Ask to stop; a second request changes nothing. Safe in signal handlers and any thread."""
        self._pending.append(reason)
        self._wake()

    def request_deadline(self) -> None:
        """Say that the deadline has come and somebody else has already ended the kernel for it."""
        self.request(self._deadline_reason)

    def attach(self, kernel: KernelHandle) -> None:
        """Say which kernel is to be stopped."""
        self._kernel = kernel

    def cell_started(self) -> None:
        """A cell was sent to the kernel."""
        self._any_cell = self._cell_running = True

    def cell_ended(self) -> None:
        """No cell is being executed."""
        self._cell_running = False

    def cells_over(self) -> None:
        """No further cell will run: what is left of the grace is for the kernel's own exit."""
        self._any_cell = self._cells_over = True

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.request(SIGNAL_REASONS.get(signal.Signals(signum), contract.STOPPED))

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"x")

    def _watch(self) -> None:
        while not self._closed:
            with contextlib.suppress(OSError):
                select.select([self._wake_read], [], [], POLL_SECONDS)
                os.read(self._wake_read, 4096)
            self._look()

    def _look(self) -> None:
        now = time.monotonic()
        asked = self._read_stop_file()
        if self.record is None:
            if self._pending:
                self._begin(self._pending[0], now)
            elif asked is not None:
                self._begin(str(asked.get("reason") or contract.STOPPED), now)
            elif self.deadline is not None and now >= self.deadline:
                self._begin(self._deadline_reason, now)
        if asked is not None and asked.get("now") is True:
            self._at_once = True
        if self.record is not None:
            self._act(self.record, now)

    def _begin(self, reason: str, now: float) -> None:
        self.record = StopRecord(reason, now)
        self._tell(0, "asked")
        if self._stop_file is not None and not self._stop_file.exists():
            # the second way for the notebook to hear of it: a handler may be missing, the file never is
            with contextlib.suppress(OSError):
                atomic_write(self._stop_file, json.dumps({"reason": reason, "t": time.time()}), durable=False)

    def _act(self, record: StopRecord, now: float) -> None:
        if self._kernel is None:
            return
        kernel = self._kernel
        facts = Facts(
            now=now,
            requested_at=record.requested_at,
            grace=self.grace,
            any_cell=self._any_cell,
            cell_running=self._cell_running,
            catches_sigterm=kernel.catches_sigterm() if not self._terminated else None,
            terminated=self._terminated,
            interrupts=self._interrupts,
            last_interrupt_at=self._last_interrupt_at,
            at_once=self._at_once,
        )
        action = decide(facts)
        if action == "wait":
            return
        record.actions.append({"action": action, "after_seconds": round(now - record.requested_at, 3)})
        if action == "terminate":
            self._terminated = True
            self._tell(1, "terminate")
            kernel.terminate()
        elif action == "interrupt":
            self._interrupts += 1
            self._last_interrupt_at = now
            self._tell(2, "interrupt")
            kernel.interrupt()
        else:
            self._kernel = None
            # A kernel that is slow to exit after its last cell has lost nothing.
            record.killed = self._any_cell and not self._cells_over
            record.at_once = record.killed and self._at_once
            self._tell(3, "kill at once" if self._at_once else "kill")
            kernel.kill()

    def _tell(self, stage: int, action: str) -> None:
        if self._on_event is not None:
            self._on_event(contract.EVENT_STOP, stage=stage, action=action, reason=self.reason)

    def _read_stop_file(self) -> dict[str, Any] | None:
        if self._stop_file is None:
            return None
        try:
            value = json.loads(self._stop_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}  # it exists: somebody asked, whatever is in it
        return value if isinstance(value, dict) else {}
