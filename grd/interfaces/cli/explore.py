"""``grd explore``: what this machine is, into the report."""

from __future__ import annotations

from pathlib import Path

import click

from grd.interfaces.cli.answer import Answer, AnsweringCommand


@click.command(cls=AnsweringCommand)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="Report to write the section into. Default: the project's own, .planning/DATA_REPORT.md.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the profile as JSON (schema grd.explore/1).")
def explore(report: Path | None, as_json: bool) -> Answer:
    """Profile this machine and write the profile into the report.

    The profile is also kept as hardware_profile.json beside the report. What is unknown is null, with the
    reason under "reasons".
    """
    from grd.steps import explorer

    found = explorer.explore(report, progress=lambda line: click.echo(f"grd: {line}", err=True))
    lines = [f"Report  {found.report_path}", f"Profile {found.profile_path}", *found.summary()]
    return Answer(document=found.to_dict(), lines=lines, value=found, as_json=as_json)
