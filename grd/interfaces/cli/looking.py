"""``grd status``, ``list``, ``logs``, ``result``: looking at runs. Loads neither papermill nor torch."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from grd import contract
from grd.errors import GrdError, UsageError
from grd.files import read_json_lines
from grd.interfaces.cli.answer import Answer, AnsweringCommand, surface
from grd.interfaces.cli.completion import run_argument
from grd.interfaces.cli.rendering import describe_end, format_number, say
from grd.interfaces.run_table import RunTable, row
from grd.runs import handover, listing, recovery, retry
from grd.runs.batch_folder import batch_folders
from grd.runs.folder import RunFolder, find_run
from grd.runs.model import RunRecord
from grd.steps import run as runs
from grd.steps.following import POLL_SECONDS, is_under_way
from grd.steps.reading import tail_of_cells, tail_of_file

_runs_dir = click.option("--runs-dir", metavar="DIR", help="Where the runs lie. Default: experiments/.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command(cls=AnsweringCommand)
@run_argument(required=False)
@click.option("--all", "everything", is_flag=True, help="All runs, also where %grd would show the latest.")
@_runs_dir
@_json
def status(run: str | None, everything: bool, runs_dir: str | None, as_json: bool) -> Answer:
    """What RUN is doing; without RUN, what runs, what can be resumed, what failed.

    Each comes with the next command to type. In Jupyter, without RUN, it is the run last started there.
    """
    if run is not None and everything:
        raise UsageError("name a RUN or give --all, not both")
    folder = runs.runs_folder(runs_dir)
    started_here = surface().last_run
    if run is not None:
        return _one(find_run(folder, run), as_json)
    if started_here is not None and not everything and RunFolder(started_here).record.exists():
        return _one(RunFolder(started_here), as_json)
    entries = listing.list_all(folder)
    _tell_of_other_versions([entry.read for entry in entries if entry.read is not None])
    found = handover.overview_of(entries)
    batches = _open_batches(folder)
    document = {
        "schema": "grd.status/1",
        "runs_dir": str(folder),
        "running": [row(record) for record in found.running],
        "resumable": [row(record) for record in found.resumable],
        "failed": [row(record) for record in found.failed],
        "completed": found.completed,
        "batches": batches,
    }
    if not entries and not batches:
        lines = [f"no runs in {folder} yet; start one: grd research NOTEBOOK"]
    else:
        lines = [
            *_section("Running", found.running),
            *_section("Can be resumed", found.resumable),
            *_section("Failed", found.failed),
            *_batch_section(batches),
            f"{found.completed} completed; see: grd list",
        ]
    return Answer(document=document, lines=lines, as_json=as_json)


def _open_batches(runs_dir: Path) -> list[dict[str, Any]]:
    """Batches under way, and those that can go on, each with the next command. Reads no run's record."""
    folders = list(batch_folders(runs_dir))
    if not folders:
        return []
    from grd.batch import view  # 0.1 s that projects without batches need not pay

    found = []
    for folder in folders:
        try:
            record = view.current_record(folder)
        except GrdError:
            continue
        if record.state not in (contract.RUNNING, contract.INTERRUPTED):
            continue
        verb = "wait" if record.state == contract.RUNNING else "resume"
        found.append(
            {
                "batch_id": record.batch_id,
                "state": record.state,
                "cause": record.cause,
                "detail": record.detail,
                "total": record.total,
                "next_command": f"grd batch {verb} {record.batch_id}",
                "folder": str(folder.path),
            }
        )
    return found


def _batch_section(batches: list[dict[str, Any]]) -> list[str]:
    lines = ["Batches:"] if batches else []
    for each in batches:
        because = f" ({each['cause']})" if each["cause"] else ""
        lines.append(f"  {each['batch_id']}  {each['state']}{because}, {each['total']} runs")
        if each["detail"]:
            lines.append(f"      {each['detail']}")
        lines.append(f"      next: {each['next_command']}")
    return lines


def _one(folder: RunFolder, as_json: bool) -> Answer:
    shown = runs.status_of(folder)
    _tell_of_other_versions([recovery.current_record(folder)])
    found, here = runs.Run(folder), surface()
    if here.panels is not None and here.shows_panels and not as_json:
        found = here.panels.of(found)
    return Answer(document=shown, lines=describe_end(shown), value=found, as_json=as_json)


def _tell_of_other_versions(records: Sequence[RunRecord]) -> None:
    for record in records:
        if record.written_by_another_version is not None:
            say(record.written_by_another_version)


def _section(title: str, records: Sequence[RunRecord]) -> list[str]:
    lines = [f"{title}:"] if records else []
    for record in records:
        because = f" ({record.cause})" if record.cause else ""
        lines.append(f"  {record.run_id}  {record.state}{because}")
        if record.detail:
            lines.append(f"      {record.detail}")
        retried = retry.text(retry.shown(RunFolder(Path(record.folder)), record))
        if retried is not None:
            lines.append(f"      retry: {retried}")
        lines.append(f"      next: {handover.next_command(record)}")
    return lines


@click.command("list", cls=AnsweringCommand)
@click.option("--state", type=click.Choice(contract.STATES), help="Only runs in this state.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many.")
@_runs_dir
@_json
def list_runs(state: str | None, limit: int, runs_dir: str | None, as_json: bool) -> Answer:
    """This project's runs, newest first."""
    folder = runs.runs_folder(runs_dir)
    entries = [entry for entry in listing.list_all(folder) if state is None or entry.state == state]
    shown = [pair for pair in listing.records(entries[:limit]) if state is None or pair[1].state == state]
    _tell_of_other_versions([record for _, record in shown])
    table = RunTable(shown, runs_dir=folder, total=len(entries))
    return Answer(document=table.to_dict(), lines=table.lines(), value=table, as_json=as_json)


@click.command(cls=AnsweringCommand)
@run_argument()
@click.option("--tail", type=click.IntRange(0), metavar="N", help="Only the last N lines.")
@click.option(
    "-f", "--follow", "following", is_flag=True, help="Go on with what is printed until the run ends."
)
@click.option("--runner", is_flag=True, help="What runner and kernel process said, rather than the cells.")
@_runs_dir
def logs(run: str, tail: int | None, following: bool, runner: bool, runs_dir: str | None) -> Answer:
    """What the cells of RUN printed, errors included; complete also while it runs.

    Their text as it is, so there is no --json; for JSON lines see: grd events.
    """
    folder = find_run(runs.runs_folder(runs_dir), run)
    attempt = folder.attempt(recovery.current_record(folder).attempt)
    if runner:
        parts = tail_of_file(attempt.log, lambda: following and is_under_way(folder))
    else:
        parts = tail_of_cells(attempt, lambda: following and is_under_way(folder))
    first = next(parts, None)
    if first is None:
        click.echo(f"grd: attempt {attempt.number} has no notebook yet; try --runner", err=True)
        return Answer()
    lines = first.splitlines(keepends=True)
    click.echo("".join(lines if tail is None else lines[len(lines) - min(tail, len(lines)) :]), nl=False)
    for part in parts:
        click.echo(part, nl=False)
    return Answer()


@click.command(cls=AnsweringCommand)
@run_argument()
@click.option("--since", type=click.IntRange(0), default=0, metavar="OFFSET", help="Only what came after it.")
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until the run ends.")
@_runs_dir
def events(run: str, since: int, following: bool, runs_dir: str | None) -> Answer:
    """The events of RUN as JSON lines. The "offset" of the last one is the --since of the next call."""
    folder = find_run(runs.runs_folder(runs_dir), run)
    position = since
    while True:
        under_way = following and is_under_way(folder)
        for offset, event in read_json_lines(folder.events, position):
            click.echo(json.dumps({**event, "offset": offset}, ensure_ascii=False))
            position = offset
        if not under_way:
            return Answer()
        time.sleep(POLL_SECONDS)


@click.command(cls=AnsweringCommand)
@run_argument()
@_runs_dir
@_json
def result(run: str, runs_dir: str | None, as_json: bool) -> Answer:
    """Metrics of RUN and where its notebook, checkpoints and record lie."""
    shown = runs.result_of(find_run(runs.runs_folder(runs_dir), run))
    because = f" ({shown['cause']})" if shown["cause"] else ""
    lines = [f"{shown['run_id']}: {shown['state']}{because}"]
    lines += [f"  {name:<20} {format_number(value)}" for name, value in shown["metrics"].items()]
    lines.append(f"  {'notebook':<20} {shown['output_notebook']}")
    if shown["checkpoint"]:
        lines.append(f"  {'checkpoint':<20} {shown['checkpoint']['path']}")
    lines.append(f"  {'folder':<20} {shown['folder']}")
    if shown["resume_command"]:
        lines.append(f"  {'next':<20} {shown['resume_command']}")
    return Answer(document=shown, lines=lines, as_json=as_json)
