"""The loop: cycle after cycle of a plan's notebooks, until enough are made, it is stopped, or it fails.

A cycle is over once each of its runs is completed; until then the same cycle is tried again, and its runs are
resumed rather than started anew.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from grd import contract
from grd.backoff import full_jitter
from grd.batch import loop_state
from grd.batch.loop_plan import Plan, read_plan
from grd.batch.loop_state import LoopMemory
from grd.batch.loop_step import DONE, FAILURES, Ends, StepMaker, Stopping, TryFailed
from grd.errors import GrdError, ResourceUnavailable, UsageError
from grd.runs.changes import Changes
from grd.runs.model import iso, now_iso
from grd.settings import find_project_root, format_duration, load_settings
from grd.steps.request import check
from grd.steps.run import runs_folder

LONGEST_PAUSE_SECONDS = 300.0
REQUEST_SECONDS = 2.0
"""How soon a request to stop is heard where no system tells of it at once."""

_SIGNALS = {signal.SIGTERM: contract.SIGTERM, signal.SIGINT: contract.SIGINT}


@dataclass(frozen=True)
class LoopEnd:
    """How a loop ended: the reason, the same for people, and the cycles that are completed in all."""

    reason: str
    detail: str
    cycles: int


def memory_folder(memory_path: str | Path | None, plan: object = None) -> Path:
    """Where a loop remembers: the path given, else ``loops/NAME OF THE PLAN`` in the project."""
    if memory_path is not None:
        return Path(memory_path).expanduser().resolve()
    name = Path(plan).stem if isinstance(plan, (str, Path)) else "loop"
    return find_project_root(Path.cwd()) / "loops" / name


class ContinuousResearchLoop:
    """Runs the cycles of a plan. `run` returns when it is over; `stop` ends it from another thread.

    ``max_cycles`` counts all cycles that were made with this ``memory_path``, also by earlier loops: the same
    call goes on where the last one was killed; 0 makes none, None has no end. ``plan`` is a file, or a
    mapping with its words; without it, ``plan.yaml`` in ``memory_path``. ``dry_run`` checks the plan and says
    what would be run, and nothing is started or written.
    """

    def __init__(
        self,
        memory_path: str | Path | None = None,
        max_cycles: int | None = None,
        dry_run: bool = False,
        *,
        plan: str | Path | Mapping[str, Any] | None = None,
        runs_dir: str | Path | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        """Raises UsageError, NotFoundError or ConfigurationError for a plan that cannot be run."""
        if max_cycles is not None and max_cycles < 0:
            raise UsageError(f"--max-cycles: {max_cycles} is below 0")
        if plan is None:
            if memory_path is None:
                raise UsageError("name a plan, or a memory path with a plan.yaml in it; see: grd loop --help")
            plan = memory_folder(memory_path) / "plan.yaml"
        self.memory = LoopMemory(memory_folder(memory_path, plan))
        self.max_cycles = max_cycles
        self.dry_run = dry_run
        self._plan_source = plan
        self.runs_dir = runs_folder(runs_dir)
        self._on_note = on_note
        self._guard = threading.RLock()
        self._stopping = Stopping()
        self._steps = StepMaker(self.memory, self._guard, self._stopping, self.runs_dir, self._say)
        self._ahead: threading.Thread | None = None
        self._ahead_cycle = 0
        self.plan = self._read_plan()

    @property
    def cycle_count(self) -> int:
        """Cycles that are completed, those of earlier loops with this memory included."""
        return int((self.memory.value or self.memory.read()).get("cycles") or 0)

    @property
    def should_stop(self) -> bool:
        """Whether somebody has asked it to stop; set it, or call `stop`."""
        return self._stopping.asked

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        if value:
            self.stop()
        else:
            self._stopping.asked = self._stopping.at_once = False

    def stop(self, reason: str = contract.STOPPED, *, now: bool = False) -> None:
        """End the loop: what it runs is asked to save and stop; ``now`` kills it. Returns at once."""
        self._stopping.ask(reason, now=now)

    @property
    def plan_file(self) -> str | Path:
        """Where the plan is read from. Raises UsageError where it was given as a mapping."""
        if isinstance(self._plan_source, Mapping):
            raise UsageError("a loop that is to outlive this process needs a plan in a file")
        return self._plan_source

    def check(self) -> None:
        """See that each step of the next cycle that was not begun can be. Starts and writes nothing.

        Raises UsageError (ParameterError, NotebookError), NotFoundError or KernelUnavailable.
        """
        number = self.cycle_count + 1
        if self.should_stop or (self.max_cycles is not None and number > self.max_cycles):
            return
        for entry in self._as_remembered().cycle(number, self.plan)["steps"]:
            if entry["run_id"] is None:
                check(entry["notebook"], entry["parameters"], kernel=entry["kernel"])

    def _as_remembered(self) -> LoopMemory:
        """The memory for those who only look: nothing is taken over, and nothing made."""
        memory = LoopMemory(self.memory.path)
        memory.value = {"loop_id": "dry", "current": None, "prepared": None} | self.memory.read()
        return memory

    def run(self, *, lock: int | None = None) -> LoopEnd:
        """Make cycles until there is a reason to end. ``lock``: that of the memory, where it is held already.

        Raises what `check` does before anything is started, and ResourceUnavailable if another loop has the
        memory, or that cannot be written. ``grd loop --stop`` ends it wherever it runs; on the main thread
        SIGTERM and SIGINT do so too, the second one kills what it runs.
        """
        if self.dry_run:
            return self._rehearse()
        if lock is None:
            self.check()
        with self.memory.held(lock), self._listening(), self._hearing_requests():
            self._begin()
            try:
                return self._close(self._until_it_ends())
            except OSError as error:
                raise ResourceUnavailable(
                    f"{self.memory.path} cannot be written ({error.strerror or error}); "
                    "what was started goes on"
                ) from None

    def _begin(self) -> None:
        self.memory.begin(self.plan, self.max_cycles)
        made = self.memory.value["cycles"]
        of = "unlimited" if self.max_cycles is None else str(self.max_cycles)
        self._say(f"loop of {self.plan.origin}: {made} cycles made, max cycles: {of}")
        self.memory.tell("loop_start", cycles=made, max_cycles=self.max_cycles)

    def _until_it_ends(self) -> LoopEnd:
        try:
            return self._cycles()
        except Ends as reason:
            return LoopEnd(reason.reason, str(reason), self.cycle_count)
        finally:
            self._await_ahead(stop=True)

    def _close(self, end: LoopEnd) -> LoopEnd:
        self.memory.tell("loop_end", reason=end.reason, detail=end.detail, cycles=end.cycles)
        self.memory.save(
            state=loop_state.ENDED, reason=end.reason, detail=end.detail, next_at=None, ended_at=now_iso()
        )
        self._say(f"loop ended: {end.detail}; {end.cycles} cycles completed in all")
        return end

    def _cycles(self) -> LoopEnd:
        while True:
            number = self.cycle_count + 1
            if self.max_cycles is not None and number > self.max_cycles:
                return LoopEnd(DONE, f"max cycles of {self.max_cycles} reached", self.cycle_count)
            self._stopping.end_if_asked()
            try:
                self._cycle(number)
            except TryFailed as failure:
                self._after_failure(number, str(failure))
                continue
            more = self.max_cycles is None or number < self.max_cycles
            if more and self.plan.pause:
                self._sleep(loop_state.PAUSING, self.plan.pause)

    def _cycle(self, number: int) -> None:
        """Make one cycle, or what is left of it. Raises TryFailed and Ends."""
        if self._ahead_cycle <= number:
            self._await_ahead()
        with self._guard, contextlib.suppress(GrdError):
            self.plan = self._read_plan()  # edited meanwhile; a broken one waits until somebody mends it
        with self._guard:
            cycle = self.memory.cycle(number, self.plan)
            cycle["tries"] += 1
            cycle["started_at"] = cycle["started_at"] or now_iso()
            prepared = self.memory.value["prepared"]
            kept = None if prepared is not None and prepared["cycle"] <= number else prepared
            self.memory.save(state=loop_state.RUNNING, current=cycle, prepared=kept, next_at=None)
        again = f", try {cycle['tries']}" if cycle["tries"] > 1 else ""
        self._say(f"=== cycle {number}{again} ===")
        self.memory.tell("cycle_start", cycle=number, tries=cycle["tries"])
        began = time.monotonic()
        until = began + self.plan.cycle_timeout
        for entry in cycle["steps"]:
            if entry["phase"] == loop_state.STEP:
                self._look_ahead(number + 1)
            if entry["state"] != contract.COMPLETED:
                self._steps.make(entry, number, until - time.monotonic())
        took = round(time.monotonic() - began, 3)
        phases = {entry["name"]: entry["seconds"] for entry in cycle["steps"]}
        with self._guard:
            for name, seconds in phases.items():
                self.memory.count_time(name, seconds)
            self.memory.tell(
                "cycle_end", cycle=number, state=contract.COMPLETED, seconds=took, phases=phases,
                runs=[entry["run_id"] for entry in cycle["steps"]],
            )  # fmt: skip
            last = {"cycle": number, "seconds": took, "phases": phases, "ended_at": now_iso()}
            self.memory.save(cycles=number, current=None, failures=0, last=last)
        self._say(
            f"cycle {number} completed successfully: {len(phases)} notebooks in {format_duration(took)}"
        )

    def _after_failure(self, number: int, why: str) -> None:
        failures = int(self.memory.value["failures"]) + 1
        total = int(self.memory.value["failed_tries"]) + 1
        self.memory.tell("cycle_failed", cycle=number, failures=failures, why=why)
        self.memory.save(failures=failures, failed_tries=total)
        if failures >= self.plan.max_failures:
            raise Ends(FAILURES, f"cycle {number} failed, {failures} times in a row by now: {why}")
        seconds = full_jitter(failures, self.plan.retry_delay, LONGEST_PAUSE_SECONDS)
        self._say(
            f"cycle {number} failed ({failures} of {self.plan.max_failures}): {why}; "
            f"the same cycle goes on in {format_duration(max(0.1, seconds))}"
        )
        self._sleep(loop_state.WAITING, seconds)

    # --- the next cycle, meanwhile -----------------------------------------------------------------------

    def _look_ahead(self, number: int) -> None:
        """Begin to prepare the cycle ``number`` beside the one under way, unless that was done."""
        wanted = self.max_cycles is None or number <= self.max_cycles
        if not wanted or self._ahead is not None:
            return
        self._ahead_cycle = number
        self._ahead = threading.Thread(target=self._prepare, args=(number,), name="grd-prepare", daemon=True)
        self._ahead.start()

    def _prepare(self, number: int) -> None:
        """Check the next cycle's notebooks, and make those runs that prepare it."""
        try:
            with self._guard:
                cycle = self.memory.cycle(number, self.plan)
                self.memory.save(prepared=cycle)
            for entry in cycle["steps"]:
                check(entry["notebook"], entry["parameters"], kernel=entry["kernel"])
            self.memory.tell("checked", cycle=number)
            until = time.monotonic() + self.plan.cycle_timeout
            for entry in cycle["steps"]:
                if entry["phase"] == loop_state.PREPARE and entry["state"] != contract.COMPLETED:
                    self._steps.make(entry, number, until - time.monotonic())
        except (TryFailed, Ends, GrdError, OSError) as error:
            # Its turn comes: then it is tried again, and counts.
            if not self.should_stop:
                self._say(f"cycle {number} could not be prepared yet: {error}")
                self.memory.tell("not_prepared", cycle=number, why=str(error))

    def _await_ahead(self, *, stop: bool = False) -> None:
        if self._ahead is None:
            return
        if stop:
            self.stop(self._stopping.reason)
        while self._ahead.is_alive():
            self._ahead.join(1.0)
        self._ahead = None

    # --- waiting, stopping, telling ------------------------------------------------------------------------

    def _sleep(self, state: str, seconds: float) -> None:
        until = time.monotonic() + seconds
        next_at = iso(time.time() + seconds)
        with self._guard:
            self.memory.save(state=state, next_at=next_at)
        with self._stopping.waiting() as changes:
            while not self.should_stop and (left := until - time.monotonic()) > 0:
                changes.wait(left)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def hear(signum: int, frame: FrameType | None) -> None:
            self.stop(_SIGNALS[signal.Signals(signum)], now=self.should_stop)

        previous = {signum: signal.signal(signum, hear) for signum in _SIGNALS}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    @contextlib.contextmanager
    def _hearing_requests(self) -> Iterator[None]:
        """See to it that a request that somebody leaves in the memory is heard."""
        over = False

        def hear() -> None:
            while not over:
                asked = self.memory.request()
                if asked is not None and (not self.should_stop or (asked[1] and not self._stopping.at_once)):
                    self.stop(asked[0], now=asked[1])
                changes.wait(REQUEST_SECONDS)

        with Changes(self.memory.path) as changes:
            thread = threading.Thread(target=hear, name="grd-requests", daemon=True)
            thread.start()
            try:
                yield
            finally:
                over = True
                changes.wake()
                thread.join()

    def _say(self, text: str) -> None:
        if not self.dry_run:
            self.memory.note(text)
        if self._on_note is not None:
            self._on_note(text)

    def _read_plan(self) -> Plan:
        settings, _ = load_settings(find_project_root(Path.cwd()))
        return read_plan(self._plan_source, settings)

    def _rehearse(self) -> LoopEnd:
        """Check every step of the cycles to come, and say what would be run."""
        made = self.cycle_count
        # Without an end one cycle stands for all.
        last = made + 1 if self.max_cycles is None else self.max_cycles
        memory = self._as_remembered()
        self._say(f"dry run of {self.plan.origin}: nothing is started or written")
        for number in range(made + 1, last + 1):
            self._say(f"=== cycle {number} (dry run) ===")
            for entry in memory.cycle(number, self.plan)["steps"]:
                check(entry["notebook"], entry["parameters"], kernel=entry["kernel"])
                given = "".join(f" {name}={value!r}" for name, value in entry["parameters"].items())
                caps = [seconds for seconds in (entry["timeout"], entry["budget"]) if seconds is not None]
                cap = f", at most {format_duration(min(caps))}" if caps else ""
                self._say(f"would run {entry['notebook']}{given}{cap}")
        return LoopEnd(DONE, "dry run", made)
