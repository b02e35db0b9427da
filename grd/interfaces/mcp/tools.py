"""The tools themselves: each works in a thread, so that the server answers meanwhile.

None of them agrees to anything on a person's behalf. What a cancelled call has begun goes on in its thread.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import anyio
from anyio import to_thread
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ResourceError, ToolError

from grd import contract
from grd.errors import GrdError, UsageError
from grd.interfaces.mcp import answers
from grd.runs import handover, listing, recovery, retry
from grd.runs.folder import RunFolder, find_run
from grd.runs.stop_request import ask_to_stop
from grd.steps.following import POLL_SECONDS, is_under_way
from grd.steps.reading import tail_of_cells, tail_of_file
from grd.steps.run import Run, result_of, runs_folder, status_of

WAIT_SECONDS = 45.0
NOTIFY_SECONDS = 5.0
"""A client that hears of progress waits on; more often is of no use to anybody."""

_logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


async def _in_thread(work: Callable[[], T]) -> T:
    """``work`` in a thread. A client that cancels, or is gone, is not made to wait for it."""
    result: T = await to_thread.run_sync(work, abandon_on_cancel=True)
    return result


def _telling(tool: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Errors reach the agent with their text: of any other exception the SDK would tell its name at most."""

    @functools.wraps(tool)
    async def told(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await tool(*args, **kwargs)
        except (GrdError, OSError) as error:
            raise ToolError(answers.error_text(error)) from error
        except Exception as error:
            _logger.exception("a defect of grd")
            raise ToolError(
                f"a defect of grd: {type(error).__name__}: {answers.error_text(error)}; "
                "the server's stderr has the traceback"
            ) from error

    return told


def _find(run: str) -> RunFolder:
    return find_run(runs_folder(), run)


def _under_way(run: Run, notes: list[str]) -> dict[str, Any]:
    """The answer about an attempt that was started; its runner is waited for, so that no zombie stays."""
    threading.Thread(target=run.reap, name=f"reap {run.id}", daemon=True).start()
    return {**answers.of_run(run.to_dict()), "notes": notes}


def _progress(folders: Sequence[RunFolder]) -> str:
    return answers.wait_text([status_of(folder) for folder in folders])


@_telling
async def run_start(
    notebook: str,
    parameters: dict[str, Any] | None = None,
    timeout: str | float | None = None,
    budget: str | float | None = None,
    key: str | None = None,
    name: str | None = None,
    kernel: str | None = None,
    checkpoint_dir: str | None = None,
    grace: str | float | None = None,
    max_attempts: int | None = None,
    gpus: int | None = None,
    allow_unknown: bool = False,
) -> dict[str, Any]:
    """Run a training notebook. Returns at once; the run goes on by itself, also after this server's end.

    Give a key of your own, such as "lr-0.01": a repeated call with it never starts a second run, but attaches
    to the one there is, resumes it, or shows its result. timeout ("30m", or seconds) caps one attempt, budget
    all attempts together; without either all attempts get 10 minutes. With max_attempts it is resumed by
    itself when its kernel or runner dies. gpus: so many are leased, and waited for; 0 hides them.
    Next: run_wait.
    """

    def start() -> dict[str, Any]:
        from grd.steps.researcher import research

        notes: list[str] = []
        run = research(
            notebook,
            parameters,
            timeout=timeout,
            budget=budget,
            key=key,
            name=name,
            kernel=kernel,
            checkpoint_dir=checkpoint_dir,
            grace=grace,
            max_attempts=max_attempts,
            gpus=gpus,
            allow_unknown=allow_unknown,
            wait=False,
            on_note=notes.append,
        )
        return _under_way(run, notes)

    return await _in_thread(start)


@_telling
async def run_resume(
    run: str,
    parameters: dict[str, Any] | None = None,
    timeout: str | float | None = None,
    budget: str | float | None = None,
    from_epoch: int | None = None,
    notebook: str | None = None,
    gpus: int | None = None,
) -> dict[str, Any]:
    """Go on with an interrupted or failed run from its last good checkpoint. Returns at once.

    After a failure give notebook: the corrected file. from_epoch goes back to the checkpoint after that
    epoch. Parameters, timeout, budget and gpus change only what they name. Next: run_wait.
    """

    def go_on() -> dict[str, Any]:
        from grd.steps.resuming import resume

        notes: list[str] = []
        going = resume(
            run,
            parameters,
            notebook=notebook,
            timeout=timeout,
            budget=budget,
            from_epoch=from_epoch,
            gpus=gpus,
            wait=False,
            on_note=notes.append,
        )
        return _under_way(going, notes)

    return await _in_thread(go_on)


@_telling
async def run_status(run: str | None = None) -> dict[str, Any]:
    """What a run is doing; without run, what is running, can be resumed or has failed in this project.

    Begin with this: every run comes with its next call. It never waits; to wait, use run_wait.
    """

    def look() -> dict[str, Any]:
        if run is not None:
            return answers.of_run(status_of(_find(run)))
        place = runs_folder()
        found = handover.overview_of(listing.list_all(place))
        groups = {"running": found.running, "resumable": found.resumable, "failed": found.failed}
        shown = {
            name: [
                {**record.to_dict(), "retry": retry.shown(RunFolder(Path(record.folder)), record)}
                for record in group
            ]
            for name, group in groups.items()
        }
        return answers.of_project(str(Path.cwd()), str(place), shown, found.completed)

    return await _in_thread(look)


@_telling
async def run_wait(
    runs: list[str] | str, ctx: Context, seconds: float = WAIT_SECONDS, any_of: bool = False
) -> dict[str, Any]:
    """Wait until the runs have ended (any_of: until one has), for 50 seconds at most.

    ended tells which it was; if it is false call it again, the runs go on meanwhile. Cheaper than asking
    run_status again and again. next is the call to make then.
    """
    limit, note = answers.seconds_to_wait(seconds)
    names = [runs] if isinstance(runs, str) else runs
    if not names:
        raise UsageError("runs: name one at least; run_status lists them")
    began = time.monotonic()
    folders = await _in_thread(lambda: [_find(name) for name in names])
    notified = began
    while True:
        going = await _in_thread(lambda: [folder for folder in folders if is_under_way(folder)])
        ended = not going or (any_of and len(going) < len(folders))
        now = time.monotonic()
        if ended or now - began >= limit:
            break
        if now - notified >= NOTIFY_SECONDS:
            notified = now
            text = await _in_thread(partial(_progress, going))
            await ctx.report_progress(round(now - began, 1), limit, text)
        await anyio.sleep(min(POLL_SECONDS, max(0.0, limit - (now - began))))
    told = await _in_thread(lambda: [answers.of_run(status_of(folder)) for folder in folders])
    own = None if seconds in (WAIT_SECONDS, 0) or note is not None else limit
    return {**answers.of_wait(told, ended, seconds=own, any_of=any_of), "note": note}


@_telling
async def run_logs(
    run: str,
    tail: int = 100,
    max_bytes: int = answers.LOG_BYTES,
    source: Literal["cells", "runner"] = "cells",
) -> dict[str, Any]:
    """The end of what a run's cells printed, errors included; source="runner": what runner and kernel said.

    At most the last tail lines and the last max_bytes bytes of them (30000 at most); the answer tells how
    much was left out and in which file all of it is.
    """

    def read() -> dict[str, Any]:
        folder = _find(run)
        attempt = folder.attempt(recovery.current_record(folder).attempt)
        if source == "runner":
            parts, file = tail_of_file(attempt.log, lambda: False), attempt.log
        else:
            parts, file = tail_of_cells(attempt, lambda: False), attempt.output
        text = next(parts, "")
        told = answers.of_text(text, tail=tail, max_bytes=max_bytes)
        return {"run_id": folder.run_id, "attempt": attempt.number, **told, "file": str(file)}

    return await _in_thread(read)


@_telling
async def run_stop(run: str, now: bool = False) -> dict[str, Any]:
    """Ask a run to save and stop; it can be resumed later. now kills it without time to save.

    Returns once the request is left; next is the run_wait that sees it end.
    """

    def ask() -> dict[str, Any]:
        folder = _find(run)
        notes: list[str] = []
        asked = is_under_way(folder)
        if asked:
            instead = ask_to_stop(folder, contract.STOPPED, at_once=now)
            notes += [instead] if instead is not None else []
        else:
            notes.append(f"{folder.run_id} is not running: there was nothing to stop")
        return {"asked": asked, **answers.of_run(status_of(folder)), "notes": notes}

    return await _in_thread(ask)


@_telling
async def run_result(run: str) -> dict[str, Any]:
    """Metrics of a run, its newest epochs, where notebook and checkpoint lie. For a run that has ended."""

    def read() -> dict[str, Any]:
        folder = _find(run)
        return answers.of_result(result_of(folder), status_of(folder))

    return await _in_thread(read)


async def record(run_id: str) -> str:
    """The whole record of a run as JSON: what ``grd status RUN --json`` prints."""

    def read() -> str:
        return json.dumps(status_of(_find(run_id)), indent=2, ensure_ascii=False, default=str)

    try:
        return await _in_thread(read)
    except GrdError as error:
        raise ResourceError(answers.error_text(error)) from error
