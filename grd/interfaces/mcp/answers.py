"""What an agent is told: runs in few words, each with the call that comes next. Facts in, JSON values out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from grd import contract, errors
from grd.interfaces.cli.rendering import progress_text
from grd.runs import retry

LONGEST_WAIT_SECONDS = 50.0
"""Clients give up on a call after about 60 s."""

LOG_BYTES = 10_000
MOST_LOG_BYTES = 30_000
MOST_DETAIL = 1_000
MOST_RUNS = 20
MOST_EPOCHS = 50

_SHOWN = (
    "run_id",
    "state",
    "cause",
    "detail",
    "resumable",
    "attempt",
    "parameters",
    "timeout",
    "budget",
    "deadline",
    "progress",
    "metrics",
    "checkpoint",
    "retry",
    "warnings",
    "folder",
)
_LISTED = ("run_id", "state", "cause", "detail", "progress", "metrics", "retry")
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

_NEXT_HERE: tuple[tuple[type[Exception], str], ...] = (
    (errors.RunNotFound, "run_status without a run lists what there is"),
    (errors.NotebookNotFound, "a path counts from the project's folder, which run_status names"),
    (errors.RunBusy, "run_wait tells when it has ended"),
    (errors.ApprovalRequired, "only a person can agree to that: ask them, no tool here does"),
)


def of_run(shown: Mapping[str, Any]) -> dict[str, Any]:
    """What `status_of` says of a run, as far as it helps an agent, with ``next``."""
    told = _short({name: shown.get(name) for name in _SHOWN})
    if "heartbeat_seconds" in shown:
        told["heartbeat_seconds"] = shown["heartbeat_seconds"]
    return {**told, "next": next_call(shown)}


def of_project(
    folder: str, runs_dir: str, groups: Mapping[str, Sequence[Mapping[str, Any]]], completed: int
) -> dict[str, Any]:
    """All runs of a project, by what is to be done about them."""
    told = {name: _group(group) for name, group in groups.items()}
    if any(groups.values()):
        following = _call(None, None, "each run names its own next call; run_start begins another one")
    else:
        following = _call("run_start", None, "nothing runs, waits to be resumed or has failed")
    return {"project": folder, "runs_dir": runs_dir, **told, "completed": completed, "next": following}


def _group(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    runs = [
        {**_short({name: run.get(name) for name in _LISTED}), "next": next_call(run)}
        for run in group[:MOST_RUNS]
    ]
    return {"runs": runs, "left_out": len(group) - len(runs)}


def _short(told: dict[str, Any]) -> dict[str, Any]:
    """An error's text can be a whole table; run_logs has it."""
    detail = told["detail"]
    if detail is None or len(detail) <= MOST_DETAIL:
        return told
    return {**told, "detail": f"{detail[:MOST_DETAIL]} ... ({len(detail) - MOST_DETAIL} characters left out)"}


def next_call(shown: Mapping[str, Any]) -> dict[str, Any]:
    """The call to make about a run, and why; where only a person can help ``tool`` is null."""
    run, state, cause = shown["run_id"], shown["state"], shown["cause"]
    if state in (contract.QUEUED, contract.RUNNING):
        return _call("run_wait", {"runs": [run]}, f"it is {state}")
    if retry.comes(shown.get("retry")):
        return _call("run_wait", {"runs": [run]}, f"{retry.text(shown['retry'])}")
    if state == contract.COMPLETED:
        return _call("run_result", {"run": run}, "it is completed")
    if state == contract.FAILED and cause == contract.START_FAILED:
        return _call("run_logs", {"run": run, "source": "runner"}, "no kernel started: see why, then resume")
    if state == contract.FAILED:
        why = "see the error, correct the notebook, then run_resume with that notebook"
        return _call("run_logs", {"run": run}, why)
    if state != contract.INTERRUPTED:
        return _call(None, None, f"it is {state}: ask the person whether it should run at all")
    if cause == contract.REVOKED:
        return _call(None, None, "a person took their agreement back: ask them before anything else")
    if cause == contract.APPROVAL_REQUIRED or _is_used_up(shown.get("budget") or {}):
        typed = shown.get("resume_command")
        return _call(None, None, f"the agreed time is used up: ask the person to agree to more, by: {typed}")
    return _call("run_resume", {"run": run}, "it was interrupted: this goes on from its last checkpoint")


def _is_used_up(budget: Mapping[str, Any]) -> bool:
    seconds = budget.get("seconds")
    return seconds is not None and float(budget.get("used_seconds") or 0.0) >= float(seconds)


def _call(tool: str | None, arguments: dict[str, Any] | None, why: str) -> dict[str, Any]:
    return {"tool": tool, "arguments": arguments, "why": why}


def of_wait(
    told: Sequence[dict[str, Any]], ended: bool, *, seconds: float | None = None, any_of: bool = False
) -> dict[str, Any]:
    """Where the runs stand after a wait; ``next`` is the wait that goes on, or what the only run needs.

    A wait of so many ``seconds``, and for ``any_of`` the runs, goes on as it was asked for.
    """
    as_asked: dict[str, Any] = {} if seconds is None else {"seconds": seconds}
    as_asked |= {"any_of": True} if any_of and not ended else {}
    going = [
        run["run_id"]
        for run in told
        if run["state"] not in contract.ENDED_STATES or retry.comes(run.get("retry"))
    ]
    if going:
        why = "not all have ended: ask again, the runs go on"
        following = _call("run_wait", {"runs": going, **as_asked}, why)
    elif len(told) == 1:
        following = told[0]["next"]
    else:
        following = _call(None, None, "all have ended: each run names its own next call")
    return {"ended": ended, "runs": list(told), "next": following}


def wait_text(shown: Sequence[Mapping[str, Any]]) -> str:
    """How far the runs that are waited for are, for a progress notification."""
    return "; ".join(
        f"{run['run_id']}: {progress_text(run['progress']) if run.get('progress') else run['state']}"
        for run in shown
    )


def seconds_to_wait(asked: float) -> tuple[float, str | None]:
    """How long a call may wait, and what to say where that is less than asked. Raises UsageError."""
    if not asked >= 0:
        raise errors.UsageError(f"seconds: {asked} is no time to wait; give 0 to {LONGEST_WAIT_SECONDS:.0f}")
    if asked <= LONGEST_WAIT_SECONDS:
        return asked, None
    return LONGEST_WAIT_SECONDS, (
        f"seconds was cut to {LONGEST_WAIT_SECONDS:.0f}: clients give up on longer calls; "
        "call run_wait again, the run goes on meanwhile"
    )


def of_text(text: str, *, tail: int, max_bytes: int) -> dict[str, Any]:
    """The end of ``text`` without colours, and how much was left out before it. Raises UsageError."""
    if tail < 0 or max_bytes < 0:
        raise errors.UsageError("tail and max_bytes must not be negative")
    plain = _COLOUR.sub("", text)
    lines = plain.splitlines(keepends=True)
    kept = "".join(lines[len(lines) - min(tail, len(lines)) :])
    most = min(max_bytes, MOST_LOG_BYTES)
    data = kept.encode("utf-8", "replace")
    if len(data) > most:
        # A character that is cut in two goes as a whole.
        kept = data[len(data) - most :].decode("utf-8", "ignore")
    left_out = len(plain.encode("utf-8", "replace")) - len(kept.encode("utf-8", "replace"))
    return {
        "text": kept,
        "lines": len(kept.splitlines()),
        "bytes_left_out": left_out,
        "lines_left_out": len(lines) - len(kept.splitlines()),
    }


def of_result(result: Mapping[str, Any], shown: Mapping[str, Any]) -> dict[str, Any]:
    """What a run has come to, with its newest epochs."""
    history = list(result["history"])
    kept = history[max(0, len(history) - MOST_EPOCHS) :]
    told = {name: value for name, value in result.items() if name not in ("schema", "resume_command")}
    step = next_call(shown)
    if shown["state"] == contract.COMPLETED:
        step = _call(None, None, "nothing is left to do")
    return {**told, "history": kept, "epochs_left_out": len(history) - len(kept), "next": step}


def error_text(error: Exception) -> str:
    """One line: what happened, and what to do next with the tools at hand."""
    text = " ".join(str(error).split()) or type(error).__name__
    for kind, here in _NEXT_HERE:
        if isinstance(error, kind):
            return f"{text} (here: {here})"
    return text
