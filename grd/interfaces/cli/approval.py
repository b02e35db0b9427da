"""``grd approve``, ``grd revoke``, ``grd approvals``: agreeing to long runs, and what was agreed to."""

from __future__ import annotations

import re
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click

from grd.agreement.book import Book, check_terms, is_allowed_headless
from grd.agreement.clock import now
from grd.agreement.grants import Grant, Ledger
from grd.agreement.person import identity, who_can_answer
from grd.errors import ApprovalRequired, UsageError
from grd.interfaces.cli import exit_codes
from grd.interfaces.cli.answer import Answer, AnsweringCommand
from grd.interfaces.cli.completion import complete_notebooks, complete_runs
from grd.interfaces.cli.rendering import local_time, say
from grd.runs.folder import find_run
from grd.settings import find_project_root, format_duration, parse_duration, user_config_file
from grd.steps.agreeing import scope_of
from grd.steps.run import runs_folder

DEFAULT_UNTIL = "12h"

AHEAD_SECONDS = 60.0
"""What the log's time may be ahead of this machine's clock without a word."""

_TIME_OF_DAY = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)")

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command(cls=AnsweringCommand)
@click.argument("notebook", required=False, shell_complete=complete_notebooks)
@click.option("--run", metavar="RUN", shell_complete=complete_runs, help="Only for this run and its resumes.")
@click.option("--everywhere", is_flag=True, help="For every project of this user.")
@click.option("--max", "per_run", metavar="TIME", help="At most so long for one run. Default: as --total.")
@click.option("--total", metavar="TIME", default="4h", show_default=True, help="At most so long in all.")
@click.option(
    "--until",
    metavar="TIME",
    default=DEFAULT_UNTIL,
    show_default=True,
    help="Its end: 8h from now, or 18:00.",
)
@click.option("--reason", metavar="TEXT", help="Kept with it.")
@click.option("--runs-dir", metavar="DIR", help="Where the runs lie. Default: experiments/.")
@_json
def approve(
    notebook: str | None,
    run: str | None,
    everywhere: bool,
    per_run: str | None,
    total: str,
    until: str,
    reason: str | None,
    runs_dir: str | None,
    as_json: bool,
) -> Answer:
    """Agree to long runs of this project, or of one NOTEBOOK: with a cap for each, one for all, and an end.

    Whoever starts runs within it, in any process, needs not ask again. Only a person grants: at a terminal or
    in Jupyter; `[approval] allow_noninteractive = true` in your own settings file lifts that.

    \b
    Examples:
      grd approve --max 2h --total 8h --until 18:00
      grd approve train.ipynb --total 3h
      grd approve --run 4f2a --total 6h
    """
    who = who_can_answer()
    if who is None and not is_allowed_headless():
        raise ApprovalRequired(
            "only a person at a terminal or in Jupyter grants; or write [approval] allow_noninteractive = "
            f"true into {user_config_file()}"
        )
    project = find_project_root(Path.cwd())
    scope = scope_of(
        run=None if run is None else find_run(runs_folder(runs_dir), run),
        notebook=None if notebook is None else _notebook(notebook),
        everywhere=everywhere,
        project=project,
    )
    in_all = _seconds("--total", total)
    for_one = in_all if per_run is None else _seconds("--max", per_run)
    lasts = _seconds_until(until)
    check_terms(per_run=for_one, total=in_all, lasts=lasts)
    book = Book()
    _, problem = book.ledger()
    if problem is not None and (aside := book.log.restart()) is not None:
        say(
            f"{problem}: a new log was begun, the old one lies in {aside}; its grants no longer "
            "count, and runs that use one save and stop"
        )
    here = book.time()
    if (ahead := here - time.time()) > AHEAD_SECONDS:
        say(
            f"this machine's clock was ahead once: the log of agreements counts on from then and is "
            f"{format_duration(round(ahead))} ahead now; the grant lasts as "
            "long as you typed, and its end is shown by the log"
        )
    grant = book.grant(
        scope,
        per_run=for_one,
        total=in_all,
        ends=here + lasts,
        by=identity(who if who is not None else "config"),
        reason=reason,
    )
    row = _row(grant, book.ledger()[0])
    return Answer(document={"schema": "grd.approve/1", "grant": row}, lines=_lines([row]), as_json=as_json)


@click.command(cls=AnsweringCommand)
@click.argument("grants", nargs=-1, metavar="GRANT...")
@click.option("--all", "every", is_flag=True, help="All that are valid, or that a run still uses.")
@_json
def revoke(grants: tuple[str, ...], every: bool, as_json: bool) -> Answer:
    """Take grants back. A run that uses one is asked to save and stop within a second or two.

    Anybody may do that, a headless command too.
    """
    if bool(grants) == every:
        raise UsageError("name a GRANT or more (see: grd approvals), or give --all")
    book = Book()
    by = identity(who_can_answer())
    revoked = book.revoke_all(by) if every else [book.revoke(name, by) for name in grants]
    ledger, _ = book.ledger()
    rows = [_row(grant, ledger) for grant in revoked]
    return Answer(
        document={"schema": "grd.revoke/1", "grants": rows},
        lines=[f"revoked {row['id']} ({row['scope']})" for row in rows]
        or ["no grant is valid, and no run uses one"],
        as_json=as_json,
    )


@click.command(cls=AnsweringCommand)
@click.option(
    "--log", "whole", is_flag=True, help="Every entry, from granted and typed to revoked and expired."
)
@click.option("--verify", is_flag=True, help="Only whether the log is whole; exit code 1 if not.")
@_json
def approvals(whole: bool, verify: bool, as_json: bool) -> Answer:
    """The grants, what is left of them, and the log of all agreements."""
    book = Book()
    if not verify:
        book.settle()
    read = book.log.read()
    ledger, problem = book.ledger()
    rows = [_row(grant, ledger) for grant in ledger.grants.values()]
    lines = [f"{len(read.entries)} entries in {book.log.path}"]
    if problem is not None:
        lines += [f"  {problem}", "  no grant counts until a person types: grd approve"]
    elif verify:
        lines.append("  whole: each entry fits the one before, and none is missing")
    else:
        lines = _lines(rows) or ["no grants yet; a person types: grd approve"]
    if whole and not verify:
        lines = [_entry_line(entry) for entry in read.entries] + ([f"  {problem}"] if problem else [])
    document: dict[str, Any] = {
        "schema": "grd.approvals/1",
        "log": str(book.log.path),
        "entries": len(read.entries),
        "problem": problem,
        "grants": rows,
    }
    if whole:
        document["history"] = list(read.entries)
    code = exit_codes.RUN_FAILED if verify and problem is not None else exit_codes.OK
    return Answer(document=document, lines=lines, as_json=as_json, code=code)


def _seconds(flag: str, text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from None


def _seconds_until(text: str) -> float:
    """Seconds to ``8h`` from now, or to the next ``18:00`` by this machine's clock."""
    match = _TIME_OF_DAY.fullmatch(text.strip())
    if match is None:
        return _seconds("--until", text)
    here = datetime.now().astimezone()
    end = here.replace(hour=int(match[1]), minute=int(match[2]), second=0, microsecond=0)
    return ((end if end > here else end + timedelta(days=1)) - here).total_seconds()


def _notebook(typed: str) -> str:
    from grd.execution.notebooks import read_notebook

    return read_notebook(typed).location


def _row(grant: Grant, ledger: Ledger) -> dict[str, Any]:
    moment = now()
    return {
        "id": grant.id,
        "scope": str(grant.scope),
        "state": ledger.state_of(grant, moment),
        "revocable": ledger.can_be_revoked(grant, moment),
        "per_run_seconds": grant.per_run,
        "total_seconds": grant.total,
        "left_seconds": round(ledger.left(grant, moment), 3),
        "used_seconds": round(ledger.spent(grant.id) - ledger.reserved(grant.id), 3),
        "reserved_seconds": round(ledger.reserved(grant.id), 3),
        "ends_at": _iso(grant.ends),
        "granted_at": _iso(grant.made.wall),
        "by": grant.by,
        "reason": grant.reason,
        "estimate": grant.estimate,
    }


def _iso(posix: float) -> str:
    from datetime import UTC

    return datetime.fromtimestamp(posix, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        lines.append(f"{row['id']}  {row['state']}: {row['scope']}")
        caps = f"  up to {format_duration(row['per_run_seconds'])} a run"
        if row["state"] == "valid":
            caps += f", {format_duration(max(0.1, row['left_seconds']))} of "
            caps += f"{format_duration(row['total_seconds'])} left, until {local_time(row['ends_at'])}"
        if row["reserved_seconds"]:
            caps += f", {format_duration(row['reserved_seconds'])} reserved by runs under way"
        by = row["by"]
        lines.append(f"{caps}; by {by.get('user') or 'somebody'} ({by.get('how')})")
        if row["revocable"]:
            lines.append(f"  to take it back: grd revoke {row['id']}")
    return lines


def _entry_line(entry: dict[str, Any]) -> str:
    when = local_time(_iso(float(entry["t"])))
    by = entry.get("by") or {}
    who = f" by {by.get('user') or 'somebody'} ({by.get('how')})" if by else ""
    grant = f" grant {entry['grant']}" if entry.get("grant") else ""
    run = f" run {entry['run']}@{entry['attempt']}" if entry.get("run") else ""
    seconds = f" {format_duration(float(entry['seconds']))}" if entry.get("seconds") else ""
    return f"{entry['n']:>4}  {when}  {entry['kind']}{grant}{run}{seconds}{who}"
