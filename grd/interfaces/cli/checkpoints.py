"""``grd checkpoints``: what a run has saved, whether it is good, and what a resume would go on from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from grd.errors import RunNotFound, UsageError
from grd.experiment.checkpoint_folder import LATEST_NAME, version_name
from grd.interfaces.cli.answer import Answer, AnsweringCommand
from grd.interfaces.cli.completion import run_argument
from grd.interfaces.cli.rendering import format_number, format_size, say
from grd.runs.folder import RunFolder, find_run
from grd.runs.recovery import current_record
from grd.settings import format_duration, parse_size
from grd.steps import run as runs
from grd.steps.checkpoints import DAMAGED, Listed, list_checkpoints, prune_checkpoints

SAY_AFTER_SECONDS = 2.0
"""Reading that takes longer says which file it is at."""


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        return parse_size(value)
    except ValueError as error:
        raise UsageError(f"--keep: {error}") from None


@click.command(cls=AnsweringCommand)
@run_argument()
@click.option("--verify", is_flag=True, help="Read every byte of all of them; exit code 1 if one is damaged.")
@click.option("--prune", is_flag=True, help="Delete the oldest beyond the budget; two good ones always stay.")
@click.option("--keep", metavar="SIZE", callback=_size, help="With --prune: the budget. Default: the run's.")
@click.option("--dry-run", is_flag=True, help="With --prune: only say what would be deleted.")
@click.option("--runs-dir", metavar="DIR", help="Where the runs lie. Default: experiments/.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def checkpoints(
    run: str,
    verify: bool,
    prune: bool,
    keep: int | None,
    dry_run: bool,
    runs_dir: str | None,
    as_json: bool,
) -> Answer:
    """The checkpoints of RUN: epoch, step, loss, size, age, lineage, verdict.

    RUN may also be a folder of checkpoints. The one that a resume goes on from is marked, for each training
    loop where a run has several. Without --verify
    only the newest are read, until a good one is found. Epochs count from 0; a step is of the epoch after.
    """
    if not run:
        raise UsageError("RUN is empty: name a run, last, or a folder of checkpoints; see: grd list")
    if (keep is not None or dry_run) and not prune:
        raise UsageError("--keep and --dry-run belong to --prune")
    run_folder, folder = _place(run, runs_dir)
    pruned: list[Path] = []
    if prune:
        if run_folder is None:
            raise UsageError(f"--prune needs a RUN, and {run} is a folder: its owner may be writing")
        pruned = prune_checkpoints(run_folder, keep=keep, dry_run=dry_run)
    listed = list_checkpoints(folder, verify=verify, on_file=_Reading())
    verb = "would delete" if dry_run else "deleted"
    lines = [f"{verb} {path.relative_to(folder)}" for path in pruned]
    lines += ["nothing to delete"] if prune and not pruned else []
    lines += _tables(listed) if listed else [f"no checkpoints in {folder} yet"]
    document = {
        "schema": "grd.checkpoints/1",
        "folder": str(folder),
        "run_id": None if run_folder is None else run_folder.run_id,
        "checkpoints": [item.to_dict() for item in listed],
        "pruned": [str(path) for path in pruned],
        "dry_run": dry_run,
    }
    damaged = any(item.verdict == DAMAGED for item in listed)
    return Answer(document=document, lines=lines, as_json=as_json, code=1 if verify and damaged else 0)


def _place(run: str, runs_dir: str | None) -> tuple[RunFolder | None, Path]:
    """The run, if it is one, and its folder of checkpoints. Raises RunNotFound."""
    try:
        found = find_run(runs.runs_folder(runs_dir), run)
    except RunNotFound:
        folder = Path(run).expanduser()
        if folder.is_dir():
            return None, folder.absolute()
        raise
    return found, Path(current_record(found).checkpoint_dir)


class _Reading:
    """Says what is being read, once it takes long."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self, path: Path, size: int) -> None:
        if time.monotonic() - self._began > SAY_AFTER_SECONDS:
            say(f"reading {path.name} ({format_size(size)})")


def _tables(listed: list[Listed]) -> list[str]:
    loops = sorted({item.loop for item in listed})
    lines = []
    for loop in loops:
        of_loop = [item for item in listed if item.loop == loop]
        lines += [f"training loop {loop}"] if loops != [1] else []
        lines += _table(of_loop)
        if not any(item.used_next for item in of_loop):
            lines.append("none of them is good: a resume would begin anew")
    return lines


def _table(listed: list[Listed]) -> list[str]:
    rows: list[tuple[str, ...]] = [("EPOCH", "STEP", "LOSS", "SIZE", "AGE", "LINEAGE", "VERDICT")]
    rows += [_cells(item) for item in listed]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _cells(item: Listed) -> tuple[str, ...]:
    verdict = item.verdict if item.reason is None else f"{item.verdict}: {item.reason}"
    named = item.path.name
    if item.epoch is None or named == LATEST_NAME or named != _expected_name(item):
        verdict += f" ({named})"
    values: tuple[Any, ...] = (item.epoch, item.step, item.loss)
    return (
        *("-" if value is None else format_number(value) for value in values),
        format_size(item.size),
        f"{format_duration(max(0.0, round(time.time() - item.saved_at)))} ago",
        "-" if item.lineage is None else str(item.lineage),
        f"{verdict}  <- resume" if item.used_next else verdict,
    )


def _expected_name(item: Listed) -> str:
    assert item.epoch is not None
    return version_name(item.epoch if item.step is None else item.epoch + 1, item.step)
