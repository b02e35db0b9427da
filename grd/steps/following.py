"""Following a run from the process that started it: events out, stop requests in."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from grd import contract
from grd.runs.events import LiveView
from grd.runs.folder import RunFolder
from grd.runs.stop_request import ask_to_stop

POLL_SECONDS = 0.1
_REASONS = {signal.SIGINT: contract.SIGINT, signal.SIGTERM: contract.SIGTERM}


def follow(
    folder: RunFolder,
    process: subprocess.Popen[bytes],
    *,
    since: int = 0,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> None:
    """Pass on events from byte ``since`` until the runner has ended.

    The first SIGINT or SIGTERM to this process asks the run to save and stop, the second kills it. The run
    outlives this process if that is killed. Off the main thread signals are the caller's business.
    """
    view = LiveView(offset=since)
    stop_requests: list[signal.Signals] = []
    heard = 0
    with _listening(stop_requests):
        while True:
            ended = process.poll() is not None
            for event in view.read(folder.events):
                if on_event is not None:
                    on_event(event)
            while heard < len(stop_requests):
                _pass_on(folder, stop_requests[heard], again=heard > 0, on_note=on_note)
                heard += 1
            if ended:
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)


def _pass_on(
    folder: RunFolder, signum: signal.Signals, *, again: bool, on_note: Callable[[str], None] | None
) -> None:
    with contextlib.suppress(OSError):
        ask_to_stop(folder, _REASONS[signum], at_once=again)
    if on_note is not None:
        on_note(
            "killing the run"
            if again
            else f"{signum.name}: asking the run to save and stop; once more kills it"
        )


@contextlib.contextmanager
def _listening(received: list[signal.Signals]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(signum))

    previous = {signum: signal.signal(signum, note) for signum in _REASONS}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
