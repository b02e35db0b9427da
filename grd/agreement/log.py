"""The log of agreements: append-only, each entry chained to the one before by its hash.

It lies in the user's state folder, readable by its owner only. The chain and the count kept beside it show
an entry that was edited or taken out, and an end that was cut off. That guards against accidents: who can
write the folder can write a whole new log.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grd.agreement.clock import Moment, now
from grd.errors import ResourceUnavailable
from grd.files import LOCKS_UNSUPPORTED, atomic_write, fsync_folder, read_json, take_lock

LOCK_SECONDS = 5.0
FIRST = "0" * 64
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Read:
    """All entries as far as they can be trusted, and what is wrong with the rest; None if nothing is."""

    entries: tuple[dict[str, Any], ...]
    problem: str | None = None


class AgreementLog:
    """The log in ``folder``, which need not exist to be read."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "approvals.jsonl"
        self._head = folder / "approvals.head.json"
        self._lock = folder / "approvals.lock"

    def read(self) -> Read:
        """Every entry, checked. Never raises for what lies there: an unreadable log is a problem told."""
        try:
            if self.path.stat().st_mode & _WRITABLE_BY_OTHERS:
                return Read((), f"{self.path} can be written by others; chmod 600 {self.path}")
            data = self.path.read_bytes()
        except FileNotFoundError:
            return Read((), self._missing())
        except OSError as error:
            return Read((), f"{self.path} cannot be read: {error.strerror}")
        entries, problem = check(data)
        return Read(entries, problem or self._against_head(entries))

    def append(self, kind: str, **values: Any) -> None:
        """Add an entry and make it durable. Raises ResourceUnavailable where that cannot be."""
        try:
            self.append_after(lambda entries: (kind, values))
        except OSError as error:
            raise ResourceUnavailable(
                f"{self.path} cannot be written: {error.strerror or error}; make its folder writable"
            ) from None

    def append_after(
        self, look: Callable[[tuple[dict[str, Any], ...]], tuple[str, dict[str, Any]] | None]
    ) -> dict[str, Any] | None:
        """Add what ``look`` makes of all entries, with nobody writing in between; None if it makes nothing.

        Raises OSError where it cannot be written, and ResourceUnavailable for a damaged log.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = self._locked()
        try:
            found = self.read()
            if found.problem is not None:
                raise ResourceUnavailable(f"{found.problem}; see: grd approvals --verify")
            made = look(found.entries)
            return None if made is None else self._write(found.entries, made[0], now(), made[1])
        finally:
            if lock is not None:
                os.close(lock)

    def restart(self, reason: str) -> Path:
        """Put a damaged log aside and begin a new one that says so; returns where the old one lies."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = self._locked()
        moment = now()
        try:
            aside = self.path.with_name(f"approvals.damaged-{moment.wall:.0f}.jsonl")
            with contextlib.suppress(FileNotFoundError):
                self.path.replace(aside)
            self._head.unlink(missing_ok=True)
            self._write((), "restarted", moment, {"reason": reason, "previous": aside.name})
            return aside
        except OSError as error:
            raise ResourceUnavailable(f"{self.path} cannot be replaced: {error.strerror or error}") from None
        finally:
            if lock is not None:
                os.close(lock)

    def _locked(self) -> int | None:
        try:
            lock = take_lock(self._lock, wait_seconds=LOCK_SECONDS)
        except OSError as error:
            if error.errno in LOCKS_UNSUPPORTED:
                return None
            raise
        if lock is None:
            raise ResourceUnavailable(f"{self.path} is being written by another process; try again")
        return lock

    def _write(
        self, before: tuple[dict[str, Any], ...], kind: str, moment: Moment, values: Mapping[str, Any]
    ) -> dict[str, Any]:
        previous = before[-1]["hash"] if before else FIRST
        entry = {"n": len(before) + 1, "kind": kind, **moment.to_dict(), **values, "prev": previous}
        entry["hash"] = _hash(entry)
        line = (json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n").encode()
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                line = b"\n" + line  # somebody died in the midst of a line
            if os.write(fd, line) != len(line):
                raise OSError(28, "No space left on device")
            os.fsync(fd)
        finally:
            os.close(fd)
        if not before:
            fsync_folder(self.path.parent)
        atomic_write(self._head, json.dumps({"n": entry["n"], "hash": entry["hash"]}))
        return entry

    def _missing(self) -> str | None:
        if self._head.exists():
            return f"{self.path} is gone, though it had entries"
        return None

    def _against_head(self, entries: tuple[dict[str, Any], ...]) -> str | None:
        try:
            head = read_json(self._head)
            count, last = int(head["n"]), str(head["hash"])
        except FileNotFoundError:
            # written right after the first entry: whoever wrote that may have been killed before it
            return None if len(entries) <= 1 else f"{self._head.name}, the count of its entries, is gone"
        except (OSError, ValueError, KeyError, TypeError):
            return f"{self._head.name} cannot be read"
        if len(entries) < count:
            return f"{self.path} was cut off: it had {count} entries and has {len(entries)}"
        if count and entries[count - 1]["hash"] != last:
            return f"{self.path} was edited: entry {count} is another one"
        return None


def check(data: bytes) -> tuple[tuple[dict[str, Any], ...], str | None]:
    """The entries of a log's bytes up to the first that does not fit, and why it does not."""
    entries: list[dict[str, Any]] = []
    previous = FIRST
    for line in data.split(b"\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a line whose writer died; a real one that is missing breaks the chain
        if not isinstance(entry, dict):
            continue
        number = len(entries) + 1
        fits = (
            entry.get("n") == number and entry.get("prev") == previous and entry.get("hash") == _hash(entry)
        )
        if not fits:
            return tuple(entries), f"the log of agreements was edited at entry {number}"
        try:
            Moment.from_dict(entry)
        except (KeyError, TypeError, ValueError):
            return tuple(entries), f"entry {number} of the log of agreements has no time"
        previous = str(entry["hash"])
        entries.append(entry)
    return tuple(entries), None


def _hash(entry: Mapping[str, Any]) -> str:
    body = {name: value for name, value in entry.items() if name != "hash"}
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
