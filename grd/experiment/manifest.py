"""``manifest.jsonl``: what was written into a checkpoint folder, by whom, and what its bytes were."""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import xxhash

from grd.experiment.events import attempt_number, run_id
from grd.files import JsonLines

MANIFEST_NAME = "manifest.jsonl"
_CHECKSUM = "line_xxh3_64"

_process: tuple[int, str] = (0, "")


def process_id() -> str:
    """A name for this very process, which no later process with the same pid shares."""
    global _process
    if _process[0] != os.getpid():
        _process = (os.getpid(), f"{os.getpid()}-{uuid.uuid4().hex[:12]}")
    return _process[1]


def process_start(pid: int) -> str:
    """When ``pid`` was started, in clock ticks since boot; empty if there is none, or it cannot be known."""
    with suppress(OSError, IndexError):
        # The command's name may hold spaces and brackets: the fields start after the last one.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    return ""


def host_id() -> str:
    """A name for the place where this process's pid means something: host, boot and pid namespace."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return str(xxhash.xxh3_64_hexdigest("|".join(parts).encode()))[:8]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One version of one file. ``epoch`` is the last completed one; ``step`` counts inside the next.

    ``seconds`` is what saving it took, ``stall_seconds`` how long the training stood still if that is less,
    ``work_seconds`` how long before it the save before in this process was, or the training began, ``stop``
    the stop request it was written for; each None where not known.
    """

    name: str
    size: int
    xxh3_128: str
    epoch: int
    step: int | None
    loss: float | None
    lineage: int
    attempt: int
    run_id: str | None
    process: str
    format: str
    total_epochs: int | None
    t: float
    seconds: float | None = None
    stall_seconds: float | None = None
    work_seconds: float | None = None
    stop: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether this attempt wrote it; by hand, an attempt is a process."""
        if self.process == process_id():
            return True
        return self.run_id is not None and (self.run_id, self.attempt) == (run_id(), attempt_number())


_FIELDS = frozenset(field.name for field in fields(Entry))


def _entry(record: dict[str, Any]) -> Entry | None:
    try:
        return Entry(
            name=str(record["name"]),
            size=int(record["size"]),
            xxh3_128=str(record["xxh3_128"]),
            epoch=int(record["epoch"]),
            step=None if record.get("step") is None else int(record["step"]),
            loss=None if record.get("loss") is None else float(record["loss"]),
            lineage=int(record.get("lineage", 1)),
            attempt=int(record.get("attempt", 1)),
            run_id=record.get("run_id"),
            process=str(record.get("process", "")),
            format=str(record.get("format", "")),
            total_epochs=None if record.get("total_epochs") is None else int(record["total_epochs"]),
            t=float(record.get("t", 0.0)),
            seconds=_number(record.get("seconds")),
            stall_seconds=_number(record.get("stall_seconds")),
            work_seconds=_number(record.get("work_seconds")),
            stop=None if record.get("stop") is None else str(record["stop"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


@dataclass(frozen=True)
class Lines:
    """What a manifest says: its entries, oldest first, and the numbers (from 1) of lines that are damaged."""

    entries: tuple[Entry, ...] = ()
    damaged: tuple[int, ...] = ()


def read_lines(folder: Path) -> Lines:
    """The manifest of ``folder``; empty where there is none or it cannot be read.

    A line is damaged if it is no entry, or not the one its checksum was made of. Lines of earlier versions
    have no checksum.
    """
    entries: list[Entry] = []
    damaged: list[int] = []
    with suppress(OSError):
        content = (folder / MANIFEST_NAME).read_bytes()
        for number, line in enumerate(content.split(b"\n"), 1):
            if not line.strip():
                continue
            entry = _entry_in(line)
            if entry is None:
                damaged.append(number)
            else:
                entries.append(entry)
    return Lines(tuple(entries), tuple(damaged))


def _entry_in(line: bytes) -> Entry | None:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    checksum = record.pop(_CHECKSUM, None)
    if checksum is None and not _FIELDS.issuperset(record):
        return None  # no earlier version had a field more: the checksum's own name is damaged
    if checksum is not None and checksum != _checksum(record):
        return None
    return _entry(record)


def _checksum(record: dict[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return str(xxhash.xxh3_64_hexdigest(text.encode("ascii")))


def read_entries(folder: Path) -> list[Entry]:
    """All entries, oldest first; empty where there is no manifest or it cannot be read."""
    return list(read_lines(folder).entries)


def by_name(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """``entries``, oldest first, by file name and newest first."""
    named: dict[str, list[Entry]] = {}
    for entry in reversed(tuple(entries)):
        named.setdefault(entry.name, []).append(entry)
    return named


def read_manifest(folder: Path) -> dict[str, list[Entry]]:
    """`read_entries` by file name, newest first."""
    return by_name(read_entries(folder))


def append_entry(folder: Path, entry: Entry) -> None:
    """Add a line with a checksum of its own, synced. Raises OSError."""
    record = asdict(entry)
    lines = JsonLines(folder / MANIFEST_NAME)
    try:
        lines.append({**record, _CHECKSUM: _checksum(record)}, alone=True)
        lines.sync()
    finally:
        lines.close()
