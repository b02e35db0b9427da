"""``grd rm`` and ``grd gc``: nothing is deleted unasked, and never what is in use."""

from __future__ import annotations

import click

from grd.interfaces.cli.answer import Answer, AnsweringCommand
from grd.interfaces.cli.completion import run_argument
from grd.runs.folder import find_run
from grd.runs.removal import Removed, collect_garbage, remove_run
from grd.steps import run as runs

_runs_dir = click.option("--runs-dir", metavar="DIR", help="Where the runs lie. Default: experiments/.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_dry_run = click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")


@click.command(cls=AnsweringCommand)
@run_argument(many=True)
@_dry_run
@_runs_dir
@_json
def rm(names: tuple[str, ...], dry_run: bool, runs_dir: str | None, as_json: bool) -> Answer:
    """Delete each RUN with its checkpoints in the run's folder. A run under way is refused: stop it first."""
    place = runs.runs_folder(runs_dir)
    folders = [find_run(place, name) for name in names]
    removed = [remove_run(folder, dry_run=dry_run) for folder in folders]
    return _answer("grd.rm/1", removed, dry_run, as_json)


@click.command(cls=AnsweringCommand)
@_dry_run
@_runs_dir
@_json
def gc(dry_run: bool, runs_dir: str | None, as_json: bool) -> Answer:
    """Delete what ended runs no longer need: journals already in their notebooks, checkpoints that a newer
    lineage replaced, dead locks, and starts that never came to be. Checkpoints a resume could use stay."""
    removed = list(collect_garbage(runs.runs_folder(runs_dir), dry_run=dry_run))
    return _answer("grd.gc/1", removed, dry_run, as_json)


def _answer(schema: str, removed: list[Removed], dry_run: bool, as_json: bool) -> Answer:
    total = sum(item.bytes for item in removed)
    items = [{"path": str(item.path), "bytes": item.bytes, "what": item.what} for item in removed]
    verb = "would delete" if dry_run else "deleted"
    lines = [f"{verb} {item.path} ({item.what}, {item.bytes:,} bytes)" for item in removed]
    lines.append(f"{len(removed)} in all, {total:,} bytes" if removed else "nothing to delete")
    document = {"schema": schema, "dry_run": dry_run, "bytes": total, "removed": items}
    return Answer(document=document, lines=lines, as_json=as_json)
