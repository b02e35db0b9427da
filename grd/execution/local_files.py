"""papermill's local files, written atomically, and not twice, once our engine is in use."""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from grd.files import atomic_write, write_pieces
from grd.runs.notebook_file import NotebookFile

_CANNOT_RENAME = (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS)


def write_file(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Replace ``path`` atomically, or in place where a rename cannot be (a bind-mounted file, a folder that
    takes no new files); pipes and devices are just written to. Pieces are gone through again for that: an
    iterator will not do. Raises OSError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            _write_in_place(path, data)
            return
    except FileNotFoundError:
        pass
    try:
        atomic_write(path, data)
    except OSError as error:
        if error.errno not in _CANNOT_RENAME or not os.access(path, os.W_OK):
            raise
        _write_in_place(path, data)


def _write_in_place(path: Path, data: bytes | Iterable[bytes]) -> None:
    with open(path, "wb") as stream:
        write_pieces(stream, data)


class AtomicLocalHandler:
    """papermill's handler of local paths with an atomic write; reading and the rest are the original's.

    Wraps the original, whose remembered working folder papermill sets and resets around an execution: it
    may be in the middle of one when this handler takes its place.
    """

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def resolve(self, path: str) -> Path:
        """Where a write to ``path`` goes."""
        return Path(getattr(self._original, "_cwd", None) or Path.cwd(), path)

    def write(self, text: str, path: str) -> None:
        """Write a notebook. Raises FileNotFoundError, as papermill's does, if the folder is missing."""
        target = self.resolve(path)
        if not target.parent.is_dir():
            raise FileNotFoundError(f"output folder {os.path.dirname(path)} doesn't exist.")  # noqa: PTH120
        write_file(target, text.encode("utf-8"))


def install() -> None:
    """Put the atomic handler in the place of papermill's local one, once per process.

    A `papermill.io` entry point named ``local`` would never win: papermill takes the oldest match. A handler
    that somebody else has put in its place stays, and is written to as a remote store is.
    """
    import papermill.execute
    from papermill.iorw import LocalHandler, papermill_io

    for index, (scheme, handler) in enumerate(papermill_io._handlers):
        if scheme == "local" and getattr(type(handler), "write", None) is LocalHandler.write:
            papermill_io._handlers[index] = (scheme, AtomicLocalHandler(handler))
            papermill.execute.write_ipynb = _last_write(papermill.execute.write_ipynb)


def _last_write(original: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """papermill's write of the executed notebook, without a second copy of it in memory or on the disk.

    The engine has usually saved the very same bytes: then there is nothing to write. Other places than
    regular local files are the original's.
    """

    @functools.wraps(original)
    def write_ipynb(nb: Any, path: Any) -> None:
        target = local_target(path) if isinstance(path, str) else None
        if target is None or not target.parent.is_dir():
            original(nb, path)
            return
        file = NotebookFile(nb)
        if not file.is_stored_in(target):
            write_file(target, file)

    return write_ipynb


def local_target(output_path: str | None) -> Path | None:
    """The regular local file that ``output_path`` names, or None (remote, stdout, a pipe, nothing).

    Raises IsADirectoryError, as papermill's first write does.
    """
    if output_path is None:
        return None
    from papermill.iorw import papermill_io

    handler = papermill_io.get_handler(output_path)
    if not isinstance(handler, AtomicLocalHandler):
        return None
    target = handler.resolve(output_path)
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), output_path)
    return target if stat.S_ISREG(mode) else None


def is_remote(output_path: str) -> bool:
    """Whether ``output_path`` is a place that holds whole notebooks: no local path, and no stream."""
    from papermill.iorw import StreamHandler, papermill_io

    return not isinstance(papermill_io.get_handler(output_path), AtomicLocalHandler | StreamHandler)
