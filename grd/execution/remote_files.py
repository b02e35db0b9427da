"""Outputs that go to a store (S3, HTTP, ...): written there at the start and at the end of an execution.

What a notebook puts out in between lies in a copy on this machine until the store has taken the last version:
a process that is killed, or a store that refuses after hours of work, loses nothing.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import time
from pathlib import Path
from typing import Any

from papermill.iorw import papermill_io, write_ipynb
from papermill.log import logger

from grd.execution.saving import NotebookSaver
from grd.execution.unfinished import journal_beside
from grd.files import atomic_write
from grd.settings import state_dir


class StoreHandler:
    """papermill's handler of a store, with the local copies of what the store has not yet taken."""

    def __init__(self, original: Any) -> None:
        self._original = original
        self.copies: dict[str, Path] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def write(self, text: str, path: str) -> Any:
        """Write a notebook. Raises what the store raises, once the local copy holds it."""
        copy = self.copies.pop(path, None)
        if copy is None:
            return self._original.write(text, path)
        try:
            written = self._original.write(text, path)
        except Exception:
            atomic_write(copy, text)
            logger.error(f"{path} could not be written; the notebook is kept in {copy}")
            raise
        for leftover in (copy, journal_beside(copy)):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)
        return written


def keep(nb: Any, output_path: str) -> NotebookSaver | None:
    """Write ``nb`` to its store, and begin to save it in a local copy; None if that cannot be.

    Raises what the store raises: what cannot be written to fails now, not after the work.
    """
    write_ipynb(nb, output_path)
    name = (
        re.sub(r"[^\w.-]+", "-", output_path.split("?")[0].rstrip("/").rpartition("/")[2]) or "notebook.ipynb"
    )
    folder = state_dir() / "remote"
    copy = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}-{name}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        saver = NotebookSaver(
            json.loads(json.dumps(nb)),
            copy,
            journal_beside(copy),
            on_trouble=lambda error: _warn(copy, error),
        )
    except OSError as error:
        _warn(copy, error)
        return None
    logger.info(f"Kept until it is written: {copy}")
    _handler(output_path).copies[output_path] = copy
    return saver


def _warn(copy: Path, error: OSError) -> None:
    logger.warning(f"no copy of the notebook is kept while it runs: {copy}: {error}")


def _handler(output_path: str) -> StoreHandler:
    """Our handler for this store, put in the place of the one that papermill would use."""
    used = papermill_io.get_handler(output_path)
    if isinstance(used, StoreHandler):
        return used
    ours = StoreHandler(used)
    known = papermill_io._handlers
    known[:] = [(scheme, ours if handler is used else handler) for scheme, handler in known]
    return ours
