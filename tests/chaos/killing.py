"""Kills: SIGKILL to some processes of a run at a random moment, a look, a resume, until it is completed."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .campaign import AFTER_GRACE_SECONDS, GRACE_SECONDS, Campaign, draw_moment
from .invariants import Checker
from .lane import Command, Member, Violation, pulse, wait_for

ROLES = ("runner", "kernel", "guardian", "watcher")


@dataclass(frozen=True)
class Plan:
    """One kill as it was drawn."""

    moment: str
    delay: float
    roles: frozenset[str]
    command_too: bool
    """Whether the command that follows the run is killed along."""
    next_step: str
    """look: when the processes have had their time to end; wait: `grd wait` at once; resume: at once."""
    looks_killed: int
    """How many ``grd status`` are killed while they recover the run."""

    @classmethod
    def draw(cls, dice: random.Random) -> Plan:
        moment, delay = draw_moment(dice)
        roles = [role for role in ROLES if dice.random() < 0.5] or [dice.choice(ROLES)]
        if dice.random() < 0.2:
            roles = list(ROLES)  # nobody is left to see to the rest: the next look must
        if moment == "command starting":
            roles = roles if dice.random() < 0.5 else []
        return cls(
            moment,
            delay,
            frozenset(roles),
            command_too=dice.random() < 0.5 or not roles,
            next_step=dice.choices(("look", "wait", "resume"), (8, 1, 1))[0],
            looks_killed=dice.choice((0, 0, 0, 0, 1, 2)),
        )


@dataclass(frozen=True)
class Hit:
    """A plan carried out: which roles of the attempt were killed so far, and when."""

    plan: Plan
    folder: Path | None
    killed: frozenset[str]
    struck: frozenset[Member]
    at: float


class Killing(Campaign):
    """One sequence of kills: of a run, until it is completed."""

    def one_run(self) -> None:
        """Start a run and kill it until it is completed. Raises Violation."""
        folder: Path | None = None
        self.begin_run()
        self.half_written: set[Path] = set()
        self.hit_before: frozenset[str] = frozenset()
        while True:
            self.attempts_before = len(self.attempts(folder)) if folder is not None else 0
            command = self.start_command(folder)
            hit = self._hit(folder, command)
            if hit is None:
                self.await_completion(folder, command)
                return
            folder = hit.folder
            if folder is None:
                self._check_unborn()
                folder = self.new_folder()  # it came after all: the command was not hit
            if folder is None:
                self.say(f"{hit.plan.moment:<17} +{hit.plan.delay:.3f} no run came of it")
            elif hit.plan.next_step == "resume" and hit.killed - {"command"}:
                # It must wait for what the kill has left: two kernels never train one run.
                self.lost_from.setdefault(self.record(folder)["attempt"], hit.at)
                self.hit_before = hit.killed
                self.say(f"{hit.plan.moment:<17} {'+'.join(sorted(hit.killed))}: resumed at once")
            elif self._check(hit, folder, command) == "completed":
                self.check_completed(folder)
                return

    def _hit(self, folder: Path | None, command: Command) -> Hit | None:
        """Kill what was drawn, and again while the attempt goes on; None if no kill is wanted any more."""
        killed: set[str] = set()
        all_struck: set[Member] = set()
        while self.take():
            plan = Plan.draw(self.dice)
            folder, reached = self.await_moment(plan.moment, folder, command)
            if reached:
                time.sleep(plan.delay)
            struck = self._strike(plan)
            at = time.time()
            folder = folder or self.new_folder()
            self._count(plan, struck)
            killed |= {member.role for member in struck}
            all_struck |= set(struck)
            if killed - {"command"} or not self.goes_on(folder, command):
                return Hit(plan, folder, frozenset(killed), frozenset(all_struck), at)
            self.say(f"{plan.moment:<17} hit {[m.role for m in struck]}: the run goes on")
        return None

    def _check(self, hit: Hit, folder: Path, command: Command) -> str:
        """Look at what a kill has left; returns the run's state. Raises Violation."""
        checker = Checker(folder, self.lane.printed)
        try:
            killed = hit.killed
            if checker.record["attempt"] == self.attempts_before:
                killed |= self.hit_before  # the resume at once was refused: this is still the attempt before
            self._after_kill(checker, hit, killed, command)
            self.hit_before = frozenset()
            left = checker.temporaries()
            if checker.record["attempt"] > self.attempts_before and self.has_begun(checker):
                stays = sorted(path.name for path in left & self.half_written)
                checker.expect(not stays, f"left behind after a resume: {stays}")
            self.half_written = left
            checker.seen.temporaries += len(left)
        except Violation as violation:
            checker.problems.append(str(violation))
        record = checker.record
        roles, end = "+".join(sorted(hit.killed)), f"{record['state']} {record['cause'] or ''}".strip()
        self.say(
            f"{folder.name[-4:]} attempt {record['attempt']:<2} {hit.plan.moment:<17} "
            f"+{hit.plan.delay:.3f} {roles:<40} -> {end}"
        )
        with self.tally.lock:
            self.tally.by_state[end] += 1
            self.tally.seen.add(checker.seen)
        if checker.problems:
            raise Violation(f"{folder}: {hit.plan}, struck {roles}: " + "; ".join(checker.problems))
        return str(record["state"])

    def _count(self, plan: Plan, struck: list[Member]) -> None:
        if not struck:
            self.give_back()
            return
        with self.tally.lock:
            self.tally.kills += 1
            self.tally.processes += len(struck)
            self.tally.by_moment[plan.moment] += 1
            self.tally.by_target["+".join(sorted({m.role for m in struck}))] += 1

    def _strike(self, plan: Plan) -> list[Member]:
        """Kill at once; who is not there yet cannot be killed."""
        roles = plan.roles | ({"command"} if plan.command_too else set())
        cast = self.lane.cast((*ROLES, "command"))
        return [member for member in cast if member.role in roles and member.kill()]

    # --- what must hold afterwards ---

    def _check_unborn(self) -> None:
        """A start that was killed before there was a run leaves no process."""
        left = wait_for(lambda: not self.lane.cast(), 30.0)
        if not left:
            raise Violation(f"processes of a start that was killed: {self.lane.cast()}")
        self.tally.unborn += 1

    def _after_kill(self, checker: Checker, hit: Hit, killed: frozenset[str], command: Command) -> None:
        folder, plan = checker.folder, hit.plan
        checker.files()
        # Whoever was struck does not count, though the system may still show it: it is dying. By its pid: a
        # guardian whose watcher is gone has the place of one.
        struck = {(member.pid, member.started) for member in hit.struck}
        somebody_acts = any(
            m.role in ("runner", "guardian", "watcher") and (m.pid, m.started) not in struck
            for m in self.lane.cast()
        )
        if plan.next_step == "look" and somebody_acts and killed:
            self._await_end(checker, killed)
        for _ in range(plan.looks_killed):
            look = self.lane.start("status", folder.name, "--json")
            time.sleep(self.dice.uniform(0.05, 0.5))
            look.process.kill()
            look.finish()
            self.tally.looks_killed += 1
        if plan.next_step != "look":
            waited = self.lane.grd("wait", folder.name)
            checker.expect(waited.code in (0, 1, 69, 75), f"wait exits {waited.code}: {waited.said[-500:]}")
        if "command" not in killed:
            code = command.finish()
            self.lane.expect_no_traceback(command)
            # 2: resumed at once, after a kill that came too late to keep it from its end
            expected = (0, 75, 69) if checker.record["state"] != "completed" else (0, 2)
            checker.expect(code in expected, f"{command.words[0]} exits {code}: {command.said[-500:]}")
        self._look(checker, killed, hit.at)

    def _await_end(self, checker: Checker, killed: frozenset[str]) -> None:
        """The kernel and what it started end within the grace and 2 s; the runner once it has told."""
        limit = AFTER_GRACE_SECONDS + (GRACE_SECONDS if "runner" in killed else 0.0)
        trained = ("kernel", "child", "guardian", "watcher")
        if killed == {"command"}:
            return  # nothing of the run was hit
        began = time.monotonic()
        gone = wait_for(lambda: not self.lane.cast(trained), limit + 20.0)
        took = time.monotonic() - began
        if not gone:
            checker.problems.append(f"alive {took:.1f} s after the kill: {self.lane.cast(trained)}")
        with self.tally.lock:
            self.tally.slowest_end = max(self.tally.slowest_end, took - (limit - AFTER_GRACE_SECONDS))
        starved = pulse.late(time.time() - took, time.time())
        checker.expect(
            took <= limit + starved,
            f"it took {took:.1f} s until nothing of the kernel was alive",
        )
        if not wait_for(lambda: not self.lane.cast(("runner",)), 60.0):
            checker.problems.append("the runner is still there 60 s after its kernel's end")

    def _look(self, checker: Checker, killed: frozenset[str], at: float) -> None:
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
        # A resume that was killed before it began leaves the attempt that was hit before it.
        at = self.lost_from.setdefault(shown["attempt"], at)
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
        pids = {
            e["pid"] for e in checker.events() if e["attempt"] == shown["attempt"] and e["kind"] == "state"
        }
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
