"""The runs of a project as they truly are, thousands at once: what has ended is taken from the index.

Costs a stat of each run.json; only what is shown, has changed, or had not ended is read.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from grd import contract
from grd.errors import ConfigurationError, RunNotFound
from grd.runs import recovery, store
from grd.runs.folder import RunFolder, names_in
from grd.runs.index import Row, RunIndex, Stamp
from grd.runs.model import RunRecord

FEWEST_INDEXED = 100
"""So many runs are read before a database would be open."""


@dataclass(slots=True)
class Listed:
    """A run and its state; its record is read when it is asked for."""

    path: str
    state: str
    read: RunRecord | None = field(default=None, repr=False)
    """The record, where it had to be read to know the state."""

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(Path(self.path))

    def record(self) -> RunRecord:
        """The record as it truly is. Raises RunNotFound or ConfigurationError: it went meanwhile."""
        if self.read is None:
            self.read = recovery.current_record(self.folder)
            self.state = self.read.state
        return self.read


def list_all(runs_dir: Path, *, index: RunIndex | None = None, keep_read: bool = True) -> list[Listed]:
    """All runs in ``runs_dir``, newest first; a damaged record hides only its own run.

    ``index``: by default this host's. Without ``keep_read`` a record that had to be read to know the state is
    read again when it is asked for: a thousand of them take 10 MB.
    """
    stamps = _stamps(runs_dir)
    index = (index or RunIndex()) if len(stamps) >= FEWEST_INDEXED else None
    known = index.rows(runs_dir) if index is not None else {}
    prefix = f"{runs_dir}{os.sep}"
    found: list[Listed] = []
    learnt: dict[str, Row] = {}
    outdated = set(known)
    for name in sorted(stamps, reverse=True):
        row = known.get(name)
        if row is not None and row.stamp == stamps[name]:
            found.append(Listed(prefix + name, row.state))
            outdated.remove(name)
            continue
        with contextlib.suppress(ConfigurationError, RunNotFound):
            folder = RunFolder(runs_dir / name)
            read = store.load(folder)
            if read.state in contract.ENDED_STATES and read.schema == contract.SCHEMA_RUN:
                # Of the file before it was read: one that was replaced meanwhile is read again.
                learnt[name] = Row(stamps[name], read.state)
            record = recovery.current_record(folder, read)
            found.append(Listed(prefix + name, record.state, record if keep_read else None))
    outdated -= learnt.keys()
    if index is not None and (learnt or outdated) and index.note(runs_dir, learnt, outdated) and not known:
        index.forget_places()
    return found


def records(entries: list[Listed]) -> Iterator[tuple[RunFolder, RunRecord]]:
    """Folder and record of each, without those that went meanwhile."""
    for entry in entries:
        with contextlib.suppress(ConfigurationError, RunNotFound):
            yield entry.folder, entry.record()


def _stamps(runs_dir: Path) -> dict[str, Stamp]:
    stamps: dict[str, Stamp] = {}
    names = names_in(runs_dir)
    try:
        place = os.open(runs_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return stamps  # there is none, or it went meanwhile
    try:
        for name in names:
            try:  # as suppress() would, ten thousand times
                found = os.stat(name + "/run.json", dir_fd=place)
            except OSError:
                continue
            if stat.S_ISREG(found.st_mode):  # to read a pipe would never end
                stamps[name] = Stamp.of(found)
    finally:
        os.close(place)
    return stamps
