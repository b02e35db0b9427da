"""A run from the start of its runner on: launched, and followed to its end where the caller waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grd.execution.launch import RunnerProcess, StartRunner, start_runner
from grd.runs.folder import RunFolder
from grd.runs.stop_request import forget_request
from grd.steps.following import follow
from grd.steps.run import Run


@dataclass(frozen=True)
class Started:
    """A run that is under way, or was found to need nothing."""

    folder: RunFolder
    process: RunnerProcess | None
    """The runner, where this process started it."""
    position: int
    """Byte of events.jsonl from which on the events are news."""


OnEvent = Callable[[dict[str, Any]], None]
OnNote = Callable[[str], None]


def tell(on_note: OnNote | None, text: str) -> None:
    """Say ``text`` to whoever listens."""
    if on_note is not None:
        on_note(text)


def launch(
    folder: RunFolder,
    attempt: int,
    lock: int,
    environment: Mapping[str, str] | None = None,
    *,
    forget: bool = True,
    start: StartRunner = start_runner,
) -> Started:
    """Start the runner of ``attempt``, which gets ``lock``, and ``environment`` besides this process's.

    ``forget`` what stopped the last one: whoever starts this one wants it to run. ``start`` is how.
    """
    if forget:
        forget_request(folder)
    position = folder.events.stat().st_size if folder.events.exists() else 0
    return Started(folder, start(folder, attempt, lock, environment), position)


def see_to_end(
    started: Started,
    wait: bool,
    on_start: Callable[[Run], None] | None,
    on_event: OnEvent | None,
    on_note: OnNote | None,
) -> Run:
    """The run, once it has ended where ``wait`` says so."""
    run = Run(started.folder, process=started.process)
    if on_start is not None:
        on_start(run)
    if wait:
        follow(started.folder, started.process, since=started.position, on_event=on_event, on_note=on_note)
    return run
