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
    except (KeyError, TypeError, ValueError):
        return None


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def read_entries(folder: Path) -> list[Entry]:
    """All entries, oldest first; empty where there is no manifest or it cannot be read."""
    entries: list[Entry] = []
    with suppress(OSError):
        for _, record in read_json_lines(folder / MANIFEST_NAME):
            entry = _entry(record)
            if entry is not None:
                entries.append(entry)
    return entries


def read_manifest(folder: Path) -> dict[str, list[Entry]]:
    """`read_entries` by file name, newest first."""
    entries: dict[str, list[Entry]] = {}
    for entry in reversed(read_entries(folder)):
        entries.setdefault(entry.name, []).append(entry)
    return entries


def append_entry(folder: Path, entry: Entry) -> None:
    """Add a line, synced. Raises OSError."""
    lines = JsonLines(folder / MANIFEST_NAME)
    try:
        lines.append(asdict(entry))
        lines.sync()
    finally:
        lines.close()
