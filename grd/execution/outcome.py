"""How one execution of a notebook ended: a pure decision from what was seen."""

from __future__ import annotations

import errno
import re
import signal
from dataclasses import dataclass, field
from typing import Any

from grd import contract
from grd.execution import out_of_memory
from grd.settings import format_duration

_INTERRUPTIONS = ("ExperimentInterrupted", "KeyboardInterrupt")
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class CellError:
    """The error that ended a cell."""

    index: int
    execution_count: int | None
    name: str
    value: str

    def __str__(self) -> str:
        lines = _ANSI.sub("", self.value).strip().splitlines()
        message = f"{self.name}: {lines[0][:300]}" if lines else self.name
        shown = f" (In [{self.execution_count}])" if self.execution_count else ""
        return f"cell {self.index}{shown}: {message}"


@dataclass(frozen=True)
class Seen:
    """What was observed of one execution."""

    all_cells_ran: bool
    stop_reason: str | None = None
    killed: bool = False
    killed_at_once: bool = False
    cell_error: CellError | None = None
    cell_timeout: str | None = None
    kernel_returncode: int | None = None
    kernel_died: bool = False
    kernel_start_error: str | None = None
    storage_error: OSError | None = None
    stopped_in_cell: int | None = None
    last_call: bool = False
    """The cell had been asked to stop and was interrupted because the grace was nearly over."""
    guardian_lost: bool = False
    """The kernel's guardian was killed, and the kernel died with it."""
    guardian_silent: bool = False
    """It was given up because it stood still, not killed by somebody else."""
    oom: out_of_memory.Verdict | None = None
    """What is known of a death by SIGKILL."""
    grace: float | None = None
    """Seconds, where the grace ran out."""
    killed_at_exit: bool = False
    """The cells had ended, but the kernel had not when the grace ran out."""


@dataclass(frozen=True)
class Outcome:
    """State, cause and a line of detail for the record."""

    state: str
    cause: str | None
    detail: str | None = None
    oom: str | None = None
    stop: dict[str, Any] | None = None
    cells: dict[str, int] = field(default_factory=dict)


def storage_cause(error: OSError) -> str:
    """disk_full for a full disk or quota, storage for anything else."""
    return contract.DISK_FULL if error.errno in (errno.ENOSPC, errno.EDQUOT) else contract.STORAGE


def describe_exit(returncode: int | None) -> str:
    """``killed by SIGKILL`` or ``exit code 3``."""
    if returncode is None:
        return "it no longer answers"
    if returncode < 0:
        try:
            return f"killed by {signal.Signals(-returncode).name}"
        except ValueError:
            return f"killed by signal {-returncode}"
    return f"exit code {returncode}"


def judge(seen: Seen) -> Outcome:
    """State and cause; the first thing that went wrong decides, a stop that was asked for before all else."""
    if seen.kernel_start_error is not None and seen.stop_reason is None:
        return Outcome(contract.FAILED, contract.START_FAILED, seen.kernel_start_error)
    if seen.storage_error is not None:
        cause = storage_cause(seen.storage_error)
        if seen.stop_reason in (None, cause):
            return Outcome(
                contract.INTERRUPTED, cause, f"the notebook could not be saved: {seen.storage_error}"
            )
    if seen.stop_reason is not None:
        return Outcome(contract.INTERRUPTED, seen.stop_reason, _stop_detail(seen))
    if seen.kernel_died:
        where = f" in cell {seen.stopped_in_cell}" if seen.stopped_in_cell is not None else ""
        if seen.guardian_lost:
            why = "and its guardian did not answer" if seen.guardian_silent else "its guardian was killed"
            detail = f"the kernel died{where}{',' if seen.guardian_silent else ':'} {why}"
            return Outcome(contract.INTERRUPTED, contract.KERNEL_DIED, detail)
        return _judge_death(seen, where)
    if seen.cell_timeout is not None:
        return Outcome(contract.FAILED, contract.NOTEBOOK_ERROR, seen.cell_timeout)
    if seen.cell_error is not None:
        return _judge_cell_error(seen.cell_error, last=seen.all_cells_ran)
    return Outcome(contract.COMPLETED, None)


def _judge_cell_error(error: CellError, *, last: bool) -> Outcome:
    if error.name == "SystemExit" and error.value in ("", "0", "None"):
        if last:
            return Outcome(contract.COMPLETED, None)
        detail = f"cell {error.index} called sys.exit({error.value}); the cells after it never ran"
        return Outcome(contract.FAILED, contract.NOTEBOOK_ERROR, detail)
    if error.name in _INTERRUPTIONS:
        # Nobody asked the runner: the signal went to the kernel alone.
        polite = error.name == "ExperimentInterrupted" and "sigint" not in error.value.lower()
        return Outcome(contract.INTERRUPTED, contract.SIGTERM if polite else contract.SIGINT, str(error))
    return Outcome(contract.FAILED, contract.NOTEBOOK_ERROR, str(error))


def _judge_death(seen: Seen, where: str) -> Outcome:
    detail = f"the kernel died{where}: {describe_exit(seen.kernel_returncode)}"
    if seen.kernel_returncode != -signal.SIGKILL or seen.oom is None:
        return Outcome(contract.INTERRUPTED, contract.KERNEL_DIED, detail)
    if seen.oom.oom == out_of_memory.CONFIRMED:
        return Outcome(
            contract.INTERRUPTED,
            contract.OUT_OF_MEMORY,
            f"out of memory{where}: {seen.oom.detail}",
            seen.oom.oom,
        )
    return Outcome(contract.INTERRUPTED, contract.KERNEL_DIED, f"{detail}; {seen.oom.detail}", seen.oom.oom)


def _stop_detail(seen: Seen) -> str | None:
    if seen.killed_at_once:
        return "the kernel was killed at once, as asked; what was not saved by then is lost"
    if seen.kernel_start_error is not None:
        return "stopped before the first cell"
    over = "the grace period ran out" + (f" after {format_duration(seen.grace)}" if seen.grace else "")
    if seen.killed:
        return (
            f"{over} and the kernel was killed; what was not saved by then is lost "
            "(--grace or GRD_GRACE gives more time to save)"
        )
    if seen.last_call and seen.cell_error is not None and seen.cell_error.name == "KeyboardInterrupt":
        grace = format_duration(seen.grace or 0.0)
        return (
            f"the grace period of {grace} was too short and the cell was interrupted; "
            "what was not saved by then is lost (--grace or GRD_GRACE gives more time to save)"
        )
    if seen.killed_at_exit:
        return f"{over} while the kernel was still ending, and it was killed; its cells had ended"
    if seen.kernel_died:
        oom = f"; {seen.oom.detail}" if seen.oom is not None else ""
        return f"while stopping, the kernel died: {describe_exit(seen.kernel_returncode)}{oom}"
    if seen.cell_error is not None and seen.cell_error.name not in _INTERRUPTIONS:
        return f"while stopping, {seen.cell_error}"
    if seen.storage_error is not None:
        return f"the notebook could not be saved: {seen.storage_error}"
    return None
