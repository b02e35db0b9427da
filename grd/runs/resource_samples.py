"""What the samples of an attempt say: the newest of them, while it runs and when its runner was killed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from grd.files import read_json_lines

TAIL_BYTES = 65536
NOW_ONLY = ("t", "gpu_now", "host")
"""What a sample says of its moment, and not of the attempt so far."""


def newest(path: Path) -> dict[str, Any] | None:
    """The last whole line of ``path``; None where there is none."""
    found = None
    with contextlib.suppress(OSError):
        start = max(0, path.stat().st_size - TAIL_BYTES)  # amid a line, which is then no record
        for _, record in read_json_lines(path, start):
            found = record
    return found


def of_lost_attempt(path: Path) -> dict[str, Any] | None:
    """What is known of an attempt whose runner could not sum it up."""
    found = newest(path)
    if found is None:
        return None
    return {name: value for name, value in found.items() if name not in NOW_ONLY} | {"complete": False}
