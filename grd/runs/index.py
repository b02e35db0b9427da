"""The index of runs: what each run.json said when it was last read, so that thousands are listed at once.

A cache and never the truth. It lies in the user's state folder, because SQLite's WAL needs a local disk and
one host (so each host has its own), may be deleted at any time, and is filled again from the run folders. A
row counts only while run.json is still the very file it was read from, and only for a run that had ended:
whether the others live has to be looked at anyway. Where the index cannot be opened, read or written, the
folders are read, and nobody hears of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grd import contract
from grd.settings import state_dir

if TYPE_CHECKING:
    import sqlite3

VERSION = 1
"""PRAGMA user_version: an older index is made anew, a newer one is left to the newer grd."""

LOOK_SECONDS = 0.5
"""How long somebody who only looks waits for others that write; then the index is done without."""

LONGEST_PAUSE_SECONDS = 0.02
"""Between two tries to write."""

UNUSED_DAYS = 90
"""Indexes of other hosts, such as containers that are gone, are removed once nobody wrote them so long."""

_TABLES = (
    "CREATE TABLE places (id INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE)",
    "CREATE TABLE runs (place INTEGER NOT NULL, name TEXT NOT NULL, mtime_ns INTEGER NOT NULL, "
    "ctime_ns INTEGER NOT NULL, size INTEGER NOT NULL, inode INTEGER NOT NULL, state TEXT NOT NULL, "
    "PRIMARY KEY (place, name)) WITHOUT ROWID",
)


class Stamp(NamedTuple):
    """Which file a run.json is: the record is only ever replaced, so another record is another file."""

    mtime_ns: int
    ctime_ns: int
    size: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        """The stamp of what ``os.stat`` found."""
        # An inode of a network file system may have 64 bits, an INTEGER of SQLite has 63 and a sign.
        return cls(found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino & (2**63 - 1))


class Row(NamedTuple):
    """What is remembered of a run that has ended."""

    stamp: Stamp
    state: str


def index_file() -> Path:
    """Where this host's index lies. Nothing is created by asking."""
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12]
    return state_dir() / "index" / f"{host}.sqlite3"


class RunIndex:
    """This host's index, opened for each call. No method raises for what is wrong with the index itself."""

    def __init__(self, path: Path | None = None, *, wait_seconds: float = LOOK_SECONDS) -> None:
        self.path = path or index_file()
        self._wait_seconds = wait_seconds

    def rows(self, runs_dir: Path) -> dict[str, Row]:
        """What is known of the runs in ``runs_dir`` by run id; nothing where there is no usable index."""
        if not (self.path.is_file() and _has_sqlite()):
            return {}
        import sqlite3

        try:
            with contextlib.closing(self._open()) as database:
                if _version(database) != VERSION:
                    return {}
                found = database.execute(
                    "SELECT name, mtime_ns, ctime_ns, size, inode, state FROM runs "
                    "WHERE place = (SELECT id FROM places WHERE path = ?)",
                    (_key(runs_dir),),
                )
                ended = contract.ENDED_STATES
                return {
                    name: Row(Stamp(mtime, ctime, size, inode), state)
                    for name, mtime, ctime, size, inode, state in found
                    if state in ended
                }
        except sqlite3.Error as error:
            self._after(error)
        except OSError:
            pass
        return {}

    def note(self, runs_dir: Path, rows: Mapping[str, Row], gone: Iterable[str] = ()) -> bool:
        """Remember ``rows`` by run id and forget ``gone``, in one transaction; False if that could not be.

        Rows of another state than an ended one are not kept.
        """
        if not _has_sqlite():
            return False
        import sqlite3

        forgotten = [(name,) for name in gone]
        values = [
            (name, *row.stamp, row.state)
            for name, row in rows.items()
            if row.state in contract.ENDED_STATES and name.isprintable()  # SQLite's text is UTF-8
        ]
        give_up, is_new = time.monotonic() + self._wait_seconds, False
        while True:
            try:
                is_new = is_new or not self.path.exists()
                self.path.parent.mkdir(parents=True, exist_ok=True)
                written = self._write(_key(runs_dir), values, forgotten)
                break
            except sqlite3.Error as error:
                # SQLite itself does not wait where a database is just turned to WAL, or its last user leaves.
                if not _is_busy(error) or time.monotonic() >= give_up:
                    self._after(error)
                    return False
                time.sleep(random.uniform(0.001, LONGEST_PAUSE_SECONDS))
            except OSError:
                return False
        if is_new and written:
            self._sweep()
        return written

    def _write(self, key: bytes, values: Sequence[tuple[Any, ...]], forgotten: Sequence[tuple[str]]) -> bool:
        """One transaction; False if the index is a newer grd's. Raises sqlite3.Error."""
        with contextlib.closing(self._open()) as database:
            # At once for writing: a reader that turns writer is refused without being waited for.
            database.execute("BEGIN IMMEDIATE")
            if not _prepare(database):
                return False
            place = _place(database, key)
            database.executemany(
                "INSERT OR REPLACE INTO runs (place, name, mtime_ns, ctime_ns, size, inode, state) "
                f"VALUES ({place}, ?, ?, ?, ?, ?, ?)",
                values,
            )
            database.executemany(f"DELETE FROM runs WHERE place = {place} AND name = ?", forgotten)
            database.execute("COMMIT")
        return True

    def forget_places(self) -> None:
        """Forget the runs of folders that are no longer there; whoever brings one back has it read again."""
        import sqlite3

        with contextlib.suppress(sqlite3.Error, OSError), contextlib.closing(self._open()) as database:
            if _version(database) != VERSION:
                return
            places = database.execute("SELECT id, path FROM places").fetchall()
            absent = [(number,) for number, path in places if not os.path.isdir(path)]  # noqa: PTH112
            if absent:
                database.execute("BEGIN IMMEDIATE")
                database.executemany("DELETE FROM runs WHERE place = ?", absent)
                database.executemany("DELETE FROM places WHERE id = ?", absent)
                database.execute("COMMIT")

    def delete(self) -> None:
        """Remove the index; it is filled again by whoever looks next. Never raises OSError."""
        for ending in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                self.path.with_name(self.path.name + ending).unlink(missing_ok=True)

    def _open(self) -> sqlite3.Connection:
        import sqlite3

        database = sqlite3.connect(self.path, timeout=self._wait_seconds, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")  # what a power failure takes is read again
        except BaseException:
            database.close()
            raise
        return database

    def _after(self, error: Exception) -> None:
        import sqlite3

        # Locked, read-only, no space: an OperationalError, and passes. The rest is damage, and stays.
        if not isinstance(error, sqlite3.OperationalError):
            self.delete()

    def _sweep(self) -> None:
        limit = time.time() - UNUSED_DAYS * 86400
        with contextlib.suppress(OSError):
            for path in self.path.parent.glob("*.sqlite3*"):
                if path.name.startswith(self.path.name):
                    continue
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime < limit:
                        path.unlink()


def _is_busy(error: sqlite3.Error) -> bool:
    import sqlite3

    primary = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest says more of why
    return primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)


def _has_sqlite() -> bool:
    """Some builds of Python come without it."""
    try:
        import sqlite3  # noqa: F401
    except ImportError:
        return False
    return True


def _key(runs_dir: Path) -> bytes:
    return os.fsencode(os.path.realpath(runs_dir))


def _version(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA user_version").fetchone()[0])


def _prepare(database: sqlite3.Connection) -> bool:
    found = _version(database)
    if found > VERSION:
        return False
    if found < VERSION:
        names: Sequence[tuple[str]] = database.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        ).fetchall()
        for (name,) in names:
            database.execute(f'DROP TABLE "{name}"')
        for statement in _TABLES:
            database.execute(statement)
        database.execute(f"PRAGMA user_version = {VERSION}")
    return True


def _place(database: sqlite3.Connection, path: bytes) -> int:
    database.execute("INSERT OR IGNORE INTO places (path) VALUES (?)", (path,))
    return int(database.execute("SELECT id FROM places WHERE path = ?", (path,)).fetchone()[0])
