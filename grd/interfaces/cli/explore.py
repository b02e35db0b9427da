"""``grd explore``: what this machine is, into the report."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="Report to write the section into. Default: the project's own, .planning/DATA_REPORT.md.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the profile as JSON (schema grd.explore/1).")
def explore(report: Path | None, as_json: bool) -> None:
    """Profile this machine and write the profile into the report.

    The profile is also kept as hardware_profile.json beside the report. What is unknown is null, with the
    reason under "reasons".
    """
    from grd.steps import explorer

    found = explorer.explore(report, progress=lambda line: click.echo(f"grd: {line}", err=True))
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2, ensure_ascii=False, allow_nan=False))
        return
    click.echo(f"Report  {found.report_path}")
    click.echo(f"Profile {found.profile_path}")
    for line in found.summary():
        click.echo(line)
