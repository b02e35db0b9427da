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
from grd.batch.loop_state import Entry, LoopMemory
from grd.errors import ApprovalRequired, GrdError, ResourceUnavailable, UsageError
from grd.execution.notebooks import read_notebook
from grd.runs.changes import Changes
from grd.runs.model import now_iso
from grd.runs.retry import BY_REQUEST
from grd.runs.stop_request import ask_to_stop
from grd.settings import find_project_root, format_duration, load_settings
from grd.steps.request import check
from grd.steps.researcher import research
from grd.steps.resuming import resume
from grd.steps.run import Run, runs_folder, status

DONE, STOPPED, FAILURES, APPROVAL, BUDGET = "done", "stopped", "failures", "approval_required", "budget"
"""Why a loop ends."""

LONGEST_PAUSE_SECONDS = 300.0

_SIGNALS = {signal.SIGTERM: contract.SIGTERM, signal.SIGINT: contract.SIGINT}


@dataclass(frozen=True)
class LoopEnd:
    """How a loop ended: the reason, the same for people, and the cycles that are completed in all."""

    reason: str
    detail: str
    cycles: int


class _Ends(Exception):
    """The loop can not, or must not, go on."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _TryFailed(Exception):
    """This try of the cycle is over; the same cycle is tried again."""


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
        self.should_stop = False
        self._plan_source = plan
        self._runs_dir = runs_folder(runs_dir)
        self._on_note = on_note
        self._reason = contract.STOPPED
        self._at_once = False
        self._waits: list[Changes] = []
        self._guard = threading.RLock()
        self._ahead: threading.Thread | None = None
        self._ahead_cycle = 0
        self.plan = self._read_plan()

    @property
    def cycle_count(self) -> int:
        """Cycles that are completed, those of earlier loops with this memory included."""
        return int((self.memory.value or self.memory.read()).get("cycles") or 0)

    def stop(self, reason: str = contract.STOPPED, *, now: bool = False) -> None:
        """End the loop: what it runs is asked to save and stop; ``now`` kills it. Returns at once."""
        if not self.should_stop:
            self._reason = reason
        self._at_once = self._at_once or now
        self.should_stop = True
        for wait in list(self._waits):
            wait.wake()

    def run(self) -> LoopEnd:
        """Make cycles until there is a reason to end.

        Raises ResourceUnavailable if another loop has the memory, or that cannot be written.
        On the main thread SIGTERM and SIGINT stop it, the second one kills what it runs.
        """
        if self.dry_run:
            return self._rehearse()
        with self.memory.held(), self._listening():
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
        except _Ends as reason:
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
            self._end_if_asked()
            try:
                self._cycle(number)
            except _TryFailed as failure:
                self._after_failure(number, str(failure))
                continue
            more = self.max_cycles is None or number < self.max_cycles
            if more and self.plan.pause:
                self._sleep(loop_state.PAUSING, self.plan.pause)

    def _cycle(self, number: int) -> None:
        """Make one cycle, or what is left of it. Raises _TryFailed and _Ends."""
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
                self._make(entry, number, until)
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
            raise _Ends(FAILURES, f"cycle {number} failed, {failures} times in a row by now: {why}")
        seconds = full_jitter(failures, self.plan.retry_delay, LONGEST_PAUSE_SECONDS)
        self._say(
            f"cycle {number} failed ({failures} of {self.plan.max_failures}): {why}; "
            f"the same cycle goes on in {format_duration(max(0.1, seconds))}"
        )
        self._sleep(loop_state.WAITING, seconds)

    # --- one run -------------------------------------------------------------------------------------------

    def _make(self, entry: Entry, cycle: int, until: float) -> None:
        """Bring one run to its completion. Raises _TryFailed where it ended otherwise, _Ends."""
        self._end_if_asked()
        began = time.monotonic()
        self.memory.tell("step_start", cycle=cycle, step=entry["name"], phase=entry["phase"])
        try:
            run = self._start(entry)
            self._note(entry, run_id=run.id)
            self._say(f"cycle {cycle}: {entry['name']} is run {run.id}")
            in_time = self._see_to_end(run, until)
        except ApprovalRequired as error:
            raise _Ends(APPROVAL, f"{entry['name']}: {error}") from None
        except GrdError as error:
            raise _TryFailed(f"{entry['name']}: {error}") from None
        record = run.record
        seconds = round(entry["seconds"] + time.monotonic() - began, 3)
        self._note(entry, state=record.state, cause=record.cause, detail=record.detail, seconds=seconds)
        self.memory.tell(
            "step_end", cycle=cycle, step=entry["name"], run_id=run.id, state=record.state,
            cause=record.cause, seconds=seconds,
        )  # fmt: skip
        if record.state == contract.COMPLETED:
            return
        self._end_if_asked()
        because = f" ({record.cause})" if record.cause else ""
        told = f"{entry['name']}: run {run.id} is {record.state}{because}"
        if not in_time:
            raise _TryFailed(f"{told}: the cycle took longer than {format_duration(self.plan.cycle_timeout)}")
        if record.cause in (contract.APPROVAL_REQUIRED, contract.BUDGET):
            reason = APPROVAL if record.cause == contract.APPROVAL_REQUIRED else BUDGET
            raise _Ends(reason, f"{told}; a person types: {record.resume_command}")
        if record.cause in BY_REQUEST:
            raise _Ends(STOPPED, f"{told}: somebody stopped it")
        raise _TryFailed(f"{told}: {record.detail}" if record.detail else told)

    def _start(self, entry: Entry) -> Run:
        """The run of an entry: started, attached to, or resumed, whichever applies."""
        failed = self._failed_before(entry)
        if failed is not None:
            edited = None
            with contextlib.suppress(GrdError):
                if read_notebook(entry["notebook"]).sha256 != failed.record.notebook_sha256:
                    edited = entry["notebook"]
            return resume(failed, notebook=edited, wait=False, on_note=self._say)
        return research(
            entry["notebook"],
            entry["parameters"],
            timeout=entry["timeout"],
            budget=entry["budget"],
            max_attempts=entry["max_attempts"],
            kernel=entry["kernel"],
            name=entry["name"],
            key=entry["key"],
            runs_dir=self._runs_dir,
            wait=False,
            on_note=self._say,
        )

    def _failed_before(self, entry: Entry) -> Run | None:
        """The entry's run, if an earlier try has seen it fail: a key alone would only show it again."""
        if entry["run_id"] is None or entry["state"] != contract.FAILED:
            return None
        with contextlib.suppress(GrdError):
            run = status(entry["run_id"], runs_dir=self._runs_dir)
            if run.state == contract.FAILED:
                return run
        return None

    def _see_to_end(self, run: Run, until: float) -> bool:
        """Wait until no attempt is under way or to come; False if the cycle's time was up before."""
        asked = killed = False
        in_time = True
        with self._waiting(run.folder) as changes:
            while not run.wait(0.0):
                if time.monotonic() >= until and not self.should_stop:
                    in_time = False
                if (self.should_stop or not in_time) and not asked:
                    self._ask(run, self._reason if self.should_stop else contract.STOPPED)
                    asked = True
                if self._at_once and not killed:
                    self._ask(run, self._reason, at_once=True)
                    killed = True
                left = until - time.monotonic() if in_time else 1.0
                changes.wait(min(1.0, max(0.05, left)), run.record.runner)
        run.reap()
        return in_time

    def _ask(self, run: Run, reason: str, *, at_once: bool = False) -> None:
        try:
            instead = ask_to_stop(run.run_folder, reason, at_once=at_once)
        except ResourceUnavailable as error:
            instead = str(error)
        if instead is not None:
            self._say(instead)

    def _note(self, entry: Entry, **values: Any) -> None:
        with self._guard:
            entry |= values
            self.memory.save()

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
                    self._make(entry, number, until)
        except (_TryFailed, _Ends, GrdError, OSError) as error:
            # Its turn comes: then it is tried again, and counts.
            if not self.should_stop:
                self._say(f"cycle {number} could not be prepared yet: {error}")
                self.memory.tell("not_prepared", cycle=number, why=str(error))

    def _await_ahead(self, *, stop: bool = False) -> None:
        if self._ahead is None:
            return
        if stop:
            self.stop(self._reason)
        while self._ahead.is_alive():
            self._ahead.join(1.0)
        self._ahead = None

    # --- waiting, stopping, telling ------------------------------------------------------------------------

    def _sleep(self, state: str, seconds: float) -> None:
        until = time.monotonic() + seconds
        at = time.time() + seconds
        from datetime import UTC, datetime

        next_at = datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        with self._guard:
            self.memory.save(state=state, next_at=next_at)
        with self._waiting() as changes:
            while not self.should_stop and (left := until - time.monotonic()) > 0:
                changes.wait(left)

    @contextlib.contextmanager
    def _waiting(self, *folders: Path) -> Iterator[Changes]:
        with Changes(*folders) as changes:
            self._waits.append(changes)
            try:
                yield changes
            finally:
                self._waits.remove(changes)

    def _end_if_asked(self) -> None:
        if self.should_stop:
            raise _Ends(STOPPED, f"stopped ({self._reason}); the same command goes on with this cycle")

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
        memory = LoopMemory(self.memory.path)
        memory.value = {"loop_id": "dry", "current": None, "prepared": None} | self.memory.read()
        self._say(f"dry run of {self.plan.origin}: nothing is started or written")
        for number in range(made + 1, last + 1):
            self._say(f"=== cycle {number} (dry run) ===")
            for entry in memory.cycle(number, self.plan)["steps"]:
                check(entry["notebook"], entry["parameters"], kernel=entry["kernel"])
                given = "".join(f" {name}={value!r}" for name, value in entry["parameters"].items())
                cap = "" if entry["timeout"] is None else f", at most {format_duration(entry['timeout'])}"
                self._say(f"would run {entry['notebook']}{given}{cap}")
        return LoopEnd(DONE, "dry run", made)
