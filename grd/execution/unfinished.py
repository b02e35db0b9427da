"""Notebooks that papermill executes with our engine, outside of any run: who is at work, and what is left.

While it executes, a journal and a lock lie beside the output. Both go at its end; if papermill is killed they
stay, and the notebook of that execution is rebuilt by ``grd recover`` or by the next execution into the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grd import contract
from grd.errors import NotebookBusy, NotebookError, NotebookNotFound
from grd.execution.local_files import write_file
from grd.files import LOCKS_UNSUPPORTED, read_json, take_lock
from grd.runs import notebook_journal
from grd.runs.notebook_file import NotebookFile
from grd.runs.processes import boot_id, identity, is_alive

CLAIM_SECONDS = 1.0
"""An execution that is just ending, or somebody who recovers, is waited for so long."""


def journal_beside(output: Path) -> Path:
    """Where the journal of a notebook lies that belongs to no run."""
    return output.parent / f".{output.name}.grd-journal.jsonl"


def lock_beside(output: Path) -> Path:
    """Held by whoever writes the notebook and its journal; its text says who."""
    return output.parent / f".{output.name}.grd-lock"


class Claim:
    """The right to write one notebook and its journal; ``previous`` is whoever never gave it back."""

    def __init__(self, lock: Path, descriptor: int | None, previous: dict[str, Any] | None) -> None:
        self._lock = lock
        self._descriptor = descriptor
        self.previous = previous

    def release(self) -> None:
        """Give it back; twice does no harm."""
        lock, descriptor, self._descriptor = self._lock, self._descriptor, None
        if descriptor is None and (_writer(lock) or {}).get("pid") != os.getpid():
            return
        # Removed while it is held: whoever has opened it meanwhile sees that it is no longer there.
        with contextlib.suppress(OSError):
            lock.unlink()
        if descriptor is not None:
            os.close(descriptor)


def claim(output: Path, *, force: bool = False) -> Claim:
    """Take the right to write ``output``; ``force`` takes it from a process of another machine.

    Raises NotebookBusy if a living process has it, OSError if nothing can be written beside the notebook.
    """
    lock = lock_beside(output)
    give_up = time.monotonic() + CLAIM_SECONDS
    while True:
        try:
            descriptor = take_lock(lock, wait_seconds=max(0.0, give_up - time.monotonic()))
        except OSError as error:
            if error.errno not in LOCKS_UNSUPPORTED:
                raise
            return _claim_by_identity(output, lock, force)
        if descriptor is None:
            raise _busy(output, _writer(lock))
        if _is_still_there(lock, descriptor):
            break
        os.close(descriptor)  # its last holder has removed it: a lock that nobody else would meet
    previous = _writer(lock)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(identity()).encode(), 0)
    return Claim(lock, descriptor, previous)


def _claim_by_identity(output: Path, lock: Path, force: bool) -> Claim:
    """On file systems without flock: pid, start time and boot of the writer decide."""
    previous = _writer(lock)
    elsewhere = previous is not None and previous.get("host") != identity()["host"]
    if is_alive(previous) or (elsewhere and not force):
        raise _busy(output, previous)
    write_file(lock, json.dumps(identity()).encode())
    return Claim(lock, None, previous)


def _is_still_there(lock: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(lock.stat(), os.fstat(descriptor))
    return False


def _writer(lock: Path) -> dict[str, Any] | None:
    try:
        who = read_json(lock)
    except (OSError, ValueError):
        return None
    return who if isinstance(who, dict) and "pid" in who else None


def _busy(output: Path, who: dict[str, Any] | None) -> NotebookBusy:
    if who is None:
        return NotebookBusy(f"{output} is being written by another process; wait for its end and try again")
    pid, host = who["pid"], who.get("host")
    if host != identity()["host"]:
        return NotebookBusy(
            f"{output} is being written by process {pid} on {host}; wait for its end, or if it is gone: "
            f"grd recover {shlex.quote(str(output))} --force"
        )
    return NotebookBusy(
        f"{output} is being written by process {pid}; wait for its end, or stop it: kill -TERM {pid}"
    )


# --- what a killed execution left -----------------------------------------------------------------------


@dataclass(frozen=True)
class Recovered:
    """The notebook of a killed execution as it was when its last journal line was written."""

    notebook: notebook_journal.Notebook

    @property
    def grd(self) -> dict[str, Any]:
        """Its metadata: ``state``, ``cause``, ``detail`` and more."""
        state: dict[str, Any] = self.notebook["metadata"]["grd"]
        return state

    @property
    def cells(self) -> dict[str, int]:
        """Number of code cells by status."""
        return notebook_journal.count_cells(self.notebook)

    @property
    def outputs(self) -> int:
        """Number of outputs in all cells."""
        cells = self.notebook["cells"]
        return sum(len(notebook_journal.without_empty(cell.get("outputs", []))) for cell in cells)


def recover(output: Path, *, force: bool = False) -> Recovered | None:
    """Rebuild the notebook of a killed execution in its place and remove its journal; None if there is none.

    Raises NotebookNotFound, NotebookError if the file is no notebook, NotebookBusy, OSError.
    """
    journal = journal_beside(output)
    if not output.is_file():
        left = f"; its journal is still there: {journal}" if journal.exists() else ""
        raise NotebookNotFound(f"no notebook at {output}{left}")
    if not journal.exists():
        return None
    claimed = claim(output, force=force)
    try:
        found = _rebuild(output, claimed.previous)
        if found is not None:
            write_file(output, NotebookFile(found.notebook))
            journal.unlink(missing_ok=True)
        return found
    finally:
        claimed.release()


def keep_previous(output: Path, previous: dict[str, Any] | None) -> tuple[Path, Recovered] | None:
    """Rebuild the notebook of a killed execution beside ``output``, which is about to be written anew.

    None if there is none, or if it had put out nothing yet. The caller has the claim. Raises OSError.
    """
    try:
        found = _rebuild(output, previous)
        ended = journal_beside(output).stat().st_mtime
    except (FileNotFoundError, NotebookError):
        return None
    if found is None or found.outputs == 0:
        return None
    when = datetime.fromtimestamp(ended, UTC).strftime("%Y%m%d-%H%M%S")
    kept = output.with_name(f"{output.stem}.interrupted-{when}{output.suffix}")
    write_file(kept, NotebookFile(found.notebook))
    return kept, found


def _rebuild(output: Path, previous: dict[str, Any] | None) -> Recovered | None:
    """None if there is no journal of this very notebook: somebody else has written the file since."""
    journal = journal_beside(output)
    try:
        state = read_json(output)["metadata"].get("grd", {})
        if not journal.exists() or "complete" not in state:
            return None
        notebook = notebook_journal.mark_lost(notebook_journal.rebuild(output, journal))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotebookError(f"{output} is no notebook: {error}; its journal stays: {journal}") from None
    found = Recovered(notebook)
    if not found.grd.get("complete"):  # else only the last step was missing, and it says itself how it ended
        found.grd.update(state=contract.INTERRUPTED, complete=True, **_what_was_lost(previous))
    return found


def _what_was_lost(previous: dict[str, Any] | None) -> dict[str, str]:
    who = f"process {previous['pid']}" if previous is not None else "the process that executed it"
    if previous is not None and previous.get("boot_id") != boot_id():
        detail = f"the machine was restarted, or {who} was on another one"
        return {"cause": contract.HOST_LOST, "detail": detail}
    return {"cause": contract.RUNNER_LOST, "detail": f"{who} is gone without having written its end"}
