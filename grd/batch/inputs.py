"""What a batch's runs read besides their parameters: each declared file or folder as one sha256."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Any

from grd.errors import NotFoundError, UsageError

_BLOCK_BYTES = 1 << 20


def sha256_of_input(path: Path) -> str:
    """Of a file, or of names and bytes of all files below a folder, also of those behind links.

    Raises NotFoundError, and UsageError for what is neither file nor folder, or cannot be read.
    """
    digest = hashlib.sha256()
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            _Folder(path, digest).add(found)
        else:
            _add_file(path, found, digest)
        return digest.hexdigest()
    except FileNotFoundError as error:
        if error.filename in (None, str(path)):
            raise NotFoundError(f"no input {path}") from None
        raise UsageError(f"input {path}: {error.filename} went while it was read; try again") from None
    except (OSError, ValueError) as error:
        which = getattr(error, "filename", None)
        where = "" if which in (None, str(path)) else f"{which}: "
        raise UsageError(
            f"input {path} cannot be read: {where}{getattr(error, 'strerror', None) or error}"
        ) from None


class _Folder:
    """Adds a folder to a digest. Each folder is read once, by whatever names it can be reached: links may
    lead back to where they are."""

    def __init__(self, path: Path, digest: Any) -> None:
        self._path = path
        self._digest = digest
        self._seen: dict[tuple[int, int], str] = {}

    def add(self, found: os.stat_result) -> None:
        """All of it. Raises OSError and UsageError."""
        todo = [("", found)]
        while todo:
            name, of_folder = todo.pop()
            same = self._seen.setdefault((of_folder.st_dev, of_folder.st_ino), name)
            if same != name:
                self._tell(f"{name}\0is {same}\0")
                continue
            below = []
            for path in sorted((self._path / name).iterdir()):
                inside = str(path.relative_to(self._path))
                there = self._look(path, inside)
                if there is None:
                    continue
                if stat.S_ISDIR(there.st_mode):
                    below.append((inside, there))
                    continue
                self._tell(f"{inside}\0")
                of_file = hashlib.sha256()
                _add_file(path, there, of_file)
                self._digest.update(of_file.digest())
            todo += reversed(below)

    def _look(self, path: Path, name: str) -> os.stat_result | None:
        """What is there; None for a link to nothing, of which its own text is all there is to read."""
        try:
            return path.stat()
        except FileNotFoundError:
            self._tell(f"{name}\0to {path.readlink()}\0")
            return None

    def _tell(self, text: str) -> None:
        self._digest.update(text.encode("utf-8", "surrogateescape"))


def _add_file(path: Path, found: os.stat_result, digest: Any) -> None:
    if not stat.S_ISREG(found.st_mode):  # reading a pipe or a device may never end
        raise UsageError(f"input {path} is neither a file nor a folder")
    with open(path, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
