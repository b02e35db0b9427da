"""Whether a run's runner lives: never "running" of a dead one.

Same host: the runner holds runner.lock for its whole life, and the kernel of the operating system frees it
at its death. Another host, or a file system without flock: the heartbeat's age.
"""

from __future__ import annotations

import socket
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


class Liveness(Enum):
    """What was seen of the runner."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"


def probe(folder: RunFolder, record: RunRecord) -> Liveness:
    """Look once, without waiting."""
    here = record.runner is None or record.runner.get("host") == socket.gethostname()
    if here:
        try:
            return Liveness.ALIVE if is_locked(folder.lock) else Liveness.DEAD
        except OSError:
            if record.runner is not None:
                return Liveness.ALIVE if is_alive(record.runner) else Liveness.DEAD
    try:
        age = time.time() - folder.heartbeat.stat().st_mtime
    except OSError:
        return Liveness.UNKNOWN
    return Liveness.ALIVE if age < LEASE_SECONDS else Liveness.DEAD


def needs_recovery(folder: RunFolder, record: RunRecord) -> bool:
    """Whether the record still says queued or running though nobody works on it."""
    if record.state not in (contract.QUEUED, contract.RUNNING):
        return False
    return probe(folder, record) is Liveness.DEAD
