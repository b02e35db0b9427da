"""Following a batch from the process that started it, or from any other: events out, requests to stop in."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

from grd.batch.stopping import ask_batch_to_stop, runs_under_way, stop_runs
from grd.errors import ResourceUnavailable
from grd.files import read_json_lines
from grd.runs.batch_folder import BatchFolder
from grd.steps.following import REASONS, listening

POLL_SECONDS = 0.1

OnEvent = Callable[[dict[str, Any]], None]
OnNote = Callable[[str], None]


def follow(
    folder: BatchFolder,
    process: subprocess.Popen[bytes] | None = None,
    *,
    since: int = 0,
    on_event: OnEvent | None = None,
    on_note: OnNote | None = None,
    seconds: float | None = None,
    listen: bool = True,
) -> bool:
    """Pass on the events from byte ``since`` until the coordinator has ended; False if ``seconds`` ran out.

    The first SIGINT or SIGTERM to this process asks the batch to save and stop, the second kills its runs.
    The batch outlives this process if that is killed.
    """
    position = since
    give_up = None if seconds is None else time.monotonic() + seconds
    requests: list[signal.Signals] = []
    heard = 0
    with listening(requests) if listen else contextlib.nullcontext():
        while True:
            ended = not is_coordinated(folder, process)
            for offset, event in read_json_lines(folder.events, position):
                position = offset
                if on_event is not None:
                    on_event(event)
            while heard < len(requests):
                _pass_on(folder, requests[heard], again=heard > 0, on_note=on_note)
                heard += 1
            if ended:
                return True
            if give_up is not None and time.monotonic() >= give_up:
                return False
            if process is None:
                time.sleep(POLL_SECONDS)
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)


def wait_for_stop(folder: BatchFolder, seconds: float, *, at_once: bool = False) -> bool:
    """After a request: until neither coordinator nor a run is left; False if ``seconds`` ran out before.

    A coordinator that is killed before it could pass the request on does not keep its runs going.
    """
    give_up = time.monotonic() + seconds
    asked = False
    while True:
        if not folder.has_coordinator():
            if not runs_under_way(folder):
                return True
            if not asked:
                asked = True
                stop_runs(folder, at_once=at_once)
        if time.monotonic() >= give_up:
            return False
        time.sleep(POLL_SECONDS)


def is_coordinated(folder: BatchFolder, process: subprocess.Popen[bytes] | None = None) -> bool:
    """Whether a coordinator works on it now. Never waits."""
    if process is not None and process.poll() is None:
        return True
    return folder.has_coordinator()


def _pass_on(folder: BatchFolder, signum: signal.Signals, *, again: bool, on_note: OnNote | None) -> None:
    with contextlib.suppress(ResourceUnavailable):
        ask_batch_to_stop(folder, REASONS[signum], at_once=again)
    if on_note is not None:
        on_note(
            "killing all runs"
            if again
            else f"{signum.name}: asking all runs to save and stop; once more kills them"
        )
