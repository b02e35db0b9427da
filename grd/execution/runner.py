"""The runner: the process that executes one attempt of a run and writes its record.

Started by `launch` in a session of its own, with the run's lock already held by an inherited descriptor, so
that there is no moment in which a live run looks dead: ``python -m grd.execution.runner FOLDER ATTEMPT FD``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from grd import contract
from grd.agreement.use import GrantInUse
from grd.errors import GrdError
from grd.estimation.live import probe_result, progress_with_interval
from grd.execution.gpu_turn import GpuTurn
from grd.execution.injected import injected_parameters
from grd.execution.launch import ensure_retrier
from grd.execution.outcome import Outcome, storage_cause
from grd.execution.slow_imports import import_jsonschema
from grd.execution.stopping import Stopper
from grd.files import atomic_write, read_json, write_json
from grd.runs import handover, last_word, leftovers, reserve, retry, store
from grd.runs.batch_folder import BATCHES, BatchFolder
from grd.runs.events import Digest, EventLog, view_of
from grd.runs.folder import RunFolder, process_marker
from grd.runs.liveness import HEARTBEAT_SECONDS
from grd.runs.model import now_iso, seconds_left
from grd.runs.processes import adopt_orphans, children, end_children, identity, reap
from grd.runs.recovery import resume_command
from grd.tracking.mlflow import follower
from grd.tracking.sampler import ResourceSampler

STORING_SECONDS = 1.0
"""Somebody else may hold the last block for a moment; a runner that waits longer is one that stays behind."""

HARDWARE_SECONDS = 3.0
"""A run shorter than the description of its machine waits so long for it: later attempts compare with it."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Runner:
    """One attempt, from taking over the record to writing its end."""

    def __init__(self, folder: RunFolder, attempt: int) -> None:
        self.folder = folder
        self.paths = folder.attempt(attempt)
        self.record = store.load(folder)
        self.attempt = self.record.current
        if self.attempt.number != attempt:
            raise RuntimeError(f"attempt {attempt} is not the newest of {folder.run_id}")
        self.events = EventLog(folder.events, attempt)
        self.began = time.monotonic()
        self._saving = threading.Lock()
        self._beating = threading.Event()
        self._hardware: threading.Thread | None = None
        self._grant = GrantInUse(self.record, self.attempt)
        self._mlflow: subprocess.Popen[bytes] | None = None
        self._gpus = GpuTurn(self.record, self.attempt)
        self._own_children: set[int] | None = None
        """Those that must outlive the kernel, once it is to be started."""
        self._resources = ResourceSampler(
            self.paths.resources,
            lambda message: self.events.write(contract.EVENT_WARNING, message=message),
        )
        seconds, reason = seconds_left(self.record, self.attempt.cap)
        self.stopper = Stopper(
            deadline=None,  # counts from the moment on in which it has its GPUs
            deadline_reason=reason,
            grace=self.record.grace,
            stop_file=folder.stop_file,
            signals=SIGNALS,
            on_event=self.events.write,
        )
        self.seconds = seconds

    def run(self) -> Outcome:
        """Execute the attempt; the outcome is in the record when this returns."""
        self.stopper.start()
        self._grant.watch(self.stopper.request)
        heart = threading.Thread(target=self._beat, name="grd-heartbeat", daemon=True)
        heart.start()
        try:
            outcome = self._begin_and_execute()
        except BaseException as error:
            _log(traceback.format_exc())
            outcome = _outcome_of_crash(error)
        finally:
            reap(process_marker(self.record.run_id, self.attempt.number))
        self._gpus.close()
        if self._hardware is not None:
            self._hardware.join(HARDWARE_SECONDS)
        if self._own_children is not None:
            end_children(spared=self._own_children)  # what guardian and watcher left, if both were killed
        self._end(outcome)
        self._beating.set()
        heart.join(2.0)
        self.stopper.close()
        self.events.close()
        return outcome

    def _begin_and_execute(self) -> Outcome:
        try:
            warning = self._gpus.wait(lambda: self.stopper.requested, self._note_waiting)
        finally:
            self.began = time.monotonic()  # waiting is no use of what was agreed to
            self.stopper.deadline = self.began + max(0.0, self.seconds)
        self._begin()
        if warning is not None:
            self.events.write(contract.EVENT_WARNING, message=warning)
        if self.stopper.requested:
            # Asked to stop before the first cell: say so, rather than start a kernel for nothing.
            return Outcome(contract.INTERRUPTED, self.stopper.reason, "stopped before the first cell")
        return self._execute()

    def _note_waiting(self, text: str) -> None:
        """The run is still queued, and says why. On a file system without flock a fresh record says too
        that somebody is there."""
        if self.record.detail != text:
            self.events.write(contract.EVENT_STATE, state=contract.QUEUED, cause=None, detail=text)
        self.record.detail = text
        with contextlib.suppress(OSError):
            store.save(self.folder, self.record, durable=False)

    def _begin(self) -> None:
        record, attempt = self.record, self.attempt
        # Fence first: from here on no older attempt can write a checkpoint.
        atomic_write(self.folder.fence, f"{attempt.number}\n")
        leftovers.sweep(self.folder)
        record.runner = identity()
        record.state = attempt.state = contract.RUNNING
        record.cause = attempt.cause = record.detail = attempt.detail = None
        record.resumable, record.resume_command = False, None
        record.ended_at = None
        record.started_at = attempt.started_at = now_iso()
        deadline = datetime.now(UTC) + timedelta(seconds=self.seconds)
        record.deadline = deadline.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        reserve.take(self.folder)
        self._prepare_checkpoints()
        self.events.write(contract.EVENT_STATE, state=contract.RUNNING, resume=attempt.resume)
        store.save(self.folder, record)
        store.link_output(self.folder, attempt.number)
        self._hardware = threading.Thread(target=self._describe_hardware, name="grd-hardware", daemon=True)
        self._hardware.start()
        self._resources.start()
        if record.mlflow is not None:
            self._mlflow = follower.start(self.folder, record)
        self._tell_state_page()

    def _tell_state_page(self) -> None:
        """The project's page is a courtesy: that it cannot be written never harms the run.

        Of many runs their coordinator tells, as long as it lives.
        """
        runs_dir = self.folder.path.parent
        batch = self.record.batch
        if batch is not None and BatchFolder(runs_dir / BATCHES / str(batch.get("id"))).has_coordinator():
            return
        try:
            handover.write_state_page(runs_dir)
        except (OSError, GrdError) as error:
            _log(f"STATE.md was left as it is: {error}")

    def _describe_hardware(self) -> None:
        """What this attempt runs on, beside the work; a resume on another machine is pointed out."""
        from grd.hardware import capture_hardware_profile

        profile = capture_hardware_profile(
            self.folder.path,
            checkpoint_dir=Path(self.record.checkpoint_dir),
            code_dir=Path(self.record.working_dir),
        )
        before = self._hardware_before() if self.attempt.resume else None
        with contextlib.suppress(OSError, ValueError):
            write_json(self.paths.hardware, profile, durable=False)
            write_json(self.folder.hardware, profile, durable=False)
        if before is not None:
            self._warn_of_another_machine(*before, profile)

    def _hardware_before(self) -> tuple[int, dict[str, Any]] | None:
        """The newest earlier attempt whose machine is known, and that machine's profile."""
        for number in range(self.attempt.number - 1, 0, -1):
            with contextlib.suppress(OSError, ValueError):
                return number, dict(read_json(self.folder.attempt(number).hardware))
        return None

    def _warn_of_another_machine(self, number: int, before: dict[str, Any], now: dict[str, Any]) -> None:
        from grd.hardware.comparison import machine_change

        change = machine_change(before, now)
        if change is not None:
            run, attempt = self.record.run_id, self.attempt.number
            message = (
                f"attempt {attempt} runs on another machine or software than attempt {number} did: {change}; "
                f"its results may differ; see: grd hardware diff {run}@{number} {run}@{attempt}"
            )
            self.events.write(contract.EVENT_WARNING, message=message)
            self.record.warnings.append(message)

    def _prepare_checkpoints(self) -> None:
        """A new lineage must not find later epochs of an older one."""
        from grd.experiment.checkpoint_folder import set_aside, sweep

        checkpoints = Path(self.record.checkpoint_dir)
        checkpoints.mkdir(parents=True, exist_ok=True)
        sweep(checkpoints)
        back_to = self.attempt.changes.get("from_epoch")
        if back_to is not None:
            moved = set_aside(checkpoints, after_epoch=int(back_to), reason=f"resumed from epoch {back_to}")
        elif not self.attempt.resume:
            moved = set_aside(checkpoints, reason=f"fresh start of {self.record.run_id}")
        else:
            return
        if moved:
            names = f"{len(moved)} checkpoint files of an earlier lineage"
            self.events.write(contract.EVENT_WARNING, message=f"{names} were moved aside in {checkpoints}")

    def _execute(self) -> Outcome:
        import logging

        import_jsonschema()
        import papermill
        from papermill.execute import remove_error_markers
        from papermill.iorw import write_ipynb

        from grd.execution.attempt import AttemptContext, NotebookInterrupted
        from grd.execution.notebooks import parse_notebook

        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
        record = self.record
        source = self.folder.newest_input(self.attempt.number)
        notebook = parse_notebook(source.read_text(encoding="utf-8"), str(source))
        notebook.metadata["kernelspec"] = {
            "name": record.kernel_name,
            "language": record.language,
            "display_name": notebook.metadata.get("kernelspec", {}).get("display_name", record.kernel_name),
        }
        notebook.metadata["grd"] = {
            "run_id": record.run_id,
            "attempt": self.attempt.number,
            "handles_signals": self.stopper.handles_signals,
        }
        context = AttemptContext(
            stopper=self.stopper,
            journal=self.paths.journal,
            environment=self._kernel_environment(),
            kernel_log=self.paths.log,
            max_output=self.record.max_output,
            on_warning=lambda message: self.events.write(contract.EVENT_WARNING, message=message),
            on_kernel=self._note_kernel,
            on_cell=lambda index, status, of: self.events.write(
                contract.EVENT_CELL, index=index, status=status, of=of
            ),
        )
        self._own_children = children()
        with contextlib.suppress(NotebookInterrupted):
            try:
                papermill.execute_notebook(
                    notebook,
                    str(self.paths.output).replace("{", "{{").replace("}", "}}"),  # papermill formats it
                    parameters=self._parameters(),
                    engine_name="grd",
                    kernel_name=record.kernel_name,
                    language=record.language or None,
                    progress_bar=False,
                    start_timeout=record.start_timeout,
                    cwd=record.working_dir,
                    grd_context=context,
                )
            except NotebookInterrupted:
                raise
            except Exception as error:
                if context.outcome is None:
                    raise
                if context.outcome.state == contract.COMPLETED and not isinstance(error, OSError):
                    # papermill takes every error output for a failure, also one that the cell's tag
                    # `raises-exception` expects, and marks the notebook with it.
                    write_ipynb(remove_error_markers(context.notebook), str(self.paths.output))
                # a cell's own time limit is a TimeoutError, and that is an OSError too; so is a kernel's
                # program that is not there
                ours = isinstance(error, TimeoutError) or context.outcome.cause == contract.START_FAILED
                if isinstance(error, OSError) and not ours:
                    return Outcome(contract.INTERRUPTED, storage_cause(error), f"the notebook: {error}")
        if context.outcome is None:
            raise RuntimeError("the engine ended without an outcome")
        return context.outcome

    def _parameters(self) -> dict[str, Any]:
        left = max(0.0, self.seconds - (time.monotonic() - self.began))
        injected = injected_parameters(self.record, self.attempt, seconds=left)
        return {**self.attempt.parameters, **self._gpus.parameters(), **injected}

    def _kernel_environment(self) -> dict[str, str]:
        checkpointing = self.record.checkpointing
        limits = {
            contract.ENV_MAX_LOST_WORK: checkpointing.get("max_lost_work"),
            contract.ENV_CHECKPOINT_BUDGET: checkpointing.get("checkpoint_budget"),
        }
        return {
            **{name: str(value) for name, value in limits.items() if value is not None},
            **self._gpus.environment(),
            contract.ENV_RUN_ID: self.record.run_id,
            contract.ENV_ATTEMPT: str(self.attempt.number),
            contract.ENV_EVENTS: str(self.folder.events),
            contract.ENV_STOP_FILE: str(self.folder.stop_file),
            contract.ENV_FENCE: str(self.folder.fence),
            contract.ENV_CHECKPOINT_DIR: self.record.checkpoint_dir,
            contract.ENV_DEADLINE: repr(self.began + self.seconds),
            contract.ENV_KERNEL_GRACE: repr(self.record.grace),
            contract.ENV_MARKER: f"{self.record.run_id}/{self.attempt.number}",
        }

    def _note_kernel(self, processes: dict[str, dict[str, Any]]) -> None:
        self._resources.watch(processes)
        self.record.note_processes(processes)
        with contextlib.suppress(OSError):
            store.save(self.folder, self.record, durable=False)

    def _beat(self) -> None:
        digest = Digest(self.folder)
        while True:
            try:
                self.folder.heartbeat.write_text(f"{os.getpid()}\n")
            except FileNotFoundError:
                self.stopper.request(contract.STORAGE)  # the run folder was deleted: nobody can read the rest
            except OSError as error:
                # A full disk may have room again before anything is to be written: the saver knows more.
                if error.errno == errno.EROFS:
                    self.stopper.request(contract.STORAGE)
            with contextlib.suppress(Exception):  # only a cache, and whatever somebody wrote into the events
                digest.keep_up()
            if self._beating.wait(HEARTBEAT_SECONDS):
                return

    def _end(self, outcome: Outcome) -> None:
        record, attempt = self.record, self.attempt
        leftovers.sweep_checkpoints(Path(record.checkpoint_dir))
        leftovers.sweep_exchanges(self.folder)
        reserve.give_back(self.folder)
        view = view_of(self.folder)
        detail = outcome.detail or self._grant.detail(outcome.cause)
        attempt.state, attempt.cause, attempt.detail = outcome.state, outcome.cause, detail
        attempt.stop, attempt.cells, attempt.oom = outcome.stop, outcome.cells, outcome.oom
        self._resources.close()
        attempt.resources = self._resources.summary()
        attempt.ended_at = now_iso()
        attempt.seconds = round(time.monotonic() - self.began, 3)
        self._grant.close(attempt.seconds)
        used = float(record.budget.get("used_seconds") or 0.0)
        record.budget["used_seconds"] = round(used + attempt.seconds, 3)
        record.state, record.cause, record.detail = outcome.state, outcome.cause, detail
        record.ended_at = attempt.ended_at
        record.note_processes({})
        record.resumable = contract.is_resumable(outcome.state, outcome.cause)
        left = progress_with_interval(view, record.estimate) or {}
        record.progress = view.progress if left.get("eta_seconds") is None else left
        record.metrics = view.metrics
        record.resume_command = resume_command(record)
        if record.estimate is not None and (probe := probe_result(view)) is not None:
            record.estimate["probe"] = probe
        record.checkpoint = view.checkpoint or record.checkpoint
        record.warnings = [*record.warnings, *(w for w in view.warnings if w not in record.warnings)]
        with contextlib.suppress(OSError, ValueError):
            history = [{"epoch": epoch, **values} for epoch, values in sorted(view.history.items())]
            write_json(
                self.folder.metrics,
                {
                    "schema": "grd.metrics/1",
                    "run_id": record.run_id,
                    "last": view.metrics,
                    "history": history,
                },
            )
        # The event comes before the record: whoever follows events must never find an older truth there.
        self.events.write(
            contract.EVENT_STATE, state=outcome.state, cause=outcome.cause, detail=outcome.detail
        )
        self._store_end()
        self._tell_state_page()

    def start_on_end_command(self) -> None:
        """Start the user's command in a session of its own; nobody waits for it."""
        record = self.record
        if not record.on_end:
            return
        environment = {
            **os.environ,
            contract.ENV_RUN_ID: record.run_id,
            "GRD_RUN_STATE": record.state,
            "GRD_RUN_CAUSE": record.cause or "",
            "GRD_RUN_FOLDER": str(self.folder.path),
        }
        with contextlib.suppress(OSError), open(self.paths.on_end_log, "ab") as log:
            subprocess.Popen(
                record.on_end,
                shell=True,  # the user's own command line
                cwd=record.working_dir,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _store_end(self) -> None:
        """Write the end of the run, on a full disk too: try for a while, then leave it to recovery."""
        give_up = time.monotonic() + STORING_SECONDS
        while True:
            try:
                store.save(self.folder, self.record)
                return
            except OSError as error:
                if storage_cause(error) != contract.DISK_FULL or time.monotonic() > give_up:
                    _log(f"run.json could not be written: {error}")
                    break
                time.sleep(0.1)
        if self.folder.path.is_dir():
            last_word.keep(self.folder, self.record)


def _log(text: str) -> None:
    """A line for runner.log, which lies on the very disk that may have failed."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _outcome_of_crash(error: BaseException) -> Outcome:
    if isinstance(error, OSError):
        return Outcome(contract.INTERRUPTED, storage_cause(error), f"the runner: {error}")
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return Outcome(contract.FAILED, contract.START_FAILED, f"the runner: {first}")


def main(arguments: list[str]) -> int:
    """Run one attempt; the exit status is 0 whenever the record says how it ended."""
    path, attempt, lock_fd = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    os.set_inheritable(lock_fd, False)  # ours alone: a kernel must not keep it alive
    adopt_orphans()
    runner = Runner(RunFolder(path), attempt)
    retried = retry.policy_of(runner.record) is not None
    if retried:
        ensure_retrier(runner.folder)
    runner.run()
    if retried and runner.record.state != contract.COMPLETED:
        ensure_retrier(runner.folder)  # somebody may have killed it meanwhile
    os.close(lock_fd)  # so that the command may already resume the run
    runner.start_on_end_command()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
