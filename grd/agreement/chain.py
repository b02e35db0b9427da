"""The chain of a log's entries: each names the hash of the one before, so that a change to any shows."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grd.agreement.clock import Moment

FIRST = "0" * 64
"""What the first entry names as the one before."""


class Chain:
    """The entries of one log as far as this process has checked them, so that looking again is cheap.

    Of bytes that are the same as before only a digest is made; what follows them is parsed and checked. Bytes
    that are not the same are checked from the first on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: tuple[dict[str, Any], ...] = ()
        self._size, self._seen = 0, hashlib.sha256()

    def follow(self, data: bytes) -> tuple[tuple[dict[str, Any], ...], str | None]:
        """What `check` says of a log's bytes."""
        with self._lock:
            if hashlib.sha256(memoryview(data)[: self._size]).digest() != self._seen.digest():
                self._forget()
            whole = data.rfind(b"\n") + 1  # what follows the last line end may still be under way
            more = data[self._size : whole]
            entries, problem = check(more, self._entries)
            if problem is not None:
                return entries, problem
            self._entries, self._size = entries, whole
            self._seen.update(more)
            return check(data[whole:], entries)

    def _forget(self) -> None:
        self._entries = ()
        self._size, self._seen = 0, hashlib.sha256()


_chains: dict[Path, Chain] = {}


def chain_of(path: Path) -> Chain:
    """The chain of the log at ``path``, shared by all in this process that look at it."""
    return _chains.setdefault(path, Chain())


def check(
    data: bytes, before: tuple[dict[str, Any], ...] = ()
) -> tuple[tuple[dict[str, Any], ...], str | None]:
    """The entries ``before`` with those of a log's further bytes, up to the first that does not fit, and why
    it does not."""
    entries = list(before)
    previous = entries[-1]["hash"] if entries else FIRST
    for line in data.split(b"\n"):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                continue
            true_hash = hash_of(entry)
        except (ValueError, RecursionError):
            continue  # a line whose writer died; a real one that is missing breaks the chain
        number = len(entries) + 1
        fits = entry.get("n") == number and entry.get("prev") == previous and entry.get("hash") == true_hash
        if not fits:
            return tuple(entries), f"the log of agreements was edited at entry {number}"
        try:
            Moment.from_dict(entry)
        except (KeyError, TypeError, ValueError):
            return tuple(entries), f"entry {number} of the log of agreements has no time"
        previous = str(entry["hash"])
        entries.append(entry)
    return tuple(entries), None


def hash_of(entry: Mapping[str, Any]) -> str:
    """The hash that ``entry`` must have, over all else that it has."""
    body = {name: value for name, value in entry.items() if name != "hash"}
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
