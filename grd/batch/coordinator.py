"""The coordinator: the process that starts the runs of a batch and sees each to its end.

Started by `launch_coordinator` in a session of its own, with the batch's lock already held by an inherited
descriptor: ``python -m grd.batch.coordinator FOLDER FD``. It may be killed at any moment: what it is about
to start is written down before, and a job is begun under a key (see `grd.batch.jobs`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from grd import contract
from grd.agreement.use import Revocation
from grd.batch import record as records
from grd.batch.jobs import make_job
from grd.batch.placements import Handle, Placement
from grd.batch.placements.local import LocalPlacement
from grd.batch.plan import Options, PlannedRun
from grd.batch.retrying import Retrying
from grd.batch.sharing import LEAST_MEMORY_BYTES, Share, has_room, share, thread_environment
from grd.batch.view import count_states, ends_of, look, outcome
from grd.errors import ApprovalRequired, GrdError, ResourceUnavailable
from grd.execution.launch import start_with_lock
from grd.files import read_json
from grd.hardware.limits import current_limits
from grd.runs import handover, recovery, resource_samples
from grd.runs.batch_folder import BatchFolder
from grd.runs.folder import RunFolder
from grd.runs.model import RunRecord, now_iso
from grd.runs.processes import identity
from grd.settings import find_project_root, load_settings

LOOK_SECONDS = 0.2
"""How soon a request to stop is heard; the ends of runs wake the coordinator by themselves."""

PAGE_SECONDS = 5.0
"""The project's STATE.md is brought up to date at most this often, whatever the number of runs."""

ROOM_SECONDS = 1.0
"""Between two looks at the memory, while there is too little for one more run."""

STOP_WAIT_SECONDS = 60.0

Again = Callable[[RunRecord, PlannedRun], float | None]
"""Asked at each end of a run: in how many seconds it is begun again, None where this was its end."""


def never(record: RunRecord, run: PlannedRun) -> float | None:
    """An end is an end: whoever resumes the batch goes on with it."""
    return None


class Coordinator:
    """One start of a batch, from its record to its end. ``again`` decides about ends of runs."""

    def __init__(self, folder: BatchFolder, placement: Placement, again: Again = never) -> None:
        self.folder = folder
        self.record = records.load(folder)
        self.options = Options(**self.record.options)
        self.events = records.BatchEvents(folder)
        self._placement = placement
        self._again = again
        self._runs = list(records.planned_runs(folder))
        self._pending = deque(self._unfinished())
        self._delayed: dict[int, float] = {}
        """Monotonic time before which a run is not begun again."""
        self._revocations: dict[int, Revocation] = {}
        """Of the grants that those which wait so were started with."""
        self._active: dict[int, Handle] = {}
        self._retried: set[int] = set()
        self._signalled: str | None = None
        self._asked: str | None = None
        self._killed = False
        self._failures = 0
        self._needed = self.options.memory or LEAST_MEMORY_BYTES
        self._next_room = self._next_page = 0.0
        self._share = self._divide()

    def run(self) -> None:
        """See the batch to its end; what came of it is in the record when this returns."""
        self._listen()
        self.record.state, self.record.cause, self.record.detail = contract.RUNNING, None, None
        self.record.started_at = self.record.started_at or now_iso()
        self.record.ended_at = None
        self.record.starts += 1
        self.record.coordinator = identity()
        self.record.jobs, self.record.threads = self._share.jobs, self._share.threads
        self.events.write(records.EVENT_BATCH, state=contract.RUNNING, total=len(self._runs))
        records.save(self.folder, self.record)
        if self._share.bound_by is not None:
            self._note(
                f"--jobs {self.options.jobs}: {self._share.jobs} at once here, for {self._share.bound_by}"
            )
        while self._active or self._pending:
            self._hear()
            self._heed_revocations()
            self._fill()
            if self._active:
                self._placement.wait(list(self._active.values()), LOOK_SECONDS)
            elif self._pending:
                time.sleep(LOOK_SECONDS)
            self._collect()
            self._tell_state_page()
        self._end()

    def _unfinished(self) -> list[int]:
        """What is to be begun, in order: an ended run of this batch only where it can go on."""
        shown = look(self.folder, self.record, self._runs)
        done = {contract.COMPLETED} if self.record.retry_failed else {contract.COMPLETED, contract.FAILED}
        if self.record.starts == 0:
            done = set()  # found again one by one, so that the events tell of each
        return [row.run.index for row in shown if row.state not in done or row.run_id is None]

    def _divide(self) -> Share:
        limits = current_limits()
        return share(
            wanted=self.options.jobs,
            runs=max(1, len(self._pending)),
            cores=limits.whole_cores(os.cpu_count()),
            memory=limits.memory_available(psutil.virtual_memory().available),
            needed=self.options.memory,
        )

    # --- requests ---

    def _listen(self) -> None:
        def note(signum: int, frame: FrameType | None) -> None:
            self._signalled = contract.SIGTERM if signum == signal.SIGTERM else contract.SIGINT

        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, note)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _hear(self) -> None:
        """Pass a request to stop on to every run under way, once; a second one to kill too."""
        reason, at_once = self._signalled, False
        with contextlib.suppress(OSError, ValueError, AttributeError):
            request = read_json(self.folder.stop_file)
            reason, at_once = str(request.get("reason")), bool(request.get("now"))
        if reason is None or (self._asked is not None and (self._killed or not at_once)):
            return
        self._asked, self._killed = self._asked or reason, at_once
        self._pending.clear()
        self._note("killing all runs" if at_once else f"stopping: {reason}")
        for handle in self._active.values():
            self._stop(handle, at_once=at_once)

    def _heed_revocations(self) -> None:
        """Forget what waits to be resumed on a grant that somebody has taken back."""
        for index, revocation in list(self._revocations.items()):
            if index not in self._pending:
                del self._revocations[index]
            elif revocation.has_come():
                del self._revocations[index]
                self._pending.remove(index)
                self._note(f"run {index + 1} is not resumed: {revocation.text}")

    def _stop(self, handle: Handle, *, at_once: bool) -> None:
        try:
            self._placement.stop(handle, contract.STOPPED, at_once=at_once)
        except ResourceUnavailable as error:
            self._note(str(error))

    # --- beginning ---

    def _fill(self) -> None:
        while self._pending and len(self._active) < self._share.jobs and self._has_room():
            now = time.monotonic()
            ready = next((i for i in self._pending if self._delayed.get(i, 0.0) <= now), None)
            if ready is None:
                return
            self._pending.remove(ready)
            self._begin(self._runs[ready])
            self._hear()
            self._collect(shows_only=True)

    def _begin(self, run: PlannedRun) -> None:
        job = make_job(
            self.folder,
            run,
            self.options,
            working_dir=self.record.working_dir,
            retry_failed=self.record.retry_failed,
            environment=thread_environment(self._share.threads, os.environ),
        )
        self._event(run, records.STARTING, durable=True, key=run.key)
        try:
            handle = self._placement.start(job)
        except Exception as error:  # whatever it is, the other runs go on
            if not isinstance(error, (GrdError, OSError)):
                traceback.print_exc()
            self._refuse(run, error)
            return
        self._active[run.index] = handle
        self._event(run, records.STARTED, run_id=handle["run_id"], action=handle["action"])

    def _refuse(self, run: PlannedRun, error: Exception) -> None:
        """It could not be begun, and nothing was: the others may."""
        approval = isinstance(error, ApprovalRequired)
        state = contract.DECLINED if approval else contract.FAILED
        cause = contract.APPROVAL_REQUIRED if approval else contract.START_FAILED
        self._event(run, records.REFUSED, state=state, cause=cause, detail=" ".join(str(error).split()))
        if not approval:
            self._failed(run)

    def _has_room(self) -> bool:
        """Whether memory is left for one more run, beside what those under way may still take."""
        if not self._active:
            return True
        now = time.monotonic()
        if now < self._next_room:
            return False
        room = has_room(
            available=current_limits().memory_available(psutil.virtual_memory().available),
            needed=self._needed,
            in_use=[_memory_of(handle) for handle in self._active.values()],
        )
        if not room:
            self._next_room = now + ROOM_SECONDS
        return room

    # --- ends ---

    def _collect(self, *, shows_only: bool = False) -> None:
        for index, handle in list(self._active.items()):
            if shows_only and handle["action"] != "show":
                continue
            if not self._placement.is_under_way(handle):
                del self._active[index]
                self._ended(self._runs[index], handle)

    def _ended(self, run: PlannedRun, handle: Handle) -> None:
        try:
            record = recovery.current_record(RunFolder(Path(handle["folder"])))
        except GrdError as error:
            self._event(
                run, records.ENDED, state=contract.CANCELLED, cause=None, detail=" ".join(str(error).split())
            )
            return
        self._event(
            run,
            records.ENDED,
            durable=True,
            run_id=record.run_id,
            state=record.state,
            cause=record.cause,
            detail=record.detail,
            seconds=record.budget.get("used_seconds"),
            metrics=record.metrics,
            action=handle["action"],
        )
        peak = (record.current.resources or {}).get("peak_memory_bytes")
        if self.options.memory is None and isinstance(peak, int):
            self._needed = max(self._needed, peak)
        if self._goes_on(run, record, handle):
            return
        if record.state == contract.FAILED:
            self._failed(run)

    def _goes_on(self, run: PlannedRun, record: RunRecord, handle: Handle) -> bool:
        """Begin it again: one whose runner was lost while nobody looked, or as it was agreed."""
        if self._asked is not None or record.state == contract.COMPLETED:
            return False
        lost = record.cause in (contract.RUNNER_LOST, contract.HOST_LOST)
        if handle["action"] == "attach" and lost and run.index not in self._retried:
            self._retried.add(run.index)
            self._pending.appendleft(run.index)
            return True
        delay = self._again(record, run)
        if delay is None:
            return False
        why = f"attempt {record.attempt} ended: {record.cause}"
        self._note(f"run {run.index + 1} is resumed in {delay:.1f} s: {why}")
        self._delayed[run.index] = time.monotonic() + delay
        revocation = Revocation.of(record.current)
        if revocation is not None:
            self._revocations[run.index] = revocation
        self._pending.append(run.index)
        return True

    def _failed(self, run: PlannedRun) -> None:
        self._failures += 1
        if self.options.fail_fast and self._pending:
            self._note(
                f"run {run.index + 1} failed, and --fail-fast: {len(self._pending)} runs are not started"
            )
            self._pending.clear()

    def _end(self) -> None:
        ends = ends_of(look(self.folder, self.record, self._runs, ended=True))
        state, cause = outcome(ends)
        if state == contract.INTERRUPTED and self._asked is not None:
            cause = self._asked
        self.record.state, self.record.cause = state, cause
        self.record.counts = count_states(ends)
        self.record.ended_at = now_iso()
        self.events.write(
            records.EVENT_BATCH, durable=True, state=state, cause=cause, counts=self.record.counts
        )
        records.save(self.folder, self.record)
        self._tell_state_page(at_once=True)
        self.events.close()

    # --- telling ---

    def _event(self, run: PlannedRun, step: str, *, durable: bool = False, **values: Any) -> None:
        self.events.write(records.EVENT_RUN, durable=durable, index=run.index, step=step, **values)

    def _note(self, message: str) -> None:
        with contextlib.suppress(OSError):
            self.events.write(records.EVENT_NOTE, message=message)

    def _tell_state_page(self, *, at_once: bool = False) -> None:
        """The runs of a batch leave it to their coordinator: each would read the records of all others."""
        now = time.monotonic()
        if now < self._next_page and not at_once:
            return
        self._next_page = now + PAGE_SECONDS
        try:
            handover.write_state_page(self.folder.runs_dir)
        except (OSError, GrdError) as error:
            print(f"STATE.md was left as it is: {error}", file=sys.stderr, flush=True)


def _memory_of(handle: Handle) -> int:
    """What a run takes now, as far as its samples tell."""
    attempts = sorted(
        (RunFolder(Path(handle["folder"])).path / "attempts").glob("*/resources.jsonl"),
        key=lambda path: path.stat().st_mtime,
    )
    newest = resource_samples.newest(attempts[-1]) if attempts else None
    if newest is None:
        return 0
    return int(newest.get("pss_bytes") or newest.get("rss_bytes") or 0)


def launch_coordinator(folder: BatchFolder, lock: int, working_dir: str) -> subprocess.Popen[bytes]:
    """Start the coordinator and hand it ``lock``, which is closed here. It survives the caller."""
    environment = {k: v for k, v in os.environ.items() if k not in contract.KERNEL_ENVIRONMENT}
    environment["PYTHONUNBUFFERED"] = "1"
    environment[contract.ENV_RUNNER] = folder.batch_id  # not a process of a run that it was started from
    command = [sys.executable, "-P", "-m", "grd.batch.coordinator", str(folder.path), str(lock)]
    return start_with_lock(command, lock, folder.log, environment, working_dir)


def _retrying(folder: BatchFolder) -> Again:
    """As the spec says, or the settings of now; a setting that cannot be read retries nothing."""
    record = records.load(folder)
    try:
        settings, _ = load_settings(find_project_root(Path(record.working_dir)))
    except GrdError as error:
        print(f"no run is retried: {error}", file=sys.stderr, flush=True)
        return never
    return Retrying(Options(**record.options), settings)


def main(arguments: list[str]) -> int:
    """Coordinate one batch; the exit status is 0 whenever the record says how it ended."""
    path, lock = Path(arguments[0]), int(arguments[1])
    os.set_inheritable(lock, False)  # ours alone: a runner must not keep it alive
    folder = BatchFolder(path)
    placement = LocalPlacement(lambda text: print(text, file=sys.stderr, flush=True))
    try:
        Coordinator(folder, placement, _retrying(folder)).run()
    except OSError:
        traceback.print_exc()
        return 1
    finally:
        placement.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
