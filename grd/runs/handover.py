"""What whoever comes next must know: runs under way, resumable and failed, each with the next command.

The same grouping serves ``grd status`` and grd's marked section in ``.planning/STATE.md``, which belongs to
people: only that section is ever touched, and the file is made only where there is a ``.planning`` folder.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from grd import contract
from grd.errors import ReportError
from grd.files import take_lock
from grd.marked_section import write_section
from grd.runs import listing
from grd.runs.listing import Listed
from grd.runs.model import RunRecord
from grd.settings import find_project_root

SECTION = "runs"
LOCK_WAIT_SECONDS = 5.0
MOST_SHOWN = 20


@dataclass(frozen=True)
class Overview:
    """The runs of a project by what is to be done about them, newest first."""

    running: tuple[RunRecord, ...]
    resumable: tuple[RunRecord, ...]
    failed: tuple[RunRecord, ...]
    completed: int


def overview(records: Iterable[RunRecord]) -> Overview:
    """Group records; the order within a group stays."""
    everything = list(records)

    def having(*states: str) -> tuple[RunRecord, ...]:
        return tuple(record for record in everything if record.state in states)

    return Overview(
        running=having(contract.RUNNING, contract.QUEUED),
        resumable=having(contract.INTERRUPTED),
        failed=having(contract.FAILED),
        completed=len(having(contract.COMPLETED)),
    )


def overview_of(entries: list[Listed]) -> Overview:
    """The same for what was listed; what is completed is counted without being read."""
    completed = sum(entry.state == contract.COMPLETED for entry in entries)
    others = [entry for entry in entries if entry.state != contract.COMPLETED]
    found = overview(record for _, record in listing.records(others))
    return replace(found, completed=completed + found.completed)


def next_command(record: RunRecord) -> str:
    """What to type about this run."""
    return record.resume_command or f"grd status {record.run_id}"


def state_section(found: Overview, unread: Mapping[str, int] | None = None) -> str:
    """The Markdown of the section; ``unread`` has the numbers by state of older runs besides those found."""
    unread = unread or {}
    lines = ["## Runs", ""]
    groups = (
        ("Running", found.running, 0),
        ("Can be resumed", found.resumable, unread.get(contract.INTERRUPTED, 0)),
        ("Failed", found.failed, unread.get(contract.FAILED, 0)),
    )
    for title, records, older in groups:
        if not records:
            continue
        lines += [f"### {title}", ""]
        for record in records[:MOST_SHOWN]:
            because = f" ({record.cause})" if record.cause else ""
            lines.append(f"- `{record.run_id}` {record.state}{because}: `{next_command(record)}`")
        more = max(0, len(records) - MOST_SHOWN) + older
        if more:
            lines.append(f"- and {more} more: `grd list`")
        lines.append("")
    lines.append(f"{found.completed} completed: `grd list`")
    return "\n".join(lines)


def _newest(entries: list[Listed]) -> tuple[list[Listed], Counter[str]]:
    """Without those that failed or were interrupted and would not be shown, and how many these are: whoever
    writes the page while a thousand runs fail must not read a thousand records each time."""
    kept, seen, left_out = [], Counter[str](), Counter[str]()
    for entry in entries:
        seen[entry.state] += 1
        if entry.state in (contract.FAILED, contract.INTERRUPTED) and seen[entry.state] > MOST_SHOWN:
            left_out[entry.state] += 1
        else:
            kept.append(entry)
    return kept, left_out


PAGE_LOCK = ".state-page.lock"


def half_written_pages(planning: Path) -> Iterator[Path]:
    """What runners that were killed while they wrote STATE.md have left beside it; of dead ones only for
    who holds `PAGE_LOCK`."""
    yield from sorted(planning.glob(".STATE.md.*.tmp"))


def write_state_page(runs_dir: Path) -> bool:
    """Bring the section in the project's STATE.md up to date; False if there is no ``.planning`` folder.

    Raises ReportError if the page cannot be edited without damage, OSError if its lock cannot be taken.
    """
    planning = find_project_root(runs_dir) / ".planning"
    if not planning.is_dir():
        return False
    lock = take_lock(runs_dir / PAGE_LOCK, wait_seconds=LOCK_WAIT_SECONDS)
    if lock is None:
        raise ReportError("another runner has been writing STATE.md for long")
    try:
        for path in half_written_pages(planning):
            path.unlink(missing_ok=True)
        newest, unread = _newest(listing.list_all(runs_dir, keep_read=False))
        write_section(planning / "STATE.md", SECTION, state_section(overview_of(newest), unread))
    finally:
        os.close(lock)
    return True
