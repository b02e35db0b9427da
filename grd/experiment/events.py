"""Event lines from the notebook to whoever follows the run; harmless where nobody does."""

from __future__ import annotations

import os
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from grd import contract
from grd.files import JsonLines

_lock = threading.Lock()
_writer: JsonLines | None = None
_writer_path = ""
_told_of_failure = False


def attempt_number() -> int:
    """The attempt this process belongs to; 1 outside a run of grd."""
    try:
        return max(1, int(os.environ.get(contract.ENV_ATTEMPT, "1")))
    except ValueError:
        return 1


def run_id() -> str | None:
    """The run this process belongs to, or None outside a run of grd."""
    return os.environ.get(contract.ENV_RUN_ID) or None


def emit(kind: str, **fields: Any) -> None:
    """Append one event to the file named by GRD_EVENTS; without it, nothing happens.

    Never raises: a full disk must not end a training. The first failure is told in one warning.
    """
    path = os.environ.get(contract.ENV_EVENTS)
    if not path:
        return
    global _writer, _writer_path, _told_of_failure
    record = {
        "v": contract.EVENT_VERSION,
        "t": time.time(),
        "pid": os.getpid(),
        "attempt": attempt_number(),
        "kind": kind,
        **fields,
    }
    try:
        with _lock:
            if _writer is None or _writer_path != path:
                if _writer is not None:
                    _writer.close()
                _writer, _writer_path = None, path
                _writer = JsonLines(Path(path))
            _writer.append(record)
    except (OSError, ValueError) as error:
        if not _told_of_failure:
            _told_of_failure = True
            warnings.warn(f"grd: events cannot be written to {path}: {error}", RuntimeWarning, stacklevel=2)
