"""``grd status``, ``list``, ``logs``, ``result``: looking at runs. Loads neither papermill nor torch."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import click

from grd import contract
from grd.files import read_json_lines
from grd.interfaces.cli.rendering import describe_end, format_number, local_time, print_json, say
from grd.runs import handover, recovery
from grd.runs.folder import find_run
from grd.runs.model import RunRecord
from grd.steps import run as runs
from grd.steps.following import POLL_SECONDS, is_under_way
from grd.steps.reading import tail_of_cells, tail_of_file

_runs_dir = click.option("--runs-dir", metavar="DIR", help="Where the runs lie. Default: experiments/.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@click.argument("run", required=False)
@_runs_dir
@_json
def status(run: str | None, runs_dir: str | None, as_json: bool) -> None:
    """What RUN is doing; without RUN, what runs, what can be resumed, what failed.

    Each comes with the next command to type.
    """
    folder = runs.runs_folder(runs_dir)
    if run is not None:
        found_run = find_run(folder, run)
        _tell_of_other_versions([recovery.current_record(found_run)])
        shown = runs.status_of(found_run)
        if as_json:
            print_json(shown)
        else:
            click.echo("\n".join(describe_end(shown)))
        return
    entries = [record for _, record in recovery.all_current(folder)]
    _tell_of_other_versions(entries)
    found = handover.overview(entries)
    if as_json:
        print_json(
            {
                "schema": "grd.status/1",
                "runs_dir": str(folder),
                "running": [_row(record) for record in found.running],
                "resumable": [_row(record) for record in found.resumable],
                "failed": [_row(record) for record in found.failed],
                "completed": found.completed,
            }
        )
        return
    if not entries:
        click.echo(f"no runs in {folder} yet; start one: grd research NOTEBOOK")
        return
    _section("Running", found.running)
    _section("Can be resumed", found.resumable)
    _section("Failed", found.failed)
    click.echo(f"{found.completed} completed; see: grd list")


def _tell_of_other_versions(records: Sequence[RunRecord]) -> None:
    for record in records:
        if record.written_by_another_version is not None:
            say(record.written_by_another_version)


def _section(title: str, records: Sequence[RunRecord]) -> None:
    if not records:
        return
    click.echo(f"{title}:")
    for record in records:
        because = f" ({record.cause})" if record.cause else ""
        click.echo(f"  {record.run_id}  {record.state}{because}")
        if record.detail:
            click.echo(f"      {record.detail}")
        click.echo(f"      next: {handover.next_command(record)}")


@click.command("list")
@click.option("--state", type=click.Choice(contract.STATES), help="Only runs in this state.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many.")
@_runs_dir
@_json
def list_runs(state: str | None, limit: int, runs_dir: str | None, as_json: bool) -> None:
    """This project's runs, newest first."""
    folder = runs.runs_folder(runs_dir)
    entries = [r for _, r in recovery.all_current(folder) if state is None or r.state == state]
    _tell_of_other_versions(entries[:limit])
    if as_json:
        shown = [_row(record) for record in entries[:limit]]
        print_json({"schema": "grd.list/1", "runs_dir": str(folder), "total": len(entries), "runs": shown})
        return
    if not entries:
        click.echo(f"no runs in {folder}; start one: grd research NOTEBOOK")
        return
    width = max(len(record.run_id) for record in entries[:limit])
    click.echo(f"{'RUN':<{width}}  {'STATE':<11}  {'CAUSE':<17}  {'STARTED':<19}  METRICS")
    for record in entries[:limit]:
        metrics = " ".join(f"{name}={format_number(value)}" for name, value in record.metrics.items())
        started = local_time(record.started_at)
        state = f"{record.state:<11}  {record.cause or '-':<17}"
        click.echo(f"{record.run_id:<{width}}  {state}  {started:<19}  {metrics}".rstrip())
    if len(entries) > limit:
        click.echo(f"... {len(entries) - limit} more; --limit shows them")


def _row(record: RunRecord) -> dict[str, Any]:
    names = (
        "run_id",
        "state",
        "cause",
        "detail",
        "resumable",
        "attempt",
        "created_at",
        "started_at",
        "ended_at",
    )
    more = ("parameters", "metrics", "progress", "checkpoint", "resume_command", "folder")
    return {name: getattr(record, name) for name in (*names, *more)}


@click.command()
@click.argument("run")
@click.option("--tail", type=click.IntRange(0), metavar="N", help="Only the last N lines.")
@click.option(
    "-f", "--follow", "following", is_flag=True, help="Go on with what is printed until the run ends."
)
@click.option("--runner", is_flag=True, help="What runner and kernel process said, rather than the cells.")
@_runs_dir
def logs(run: str, tail: int | None, following: bool, runner: bool, runs_dir: str | None) -> None:
    """What the cells of RUN printed, errors included; complete also while it runs."""
    folder = find_run(runs.runs_folder(runs_dir), run)
    attempt = folder.attempt(recovery.current_record(folder).attempt)
    if runner:
        parts = tail_of_file(attempt.log, lambda: following and is_under_way(folder))
    else:
        parts = tail_of_cells(attempt, lambda: following and is_under_way(folder))
    first = next(parts, None)
    if first is None:
        click.echo(f"grd: attempt {attempt.number} has no notebook yet; try --runner", err=True)
        return
    lines = first.splitlines(keepends=True)
    click.echo("".join(lines if tail is None else lines[len(lines) - min(tail, len(lines)) :]), nl=False)
    for part in parts:
        click.echo(part, nl=False)


@click.command()
@click.argument("run")
@click.option("--since", type=click.IntRange(0), default=0, metavar="OFFSET", help="Only what came after it.")
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until the run ends.")
@_runs_dir
def events(run: str, since: int, following: bool, runs_dir: str | None) -> None:
    """The events of RUN as JSON lines. The "offset" of the last one is the --since of the next call."""
    folder = find_run(runs.runs_folder(runs_dir), run)
    position = since
    while True:
        under_way = following and is_under_way(folder)
        for offset, event in read_json_lines(folder.events, position):
            click.echo(json.dumps({**event, "offset": offset}, ensure_ascii=False))
            position = offset
        if not under_way:
            return
        time.sleep(POLL_SECONDS)


@click.command()
@click.argument("run")
@_runs_dir
@_json
def result(run: str, runs_dir: str | None, as_json: bool) -> None:
    """Metrics of RUN and where its notebook, checkpoints and record lie."""
    shown = runs.result_of(find_run(runs.runs_folder(runs_dir), run))
    if as_json:
        print_json(shown)
        return
    because = f" ({shown['cause']})" if shown["cause"] else ""
    click.echo(f"{shown['run_id']}: {shown['state']}{because}")
    for name, value in shown["metrics"].items():
        click.echo(f"  {name:<20} {format_number(value)}")
    click.echo(f"  {'notebook':<20} {shown['output_notebook']}")
    if shown["checkpoint"]:
        click.echo(f"  {'checkpoint':<20} {shown['checkpoint']['path']}")
    click.echo(f"  {'folder':<20} {shown['folder']}")
    if shown["resume_command"]:
        click.echo(f"  {'next':<20} {shown['resume_command']}")
