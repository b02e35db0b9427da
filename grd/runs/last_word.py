"""The end of an attempt that its runner could not write into the run's folder.

A folder that has become read-only, or a disk without a free block, would turn every true cause into "the
runner is gone". The record as it should be is kept in the user's state folder then, until recovery stores it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from grd.errors import ConfigurationError
from grd.files import read_json, write_json
from grd.runs.folder import RunFolder
from grd.runs.model import RunRecord
from grd.settings import state_dir


def keep(folder: RunFolder, record: RunRecord) -> bool:
    """Keep ``record`` for whoever looks at the run next; False if that could not be done either."""
    place = _place(folder)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, record.to_dict())
    except (OSError, ValueError):
        return False
    return True


def find(folder: RunFolder, record: RunRecord) -> RunRecord | None:
    """What the runner of ``record``, now gone, had to say of its end; None if nothing was kept."""
    with contextlib.suppress(OSError, ValueError, ConfigurationError):
        kept = RunRecord.from_dict(read_json(_place(folder)))
        if (kept.run_id, kept.attempt, kept.runner) == (record.run_id, record.attempt, record.runner):
            kept.folder = record.folder
            return kept
    return None


def forget(folder: RunFolder) -> None:
    """Once the record itself says it."""
    with contextlib.suppress(OSError):
        _place(folder).unlink(missing_ok=True)


def _place(folder: RunFolder) -> Path:
    return state_dir() / "ends" / f"{folder.run_id}.json"
