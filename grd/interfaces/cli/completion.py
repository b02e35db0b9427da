"""Which runs and notebooks can be typed here: completion for shells and for ``%grd``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from click.shell_completion import CompletionItem

from grd.errors import GrdError
from grd.runs.batch_folder import batch_folders
from grd.runs.folder import run_folders
from grd.steps.run import runs_folder


def run_argument(
    *, required: bool = True, many: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The argument RUN, or ``names`` with several of them."""
    if many:
        return click.argument(
            "names", nargs=-1, required=required, metavar="RUN...", shell_complete=complete_runs
        )
    return click.argument("run", required=required, shell_complete=complete_runs)


def batch_argument(*, default: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The argument BATCH."""
    if default is None:  # which, said explicitly, click takes for a default
        return click.argument("batch", shell_complete=complete_batches)
    return click.argument("batch", required=False, default=default, shell_complete=complete_batches)


def complete_batches(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Ids of this project's batches, newest first, then ``last``."""
    try:
        names = [folder.batch_id for folder in batch_folders(runs_folder(context.params.get("runs_dir")))]
    except (GrdError, OSError):
        return []
    return [CompletionItem(name) for name in [*names, "last"] if name.startswith(incomplete)]


def complete_runs(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Ids of this project's runs, newest first, then ``last``. Reads one folder's names, no record."""
    typed = set(context.params.get("names") or ())
    try:
        names = [folder.run_id for folder in run_folders(runs_folder(context.params.get("runs_dir")))]
    except (GrdError, OSError):
        return []  # a completion has nowhere to say what is wrong; the command itself will
    return [
        CompletionItem(name) for name in [*names, "last"] if name.startswith(incomplete) and name not in typed
    ]


def complete_notebooks(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Files; a shell completes them itself, ``%grd`` narrows them to ``pattern``."""
    return [CompletionItem(incomplete, type="file", pattern="*.ipynb")]
