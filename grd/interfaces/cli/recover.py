"""``grd recover``: the notebook of a papermill that was killed."""

from __future__ import annotations

from pathlib import Path

import click

from grd.errors import GrdError
from grd.interfaces.cli.answer import Answer, AnsweringCommand
from grd.interfaces.cli.completion import complete_notebooks


@click.command(cls=AnsweringCommand)
@click.argument("output", type=click.Path(path_type=Path), shell_complete=complete_notebooks)
@click.option("--force", is_flag=True, help="Also where a process of another machine may still write it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def recover(output: Path, force: bool, as_json: bool) -> Answer:
    """Rebuild OUTPUT, the notebook of a `papermill --engine grd` that was killed, from its journal.

    Runs need no such command: `grd status` and `grd resume` rebuild theirs.
    """
    from grd.execution import unfinished

    output = output.expanduser().absolute()
    try:
        found = unfinished.recover(output, force=force)
    except OSError as error:
        raise GrdError(f"{output} cannot be recovered: {error.strerror}; its journal stays") from None
    why: str | None
    if found is None:
        why = _why_nothing(output)
        lines = [f"nothing to recover: {why}"]
    else:
        cells = ", ".join(f"{number} {status}" for status, number in sorted(found.cells.items()))
        why = found.grd.get("detail")
        lines = [
            f"recovered {output}: {found.outputs} outputs; code cells: {cells}",
            f"  {found.grd['state']}"
            + (f" ({found.grd['cause']})" if found.grd.get("cause") else "")
            + (f": {why}" if why else ""),
        ]
    document = {
        "schema": "grd.recover/1",
        "notebook": str(output),
        "recovered": found is not None,
        "state": found.grd.get("state") if found else None,
        "cause": found.grd.get("cause") if found else None,
        "detail": why,
        "cells": found.cells if found else None,
        "outputs": found.outputs if found else None,
    }
    return Answer(document=document, lines=lines, as_json=as_json)


def _why_nothing(output: Path) -> str:
    from grd.execution.unfinished import journal_beside

    journal = journal_beside(output)
    if journal.exists():
        return f"{output} was written by something else since; the journal is kept: {journal}"
    if output.resolve().parent.parent.name == "attempts":
        run = output.resolve().parents[2].name
        return f"{output} belongs to a run; see: grd status {run}"
    return f"{output} has no journal beside it"
