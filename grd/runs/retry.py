"""Retrying a run: which ends are followed by another attempt, when, and what is known of who does it.

What was asked for stands in run.json (`retry`). The retrier, a process of its own, holds retry.lock while it
lives and keeps in retry.json what it will do next.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from grd import contract
from grd.backoff import full_jitter
from grd.errors import ConfigurationError, RunNotFound
from grd.files import is_locked, read_json, write_json
from grd.runs import store
from grd.runs.folder import RunFolder
from grd.runs.liveness import LEASE_SECONDS, needs_recovery
from grd.runs.model import RunRecord, iso
from grd.runs.processes import identity, is_alive, send_signal
from grd.settings import format_duration

SCHEMA = "grd.retry/1"

WATCHING, WAITING, OVER, LOST = "watching", "waiting", "over", "lost"
"""An attempt is under way; the next one's time is known; there will be none; the retrier is gone."""

RETRIED = (
    contract.KERNEL_DIED, contract.OUT_OF_MEMORY, contract.RUNNER_LOST, contract.HOST_LOST,
    contract.PREEMPTED, contract.DISK_FULL, contract.STORAGE,
)  # fmt: skip
"""Causes that nobody asked for."""

BY_REQUEST = (
    contract.STOPPED, contract.SIGTERM, contract.SIGINT, contract.SIGHUP, contract.REVOKED,
)  # fmt: skip
"""Somebody wanted the end."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What was asked for. ``delay`` and ``longest`` are ceilings of the first pause and of any, seconds."""

    max_attempts: int
    """Attempts in all, counted from attempt ``from_attempt``, which somebody started."""
    from_attempt: int
    delay: float
    longest: float
    notebook_errors: bool = False
    """Whether a notebook error is retried too."""

    def to_dict(self) -> dict[str, Any]:
        """As the record keeps it."""
        return asdict(self)


def policy_of(record: RunRecord) -> Policy | None:
    """What the record says, None if nobody asked for retries."""
    kept = record.retry
    if not kept or int(kept.get("max_attempts") or 1) < 2:
        return None
    return Policy(
        max_attempts=int(kept["max_attempts"]),
        from_attempt=int(kept.get("from_attempt") or 1),
        delay=float(kept.get("delay") or 0.0),
        longest=float(kept.get("longest") or 0.0),
        notebook_errors=bool(kept.get("notebook_errors")),
    )


@dataclass(frozen=True)
class Decision:
    """What follows the end of an attempt: a pause in seconds before the next one, or None and why."""

    pause: float | None
    why: str


def decide(
    record: RunRecord, policy: Policy, *, asked: str | None, draw: Callable[[], float] = random.random
) -> Decision:
    """Whether an ended attempt is followed by another. ``asked``: why somebody has asked for a stop."""
    made = record.attempt - policy.from_attempt + 1
    if record.state == contract.COMPLETED:
        return Decision(None, "the run is completed")
    if asked is not None or record.cause in BY_REQUEST:
        return Decision(None, f"somebody asked it to stop ({asked or record.cause})")
    pause = full_jitter(made, policy.delay, policy.longest, draw=draw)
    if record.cause == contract.DEADLINE:
        if not _has_agreed_time_left(record):
            return Decision(None, "its time is up, and nobody agreed to more (--budget would)")
        pause = 0.0
    elif record.cause == contract.NOTEBOOK_ERROR:
        if not policy.notebook_errors:
            return Decision(None, "a notebook error would come again (--retry-errors tries it all the same)")
    elif record.cause in (contract.BUDGET, contract.APPROVAL_REQUIRED):
        return Decision(None, "all the time that was agreed to is used up")
    elif record.cause not in RETRIED:
        return Decision(None, f"{record.cause} is not retried")
    if made >= policy.max_attempts:
        return Decision(None, f"{made} of {policy.max_attempts} attempts are made")
    return Decision(pause, f"attempt {record.attempt} ended: {record.cause}")


def _has_agreed_time_left(record: RunRecord) -> bool:
    """Whether all attempts together may take longer than what the ended one was given."""
    if (record.current.cap or {}).get("cause") == contract.DEADLINE:
        return False  # the end of a scheduler's job
    total = record.budget.get("seconds")
    return total is not None and float(total) - float(record.budget.get("used_seconds") or 0.0) > 0


# --- who retries ----------------------------------------------------------------------------------------


def write(
    folder: RunFolder,
    state: str,
    attempt: int,
    why: str | None = None,
    *,
    next_at: float | None = None,
) -> None:
    """What the retrier will do, for those who look; ``next_at`` is POSIX seconds. A full disk is no error."""
    value = {
        "schema": SCHEMA,
        "state": state,
        "attempt": attempt,
        "next_at": None if next_at is None else iso(next_at),
        "why": why,
        "retrier": identity(),
    }
    with contextlib.suppress(OSError):
        write_json(folder.retry, value, durable=False)


def is_pending(folder: RunFolder, record: RunRecord | None = None) -> bool:
    """Whether another attempt of an ended run will, or may, come by itself."""
    if record is None:
        try:
            record = store.load(folder)
        except (RunNotFound, ConfigurationError):
            return False
    if policy_of(record) is None:
        return False
    ended = record.state in (contract.INTERRUPTED, contract.FAILED) or needs_recovery(folder, record)
    return ended and not _said_over(folder, record) and retrier_lives(folder)


def retrier_lives(folder: RunFolder) -> bool:
    """Whether the process that would start the next attempt is there."""
    kept = _read(folder)
    who = kept.get("retrier")
    if isinstance(who, dict) and who.get("host") != socket.gethostname():
        try:
            return time.time() - folder.retry_lock.stat().st_mtime < LEASE_SECONDS
        except OSError:
            return False
    try:
        return is_locked(folder.retry_lock)
    except OSError:
        return is_alive(who)


def end_retrier(folder: RunFolder) -> None:
    """End the process that would start the next attempt, where nothing can be written for it to read."""
    who = _read(folder).get("retrier")
    if isinstance(who, dict) and is_alive(who):
        with contextlib.suppress(PermissionError):
            send_signal(int(who["pid"]), who["started"], signal.SIGTERM)


def beat(folder: RunFolder) -> None:
    """A sign of life for other machines."""
    with contextlib.suppress(OSError):
        os.utime(folder.retry_lock)


def shown(folder: RunFolder, record: RunRecord) -> dict[str, Any] | None:
    """What was asked for and what will happen, as ``grd status --json`` tells it; None without retries."""
    policy = policy_of(record)
    if policy is None:
        return record.retry
    made = record.attempt - policy.from_attempt + 1
    found = {**policy.to_dict(), "made": made, "state": WATCHING, "next_at": None, "why": None}
    if record.state == contract.COMPLETED:
        return {**found, "state": OVER, "why": "the run is completed"}
    if record.state in (contract.QUEUED, contract.RUNNING):
        return found
    lives = retrier_lives(folder)
    kept = _read(folder)  # after that look: it says that it gives up before it ends
    if kept.get("state") == OVER and kept.get("attempt") == record.attempt:
        return {**found, "state": OVER, "why": kept.get("why")}
    if not lives:
        return {**found, "state": LOST, "why": "the process that would retry is gone"}
    if kept.get("state") == WAITING and kept.get("attempt") == record.attempt:
        return {**found, "state": WAITING, "next_at": kept.get("next_at"), "why": kept.get("why")}
    return found


def comes(told: dict[str, Any] | None) -> bool:
    """Whether what `shown` tells of an ended run is that another attempt will come, or may."""
    return told is not None and told.get("state") in (WAITING, WATCHING)


def text(told: dict[str, Any] | None) -> str | None:
    """A line for people; None where nothing needs to be said."""
    if not told or "state" not in told:
        return None
    made, of = told["made"], told["max_attempts"]
    if told["state"] == WAITING:
        when = _seconds_until(told["next_at"])
        soon = "now" if when <= 0 else f"in {format_duration(max(1.0, when))}, at {told['next_at']}"
        return f"attempt {made + 1} of {of} starts by itself {soon}; grd stop prevents it"
    if told["state"] == OVER:
        return None if told["why"] == "the run is completed" else f"none follows: {told['why']}"
    if told["state"] == LOST:
        return f"none follows by itself: {told['why']}; attempt {made} of {of} was the last"
    return f"this is attempt {made} of {of}"


def _said_over(folder: RunFolder, record: RunRecord) -> bool:
    kept = _read(folder)
    return kept.get("state") == OVER and kept.get("attempt") == record.attempt


def _read(folder: RunFolder) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        value = read_json(folder.retry)
        if isinstance(value, dict):
            return value
    return {}


def _seconds_until(moment: str | None) -> float:
    return 0.0 if moment is None else datetime.fromisoformat(moment).timestamp() - time.time()
