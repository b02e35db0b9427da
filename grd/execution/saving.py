"""Saves the notebook while it runs: a journal line for each output, snapshots that cost no more than it.

papermill rewrites the whole notebook twice a cell, in place, in the thread that reads the kernel's messages.
Here that thread only queues entries. A writer thread appends them to the journal, applies them to its own
copy, and replaces the snapshot when the journal since the last one outweighs it: total bytes stay linear.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from grd.files import JsonLines, atomic_write
from grd.runs import notebook_journal
from grd.runs.notebook_file import NotebookFile
from grd.runs.notebook_journal import Notebook

FLUSH_SECONDS = 0.25
"""Entries wait at most this long in memory before they are in the journal."""

SYNC_SECONDS = 1.0
RETRY_SECONDS = 2.0
MIN_SNAPSHOT_BYTES = 64_000
LONG_JOURNAL_BYTES = 32_000_000
"""A journal longer than this, and than four snapshots, starts again: endless output must not fill a disk."""

APPEND_BYTES = 1_000_000
"""Lines are handed to the journal in pieces of about this size."""


class NotebookSaver:
    """Writes one notebook and its journal; ``on_trouble`` hears of the first error of a write.

    Raises OSError at once if the notebook cannot be written at all.
    """

    def __init__(
        self,
        notebook: Notebook,
        output: Path,
        journal: Path,
        *,
        write: Callable[[Path, Iterable[bytes]], None] = atomic_write,
        on_trouble: Callable[[OSError], None] | None = None,
    ) -> None:
        self.error: OSError | None = None
        self._notebook = notebook
        self._output = output
        self._journal = journal
        self._write = write
        self._on_trouble = on_trouble
        self._queue: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._snapshot_bytes = 0
        self._since_snapshot = 0
        self._hole_since: float | None = None
        self._lines: JsonLines | None = None
        self._part = 0
        self._journal_is_stale = False
        journal.unlink(missing_ok=True)
        self._snapshot()
        self._lines = JsonLines(journal)
        self._thread = threading.Thread(target=self._run, name="grd-saver", daemon=True)
        self._thread.start()

    def put(self, entry: dict[str, Any]) -> None:
        """Queue one journal entry; never blocks. The entry must not be changed afterwards."""
        self._queue.put(entry)

    def close(self) -> None:
        """Write what is queued, take the last snapshot, end the thread. Raises the OSError that lost data."""
        if self._lines is None:
            return
        self._ending.set()
        self._queue.put({})  # wakes the thread
        self._thread.join()
        try:
            self._snapshot()
        finally:
            self._lines.close()
            self._lines = None

    def discard_journal(self) -> None:
        """Remove the journal once the notebook itself holds everything."""
        with contextlib.suppress(OSError):
            self._journal.unlink(missing_ok=True)

    def _run(self) -> None:
        ended = False
        unsynced_since: float | None = None
        while not ended:
            entries, ended = self._take()
            if entries:
                self._append(entries)
                unsynced_since = unsynced_since or time.monotonic()
            if unsynced_since and time.monotonic() - unsynced_since >= SYNC_SECONDS:
                self._sync()
                unsynced_since = None
            if not ended and self._snapshot_is_due():
                try:
                    self._snapshot()
                except OSError as error:
                    self._since_snapshot = 0  # not at every output again: the journal holds it
                    self._trouble(error)

    def _take(self) -> tuple[list[dict[str, Any]], bool]:
        """What has gathered, and whether that was all: waits for a first entry, then lets others gather.

        It does not wait for each: being woken for every entry would cost the thread that reads the kernel's
        messages more than all the rest of saving.
        """
        entries: list[dict[str, Any]] = []
        with contextlib.suppress(queue.Empty):
            entries.append(self._queue.get(timeout=SYNC_SECONDS))
            self._ending.wait(FLUSH_SECONDS)
        ended = self._ending.is_set()  # before the rest is taken: nothing is put after it
        with contextlib.suppress(queue.Empty):
            while True:
                entries.append(self._queue.get_nowait())
        return [entry for entry in entries if entry], ended

    def _append(self, entries: list[dict[str, Any]]) -> None:
        lines = bytearray()
        for entry in entries:
            notebook_journal.apply(self._notebook, entry)
            line = json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
            lines += line.encode("utf-8", "backslashreplace") + b"\n"
            if len(lines) >= APPEND_BYTES:
                self._write_lines(lines)
                lines = bytearray()
        if lines:
            self._write_lines(lines)

    def _write_lines(self, lines: bytearray) -> None:
        self._since_snapshot += len(lines)
        if self._hole_since is not None or self._lines is None:
            return  # entries after a lost one would be applied to the wrong notebook: a snapshot first
        try:
            self._lines.append_bytes(lines)
        except OSError as error:
            self._hole_since = time.monotonic()
            self._trouble(error)

    def _snapshot_is_due(self) -> bool:
        if self._hole_since is not None:
            return time.monotonic() - self._hole_since >= RETRY_SECONDS
        return self._since_snapshot > max(self._snapshot_bytes, MIN_SNAPSHOT_BYTES)

    def _snapshot(self) -> None:
        if self._hole_since is not None:
            self._hole_since = time.monotonic()
        journal_bytes = self._lines.size() if self._lines is not None else 0
        long = journal_bytes > max(LONG_JOURNAL_BYTES, 4 * self._snapshot_bytes)
        start_again = long or self._journal_is_stale
        state = self._notebook["metadata"].setdefault("grd", {})
        state["journal_bytes"] = 0 if start_again else journal_bytes
        state["journal_part"] = self._part + start_again
        if state.get("complete"):
            del state["journal_bytes"], state["journal_part"]  # nothing comes after it
        try:
            file = NotebookFile(self._notebook)
            self._write(self._output, file)
        except BaseException:
            state["journal_bytes"], state["journal_part"] = journal_bytes, self._part
            raise
        self._snapshot_bytes = file.size
        self._since_snapshot = 0
        self._hole_since = None
        if start_again:
            self._restart_journal()

    def _restart_journal(self) -> None:
        """Replace the journal by an empty one, whose first line says which snapshots it goes with."""
        assert self._lines is not None
        self._part += 1
        self._journal_is_stale = True
        first = json.dumps({"op": notebook_journal.PART, "part": self._part}).encode() + b"\n"
        try:
            atomic_write(self._journal, first)
            lines = JsonLines(self._journal)
        except OSError as error:
            self._hole_since = time.monotonic()  # nothing goes into a journal that no snapshot knows
            self._trouble(error)
            return
        self._lines.close()
        self._lines = lines
        self._journal_is_stale = False

    def _sync(self) -> None:
        with contextlib.suppress(OSError):
            if self._lines is not None:
                self._lines.sync()

    def _trouble(self, error: OSError) -> None:
        first = self.error is None
        self.error = error
        if first and self._on_trouble is not None:
            self._on_trouble(error)
