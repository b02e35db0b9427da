"""Files that stay whole: atomic replacement, JSON lines, advisory locks, and what ships with grd."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from grd.errors import ConfigurationError

# --- atomic replacement --------------------------------------------------------------------------------


def fsync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable; silently skipped where folders cannot be synced."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def atomic_write(path: Path, data: bytes | str | Iterable[bytes], *, durable: bool = True) -> None:
    """Replace the content of ``path`` so that a reader or a crash sees the old bytes or the new, never a mix.

    ``data`` may come in pieces, which are written one by one. Symbolic links are kept (their target is
    replaced), and so are the mode of an existing file and, where this process may give files away, its owner
    and group. A hard link is not: the file's other names keep the old content. ``durable`` adds fsync of file
    and folder. Raises OSError; then the old file is untouched and no temporary file stays.
    """
    path = Path(path)
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    try:
        old = target.stat()
    except FileNotFoundError:
        old = None
    # Not by mkstemp: reading the umask for a new file's mode changes it for all threads for a moment.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o666 if old is None else 0o600)
    try:
        with os.fdopen(fd, "wb") as stream:
            write_pieces(stream, data)
            stream.flush()
            if old is not None:
                _take_over(stream.fileno(), old)
            if durable:
                os.fsync(stream.fileno())
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        fsync_folder(target.parent)


def _take_over(fd: int, old: os.stat_result) -> None:
    """Owner and group of a file that is being replaced, where they can be had, and then its mode."""
    new = os.fstat(fd)
    if new.st_uid != old.st_uid:
        with contextlib.suppress(OSError):
            os.fchown(fd, old.st_uid, -1)
    if new.st_gid != old.st_gid:
        with contextlib.suppress(OSError):
            os.fchown(fd, -1, old.st_gid)
    os.fchmod(fd, stat.S_IMODE(old.st_mode))  # last: a change of owner clears bits of it


def write_pieces(stream: BinaryIO, data: bytes | str | Iterable[bytes]) -> None:
    """Write ``data``, whole or in pieces, to ``stream``. Raises OSError."""
    if isinstance(data, (bytes, str)):
        stream.write(data.encode("utf-8") if isinstance(data, str) else data)
        return
    for piece in data:
        stream.write(piece)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """`atomic_write` of ``value`` as indented JSON with a final newline."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(path, encode_json(text), durable=durable)


def encode_json(text: str) -> bytes:
    """JSON as UTF-8. Surrogates, which stand for bytes of names that are no UTF-8, become escapes of JSON."""
    return text.encode("utf-8", "backslashreplace")


def read_json(path: Path) -> Any:
    """The value stored in ``path``; raises OSError or ValueError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


# --- JSON lines ------------------------------------------------------------------------------------------


class JsonLines:
    """Append-only writer of one JSON object a line, shared by any number of processes.

    Each record is a single write() to an O_APPEND descriptor, so that lines of several writers never mix.
    A torn last line (a writer died in mid-write, a disk filled up) is ended first, so that it spoils
    nothing but itself; another writer's too, whenever it died.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def append(self, record: dict[str, Any], *, alone: bool = False) -> None:
        """Write one record. Raises OSError, and ValueError for what JSON cannot hold.

        Where a disk fills up in the midst of it, half a line stays; ``alone``, which says that nobody else
        writes to the file, takes it back.
        """
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str)
        data = encode_json(line) + b"\n"
        if self._ends_torn():
            data = b"\n" + data
        written = os.write(self._fd, data)
        if written != len(data):
            if alone:
                os.ftruncate(self._fd, os.lseek(self._fd, 0, os.SEEK_CUR) - written)
            raise OSError(errno.ENOSPC, "the line was written in part", str(self.path))

    def append_bytes(self, lines: bytes | bytearray) -> None:
        """Write whole, newline-terminated lines that were encoded before. Raises OSError."""
        view = memoryview(b"\n" + lines if self._ends_torn() else lines)
        while view:
            view = view[os.write(self._fd, view) :]

    def _ends_torn(self) -> bool:
        # Of a line that another writer is just now writing too: the empty line that makes is no record.
        size = os.fstat(self._fd).st_size
        return size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"

    def sync(self) -> None:
        """fsync what was appended."""
        os.fsync(self._fd)

    def size(self) -> int:
        """Bytes in the file now: the position a reader continues from."""
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        """Close the descriptor; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_json_lines(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield ``(offset after the line, record)`` from byte ``offset`` on.

    A last line without newline is not yet written and is left for the next call; lines that are no JSON
    object are skipped. A missing file has no records. A file shorter than ``offset`` was restarted: it is
    read from its beginning.
    """
    if not Path(path).exists():
        return
    with open(path, "rb") as stream:
        if offset > os.fstat(stream.fileno()).st_size:
            offset = 0
        stream.seek(offset)
        for line in stream:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield offset, record


# --- locks -------------------------------------------------------------------------------------------------


def open_lock_file(path: Path) -> int:
    """``path`` as a descriptor that no other process gets, made where it is missing.

    Never one of the first three, which a process without stdin has free: whoever inherits the lock has
    streams of its own there.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    return above_the_streams(fd)


def above_the_streams(fd: int) -> int:
    """``fd``, or in its place another one above stdin, stdout and stderr. Raises OSError if there is none."""
    if fd > 2:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


def take_lock(path: Path, *, wait_seconds: float = 0.0, inheritable: bool = False) -> int | None:
    """An exclusive flock on ``path`` as an open descriptor, or None if another process holds it.

    The lock lives as long as the open file description: it is handed to a child by inheriting the
    descriptor, and freed by the death of the last holder. Raises OSError where files cannot be locked.
    """
    fd = open_lock_file(path)
    give_up = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= give_up:
                os.close(fd)
                return None
            time.sleep(0.02)
        except OSError:
            os.close(fd)
            raise
        else:
            os.set_inheritable(fd, inheritable)
            return fd


LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
"""What flock answers on file systems that have none."""


def is_locked(path: Path) -> bool:
    """Whether some process holds `take_lock` on ``path``; never creates or takes it.

    Probes with a shared lock: two exclusive probes at once would each call a free lock held. Raises
    OSError where files cannot be locked.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


# --- what ships with grd ----------------------------------------------------------------------------------


def shipped_file(relative: str) -> Path:
    """Path of a file under ``templates/`` or ``notebooks/``: the checkout's first, then the package's.

    An editable install has them only in the checkout, a wheel only inside the package.
    """
    package = Path(__file__).resolve().parent
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / relative).is_file():
        return checkout / relative
    if (package / relative).is_file():
        return package / relative
    raise ConfigurationError(f"grd's own file {relative} is missing: reinstall grd-notebooks")
