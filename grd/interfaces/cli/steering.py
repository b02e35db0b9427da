"""``grd stop`` and ``grd wait``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click

from grd import contract
from grd.errors import UsageError
from grd.files import read_json_lines
from grd.interfaces.cli import exit_codes
from grd.interfaces.cli.answer import Answer, AnsweringCommand
from grd.interfaces.cli.completion import run_argument
from grd.interfaces.cli.rendering import ProgressPrinter, describe_end, say
from grd.runs.events import view_of
from grd.runs.folder import RunFolder, find_run
from grd.runs.stop_request import ask_to_stop
from grd.settings import parse_duration
from grd.steps import run as runs
from grd.steps.following import is_under_way

POLL_SECONDS = 0.1
SETTLING_SECONDS = 20.0
"""Beyond the grace: the kernel's end is noticed, the notebook and the record are written."""

_runs_dir = click.option("--runs-dir", metavar="DIR", help="Where the runs lie. Default: experiments/.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command(cls=AnsweringCommand)
@run_argument(many=True)
@click.option("--now", is_flag=True, help="Kill at once, without time to save.")
@click.option(
    "--no-wait", is_flag=True, help="Return once the request is left, not when the runs have ended."
)
@_runs_dir
@_json
def stop(names: tuple[str, ...], now: bool, no_wait: bool, runs_dir: str | None, as_json: bool) -> Answer:
    """Ask each RUN to save and stop; after its grace period it is killed. It can be resumed later."""
    place = runs.runs_folder(runs_dir)
    folders = [find_run(place, name) for name in names]
    asked = []
    for folder in folders:
        if is_under_way(folder):
            instead = ask_to_stop(folder, contract.STOPPED, at_once=now)
            if instead is not None:
                say(instead)
            asked.append(folder)
        else:
            say(f"{folder.run_id} is not running")
    if not no_wait:
        for folder in asked:
            grace = 0.0 if now else float(runs.status_of(folder)["grace"])
            if not _wait_for([folder], grace + SETTLING_SECONDS, any_of=False):
                say(f"{folder.run_id} is still ending; see: grd status {folder.run_id}")
    return _answer([runs.status_of(folder) for folder in folders], as_json, {"schema": "grd.stop/1"})


@click.command(cls=AnsweringCommand)
@run_argument(many=True)
@click.option("--any", "any_of", is_flag=True, help="Until one of them has ended, rather than all.")
@click.option("--timeout", metavar="TIME", help="At most so long, such as 540 or 9m; then exit 124.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@_runs_dir
@_json
def wait(
    names: tuple[str, ...],
    any_of: bool,
    timeout: str | None,
    quiet: bool,
    runs_dir: str | None,
    as_json: bool,
) -> Answer:
    """Wait until each RUN has ended.

    Exit code: that of the run (of the worst, of several); 124 if the time ran out and a run goes on.
    """
    try:
        seconds = None if timeout is None else parse_duration(timeout)
    except ValueError as error:
        raise UsageError(f"--timeout: {error}") from None
    place = runs.runs_folder(runs_dir)
    folders = [find_run(place, name) for name in names]
    printer = ProgressPrinter(quiet=quiet, as_json=as_json)
    try:
        in_time = _wait_for(folders, seconds, any_of=any_of, look=_watch(folders, printer))
    finally:
        printer.close()
    shown = [runs.status_of(folder) for folder in folders]
    if in_time:
        ended = [run for run in shown if run["state"] in contract.ENDED_STATES]
        code = exit_codes.worst(exit_codes.of_run(run["state"], run["cause"]) for run in ended)
    else:
        say("the time is up and the run goes on; type the same command again")
        code = exit_codes.WAIT_TIMEOUT
    return _answer(shown, as_json, {"schema": "grd.wait/1", "timed_out": not in_time}, code)


def _watch(folders: list[RunFolder], printer: ProgressPrinter) -> Callable[[], None]:
    """Shows, whenever it is called, what is new; what came before only moves the bars."""
    names = {folder: folder.run_id if len(folders) > 1 else "" for folder in folders}
    positions: dict[RunFolder, int] = {}
    for folder, name in names.items():
        view = view_of(folder)
        positions[folder] = view.offset
        printer.catch_up(name, view)

    def look() -> None:
        for folder, name in names.items():
            for offset, event in read_json_lines(folder.events, positions[folder]):
                positions[folder] = offset
                printer.of(name)(event)

    return look


def _wait_for(
    folders: list[RunFolder],
    seconds: float | None,
    *,
    any_of: bool,
    look: Callable[[], None] = lambda: None,
) -> bool:
    give_up = None if seconds is None else time.monotonic() + seconds
    while True:
        going = [folder for folder in folders if is_under_way(folder)]
        look()
        if not going or (any_of and len(going) < len(folders)):
            return True
        if give_up is not None and time.monotonic() >= give_up:
            return False
        time.sleep(POLL_SECONDS)


def _answer(
    shown: list[dict[str, Any]], as_json: bool, head: dict[str, Any], code: int = exit_codes.OK
) -> Answer:
    lines = [line for run in shown for line in describe_end(run)]
    return Answer(document={**head, "runs": shown}, lines=lines, as_json=as_json, code=code)
