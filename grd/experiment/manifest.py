"""``manifest.jsonl``: what was written into a checkpoint folder, by whom, and what its bytes were."""

from __future__ import annotations

import os
import socket
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from grd.experiment.events import attempt_number, run_id
from grd.files import JsonLines, read_json_lines

MANIFEST_NAME = "manifest.jsonl"

_process: tuple[int, str] = (0, "")


def process_id() -> str:
    """A name for this very process, which no later process with the same pid shares."""
    global _process
    if _process[0] != os.getpid():
        _process = (os.getpid(), f"{os.getpid()}-{uuid.uuid4().hex[:12]}")
    return _process[1]


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
    """One version of one file. ``epoch`` is the last completed one; ``step`` counts inside the next."""

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

    @property
    def is_ours(self) -> bool:
        """Whether this attempt wrote it; by hand, an attempt is a process."""
        if self.process == process_id():
            return True
        return self.run_id is not None and (self.run_id, self.attempt) == (run_id(), attempt_number())


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
        )
    except (KeyError, TypeError, ValueError):
        return None


def read_manifest(folder: Path) -> dict[str, list[Entry]]:
    """Entries by file name, newest first; empty where there is no manifest or it cannot be read."""
    entries: dict[str, list[Entry]] = {}
    with suppress(OSError):
        for _, record in read_json_lines(folder / MANIFEST_NAME):
            entry = _entry(record)
            if entry is not None:
                entries.setdefault(entry.name, []).insert(0, entry)
    return entries


def append_entry(folder: Path, entry: Entry) -> None:
    """Add a line, synced. Raises OSError."""
    lines = JsonLines(folder / MANIFEST_NAME)
    try:
        lines.append(asdict(entry))
        lines.sync()
    finally:
        lines.close()
