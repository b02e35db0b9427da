"""What killing and filling have in common: runs, the moments in their life, their result, and the tally."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .invariants import Checker, Seen, read_lines, result_of
from .lane import Command, Lane, Violation, wait_for
from .training_notebook import write_training

GRACE_SECONDS = 3.0
AFTER_GRACE_SECONDS = 2.0
START_SECONDS = 300.0

MOMENTS = {
    "command starting": 1,
    "kernel starting": 2,
    "cell begun": 1,
    "saving": 3,
    "between": 4,
    "ending": 1,
}
"""How often each moment is drawn."""

SPANS = {
    "command starting": (0.0, 1.8),
    "kernel starting": (0.0, 2.0),
    "cell begun": (0.0, 0.5),
    "saving": (0.0, 0.02),
    "between": (0.2, 6.0),
    "ending": (0.0, 0.4),
}
"""Seconds from the event that a moment is named after."""


def draw_moment(dice: random.Random) -> tuple[str, float]:
    """A moment and how long after it."""
    moment = dice.choices(list(MOMENTS), list(MOMENTS.values()))[0]
    return moment, dice.uniform(*SPANS[moment])


@dataclass
class Tally:
    """What was done and seen, over all lanes."""

    kills: int = 0
    processes: int = 0
    fillings: int = 0
    runs: int = 0
    completed: int = 0
    by_moment: Counter[str] = field(default_factory=Counter)
    by_target: Counter[str] = field(default_factory=Counter)
    by_state: Counter[str] = field(default_factory=Counter)
    looks_killed: int = 0
    unborn: int = 0
    """Starts killed before there was a run."""
    slowest_end: float = 0.0
    """Seconds from a kill to the end of what it left, where somebody was left to see to it."""
    slowest_reap: float = 0.0
    violations: list[str] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Expected:
    """What comes of a run that nobody disturbs."""

    result: str
    history: list[dict[str, Any]]


class Campaign:
    """One sequence of runs that are disturbed; ``take`` says whether another disturbance is wanted."""

    def __init__(
        self,
        lane: Lane,
        dice: random.Random,
        kind: str,
        expected: Expected,
        tally: Tally,
        take: Callable[[], bool],
        give_back: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self.lane, self.dice, self.kind, self.expected = lane, dice, kind, expected
        self.tally, self.take, self.give_back, self.say = tally, take, give_back, say
        self.attempts_before = 0
        self.lost_from: dict[int, float] = {}
        """When the attempts of the run under way were hit."""
        self.on_full_disk: set[int] = set()
        """Attempts that may have ended without room for their last snapshot: the journal holds the rest."""
        write_training(lane.project / "train.ipynb", kind)
        self.known: set[Path] = set(lane.run_folders())

    def begin_run(self) -> None:
        """Forget the run before."""
        self.lost_from.clear()
        self.on_full_disk.clear()

    def options(self) -> list[str]:
        """Of the start of a run."""
        return ["-p", "printed", str(self.lane.printed), "--timeout", "1h", "--grace", f"{GRACE_SECONDS}s"]

    def start_command(self, folder: Path | None) -> Command:
        detached = ["--detach"] if self.dice.random() < 0.2 else []
        if folder is not None:
            return self.lane.start("resume", folder.name, *detached)
        with self.tally.lock:
            self.tally.runs += 1
        return self.lane.start("research", "train.ipynb", *self.options(), *detached)

    def new_folder(self) -> Path | None:
        new = [path for path in self.lane.run_folders() if path not in self.known]
        if len(new) > 1:
            raise Violation(f"one start made {len(new)} runs: {new}")
        if new:
            self.known.add(new[0])
            return new[0]
        return None

    def await_moment(self, moment: str, folder: Path | None, command: Command) -> tuple[Path | None, bool]:
        """The run's folder, and whether the moment came; it does not if the command or the run ends first."""
        if moment == "command starting":
            return folder, True
        give_up = time.monotonic() + START_SECONDS
        look_at_processes = 0.0
        while time.monotonic() < give_up:
            folder = folder or self.new_folder()
            if folder is not None and len(self.attempts(folder)) > self.attempts_before:
                if self.has_come(moment, folder, self.record(folder)["attempt"]):
                    return folder, True
                if self.is_over(folder):
                    return folder, False
                if time.monotonic() > look_at_processes:
                    if not self.lane.cast(("runner", "command")):
                        return folder, False
                    look_at_processes = time.monotonic() + 1.0
            elif command.ended:
                return folder, False
            time.sleep(0.02 if moment == "saving" else 0.05)
        raise Violation(f"{moment!r} did not come in {START_SECONDS:.0f} s: {command.said[-500:]}")

    def has_come(self, moment: str, folder: Path, attempt: int) -> bool:
        if moment == "saving":
            names = [path.name for path in (folder / "checkpoints").glob(".checkpoint_*.tmp")]
            if names:
                return True
        events = [e for e in read_lines(folder / "events.jsonl") if e.get("attempt") == attempt]
        if moment == "kernel starting":
            return any(e["kind"] == "state" for e in events)
        if moment == "cell begun":
            return any(e["kind"] == "cell" and e["status"] == "running" for e in events)
        if moment == "between":
            return any(e["kind"] == "checkpoint" for e in events)
        if moment == "ending":
            return any(e["kind"] == "cell" and e["index"] >= 3 for e in events)
        return False

    def attempts(self, folder: Path) -> list[Any]:
        return list(self.record(folder)["attempts"])

    def record(self, folder: Path) -> dict[str, Any]:
        return Checker(folder, self.lane.printed).record

    def is_over(self, folder: Path) -> bool:
        attempt = self.record(folder)["attempt"]
        states = [
            e["state"]
            for e in read_lines(folder / "events.jsonl")
            if e["kind"] == "state" and e.get("attempt") == attempt
        ]
        return bool(states) and states[-1] != "running"

    def goes_on(self, folder: Path | None, command: Command) -> bool:
        """Whether there is still something to kill."""
        if folder is None:
            return not command.ended
        return bool(self.lane.cast(("runner", "command"))) and not self.is_over(folder)

    def has_begun(self, checker: Checker) -> bool:
        """Whether the newest attempt's runner came to its work."""
        began = [e["attempt"] for e in checker.events() if e["kind"] == "state" and e["state"] == "running"]
        return bool(began) and began[-1] == checker.record["attempt"]

    def await_completion(self, folder: Path | None, command: Command) -> None:
        """The kills are over: the run must come to its end by itself."""
        command.finish(300.0)
        folder = folder or self.new_folder()
        if folder is None and command.code is not None and command.code < 0:
            return  # killed before there was a run
        if folder is None:
            raise Violation(f"no run came of the start: {command.said[-500:]}")
        for _ in range(3):
            self.lane.grd("wait", folder.name)
            if self.record(folder)["state"] == "completed":
                break
            self.lane.grd("resume", folder.name)
        wait_for(lambda: not self.lane.cast(), AFTER_GRACE_SECONDS)
        self.check_completed(folder)

    def check_completed(self, folder: Path) -> None:
        checker = Checker(folder, self.lane.printed)
        checker.ended(self.lane.grd("status", folder.name, "--json").json)
        checker.files()
        record = checker.record
        notebook = checker.rebuilt(record["attempt"])
        result = result_of(notebook) if notebook is not None else None
        wanted = self.expected
        checker.expect(result == wanted.result, f"the result is {result}, undisturbed {wanted.result}")
        history = self.lane.grd("result", folder.name, "--json").json["history"]
        checker.expect(history == wanted.history, "the history differs from that of an undisturbed run")
        listed = self.lane.grd("list", "--json", "--limit", "100000").json
        known = {row["run_id"] for row in listed["runs"]}
        missing = [path.name for path in self.known if path.name not in known]
        checker.expect(not missing, f"lost runs: {missing}")
        for number in range(1, record["attempt"] + 1):
            whole = number == record["attempt"]  # nobody hit it, or too late
            hit = float("inf") if whole else self.lost_from.get(number, 0.0)
            checker.notebook(number, hit, on_disk=whole or number not in self.on_full_disk)
            later = checker.notes(number)
            earlier = [t for before in range(1, number) for t, _ in checker.notes(before)]
            if earlier and later:
                checker.expect(max(earlier) < later[0][0], f"attempt {number} ran beside an older kernel")
        left = checker.temporaries()
        checker.expect(not left, f"left behind at the end: {sorted(path.name for path in left)}")
        # Who is killed while it writes the page of a run that has ended leaves its half to the next writer of
        # the page, or to `grd gc`.
        self.lane.grd("gc")
        planning = [p.name for p in (self.lane.project / ".planning").glob(".*.tmp")]
        checker.expect(not planning, f"left behind beside STATE.md: {planning}")
        if checker.problems:
            raise Violation(f"{folder}, completed: " + "; ".join(checker.problems))
        with self.tally.lock:
            self.tally.completed += 1
        shutil.rmtree(folder)
        self.known.discard(folder)


def undisturbed(lane: Lane, kind: str) -> Expected:
    """Run the notebook of ``kind`` undisturbed. Raises Violation."""
    write_training(lane.project / "undisturbed.ipynb", kind)
    options = ["-p", "printed", str(lane.printed), "--timeout", "1h"]
    run = lane.grd("research", "undisturbed.ipynb", *options, "--json")
    if run.code != 0:
        raise Violation(f"the undisturbed run exits {run.code}: {run.said[-500:]}")
    checker = Checker(Path(run.json["folder"]), lane.printed)
    result = result_of(checker.rebuilt(1) or {"cells": []})
    if result is None:
        raise Violation("the undisturbed run printed no result")
    history = lane.grd("result", checker.folder.name, "--json").json["history"]
    shutil.rmtree(checker.folder)
    return Expected(result, history)
