"""One execution of a notebook, from a prepared document to an outcome and a saved file.

Used by the runner, which keeps a record, and by ``papermill --engine grd``, which has only the output file.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillException
from papermill.iorw import write_ipynb
from papermill.log import logger
from papermill.utils import remove_args

from grd import contract
from grd.errors import ConfigurationError
from grd.execution import guarded_kernel, kernel_start, local_files, remote_files, unfinished
from grd.execution.client import GrdNotebookClient, ManagedNotebook
from grd.execution.out_of_memory import OomWatch, Verdict
from grd.execution.outcome import CellError, Outcome, Seen, judge, storage_cause
from grd.execution.output_limit import OutputLimit, readable_size
from grd.execution.saving import NotebookSaver
from grd.execution.stopping import KernelHandle, Stopper
from grd.runs import notebook_journal
from grd.runs.processes import catches_signal, identity
from grd.settings import parse_duration, parse_size

Number = TypeVar("Number", int, float)

CONFIGURATION = ("timeout", "grace", "max_output")


class NotebookInterrupted(PapermillException):
    """The execution was stopped; the outputs so far are saved. ``outcome`` says by what."""

    def __init__(self, outcome: Outcome) -> None:
        because = f"{outcome.cause}" + (f": {outcome.detail}" if outcome.detail else "")
        super().__init__(f"the notebook was interrupted ({because}); its outputs so far are saved")
        self.outcome = outcome

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.outcome,)  # pools and task queues hand exceptions on as pickles


@dataclass
class AttemptContext:
    """What the runner gives to an execution beyond the notebook, and where it finds the outcome."""

    stopper: Stopper
    journal: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    on_kernel: Callable[[dict[str, dict[str, Any]]], None] | None = None
    """Told the identities of kernel, guardian and watcher at their start, and an empty dict at the end."""
    on_cell: Callable[[int, str, int], object] | None = None
    on_warning: Callable[[str], object] | None = None
    kernel_log: Path | None = None
    """The file that stderr of this process is, where a kernel shares it."""
    max_output: int = contract.DEFAULT_MAX_OUTPUT_BYTES
    oom: OomWatch | None = None
    outcome: Outcome | None = None
    notebook: Any = None
    """The executed NotebookNode, for a caller that papermill raises past."""


def execute_for_papermill(
    nb: Any,
    kernel_name: str,
    output_path: str | None = None,
    progress_bar: Any = True,
    log_output: bool = False,
    autosave_cell_every: int = 30,
    *,
    grd_context: AttemptContext | None = None,
    grd_timeout: float | str | None = None,
    grd_grace: float | str | None = None,
    grd_max_output: int | str | None = None,
    **kwargs: Any,
) -> Any:
    """What papermill calls through the engine. See `GrdEngine`."""
    local_files.install()
    managed = ManagedNotebook(nb, output_path=output_path, progress_bar=progress_bar, log_output=log_output)
    destination = output_path
    if output_path is None and "input_path" in kwargs:
        # --no-request-save-on-cell-execute, or "-": papermill writes at the end, but not once we raise.
        destination = nb.metadata.get("papermill", {}).get("output_path")
    own = grd_context is None
    context = grd_context or _context_for_papermill(nb, output_path, grd_timeout, grd_grace, grd_max_output)
    claimed = _claim_output(output_path) if own else None
    if own:
        context.stopper.start()
    try:
        ending = _execute(managed, kernel_name, context, own, log_output=log_output, **kwargs)
    finally:
        if own:
            context.stopper.close()
        if claimed is not None:
            claimed.release()
    if managed.saver is None or managed.elsewhere:
        papermill_writes = ending is None and "input_path" in kwargs
        if not papermill_writes:
            _write_elsewhere(managed.nb, destination, ending)
    if ending is not None:
        raise ending
    return managed.nb


def _write_elsewhere(nb: Any, destination: str | None, ending: BaseException | None) -> None:
    """The last write to a store or stream, where papermill makes none. An ``ending`` is never hidden."""
    if destination is None:
        return
    try:
        write_ipynb(nb, destination)
    except Exception as error:
        if ending is None:
            raise
        logger.error(f"the notebook could not be written to {destination}: {_first_line(error)}")


def _claim_output(output_path: str | None) -> unfinished.Claim | None:
    """Keep others from writing the same output, and keep what an execution that was killed has left there.

    Raises NotebookBusy, and OSError if what was left cannot be kept.
    """
    target = local_files.local_target(output_path)
    if target is None:
        return None
    try:
        claimed = unfinished.claim(target)
    except OSError:
        return None  # whether the output can be written there is found out, and said, by its first write
    try:
        left = unfinished.keep_previous(target, claimed.previous)
    except BaseException:
        claimed.release()
        raise
    if left is not None:
        kept, found = left
        logger.warning(
            f"{target} was left by an execution that was killed: its {found.outputs} outputs are in {kept}"
        )
    return claimed


def _context_for_papermill(
    nb: Any,
    output_path: str | None,
    timeout: float | str | None,
    grace: float | str | None,
    max_output: int | str | None,
) -> AttemptContext:
    metadata = {k: v for k, v in nb.metadata.get("grd", {}).items() if k in CONFIGURATION}
    nb.metadata["grd"] = metadata  # the rest says how an earlier execution of this document ended
    deadline = _first(parse_duration, "timeout", timeout, metadata)
    grace_seconds = _first(parse_duration, "grace", grace, metadata)
    output_bytes = _first(parse_size, "max_output", max_output, metadata)
    stop_file = os.environ.get(contract.ENV_STOP_FILE)
    stopper = Stopper(
        deadline=None if deadline is None else time.monotonic() + deadline,
        grace=contract.DEFAULT_GRACE_SECONDS if grace_seconds is None else grace_seconds,
        stop_file=Path(stop_file) if stop_file else None,
        signals=(signal.SIGTERM, signal.SIGINT),
    )
    target = local_files.local_target(output_path)
    journal = unfinished.journal_beside(target) if target is not None else Path(os.devnull)
    environment = {
        contract.ENV_MARKER: f"papermill-{os.getpid()}-{secrets.token_hex(4)}",
        contract.ENV_KERNEL_GRACE: repr(stopper.grace),
    }
    if stopper.deadline is not None:
        environment[contract.ENV_DEADLINE] = repr(stopper.deadline)
    return AttemptContext(
        stopper=stopper,
        journal=journal,
        environment=environment,
        max_output=contract.DEFAULT_MAX_OUTPUT_BYTES if output_bytes is None else output_bytes,
    )


def _first(
    parse: Callable[[Any], Number], name: str, given: Any, metadata: Mapping[str, Any]
) -> Number | None:
    """The value given to the call, else in the notebook's metadata, else in GRD_*."""
    for value in (given, metadata.get(name), os.environ.get(f"GRD_{name.upper()}")):
        if value not in (None, ""):
            try:
                return parse(value)
            except (ValueError, TypeError, AttributeError) as error:
                raise ConfigurationError(f"grd's {name}: {error}") from None
    return None


def _execute(
    managed: ManagedNotebook, kernel_name: str, context: AttemptContext, own: bool, **kwargs: Any
) -> BaseException | None:
    """Run the cells and save; the exception that papermill's caller should see, if any."""
    stopper = context.stopper
    managed.notebook_start()
    context.notebook = managed.nb
    managed.nb.metadata["grd"] = {**managed.nb.metadata.get("grd", {}), "complete": False}
    saver = _start_saver(managed, context)
    managed.on_cell = context.on_cell
    client = _make_client(managed, kernel_name, context, **kwargs)
    client.on_kernel = lambda provisioner: _kernel_started(provisioner, context)
    client.on_warning = lambda message: _warn(message, context)
    seen = Seen(all_cells_ran=False)
    error: BaseException | None = None
    try:
        client.execute(env={**os.environ, **context.environment, contract.ENV_NONINTERACTIVE: "1"})
    except DeadKernelError as dead:
        seen, error = replace(seen, kernel_died=True), dead
    except CellTimeoutError as timeout:
        seen, error = replace(seen, cell_timeout=_first_line(timeout)), timeout
    except KeyboardInterrupt as interrupt:
        error = interrupt
        stopper.request(contract.SIGINT)
    except Exception as failure:
        if client.current_cell is not None:
            error = failure
            seen = replace(seen, kernel_died=_has_ended(client))
            if not seen.kernel_died and not stopper.requested:
                seen = replace(seen, cell_timeout=_first_line(failure))
        else:
            error = failure
            seen = replace(seen, kernel_start_error=kernel_start.describe(failure))
    finally:
        if getattr(client.popen, "ended_by", None) == contract.DEADLINE:
            stopper.request_deadline()  # the guardian kept it, since this process stood still
        _end_processes(client)
        client.kernel_has_ended()
        if context.on_kernel is not None:
            context.on_kernel({})
    ended_by = getattr(client.popen, "ended_by", None)
    seen = replace(
        seen,
        all_cells_ran=client.ran_all,
        stop_reason=stopper.reason,
        killed=stopper.killed,
        killed_at_once=stopper.killed_at_once,
        cell_error=_cell_error(client),
        cell_timeout=seen.cell_timeout or _interrupted_for_its_timeout(client),
        kernel_returncode=client.popen.poll() if client.popen is not None else None,
        stopped_in_cell=client.current_cell,
        guardian_lost=ended_by in (guarded_kernel.LOST, guarded_kernel.SILENT),
        guardian_silent=ended_by == guarded_kernel.SILENT,
        grace=stopper.grace,
        killed_at_exit=stopper.killed_at_exit,
        last_call=stopper.last_call,
    )
    seen = replace(seen, oom=_why_killed(seen, context))
    _warn_of_missing_output(client, context)
    context.outcome = _finish(managed, saver, seen, stopper)
    if own and stopper.reason == contract.SIGINT:
        return KeyboardInterrupt()  # papermill's command line turns it into its own "Aborted!"
    if isinstance(error, KeyboardInterrupt) or (seen.kernel_died and seen.stop_reason is None):
        return error
    if context.outcome.state != contract.INTERRUPTED:
        return error
    if own and seen.stop_reason is None and seen.cell_error and seen.cell_error.name == "KeyboardInterrupt":
        return None  # the cell raised it, and nobody asked for it: papermill judges it as any other error
    return NotebookInterrupted(context.outcome)


def _start_saver(managed: ManagedNotebook, context: AttemptContext) -> NotebookSaver | None:
    target = local_files.local_target(managed.output_path)
    if target is None:
        if managed.output_path is not None and local_files.is_remote(managed.output_path):
            managed.elsewhere = True
            managed.saver = remote_files.keep(managed.nb, managed.output_path)
        return managed.saver
    if not target.parent.is_dir():
        raise FileNotFoundError(f"output folder {target.parent} doesn't exist.")
    # The writer's own copy; outputs are shared with the client's document, everything else is not.
    copy = json.loads(json.dumps(managed.nb))
    managed.saver = NotebookSaver(
        copy,
        target,
        context.journal,
        write=local_files.write_file,
        on_trouble=lambda error: context.stopper.request(storage_cause(error)),
    )
    return managed.saver


def _make_client(
    managed: ManagedNotebook,
    kernel_name: str,
    context: AttemptContext,
    *,
    log_output: bool = False,
    stdout_file: Any = None,
    stderr_file: Any = None,
    start_timeout: float = contract.DEFAULT_START_TIMEOUT_SECONDS,
    execution_timeout: int | None = None,
    **kwargs: Any,
) -> GrdNotebookClient:
    extra = remove_args(["input_path", "timeout", "startup_timeout"], **kwargs)
    return GrdNotebookClient(
        managed,
        context.stopper,
        OutputLimit(context.max_output),
        timeout=execution_timeout if execution_timeout else kwargs.get("timeout"),
        startup_timeout=start_timeout,
        kernel_log=context.kernel_log,
        kernel_name=kernel_name,
        log=logger,
        log_output=log_output,
        stdout_file=stdout_file,
        stderr_file=stderr_file,
        **extra,
    )


def _kernel_started(provisioner: Any, context: AttemptContext) -> None:
    process: Any = getattr(provisioner, "process", None)
    pid = getattr(process, "pid", None)
    if context.on_kernel is not None and pid is not None:
        guardians = dict(zip(("guardian", "watcher"), getattr(process, "guardians", ()), strict=False))
        kernel = identity(pid)
        if getattr(process, "started", None) is not None:
            kernel["started"] = process.started  # as its parent saw it: it may have ended since
        context.on_kernel({"kernel": kernel, **guardians})
    if pid is None or not hasattr(provisioner, "kill_tree"):
        return
    context.oom = OomWatch(pid, provisioner.marker or "")

    def send(signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signum)

    def interrupt() -> None:
        manager = provisioner.parent
        if getattr(manager.kernel_spec, "interrupt_mode", "signal") == "message":
            message = manager.session.msg("interrupt_request", content={})
            socket = manager._create_connected_socket("control")
            try:
                manager.session.send(socket, message)
            finally:
                socket.close(linger=1000)
        else:
            send(signal.SIGINT)

    context.stopper.attach(
        KernelHandle(
            catches_sigterm=lambda: catches_signal(pid, signal.SIGTERM),
            terminate=lambda: send(signal.SIGTERM),
            interrupt=interrupt,
            kill=lambda: provisioner.kill_tree(),
        )
    )


def _end_processes(client: GrdNotebookClient) -> None:
    """Whatever the kernel left behind: children, sessions of their own, pools."""
    if client.provisioner is not None and hasattr(client.provisioner, "kill_tree"):
        client.provisioner.kill_tree()


def _why_killed(seen: Seen, context: AttemptContext) -> Verdict | None:
    """What a SIGKILL was for that nobody of grd has sent."""
    if context.oom is None:
        return None
    context.oom.close()
    sent = seen.killed or seen.killed_at_exit or seen.guardian_lost
    if not seen.kernel_died or sent or seen.kernel_returncode != -signal.SIGKILL:
        return None
    return context.oom.verdict()


def _warn_of_missing_output(client: GrdNotebookClient, context: AttemptContext) -> None:
    warnings = []
    if client.lost_output:
        warnings.append("the kernel printed faster than it can be read, and dropped a part of its output")
    if client.limit.left_out:
        limit = readable_size(context.max_output)
        warnings.append(f"the notebook keeps the first and the last of {limit} of output: --max-output")
    for warning in warnings:
        _warn(warning, context)


def _warn(message: str, context: AttemptContext) -> None:
    logger.warning(message)
    if context.on_warning is not None:
        context.on_warning(message)


def _has_ended(client: GrdNotebookClient) -> bool:
    return client.popen is not None and client.popen.poll() is not None


def _interrupted_for_its_timeout(client: GrdNotebookClient) -> str | None:
    """With nbclient's ``interrupt_on_timeout`` a cell's time limit ends in an error of the cell."""
    if client.timed_out is None or client.cell_error is None:
        return None
    return f"cell {client.current_cell} was interrupted: it ran longer than {client.timed_out} s"


def _cell_error(client: GrdNotebookClient) -> CellError | None:
    error = client.cell_error
    if error is None or client.current_cell is None:
        return None
    cell = client.nb.cells[client.current_cell]
    return CellError(client.current_cell, cell.execution_count, str(error.ename), str(error.evalue))


def _finish(managed: ManagedNotebook, saver: NotebookSaver | None, seen: Seen, stopper: Stopper) -> Outcome:
    """Judge, write the judgement into the notebook, and save it for the last time."""
    outcome = judge(seen)
    if outcome.state != contract.COMPLETED and managed.nb.metadata.papermill.get("exception") is None:
        managed.nb.metadata.papermill["exception"] = True
    managed.notebook_complete()
    for cell in managed.nb.cells:
        if cell.cell_type == "code":
            cell.outputs = notebook_journal.without_empty(cell.outputs)
    state = {"state": outcome.state, "cause": outcome.cause, "detail": outcome.detail, "complete": True}
    managed.nb.metadata["grd"].update(state)
    managed.put(
        {"op": notebook_journal.HEADER, "papermill": dict(managed.nb.metadata.papermill), "grd": state}
    )
    try:
        if saver is not None:
            saver.close()
            saver.discard_journal()
    except OSError as error:
        if not managed.elsewhere:
            outcome = judge(replace(seen, storage_error=error))
    return replace(
        outcome,
        stop=stopper.record.to_dict() if stopper.record is not None else None,
        cells=notebook_journal.count_cells(managed.nb),
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
