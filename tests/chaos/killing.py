"""Kills: SIGKILL to some processes of a run at a random moment, a look, a resume, until it is completed."""

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
from .lane import Command, Lane, Member, Violation, wait_for
from .training_notebook import write_training

GRACE_SECONDS = 3.0
AFTER_GRACE_SECONDS = 2.0
START_SECONDS = 90.0

ROLES = ("runner", "kernel", "guardian", "watcher")
MOMENTS = {
    "command starting": 1,
    "kernel starting": 2,
    "cell begun": 2,
    "saving": 3,
    "between": 3,
    "ending": 1,
}
"""How often each moment is drawn."""


@dataclass(frozen=True)
class Plan:
    """One kill as it was drawn."""

    moment: str
    delay: float
    roles: frozenset[str]
    command_too: bool
    """Whether the command that follows the run is killed along."""
    wait_for_end: bool
    """Whether the processes are given their time to end before anybody looks."""
    looks_killed: int
    """How many ``grd status`` are killed while they recover the run."""

    @classmethod
    def draw(cls, dice: random.Random) -> Plan:
        moment = dice.choices(list(MOMENTS), list(MOMENTS.values()))[0]
        span = {
            "command starting": (0.0, 1.8),
            "kernel starting": (0.0, 1.2),
            "cell begun": (0.0, 0.5),
            "saving": (0.0, 0.02),
            "between": (0.2, 5.0),
            "ending": (0.0, 0.4),
        }[moment]
        roles = [role for role in ROLES if dice.random() < 0.5] or [dice.choice(ROLES)]
        if moment == "command starting":
            roles = roles if dice.random() < 0.5 else []
        return cls(
            moment,
            dice.uniform(*span),
            frozenset(roles),
            command_too=dice.random() < 0.5 or not roles,
            wait_for_end=dice.random() < 0.85,
            looks_killed=dice.choice((0, 0, 0, 0, 1, 2)),
        )


@dataclass
class Tally:
    """What was done and seen, over all lanes."""

    kills: int = 0
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


class KillingLane:
    """One sequence of runs that are killed; ``take`` says whether another kill is wanted."""

    def __init__(
        self,
        lane: Lane,
        dice: random.Random,
        kind: str,
        expected: str,
        tally: Tally,
        take: Callable[[], bool],
        give_back: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self.lane, self.dice, self.kind, self.expected = lane, dice, kind, expected
        self.tally, self.take, self.give_back, self.say = tally, take, give_back, say
        self._attempts_before = 0
        write_training(lane.project / "train.ipynb", kind)
        self.known: set[Path] = set(lane.run_folders())

    # --- one run ---

    def one_run(self, more: bool) -> None:
        """Start a run and kill it until it is completed. Raises Violation."""
        folder: Path | None = None
        old_temporaries: set[Path] = set()
        while True:
            self._attempts_before = len(self._attempts(folder)) if folder is not None else 0
            command = self._start_command(folder)
            while True:
                plan = Plan.draw(self.dice) if more and self.take() else None
                if plan is None:
                    self._await_completion(folder, command)
                    return
                folder, reached = self._await_moment(plan, folder, command)
                if reached:
                    time.sleep(plan.delay)
                struck = self._strike(plan)
                at = time.time()
                folder = folder or self._new_folder()
                self._count(plan, struck)
                if {m.role for m in struck} - {"command"} or not self._goes_on(folder, command):
                    break
                self.say(f"{plan.moment:<17} hit {[m.role for m in struck]}: the run goes on")
            if folder is None:
                self._check_unborn()
                folder = self._new_folder()  # it came after all: the command was not hit
                if folder is None:
                    self.say(f"{plan.moment:<17} +{plan.delay:.3f} no run came of it")
                    continue
            checker = Checker(folder, self.lane.printed)
            try:
                self._after_kill(checker, plan, struck, at, command)
                left = checker.temporaries()
                if self._has_begun(checker):
                    stays = sorted(p.name for p in left & old_temporaries)
                    checker.expect(not stays, f"left behind after a resume: {stays}")
                old_temporaries = left
                checker.seen.temporaries += len(left)
            except Violation as violation:
                checker.problems.append(str(violation))
            record = checker.record
            roles = "+".join(sorted({m.role for m in struck}))
            self.say(
                f"{folder.name[-4:]} attempt {record['attempt']:<2} {plan.moment:<17} +{plan.delay:.3f} "
                f"{roles:<40} -> {record['state']} {record['cause'] or ''}"
            )
            with self.tally.lock:
                self.tally.by_state[f"{record['state']} {record['cause'] or ''}".strip()] += 1
                self.tally.seen.add(checker.seen)
            if checker.problems:
                raise Violation(f"{folder}: {plan}, struck {roles}: " + "; ".join(checker.problems))
            if record["state"] == "completed":
                self._check_completed(folder)
                return

    def _count(self, plan: Plan, struck: list[Member]) -> None:
        if not struck:
            self.give_back()
            return
        with self.tally.lock:
            self.tally.kills += 1
            self.tally.by_moment[plan.moment] += 1
            self.tally.by_target["+".join(sorted({m.role for m in struck}))] += 1

    def _goes_on(self, folder: Path | None, command: Command) -> bool:
        """Whether there is still something to kill."""
        if folder is None:
            return not command.ended
        return bool(self.lane.cast(("runner", "command"))) and not self._is_over(folder)

    def _has_begun(self, checker: Checker) -> bool:
        """Whether the newest attempt's runner came to its work."""
        began = [e["attempt"] for e in checker.events() if e["kind"] == "state" and e["state"] == "running"]
        return bool(began) and began[-1] == checker.record["attempt"]

    def _await_completion(self, folder: Path | None, command: Command) -> None:
        """The kills are over: the run must come to its end by itself."""
        command.finish(300.0)
        folder = folder or self._new_folder()
        if folder is None and command.code is not None and command.code < 0:
            return  # killed before there was a run
        if folder is None:
            raise Violation(f"no run came of the start: {command.said[-500:]}")
        for _ in range(3):
            self.lane.grd("wait", folder.name)
            if self._record(folder)["state"] == "completed":
                break
            self.lane.grd("resume", folder.name)
        wait_for(lambda: not self.lane.cast(), AFTER_GRACE_SECONDS)
        self._check_completed(folder)

    def _start_command(self, folder: Path | None) -> Command:
        detached = ["--detach"] if self.dice.random() < 0.2 else []
        if folder is not None:
            return self.lane.start("resume", folder.name, *detached)
        with self.tally.lock:
            self.tally.runs += 1
        options = ["-p", "printed", str(self.lane.printed), "--timeout", "1h", "--grace", f"{GRACE_SECONDS}s"]
        return self.lane.start("research", "train.ipynb", *options, *detached)

    def _new_folder(self) -> Path | None:
        new = [path for path in self.lane.run_folders() if path not in self.known]
        if len(new) > 1:
            raise Violation(f"one start made {len(new)} runs: {new}")
        if new:
            self.known.add(new[0])
            return new[0]
        return None

    def _await_moment(self, plan: Plan, folder: Path | None, command: Command) -> tuple[Path | None, bool]:
        """The run's folder, and whether the moment came; it does not if the command or the run ends first."""
        if plan.moment == "command starting":
            return folder, True
        give_up = time.monotonic() + START_SECONDS
        while time.monotonic() < give_up:
            folder = folder or self._new_folder()
            if folder is not None and len(self._attempts(folder)) > self._attempts_before:
                if self._has_come(plan.moment, folder, self._record(folder)["attempt"]):
                    return folder, True
                if self._is_over(folder) or not self.lane.cast(("runner", "command")):
                    return folder, False
            elif command.ended:
                return folder, False
            time.sleep(0.01 if plan.moment == "saving" else 0.03)
        raise Violation(f"{plan.moment!r} did not come in {START_SECONDS:.0f} s: {command.said[-500:]}")

    def _has_come(self, moment: str, folder: Path, attempt: int) -> bool:
        if moment == "kernel starting":
            return bool(self.lane.cast(("guardian", "kernel")))
        if moment == "saving":
            names = [path.name for path in (folder / "checkpoints").glob(".checkpoint_*.tmp")]
            if names:
                return True
        events = [e for e in read_lines(folder / "events.jsonl") if e.get("attempt") == attempt]
        if moment == "cell begun":
            return any(e["kind"] == "cell" and e["status"] == "running" for e in events)
        if moment == "between":
            return any(e["kind"] == "checkpoint" for e in events)
        if moment == "ending":
            return any(e["kind"] == "cell" and e["index"] >= 3 for e in events)
        return False

    def _attempts(self, folder: Path) -> list[Any]:
        return list(self._record(folder)["attempts"])

    def _record(self, folder: Path) -> dict[str, Any]:
        return Checker(folder, self.lane.printed).record

    def _is_over(self, folder: Path) -> bool:
        attempt = self._record(folder)["attempt"]
        states = [
            e["state"]
            for e in read_lines(folder / "events.jsonl")
            if e["kind"] == "state" and e.get("attempt") == attempt
        ]
        return bool(states) and states[-1] != "running"

    def _strike(self, plan: Plan) -> list[Member]:
        """Kill at once; who is not there yet cannot be killed."""
        roles = plan.roles | ({"command"} if plan.command_too else set())
        cast = self.lane.cast(ROLES + ("command",))
        return [member for member in cast if member.role in roles and member.kill()]

    # --- what must hold afterwards ---

    def _check_unborn(self) -> None:
        """A start that was killed before there was a run leaves no process."""
        left = wait_for(lambda: not self.lane.cast(), 30.0)
        if not left:
            raise Violation(f"processes of a start that was killed: {self.lane.cast()}")
        self.tally.unborn += 1

    def _after_kill(
        self, checker: Checker, plan: Plan, struck: list[Member], at: float, command: Command
    ) -> None:
        folder = checker.folder
        checker.files()
        killed = {member.role for member in struck}
        cast = self.lane.cast()
        somebody_acts = any(m.role in ("runner", "guardian", "watcher") for m in cast)
        if plan.wait_for_end and somebody_acts and struck:
            self._await_end(checker, killed, at)
        for _ in range(plan.looks_killed):
            look = self.lane.start("status", folder.name, "--json")
            time.sleep(self.dice.uniform(0.05, 0.5))
            look.process.kill()
            look.finish()
            self.tally.looks_killed += 1
        if not plan.wait_for_end:
            # Somebody resumes at once: it must wait for the old kernel, and two must never train one run.
            return self._look_at_once(checker, command)
        if "command" not in killed:
            code = command.finish()
            self.lane.expect_no_traceback(command)
            checker.expect(code in (0, 75, 69), f"{command.words[0]} exits {code}: {command.said[-500:]}")
        self._look(checker, killed, at)
        return None

    def _await_end(self, checker: Checker, killed: set[str], at: float) -> None:
        """The kernel and what it started end within the grace and 2 s; the runner when it has written that."""
        limit = AFTER_GRACE_SECONDS + (GRACE_SECONDS if "runner" in killed else 0.0)
        trained = ("kernel", "child", "guardian", "watcher")
        if "command" in killed and "runner" not in killed and killed == {"command"}:
            return  # nothing of the run was hit
        began = time.monotonic()
        gone = wait_for(lambda: not self.lane.cast(trained), limit + 20.0)
        took = time.monotonic() - began
        if not gone:
            checker.problems.append(f"alive {took:.1f} s after the kill: {self.lane.cast(trained)}")
        with self.tally.lock:
            self.tally.slowest_end = max(self.tally.slowest_end, took - (limit - AFTER_GRACE_SECONDS))
        checker.expect(
            took <= limit + AFTER_GRACE_SECONDS, f"it took {took:.1f} s until nothing of the kernel was alive"
        )
        if not wait_for(lambda: not self.lane.cast(("runner",)), 60.0):
            checker.problems.append("the runner is still there 60 s after its kernel's end")

    def _look_at_once(self, checker: Checker, command: Command) -> None:
        """`grd wait` for the end, whatever still goes on, and the same checks."""
        waited = self.lane.grd("wait", checker.folder.name)
        checker.expect(waited.code in (0, 1, 69, 75), f"wait exits {waited.code}: {waited.said[-500:]}")
        wait_for(lambda: command.ended, 60.0)
        self._look(checker, set(), time.time())

    def _look(self, checker: Checker, killed: set[str], at: float) -> None:
        looking = time.monotonic()
        status = self.lane.grd("status", checker.folder.name, "--json")
        checker.expect(status.code == 0, f"status exits {status.code}: {status.said[-300:]}")
        shown = status.json
        nothing_hit = not killed & set(ROLES)
        if nothing_hit and shown["state"] in ("running", "queued"):
            self.lane.grd("wait", checker.folder.name)
            shown = self.lane.grd("status", checker.folder.name, "--json").json
        gone = wait_for(lambda: not self.lane.cast(), AFTER_GRACE_SECONDS)
        with self.tally.lock:
            self.tally.slowest_reap = max(self.tally.slowest_reap, time.monotonic() - looking)
        checker.expect(gone, f"orphans after a look: {self.lane.cast()}")
        checker.files()
        checker.ended(shown)
        checker.notebook(shown["attempt"], at, on_disk=True)
        checker.checkpoints()
        state, cause = shown["state"], shown["cause"]
        allowed = {("completed", None)}
        if "runner" in killed:
            allowed.add(("interrupted", "runner_lost"))
        if killed & {"kernel", "guardian", "watcher"}:
            allowed |= {("interrupted", "kernel_died"), ("failed", "start_failed")}
        if "command" in killed or not killed:
            allowed |= {("interrupted", "runner_lost"), ("interrupted", "kernel_died")}
            allowed.add(("failed", "start_failed"))
        checker.expect((state, cause) in allowed, f"it is called {state}, {cause} after a kill of {killed}")
        if cause == "runner_lost":
            self._truth_of_loss(checker, shown)

    def _truth_of_loss(self, checker: Checker, shown: dict[str, Any]) -> None:
        """A runner that is called lost was one of this attempt."""
        pids = {e["pid"] for e in checker.events() if e["attempt"] == shown["attempt"] and e["kind"] == "state"}
        told = [int(word) for word in shown["detail"].split() if word.isdigit()]
        started = any(
            e["kind"] == "state" and e["state"] == "running" and e["attempt"] == shown["attempt"]
            for e in checker.events()
        )
        if told and started:
            checker.expect(told[0] in pids, f"the detail names another runner: {shown['detail']}")
        elif told:
            earlier = {e["pid"] for e in checker.events() if e["attempt"] < shown["attempt"]}
            checker.expect(told[0] not in earlier, f"blames an earlier attempt's runner: {shown['detail']}")

    def _check_completed(self, folder: Path) -> None:
        checker = Checker(folder, self.lane.printed)
        checker.ended(self.lane.grd("status", folder.name, "--json").json)
        checker.files()
        record = checker.record
        notebook = checker.rebuilt(record["attempt"])
        result = result_of(notebook) if notebook is not None else None
        checker.expect(result == self.expected, f"the result is {result}, without kills {self.expected}")
        listed = self.lane.grd("list", "--json", "--limit", "100000").json
        known = {row["run_id"] for row in listed["runs"]}
        missing = [path.name for path in self.known if path.name not in known]
        checker.expect(not missing, f"lost runs: {missing}")
        for number in range(1, record["attempt"] + 1):
            checker.notebook(number, 0.0, on_disk=True)
        left = checker.temporaries()
        checker.expect(not left, f"left behind at the end: {sorted(path.name for path in left)}")
        planning = [p.name for p in (self.lane.project / ".planning").glob(".*.tmp")]
        checker.expect(not planning, f"left behind beside STATE.md: {planning}")
        if checker.problems:
            raise Violation(f"{folder}, completed: " + "; ".join(checker.problems))
        with self.tally.lock:
            self.tally.completed += 1
        shutil.rmtree(folder)
        self.known.discard(folder)


def undisturbed_result(lane: Lane, kind: str) -> str:
    """The result of a run that nobody disturbs. Raises Violation."""
    write_training(lane.project / "undisturbed.ipynb", kind)
    options = ["-p", "printed", str(lane.printed), "--timeout", "1h"]
    run = lane.grd("research", "undisturbed.ipynb", *options, "--json")
    if run.code != 0:
        raise Violation(f"the undisturbed run exits {run.code}: {run.said[-500:]}")
    checker = Checker(Path(run.json["folder"]), lane.printed)
    result = result_of(checker.rebuilt(1) or {"cells": []})
    if result is None:
        raise Violation("the undisturbed run printed no result")
    shutil.rmtree(checker.folder)
    return result
