"""Following a run from the process that started it: events out, stop requests in."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from grd import contract
from grd.errors import ConfigurationError, ResourceUnavailable, RunNotFound
from grd.execution.launch import RunnerProcess
from grd.runs import retry, store
from grd.runs.events import LiveView
from grd.runs.folder import RunFolder
from grd.runs.liveness import needs_recovery
from grd.runs.recovery import guardian_is_at_work
from grd.runs.stop_request import ask_to_stop

POLL_SECONDS = 0.1
REASONS = {signal.SIGINT: contract.SIGINT, signal.SIGTERM: contract.SIGTERM}


def follow(
    folder: RunFolder,
    process: RunnerProcess | None = None,
    *,
    since: int = 0,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    seconds: float | None = None,
    listen: bool = True,
) -> bool:
    """Pass on events from byte ``since`` until the runner has ended; False if ``seconds`` ran out before.

    ``process`` is the runner where this process started it. The first SIGINT or SIGTERM to this process
    asks the run to save and stop, the second kills it. The run outlives this process if that is killed. Off
    the main thread, or without ``listen``, signals are the caller's business.
    """
    view = LiveView(offset=since)
    give_up = None if seconds is None else time.monotonic() + seconds
    stop_requests: list[signal.Signals] = []
    heard = 0
    with listening(stop_requests) if listen else contextlib.nullcontext():
        while True:
            ended = not is_under_way(folder, process)
            for event in view.read(folder.events):
                if on_event is not None:
                    on_event(event)
            while heard < len(stop_requests):
                _pass_on(folder, stop_requests[heard], again=heard > 0, on_note=on_note)
                heard += 1
            if ended:
                return True
            if give_up is not None and time.monotonic() >= give_up:
                return False
            if process is None or process.poll() is not None:
                time.sleep(POLL_SECONDS)
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)


def is_under_way(folder: RunFolder, process: RunnerProcess | None = None) -> bool:
    """Whether an attempt is under way, or the next one will come by itself. Never waits."""
    # Asked twice: what waited for its next attempt at the first look may have begun it at the second.
    return (
        attempt_is_under_way(folder, process)
        or retry.is_pending(folder)
        or attempt_is_under_way(folder, process)
    )


def attempt_is_under_way(folder: RunFolder, process: RunnerProcess | None = None) -> bool:
    """Whether a runner works on this run now, or its guardian after it. Never waits."""
    if process is not None and process.poll() is None:
        return True
    try:
        record = store.load(folder)
    except (RunNotFound, ConfigurationError):
        if process is None:
            raise
        return False
    if record.state not in (contract.QUEUED, contract.RUNNING):
        return False
    # Where a retrier starts the attempts, the one that is under way may have another runner.
    if (process is None or record.retry is not None) and not needs_recovery(folder, record):
        return True
    return guardian_is_at_work(folder, record)


def _pass_on(
    folder: RunFolder, signum: signal.Signals, *, again: bool, on_note: Callable[[str], None] | None
) -> None:
    instead = None
    with contextlib.suppress(ResourceUnavailable):
        instead = ask_to_stop(folder, REASONS[signum], at_once=again)
    if on_note is not None and instead is not None:
        on_note(instead)
    if on_note is not None:
        on_note(
            "killing the run"
            if again
            else f"{signum.name}: asking the run to save and stop; once more kills it"
        )


@contextlib.contextmanager
def listening(received: list[signal.Signals]) -> Iterator[None]:
    """Collect what asks this process to end, in place of ending; off the main thread it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(signum))

    previous = {signum: signal.signal(signum, note) for signum in REASONS}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
