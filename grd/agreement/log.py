"""The log of agreements: append-only, each entry chained to the one before by its hash.

It lies in the user's state folder, readable by its owner only. The chain and the count kept beside it show
an entry that was edited or taken out, and an end that was cut off. That guards against accidents: who can
write the folder can write a whole new log.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grd.agreement.chain import FIRST, chain_of, hash_of
from grd.agreement.clock import Moment, after, now
from grd.errors import ResourceUnavailable
from grd.files import LOCKS_UNSUPPORTED, atomic_write, encode_json, fsync_folder, read_json, take_lock

LOCK_SECONDS = 5.0
RESTARTED = "restarted"
"""The kind of the first entry of a log that was begun in place of a damaged one."""
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
        """Every entry, checked. Never raises for what lies there: an unreadable log is a problem told.

        What seems wrong is looked at again with nobody writing: a log is replaced in more than one step.
        """
        found = self._look()
        if found.problem is None:
            return found
        try:
            with self._locked():
                return self._look()
        except (OSError, ResourceUnavailable):
            return found  # a folder that cannot be written has no lock to take

    def _look(self) -> Read:
        # The count first: entries that are added meanwhile are more than it says, never fewer.
        try:
            head = self._read_head()
            if self.path.stat().st_mode & _WRITABLE_BY_OTHERS:
                return Read((), f"{self.path} can be written by others; chmod 600 {self.path}")
            data = self.path.read_bytes()
        except FileNotFoundError:
            return Read((), f"{self.path} is gone, though it had entries" if head is not None else None)
        except OSError as error:
            return Read((), f"{self.path} cannot be read: {error.strerror}")
        entries, problem = chain_of(self.path).follow(data)
        return Read(entries, problem or self._against_head(entries, head))

    def append(self, kind: str, **values: Any) -> None:
        """Add an entry and make it durable. Raises ResourceUnavailable where that cannot be."""
        try:
            self.append_after(lambda entries: (kind, values))
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            helps = "make room there" if full else "make its folder writable"
            raise ResourceUnavailable(
                f"{self.path} cannot be written: {error.strerror or error}; {helps}"
            ) from None

    def append_after(
        self, look: Callable[[tuple[dict[str, Any], ...]], tuple[str, dict[str, Any]] | None]
    ) -> dict[str, Any] | None:
        """Add what ``look`` makes of all entries, with nobody writing in between; None if it makes nothing.

        Raises OSError where it cannot be written, and ResourceUnavailable for a damaged log.
        """
        with self._locked():
            found = self._look()
            if found.problem is not None:
                raise ResourceUnavailable(f"{found.problem}; see: grd approvals --verify")
            made = look(found.entries)
            return (
                None
                if made is None
                else self._write(found.entries, made[0], _moment_after(found.entries), made[1])
            )

    def restart(self) -> Path | None:
        """Put a damaged log aside and begin a new one that says so; returns where the old one lies.

        A log that is whole, or whole again, is left as it is: None. Raises ResourceUnavailable.
        """
        try:
            with self._locked():
                problem = self._look().problem
                return None if problem is None else self._replace(problem)
        except OSError as error:
            raise ResourceUnavailable(
                f"{self.path} cannot be replaced: {error.strerror or error}; make its folder writable"
            ) from None

    def _replace(self, problem: str) -> Path:
        moment = now()
        aside = self.path.with_name(f"approvals.damaged-{moment.wall:.0f}.jsonl")
        with contextlib.suppress(FileNotFoundError):
            self.path.replace(aside)
        self._head.unlink(missing_ok=True)
        self._write((), RESTARTED, moment, {"reason": problem, "previous": aside.name})
        return aside

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """With nobody else writing. Raises OSError, and ResourceUnavailable where somebody else is at it."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.ExitStack() as held:
            try:
                lock = take_lock(self._lock, wait_seconds=LOCK_SECONDS)
            except OSError as error:
                if error.errno not in LOCKS_UNSUPPORTED:
                    raise
            else:
                if lock is None:
                    raise ResourceUnavailable(f"{self.path} is being written by another process; try again")
                held.callback(os.close, lock)
            yield

    def _write(
        self, before: tuple[dict[str, Any], ...], kind: str, moment: Moment, values: Mapping[str, Any]
    ) -> dict[str, Any]:
        previous = before[-1]["hash"] if before else FIRST
        entry = {"n": len(before) + 1, "kind": kind, **moment.to_dict(), **values, "prev": previous}
        entry["hash"] = hash_of(entry)
        line = encode_json(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                line = b"\n" + line  # somebody died in the midst of a line
            try:
                if os.write(fd, line) != len(line):
                    raise OSError(errno.ENOSPC, "No space left on device")
                os.fsync(fd)
                if not before:
                    fsync_folder(self.path.parent)
                self._write_head(entry)
            except OSError:
                os.ftruncate(fd, size)  # nobody else writes, and what is told as failed must not count
                raise
        finally:
            os.close(fd)
        return entry

    def _write_head(self, entry: Mapping[str, Any]) -> None:
        """Keep the count beside the log. Raises OSError where there is none yet.

        An older one does where there is no room for this: the entry counts, and only that this one was cut
        off later would not be seen.
        """
        try:
            atomic_write(self._head, json.dumps({"n": entry["n"], "hash": entry["hash"]}))
        except OSError:
            if not self._head.exists():
                raise

    def _read_head(self) -> Any:
        """The count and the hash beside the log as they were written; None where there are none."""
        try:
            return read_json(self._head)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):
            return {}

    def _against_head(self, entries: tuple[dict[str, Any], ...], head: Any) -> str | None:
        if head is None:
            # written right after the first entry: whoever wrote that may have been killed before it
            return None if len(entries) <= 1 else f"{self._head.name}, the count of its entries, is gone"
        count = head.get("n") if isinstance(head, dict) else None
        if type(count) is not int or count < 0 or not isinstance(head.get("hash"), str):
            return f"{self._head.name} cannot be read"
        if len(entries) < count:
            return f"{self.path} was cut off: it had {count} entries and has {len(entries)}"
        if count and entries[count - 1]["hash"] != head["hash"]:
            return f"{self.path} was edited: entry {count} is another one"
        return None


def _moment_after(entries: tuple[dict[str, Any], ...]) -> Moment:
    """This moment, for an entry after ``entries``: no entry's time is before another's, so that a clock that
    was once ahead and is right again, and one that was set back, are counted on from where they were."""
    latest = max(reversed(entries), key=lambda entry: float(entry["t"]), default=None)
    return after(None if latest is None else Moment.from_dict(latest), now())
