"""Asking a run to stop, from any process that can write its folder."""

from __future__ import annotations

import json
import time

from grd.files import atomic_write
from grd.runs import recovery
from grd.runs.folder import RunFolder


def ask_to_stop(folder: RunFolder, reason: str, *, at_once: bool = False) -> None:
    """Leave the request where runner and notebook look for it. ``at_once`` kills without a grace.

    Raises OSError.
    """
    request = {"reason": reason, "now": at_once, "t": time.time()}
    atomic_write(folder.stop_file, json.dumps(request) + "\n", durable=False)
    if at_once:
        recovery.end_at_once(folder)  # nobody reads the request where only the guardian is left


def forget_request(folder: RunFolder) -> None:
    """Before a new attempt: what stopped the last one must not stop this one."""
    folder.stop_file.unlink(missing_ok=True)
