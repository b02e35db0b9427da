"""The retrier: the process that resumes a run after interruptions that nobody asked for.

Started by the runner of a run with ``--max-attempts``, in a session of its own, with retry.lock already held
by an inherited descriptor: ``python -m grd.steps.retrier FOLDER FD``. It outlives the runner, so that also
the death of that is retried; a runner that finds it gone starts another one. What it will do next lies in
retry.json, so that its own death is seen by whoever looks.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from grd import contract
from grd.agreement.use import LOOK_SECONDS, Revocation
from grd.backoff import full_jitter
from grd.errors import ConfigurationError, GrdError, ResourceUnavailable, RunBusy, RunNotFound
from grd.execution.launch import RunnerProcess
from grd.files import read_json
from grd.runs import recovery, retry, store
from grd.runs.changes import Changes, pause
from grd.runs.events import EventLog
from grd.runs.folder import RunFolder
from grd.runs.model import RunRecord
from grd.steps.following import attempt_is_under_way


class Retrier:
    """Sees a run through its attempts, until there is no reason for another one."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.changes = Changes(folder.path)
        self.process: RunnerProcess | None = None
        self._refusals = 0

    def run(self) -> None:
        """Until the run is completed, or nothing more will be tried, or its folder is gone."""
        while True:
            record = self._await_end()
            policy = retry.policy_of(record)
            if policy is None:
                return
            asked = take_request(self.folder)
            decision = retry.decide(record, policy, asked=asked)
            if decision.pause is None:
                self._give_up(record, decision.why)
                return
            if not self._go_on(record, policy, decision):
                return

    def _await_end(self) -> RunRecord:
        """The record, once no attempt is under way."""
        self._told(store.load(self.folder))
        while attempt_is_under_way(self.folder, self.process):
            retry.beat(self.folder)
            self.changes.wait(5.0, store.load(self.folder).runner)
            pause(0.05)  # what tells of a change tells of each of many
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10.0)
            self.process = None
        return recovery.current_record(self.folder)

    def _told(self, record: RunRecord) -> None:
        if record.state in (contract.QUEUED, contract.RUNNING):
            retry.write(self.folder, retry.WATCHING, record.attempt)

    def _go_on(self, record: RunRecord, policy: retry.Policy, decision: retry.Decision) -> bool:
        """Wait and start the next attempt; False if there will be none."""
        seconds = decision.pause or 0.0
        while True:
            next_at = time.time() + seconds
            retry.write(self.folder, retry.WAITING, record.attempt, decision.why, next_at=next_at)
            self._say(record.attempt, "waiting", decision.why, seconds=round(seconds, 3))
            revocation = Revocation.of(record.current)
            if self._somebody_else_went_on(record, seconds, revocation):
                return True
            asked = take_request(self.folder)
            if asked is not None:
                self._give_up(record, f"somebody asked it to stop ({asked})")
                return False
            if revocation is not None and revocation.has_come():
                self._give_up(record, revocation.text)
                return False
            try:
                return self._start()
            except RunBusy:
                return True
            except ResourceUnavailable as error:
                self._refusals += 1
                if self._refusals >= policy.max_attempts:
                    self._give_up(record, str(error))
                    return False
                seconds = full_jitter(self._refusals + 1, policy.delay, policy.longest)
                decision = retry.Decision(seconds, str(error))
            except GrdError as error:
                self._give_up(record, str(error))
                return False

    def _start(self) -> bool:
        from grd.steps.resuming import resume_folder

        started = resume_folder(
            self.folder, {}, None, None, None, None, None, None, None,
            allow_unknown=True, retrying=True, on_note=_log,
        )  # fmt: skip
        self.process = started.process
        return True

    def _somebody_else_went_on(
        self, record: RunRecord, seconds: float, revocation: Revocation | None
    ) -> bool:
        """Wait, until somebody asks for the end at the most; True if a person resumed the run meanwhile."""
        give_up = time.monotonic() + seconds
        while True:
            if store.load(self.folder).attempt != record.attempt:
                return True
            left = give_up - time.monotonic()
            if left <= 0 or self.folder.stop_file.exists():
                return False
            if revocation is not None and revocation.has_come():
                return False
            retry.beat(self.folder)
            self.changes.wait(min(left, 5.0 if revocation is None else LOOK_SECONDS))

    def _give_up(self, record: RunRecord, why: str) -> None:
        if record.state != contract.COMPLETED:
            self._say(record.attempt, "over", why)
        retry.write(self.folder, retry.OVER, record.attempt, why)

    def _say(self, attempt: int, state: str, why: str, **values: float) -> None:
        _log(f"after attempt {attempt}: {state}: {why}")
        with contextlib.suppress(OSError):
            log = EventLog(self.folder.events, attempt)
            log.write(contract.EVENT_RETRY, state=state, why=why, **values)
            log.close()


def take_request(folder: RunFolder) -> str | None:
    """Take what asked the ended attempt, or the wait after it, to stop; why, where that was a person.

    By renaming: a request that comes a moment later is not overlooked.
    """
    taken = folder.path / ".stop.taken.tmp"
    try:
        folder.stop_file.rename(taken)
        found = read_json(taken)
        taken.unlink(missing_ok=True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return contract.STOPPED  # somebody asked, whatever is in it
    reason = str(found.get("reason")) if isinstance(found, dict) else contract.STOPPED
    return reason if reason in retry.BY_REQUEST else None


def _log(text: str) -> None:
    with contextlib.suppress(OSError):
        print(json.dumps({"t": round(time.time(), 3), "message": text}), file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """See one run through its attempts."""
    folder, lock = RunFolder(Path(arguments[0])), int(arguments[1])
    os.set_inheritable(lock, False)  # no runner of ours may keep it alive
    with contextlib.suppress(RunNotFound, ConfigurationError):  # deleted, or damaged: nothing to go on with
        Retrier(folder).run()
    os.close(lock)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
