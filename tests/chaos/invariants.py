"""What must hold of a run folder, whatever was killed and whenever: each check returns what does not.

Read with code of its own where that is possible: a checker that uses what it checks sees nothing.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat

from grd.experiment import checkpoint_folder
from grd.files import is_locked
from grd.runs import notebook_journal

from .lane import pulse

OLD_SECONDS = 2.0
"""Output that is older than this at the moment of a kill must be there afterwards."""

STARVED_SECONDS = 6.0
"""How long before a kill the machine is asked whether it gave everybody a turn."""

_NOTE = re.compile(r"<(\d{5})>")


@dataclass
class Seen:
    """What the checks met that is no violation, but worth a number."""

    torn_lines: int = 0
    temporaries: int = 0
    notes_checked: int = 0
    checkpoints_verified: int = 0
    youngest_lost: float = 0.0
    """Age in seconds of the oldest output that a kill took."""

    def add(self, other: Seen) -> None:
        self.torn_lines += other.torn_lines
        self.temporaries += other.temporaries
        self.notes_checked += other.notes_checked
        self.checkpoints_verified += other.checkpoints_verified
        self.youngest_lost = max(self.youngest_lost, other.youngest_lost)


@dataclass
class Checker:
    """Collects what does not hold of one run."""

    folder: Path
    printed: Path
    seen: Seen = field(default_factory=Seen)
    problems: list[str] = field(default_factory=list)

    def expect(self, holds: object, problem: str) -> None:
        if not holds:
            self.problems.append(problem)

    # --- files ---

    def files(self) -> None:
        """Every file that claims to be JSON, JSON lines or a notebook is one."""
        for path in sorted(self.folder.rglob("*")):
            if path.name.endswith(".tmp") or not path.is_file():
                continue
            name = path.relative_to(self.folder)
            try:
                if path.suffix == ".json":
                    json.loads(path.read_text(encoding="utf-8"))
                elif path.suffix == ".ipynb":
                    nbformat.validate(nbformat.reads(path.read_text(encoding="utf-8"), as_version=4))
                elif path.suffix == ".jsonl":
                    self._lines(path)
            except FileNotFoundError:
                continue  # replaced meanwhile
            except Exception as error:
                self.problems.append(f"{name} is invalid: {str(error)[:200]}")

    def _lines(self, path: Path) -> None:
        for number, line in enumerate(path.read_bytes().split(b"\n")):
            if not line:
                continue
            with contextlib.suppress(ValueError):
                if isinstance(json.loads(line), dict):
                    continue
            self.seen.torn_lines += 1
            for later in re.finditer(rb'\{"(?:v|op|name)":', line):
                if later.start():
                    with contextlib.suppress(ValueError):
                        json.loads(line[later.start() :])
                        self.problems.append(f"{path.name}: line {number} was written onto a torn one")

    def temporaries(self) -> set[Path]:
        """Half-written files, whoever left them."""
        names = [p for p in self.folder.rglob(".*") if p.name.endswith(".tmp") or p.name.startswith(".now-")]
        return set(names)

    # --- the record ---

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text(encoding="utf-8"))

    def events(self) -> list[dict[str, Any]]:
        return list(read_lines(self.folder / "events.jsonl"))

    def ended(self, shown: dict[str, Any]) -> None:
        """``grd status``, run.json and the events tell the same end; nothing is held."""
        record = self.record
        different = [key for key in shown if shown[key] != record.get(key)]
        self.expect(not different, f"status and run.json disagree on {different}")
        state, attempts = record["state"], record["attempts"]
        self.expect(state in ("completed", "failed", "interrupted"), f"state is {state}")
        states = [event for event in self.events() if event["kind"] == "state"]
        self.expect(states and states[-1]["state"] == state, f"the last state event is {states[-1:]}")
        self.expect(record["attempt"] == len(attempts) == attempts[-1]["number"], "attempts are miscounted")
        self.expect(
            all(a["state"] in ("completed", "failed", "interrupted") for a in attempts),
            f"attempts have states {[a['state'] for a in attempts]}",
        )
        spent = sum(a["seconds"] for a in attempts)
        used = record["budget"]["used_seconds"]
        self.expect(abs(spent - used) < 0.1, f"attempts took {spent:.3f} s, the budget says {used}")
        self.expect(record["processes"] == {} and record["kernel_pid"] is None, "processes are still noted")
        self.expect((state == "completed") != record["resumable"], f"{state} with {record['resumable']=}")
        if record["resumable"]:
            self.expect(record["resume_command"], "resumable without a command")
        for name in ("runner.lock", "recovery.lock"):
            self.expect(not is_locked(self.folder / name), f"{name} is held")
        self.expect(not (self.folder / "reserve").exists(), "the reserve was not given back")

    # --- the notebook ---

    def rebuilt(self, attempt: int) -> dict[str, Any] | None:
        """The notebook of an attempt with its journal; None if it had not begun one."""
        place = self.folder / "attempts" / str(attempt)
        if not (place / "output.ipynb").exists():
            return None
        notebook = notebook_journal.rebuild(place / "output.ipynb", place / "journal.jsonl")
        try:
            nbformat.validate(nbformat.reads(json.dumps(notebook), as_version=4))
        except Exception as error:
            self.problems.append(f"the rebuilt notebook is invalid: {str(error)[:200]}")
        return notebook

    def notebook(self, attempt: int, lost_from: float, *, on_disk: bool) -> None:
        """Statuses are true and every output older than 2 s at ``lost_from`` is there, once and in order.

        ``on_disk``: the file alone must hold it, without a journal.
        """
        place = self.folder / "attempts" / str(attempt)
        notes = self.notes(attempt)
        old_from = lost_from - OLD_SECONDS - pulse.late(lost_from - STARVED_SECONDS, lost_from + 1.0)
        old = [number for t, number in notes if t < old_from]
        try:
            notebook = self.rebuilt(attempt)
        except (OSError, ValueError, KeyError) as error:
            self.problems.append(f"attempt {attempt}: the notebook cannot be rebuilt: {error}")
            return
        if notebook is None:
            self.expect(not old, f"attempt {attempt} printed {len(old)} lines and has no notebook")
            return
        have = [int(number) for number in _NOTE.findall(_text(notebook))]
        self.expect(have == sorted(set(have)), f"attempt {attempt}: outputs are repeated or out of order")
        lost = sorted(set(old) - set(have))
        when = {number: t for t, number in notes}
        self.expect(
            not lost,
            f"attempt {attempt}: {len(lost)} outputs older than 2 s are lost, the oldest of "
            f"{lost_from - min((when[n] for n in lost), default=0.0):.2f} s",
        )
        gone = [lost_from - t for t, number in notes if t < lost_from and number not in set(have)]
        self.seen.youngest_lost = max([self.seen.youngest_lost, *gone])
        self.seen.notes_checked += len(old)
        if on_disk:
            self.expect(not (place / "journal.jsonl").exists(), f"attempt {attempt}: the journal was left")
            self.expect(notebook["metadata"]["grd"].get("complete"), f"attempt {attempt}: not complete")
            self._statuses(notebook, attempt)

    def _statuses(self, notebook: dict[str, Any], attempt: int) -> None:
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        statuses = [cell["metadata"].get("papermill", {}).get("status", "pending") for cell in cells]
        order = "".join(
            {"completed": "c", "interrupted": "x", "failed": "x"}.get(status, status[0])
            for status in statuses
        )
        self.expect(re.fullmatch("c*x?p*", order), f"attempt {attempt}: cell statuses are {statuses}")
        for cell, status in zip(cells, statuses, strict=True):
            if status == "pending":
                self.expect(not cell["outputs"], f"attempt {attempt}: a pending cell has outputs")

    def notes(self, attempt: int) -> list[tuple[float, int]]:
        """When the notebook of an attempt printed what, by its own notes."""
        path = self.printed / f"{self.folder.name}-{attempt}"
        if not path.exists():
            return []
        lines = [line.split() for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [(float(t), int(number)) for t, number in lines]

    # --- checkpoints ---

    def checkpoints(self) -> None:
        """The newest checkpoint that an event promises is there, and its bytes are what was written."""
        folder = self.folder / "checkpoints"
        told = [event for event in self.events() if event["kind"] == "checkpoint"]
        found = checkpoint_folder.scan(folder)
        for path, reason in found.damaged:
            self.problems.append(f"{path.name} is damaged: {reason}")
        if not told:
            return
        self.expect(found.found is not None, "no checkpoint is left of those that were told of")
        if found.found is not None:
            self.seen.checkpoints_verified += 1
            have = (found.found.epoch, found.found.step or 0)
            newest = max((event["epoch"], event["step"] or 0) for event in told)
            self.expect(have >= newest, f"the newest checkpoint is {have}, an event told of {newest}")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file; torn lines are passed over."""
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    yield value


def _text(notebook: dict[str, Any]) -> str:
    """What the outputs show, as they are ordered; HTML stands for itself.

    Neighbouring pieces of stdout and of stderr may be joined each, so the order counts within a stream and
    a display: the caller's numbers are sorted by their place in the cell, which `_NOTE` finds.
    """
    parts: list[str] = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            text = output.get("text", output.get("data", {}).get("text/html", ""))
            parts.append(text if isinstance(text, str) else "".join(text))
    return "".join(parts)


def result_of(notebook: dict[str, Any]) -> str | None:
    """The result that the notebook printed at its end."""
    found = re.findall(r"RESULT ([0-9a-f]{64})", _text(notebook))
    return found[-1] if found else None
