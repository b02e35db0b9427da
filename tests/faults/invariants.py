"""What must hold after any fault at any moment."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import psutil
from conftest import Project, wait_until

from grd.files import is_locked
from grd.runs import notebook_journal


@dataclass(frozen=True)
class Before:
    """What was known of a run when the fault struck."""

    run: Path
    processes: list[psutil.Process]
    said: list[str]
    """What the notebook had said so long before that it must be on disk."""


def known_processes(project: Project, children: list[psutil.Process]) -> list[psutil.Process]:
    """Runner, kernel, guardian, watcher, as far as there are any, and what the notebook started."""
    record = project.record()
    found = list(children)
    for who in (record["runner"], *record["processes"].values()):
        with contextlib.suppress(psutil.NoSuchProcess, TypeError):
            found.append(psutil.Process(who["pid"]))
    return found


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Which are still there; psutil compares start times, so that a reused pid is nobody's."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def nothing_is_alive(project: Project, before: Before) -> None:
    """No process of the run, known before or found by its mark."""
    wait_until(lambda: not living(before.processes), "the end of every process that was known", 10)
    wait_until(lambda: project.processes() == [], "the end of every process that carries the mark", 10)


def nothing_is_locked(run: Path) -> None:
    """No lock of the run is held."""
    for lock in run.glob("*.lock"):
        assert not is_locked(lock), f"{lock.name} is held"


def record_and_events_agree(project: Project, run: Path, state: str, causes: set[str]) -> dict[str, Any]:
    """``grd status``, run.json, events and the listing tell the same end; returns it."""
    shown = project.grd("status", run.name, "--json").json
    assert shown["state"] == state and shown["cause"] in causes, (
        shown["state"],
        shown["cause"],
        shown["detail"],
    )
    assert shown["resumable"] and shown["resume_command"]
    assert shown == project.record(run), "status and run.json disagree"
    last = [event for event in project.events(run) if event["kind"] == "state"][-1]
    assert (last["state"], last["cause"]) == (shown["state"], shown["cause"]), "events and run.json disagree"
    listed = {row["run_id"]: row["state"] for row in project.grd("list", "--json").json["runs"]}
    assert listed[run.name] == shown["state"], "list and run.json disagree"
    return shown


def notebook_is_whole(run: Path, before: Before, *, cells_ran: bool) -> None:
    """The newest attempt's notebook, with its journal: valid, with every older output, cells as they were."""
    attempt = run / "attempts" / "1"
    output = attempt / "output.ipynb"
    if not output.exists():
        assert not cells_ran, "there is no notebook"
        return
    rebuilt = notebook_journal.rebuild(output, attempt / "journal.jsonl")
    notebook = nbformat.reads(json.dumps(notebook_journal.mark_lost(rebuilt)), as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    statuses = [cell.metadata.papermill.status for cell in cells]
    assert statuses[-1] == "pending", f"a cell that never ran is called {statuses[-1]}"
    if cells_ran:
        assert statuses[-2] in ("interrupted", "failed"), statuses
        assert "completed" in statuses[:-2]
    text = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    missing = [line for line in before.said if f"{line}\n" not in text]
    assert not missing, f"{len(missing)} of {len(before.said)} outputs are lost, such as {missing[0]!r}"


def no_scraps(run: Path) -> None:
    """No temporary file is left in the run's folder."""
    scraps = [path for path in run.rglob("*") if path.name.endswith(".tmp")]
    assert not scraps, scraps
