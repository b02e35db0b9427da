"""Whether a run's runner lives: never "running" of a dead one.

Same host: the runner holds runner.lock for its whole life, and the kernel of the operating system frees it
at its death. Another host, or a file system without flock: the heartbeat's age.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from enum import Enum

from grd import contract
from grd.files import is_locked
from grd.runs.folder import RunFolder
from grd.runs.model import RunRecord
from grd.runs.processes import is_alive

HEARTBEAT_SECONDS = 5.0
LEASE_SECONDS = 60.0
"""A heartbeat older than this belongs to a runner that is gone, or cut off."""

START_SECONDS = 30.0
"""A runner that has not said anything after so long never will."""


class Liveness(Enum):
    """What was seen of the runner."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"


def probe(folder: RunFolder, record: RunRecord) -> Liveness:
    """Look once, without waiting."""
    if record.runner is not None and record.runner.get("host") != socket.gethostname():
        return _by_heartbeat(folder)
    try:
        return Liveness.ALIVE if is_locked(folder.lock) else Liveness.DEAD
    except OSError:
        return _without_lock(folder, record)


def heartbeat_age(folder: RunFolder) -> float | None:
    """Seconds since the runner's last sign of life, None if there was none.

    Both times are the file system's: a heartbeat written on another machine is compared with a file
    written now, so that two machines' clocks need not agree. On a read-only folder this clock must do.
    """
    try:
        beat = folder.heartbeat.stat().st_mtime
    except OSError:
        return None
    return max(0.0, _file_system_time(folder) - beat)


def _file_system_time(folder: RunFolder) -> float:
    with (
        contextlib.suppress(OSError),
        tempfile.TemporaryFile(dir=folder.path) as probe_file,  # without a name: a kill leaves nothing
    ):
        return os.fstat(probe_file.fileno()).st_mtime
    return time.time()


def _by_heartbeat(folder: RunFolder) -> Liveness:
    age = heartbeat_age(folder)
    if age is None:
        return Liveness.UNKNOWN
    return Liveness.ALIVE if age < LEASE_SECONDS else Liveness.DEAD


def _without_lock(folder: RunFolder, record: RunRecord) -> Liveness:
    """This host, but no flock: the very process of the record, or a start that is under way."""
    runner_is_of_this_attempt = record.state == contract.RUNNING
    if runner_is_of_this_attempt:
        return Liveness.ALIVE if is_alive(record.runner) else Liveness.DEAD
    with contextlib.suppress(OSError):
        if _file_system_time(folder) - folder.record.stat().st_mtime < START_SECONDS:
            return Liveness.ALIVE
    return Liveness.DEAD


def needs_recovery(folder: RunFolder, record: RunRecord) -> bool:
    """Whether the record still says queued or running though nobody works on it."""
    if record.state not in (contract.QUEUED, contract.RUNNING):
        return False
    return probe(folder, record) is Liveness.DEAD
