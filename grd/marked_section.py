"""One section of a text file that grd owns, between two HTML comments; every other byte is somebody else's.

Works on bytes: the file may have any encoding that contains ASCII, any line ends, a UTF-8 BOM, no final
newline. Nothing outside the markers is ever decoded or rewritten.
"""

from __future__ import annotations

import codecs
import os
import tempfile
from pathlib import Path

from grd.errors import ReportError
from grd.files import atomic_write

_WIDE_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32-LE begins as UTF-16-LE


def section_markers(name: str) -> tuple[str, str]:
    """The comments that open and close the section ``name``."""
    return f"<!-- grd:{name}:start -->", f"<!-- grd:{name}:end -->"


def find_section(content: bytes, name: str) -> tuple[int, int] | None:
    """Where the section stands: offsets from its start marker to behind its end marker, None if nowhere.

    Raises ReportError if a marker is there twice, without the other, or behind it: replacing anything then
    might destroy what a person wrote. So it does for text in which ASCII would be unreadable.
    """
    start, end = (marker.encode("ascii") for marker in section_markers(name))
    # Without a mark of their order, too: in their bytes every space and line end has zeros.
    if content.startswith(_WIDE_BOMS) or b"\0" in content:
        raise ReportError("it is UTF-16 or UTF-32 text, or no text; save it as UTF-8")
    starts, ends = content.count(start), content.count(end)
    if (starts, ends) == (0, 0):
        return None
    if starts > 1 or ends > 1:
        raise ReportError(f"it has more than one grd:{name} section; delete all markers but one pair")
    if starts == 0 or ends == 0:
        missing = section_markers(name)[0 if starts == 0 else 1]
        raise ReportError(f"the marker {missing} is missing; put it back, or delete the other one")
    first, last = content.index(start), content.index(end)
    if last < first:
        raise ReportError(f"the end marker of grd:{name} stands before its start; put them in order")
    return first, last + len(end)


def replace_section(content: bytes, name: str, body: str) -> bytes:
    """``content`` with the section ``name`` holding ``body``: replaced where it is, else appended.

    ``body`` has "\\n" line ends and none of the markers; it takes on the line ends of the text around it.
    Raises ReportError as `find_section` does, ValueError for a body that holds a marker.
    """
    start, end = section_markers(name)
    if start in body or end in body:
        raise ValueError(f"the body of the section {name} holds one of its own markers")
    place = find_section(content, name)
    before, after = (content, b"") if place is None else (content[: place[0]], content[place[1] :])
    around = before + after
    crlf = around.count(b"\r\n")
    newline = b"\r\n" if crlf > around.count(b"\n") - crlf else b"\n"
    text = f"{start}\n{body.strip(chr(10))}\n{end}".encode()
    section = text.replace(b"\n", newline)
    if place is not None:
        return before + section + after
    gap = b""
    if content and content != codecs.BOM_UTF8:
        gap = newline if content.endswith(b"\n") else newline * 2
    return content + gap + section + newline


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def check_target(path: Path) -> None:
    """Raise ReportError if no file can be written at ``path`` now, by making one there that has no name."""
    target = Path(os.path.realpath(path))
    try:
        if target.is_dir():
            raise ReportError(f"{path} is a folder; name a file in it")
        if target.exists() and not target.is_file():
            raise ReportError(f"{path} is no regular file; name another one")
        if target.exists() and not os.access(target, os.W_OK):
            # Replacing it would work, but whoever made it read-only did not want it changed.
            raise ReportError(f"{path} is write-protected; chmod u+w it, or name another file")
        folder = next(parent for parent in target.parents if os.path.lexists(parent))
        if not folder.is_dir():
            raise ReportError(f"{path} cannot be written: {folder} is no folder; name another file")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ReportError(f"{path} cannot be written: no permission in {folder}; name another file")
        try:
            # Some folders say that they can be written and take no file: those of /proc and /sys.
            tempfile.TemporaryFile(dir=folder, prefix=".grd-").close()
        except OSError as error:
            why = error.strerror or error
            raise ReportError(f"{path} cannot be written: {folder}: {why}; name another file") from None
    except OSError as error:
        raise ReportError(f"{path} cannot be reached: {error.strerror or error}; name another file") from None


def check_section(path: Path, name: str) -> None:
    """Raise ReportError if `write_section` could not write to ``path`` now; changes nothing.

    For callers that have work to do before they know what to write.
    """
    path = Path(path)
    check_target(path)
    try:
        find_section(_read(path), name)
    except ReportError as error:
        raise ReportError(f"{path} was left as it is: {error}") from None
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror or error}; name another file") from None


def write_section(path: Path, name: str, body: str) -> None:
    """Put ``body`` into the section ``name`` of the file, atomically; file and folders are made if missing.

    A symbolic link stays one, a hard link does not (see `atomic_write`). A file that would not change is not
    written. Raises ReportError with the file untouched.
    """
    path = Path(path)
    check_target(path)
    target = Path(os.path.realpath(path))
    try:
        content = _read(target)
        changed = replace_section(content, name, body)
        if changed != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(target, changed)
    except ReportError as error:
        raise ReportError(f"{path} was left as it is: {error}") from None
    except OSError as error:
        raise ReportError(
            f"{path} cannot be written: {error.strerror or error}; free the path or name another file"
        ) from None
