"""Full disks: the file system of the runs fills up at a random moment, and is freed again."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from .campaign import Campaign, draw_moment
from .invariants import Checker
from .lane import Command, Violation, wait_for

FREE_BYTES = 12_000_000
"""What an attempt finds free at its start."""

MEANS = {"file": 4, "greedy": 2, "output": 1, "checkpoint": 1}
"""Another file takes all that is left; all that is left and whatever is given back; the notebook prints, or
saves, more than there is room for."""

KILLS = ((), (), (), ("runner",), ("kernel",), ("runner", "kernel", "guardian", "watcher"))


class CannotMount(Exception):
    """This machine or user cannot mount a small file system."""


@dataclass
class Disk:
    """A small tmpfs."""

    path: Path
    _greed: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def mount(self) -> None:
        """Raises CannotMount."""
        self.path.mkdir(parents=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={FREE_BYTES}", "tmpfs", str(self.path)],
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise CannotMount(done.stderr.strip())

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", str(self.path)], check=True)

    @property
    def _filler(self) -> Path:
        return self.path / "filler"

    def fill(self) -> None:
        """Take every block that is left."""
        handle = os.open(self._filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for size in (65_536, 4_096):
                with contextlib.suppress(OSError):
                    while os.write(handle, b"x" * size) == size:
                        pass
        finally:
            os.close(handle)

    def fill_greedily(self) -> None:
        """`fill` again whenever something was given back, until `free`."""

        def go_on() -> None:
            while not self._greed.wait(0.005):
                with contextlib.suppress(OSError):
                    self.fill()

        self._greed.clear()
        self.fill()
        self._thread = threading.Thread(target=go_on, daemon=True)
        self._thread.start()

    def free(self) -> None:
        """Give the space back, and so much that the next attempt has enough."""
        if self._thread is not None:
            self._greed.set()
            self._thread.join()
            self._thread = None
        self._filler.unlink(missing_ok=True)
        room = os.statvfs(self.path)
        used = (room.f_blocks - room.f_bfree) * room.f_frsize
        size = used + FREE_BYTES
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.path)], check=True)

    @property
    def is_full(self) -> bool:
        try:
            with (self.path / "probe").open("wb", buffering=0) as probe:
                return probe.write(b"x" * 4096) < 4096
        except OSError as error:
            return error.errno == errno.ENOSPC
        finally:
            (self.path / "probe").unlink(missing_ok=True)


@dataclass(frozen=True)
class Plan:
    """One full disk as it was drawn."""

    moment: str
    delay: float
    means: str
    killed: tuple[str, ...]
    kill_delay: float
    freed_after: float | None
    """Seconds until there is space again; None: when the run has ended."""

    @classmethod
    def draw(cls, dice: random.Random) -> Plan:
        moment, delay = draw_moment(dice)
        return cls(
            moment,
            delay,
            dice.choices(list(MEANS), list(MEANS.values()))[0],
            dice.choice(KILLS),
            dice.uniform(0.0, 1.0),
            dice.uniform(0.0, 2.0) if dice.random() < 0.3 else None,
        )


class Filling(Campaign):
    """One sequence of runs whose disk fills up."""

    disk: Disk

    @property
    def flood(self) -> Path:
        return self.lane.path / "flood"

    def options(self) -> list[str]:
        return [*super().options(), "-p", "flood", str(self.flood)]

    def one_run(self) -> None:
        """Start a run and fill its disk until it is completed. Raises Violation."""
        folder: Path | None = None
        self.begin_run()
        while True:
            self._free()
            self.attempts_before = len(self.attempts(folder)) if folder is not None else 0
            command = self.start_command(folder)
            plan = Plan.draw(self.dice) if self.take() else None
            if plan is None:
                self.await_completion(folder, command)
                return
            folder, reached = self.await_moment(plan.moment, folder, command)
            if reached:
                time.sleep(plan.delay)
            at = self._fill(plan)
            killed = self._kill(plan)
            if plan.freed_after is not None:
                time.sleep(plan.freed_after)
                self._free()
            with self.tally.lock:
                self.tally.fillings += 1
                self.tally.by_moment[f"disk: {plan.moment}"] += 1
                self.tally.by_target[f"disk: {plan.means}" + ("+kill" if killed else "")] += 1
            folder = folder or self.new_folder()
            try:
                folder = self._await_end(plan, folder, command)
                if folder is None:
                    self.say(f"{plan.moment:<17} +{plan.delay:.3f} {plan.means:<10} no run came of it")
                    continue
                checker = Checker(folder, self.lane.printed)
                self._look(checker, plan, killed, at)
            except Violation as violation:
                raise Violation(f"{folder}: {plan}, killed {sorted(killed)}: {violation}") from None
            record = checker.record
            self.say(
                f"{folder.name[-4:]} attempt {record['attempt']:<2} {plan.moment:<17} +{plan.delay:.3f} "
                f"{plan.means} {'+'.join(sorted(killed)):<25} -> {record['state']} {record['cause'] or ''}"
            )
            with self.tally.lock:
                self.tally.by_state[f"disk: {record['state']} {record['cause'] or ''}".strip()] += 1
                self.tally.seen.add(checker.seen)
            if checker.problems:
                problems = "; ".join(checker.problems)
                raise Violation(f"{folder}: {plan}, killed {sorted(killed)}: {problems}")
            if record["state"] == "completed":
                self.check_completed(folder)
                return

    def _fill(self, plan: Plan) -> float:
        """Fill the disk; when the first write may have failed."""
        at = time.time()
        if plan.means == "file":
            self.disk.fill()
        elif plan.means == "greedy":
            self.disk.fill_greedily()
        else:
            self.flood.write_text(plan.means)
            wait_for(lambda: self.disk.is_full or not self.lane.cast(("kernel",)), 10.0)
        return at

    def _free(self) -> None:
        self.flood.unlink(missing_ok=True)
        self.disk.free()

    def _kill(self, plan: Plan) -> set[str]:
        if not plan.killed:
            return set()
        time.sleep(plan.kill_delay)
        return {member.role for member in self.lane.cast(plan.killed) if member.kill()}

    def _await_end(self, plan: Plan, folder: Path | None, command: Command) -> Path | None:
        """The run's folder once it has ended, on the full disk if that is the plan; None if there is none."""
        if plan.means == "checkpoint" and plan.freed_after is None:
            # A training outlives a save that fails: it need not end.
            wait_for(lambda: not self.lane.cast(("runner",)), 5.0)
            self._free()
        code = command.finish()
        self.lane.expect_no_traceback(command)
        folder = folder or self.new_folder()
        if folder is None:
            if code == 0 or not command.said.strip():
                raise Violation(f"no run came of a start that exits {code} and says {command.said!r}")
            left = [path.name for path in self.lane.runs_dir.glob(".new-*")]
            if left:
                raise Violation(f"a start that was refused left {left}")
            return None
        if not wait_for(lambda: not self.lane.cast(("runner", "guardian", "watcher", "kernel")), 60.0):
            raise Violation(f"60 s after the fault there are {self.lane.cast()}")
        return folder

    def _look(self, checker: Checker, plan: Plan, killed: set[str], at: float) -> None:
        name = checker.folder.name
        still_full = plan.freed_after is None and plan.means != "checkpoint"
        if still_full:
            checker.files()
            shown = self.lane.grd("status", name, "--json")
            checker.expect(shown.code == 0, f"status on a full disk exits {shown.code}: {shown.said[-300:]}")
            state = shown.json["state"]
            checker.expect(state not in ("running", "queued"), f"on the full disk it is called {state}")
            if state != "completed":
                # Not to be refused only where somebody gave space back meanwhile.
                refused = self.lane.grd("resume", name)
                checker.expect(
                    refused.code == 69 or self.record(checker.folder)["attempt"] > shown.json["attempt"],
                    f"resume on a full disk exits {refused.code}: {refused.said[-300:]}",
                )
            checker.notebook(shown.json["attempt"], at, on_disk=False)
        self._free()
        status = self.lane.grd("status", name, "--json")
        checker.expect(status.code == 0, f"status exits {status.code}: {status.said[-300:]}")
        shown = status.json
        if not wait_for(lambda: not self.lane.cast(), 5.0):
            checker.problems.append(f"orphans: {self.lane.cast()}")
        checker.files()
        checker.ended(shown)
        attempt = shown["attempt"]
        for number in range(1, attempt + 1):
            at = self.lost_from.setdefault(number, at)
            self.on_full_disk.add(number)
            checker.notebook(number, at, on_disk=False)
        checker.checkpoints()
        allowed = {("completed", None), ("interrupted", "disk_full")}
        if "runner" in killed:
            allowed.add(("interrupted", "runner_lost"))
        if plan.means == "greedy":
            allowed.add(("interrupted", "runner_lost"))  # no block was left to tell the true cause in
        if killed:
            allowed |= {("interrupted", "kernel_died"), ("failed", "start_failed")}
        told = (shown["state"], shown["cause"])
        checker.expect(told in allowed, f"it is called {told}: {shown['detail']}")
