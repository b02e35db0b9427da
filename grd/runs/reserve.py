"""Space that is kept from the start of an attempt on, so that its end can be told on a full disk."""

from __future__ import annotations

import contextlib

from grd.runs.folder import RunFolder

RESERVE_BYTES = 256 * 1024
"""More than run.json, metrics.json and a last event need."""


def take(folder: RunFolder) -> None:
    """Take the space, or what of it is not there yet. Raises OSError where there is too little; then none is
    kept."""
    with contextlib.suppress(OSError):
        if folder.reserve.stat().st_size == RESERVE_BYTES:
            return
    try:
        folder.reserve.write_bytes(b"\1" * RESERVE_BYTES)  # zeros may be stored as a hole
    except OSError:
        give_back(folder)
        raise


def give_back(folder: RunFolder) -> None:
    """Free the space for what is to be written now."""
    with contextlib.suppress(OSError):
        folder.reserve.unlink(missing_ok=True)
