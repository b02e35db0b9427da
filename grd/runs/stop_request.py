"""Asking a run to stop, from any process that can write its folder, or signal its runner."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from typing import Any

from grd.errors import ConfigurationError, ResourceUnavailable, RunNotFound
from grd.files import atomic_write
from grd.runs import recovery, retry, store
from grd.runs.folder import RunFolder
from grd.runs.processes import is_alive, send_signal


def ask_to_stop(folder: RunFolder, reason: str, *, at_once: bool = False) -> str | None:
    """Leave the request where runner and notebook look for it. ``at_once`` kills without a grace.

    Where the request finds no room (a full or read-only disk) the runner is sent SIGTERM instead; returns
    what was done then, for people. Raises ResourceUnavailable if the runner is out of reach too.
    """
    request = {"reason": reason, "now": at_once, "t": time.time()}
    instead = None
    try:
        atomic_write(folder.stop_file, json.dumps(request) + "\n", durable=False)
    except OSError as error:
        instead = _signal_runner(folder, error, at_once=at_once)
    if at_once:
        recovery.end_at_once(folder)  # nobody reads the request where only the guardian is left
    return instead


def _signal_runner(folder: RunFolder, error: OSError, *, at_once: bool) -> str:
    why = error.strerror or str(error)
    try:
        record = store.load(folder)
    except (RunNotFound, ConfigurationError):
        record = None
    if record is not None and retry.is_pending(folder, record):
        retry.end_retrier(folder)
        return f"{folder.run_id}: the request could not be written ({why}); its next attempt was called off"
    if record is None or not (
        _send(record.runner, signal.SIGTERM) or is_alive(record.processes.get("kernel"))
    ):
        raise ResourceUnavailable(
            f"{folder.run_id} cannot be asked to stop: {why}, and its runner is not on this machine"
        )
    if at_once:
        _send(record.processes.get("kernel"), signal.SIGKILL)
    return f"{folder.run_id}: the request could not be written ({why}); its runner was sent SIGTERM instead"


def _send(who: dict[str, Any] | None, signum: int) -> bool:
    """Signal the very process of an identity; False if it is not there."""
    if who is None or not is_alive(who):
        return False
    with contextlib.suppress(PermissionError):
        return send_signal(int(who["pid"]), who["started"], signum)
    return False


def forget_request(folder: RunFolder) -> None:
    """Before a new attempt: what stopped the last one must not stop this one."""
    folder.stop_file.unlink(missing_ok=True)
