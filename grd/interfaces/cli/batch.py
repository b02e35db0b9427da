"""``grd batch`` and ``grd sweep``: many runs from one spec; status, wait, stop, resume of a batch."""

from __future__ import annotations

from typing import Any

import click

from grd import contract
from grd.batch import looking, submitting
from grd.batch.agreeing import BatchQuestion, Total, estimate_total
from grd.batch.looking import Batch
from grd.batch.plan import Plan, parameters_text
from grd.batch.values import split_values
from grd.errors import UsageError
from grd.interfaces.cli import exit_codes
from grd.interfaces.cli.answer import Answer, AnsweringCommand, surface
from grd.interfaces.cli.asking import read_answer
from grd.interfaces.cli.batch_options import follow_options, json_option, runs_dir_option, spec_options
from grd.interfaces.cli.batch_progress import BatchPrinter
from grd.interfaces.cli.completion import batch_argument, complete_notebooks
from grd.interfaces.cli.rendering import say
from grd.interfaces.cli.research import gather, parameter_options
from grd.settings import format_duration, parse_duration
from grd.steps.run import runs_folder

PROMPT = "y (yes, all of it), c (each capped), n (no), or a time for each run such as 2h: "
PROMPT_WITHOUT_CAP = "y (yes, all of it), n (no), or a time for each run such as 2h: "


class BatchGroup(click.Group):
    """A group whose first word may be a spec: ``grd batch SPEC`` is ``grd batch start SPEC``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the command's name before a spec, or before options."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["start", *args]
        return super().parse_args(ctx, args)


@click.group(cls=BatchGroup, context_settings={"help_option_names": ["-h", "--help"]})
def batch() -> None:
    """Many runs from one SPEC: a grid, lists or files of parameters.

    `grd batch SPEC` is `grd batch start SPEC` (see: grd batch start --help). A batch goes on whatever ends
    the command that started it; killed at any moment, `grd batch resume` goes on with it: nothing is run
    twice, nothing is forgotten.
    """


@batch.command(cls=AnsweringCommand)
@click.argument("spec", type=click.Path())
@click.option("--notebook", metavar="NB", help="The notebook, for a SPEC that has parameters only (CSV).")
@spec_options
@parameter_options
@follow_options
def start(spec: str, notebook: str | None, **given: Any) -> Answer:
    """Run the batch in SPEC, a YAML or JSON file, or a CSV with --notebook.

    Everything is checked before anything starts; what is completed already is not run again. Exit code:
    0 all completed, 1 some failed, 75 some can be resumed, 77 nobody has agreed to the time.

    \b
    notebook: train.ipynb         # or notebooks: [a.ipynb, b.ipynb]
    parameters: {epochs: 20}      # of all runs
    grid:                         # each with each
      lr: [0.1, 0.01]
      seed: 1..3                  # 1, 2, 3
    zip: {width: [8, 16], depth: [2, 4]}        # side by side
    list: [{dropout: 0.1}, {dropout: 0.5, tail: true}]
    file: more.csv                # rows of a CSV, YAML or JSON file
    runs:                         # one by one
      - {notebook: other.ipynb, name: other, parameters: {x: 1}, timeout: 5m}
    jobs: 2                       # and memory, timeout, budget, max_attempts, gpus, inputs, fail_fast ...
    """
    return _begin(spec, {"notebook": notebook}, given)


@click.command(cls=AnsweringCommand)
@click.argument("notebook", shell_complete=complete_notebooks)
@click.option(
    "-g",
    "--grid",
    "grid",
    nargs=2,
    multiple=True,
    metavar="NAME VALUES",
    help="Values of a parameter: 0.1,0.01 or 1..3; each -g with each.",
)
@click.option(
    "-z",
    "--zip",
    "zipped",
    nargs=2,
    multiple=True,
    metavar="NAME VALUES",
    help="The same, but all -z side by side.",
)
@click.option("--file", metavar="FILE", help="Rows of parameters: CSV, YAML or JSON.")
@spec_options
@parameter_options
@follow_options
def sweep(
    notebook: str,
    grid: tuple[tuple[str, str], ...],
    zipped: tuple[tuple[str, str], ...],
    file: str | None,
    **given: Any,
) -> Answer:
    """Run NOTEBOOK with every combination of parameters. See also: grd batch start --help.

    \b
    Examples:
      grd sweep train.ipynb -g lr 0.1,0.01 -g seed 1..3 --jobs 2
      grd sweep train.ipynb -z width 8,16 -z depth 2,4 -p epochs 20 --dry-run
      grd sweep train.ipynb -g layers '[64],[64,32]' -g name '"a,b",c' --detach
      grd sweep train.ipynb --file rows.csv --timeout 1h
    """
    if not (grid or zipped or file):
        raise UsageError("give -g NAME VALUES, -z NAME VALUES or --file FILE; for one run: grd research")
    document = {
        "notebook": notebook,
        "grid": _axes("-g", grid) or None,
        "zip": _axes("-z", zipped) or None,
        "file": file,
    }
    return _begin({k: v for k, v in document.items() if v is not None}, {}, given)


@batch.command("status", cls=AnsweringCommand)
@batch_argument(default="last")
@click.option("--csv", "as_csv", is_flag=True, help="Print the table as CSV.")
@runs_dir_option
@json_option
def status(batch: str, as_csv: bool, runs_dir: str | None, as_json: bool) -> Answer:
    """The runs of BATCH (default: the last) with parameters, states, causes, times, metrics."""
    if as_csv and as_json:
        raise UsageError("--csv or --json, not both")
    found = looking.batch_status(batch, runs_dir=runs_dir)
    table = found.table
    if as_csv:
        return Answer(document=table.document, lines=table.csv().splitlines(), as_json=False)
    return Answer(document=table.document, lines=table.lines(), value=found, as_json=as_json)


@batch.command("list", cls=AnsweringCommand)
@runs_dir_option
@json_option
def list_batches(runs_dir: str | None, as_json: bool) -> Answer:
    """This project's batches, newest first."""
    place = runs_folder(runs_dir)
    shown = []
    for found in looking.list_batches(runs_dir=runs_dir):
        entry = found.to_dict()
        del entry["runs"]
        shown.append(entry)
    lines = [
        f"{each['batch_id']}  {each['state']:<11}  "
        + ", ".join(f"{count} {state}" for state, count in each["counts"].items())
        for each in shown
    ]
    return Answer(
        document={"schema": "grd.batch-list/1", "runs_dir": str(place), "batches": shown},
        lines=lines or [f"no batches in {place}; start one: grd batch SPEC, or grd sweep NOTEBOOK"],
        as_json=as_json,
    )


@batch.command("wait", cls=AnsweringCommand)
@batch_argument(default="last")
@click.option("--timeout", metavar="TIME", help="At most so long, such as 540 or 9m; then exit 124.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
@runs_dir_option
@json_option
def wait(batch: str, timeout: str | None, quiet: bool, runs_dir: str | None, as_json: bool) -> Answer:
    """Wait until BATCH has ended. Exit code: that of the batch; 124 if the time ran out and it goes on."""
    try:
        seconds = None if timeout is None else parse_duration(timeout)
    except ValueError as error:
        raise UsageError(f"--timeout: {error}") from None
    found = looking.batch_status(batch, runs_dir=runs_dir)
    printer = BatchPrinter(found, quiet=quiet, as_json=as_json)
    in_time = printer.follow(seconds)
    if not in_time:
        say("the time is up and the batch goes on; type the same command again")
    return _answer(found, as_json, code=None if in_time else exit_codes.WAIT_TIMEOUT)


@batch.command("stop", cls=AnsweringCommand)
@batch_argument()
@click.option("--now", is_flag=True, help="Kill its runs at once, without time to save.")
@click.option("--no-wait", is_flag=True, help="Return once the request is left.")
@runs_dir_option
@json_option
def stop(batch: str, now: bool, no_wait: bool, runs_dir: str | None, as_json: bool) -> Answer:
    """Start no more runs of BATCH, and ask those under way to save and stop. It can be resumed later."""
    found = looking.batch_status(batch, runs_dir=runs_dir)
    ended = found.stop(now=now, wait=not no_wait)
    if not ended and not no_wait:
        say(f"{found.id} is still ending; see: grd batch status {found.id}")
    return _answer(found, as_json, code=exit_codes.OK)


@batch.command("resume", cls=AnsweringCommand)
@batch_argument()
@click.option("--failed", is_flag=True, help="Take up failed runs again too.")
@click.option("-j", "--jobs", type=click.IntRange(1), metavar="N", help="Another number at once.")
@click.option("--timeout", metavar="TIME", help="Another cap on one attempt of each run.")
@click.option("--budget", metavar="TIME", help="Another cap on all attempts of each run together.")
@follow_options
def resume(
    batch: str,
    failed: bool,
    jobs: int | None,
    timeout: str | None,
    budget: str | None,
    runs_dir: str | None,
    as_json: bool,
    quiet: bool,
    wait: bool | None,
) -> Answer:
    """Go on with BATCH: resume its interrupted runs, start those that were not; completed ones stay."""
    waits = surface().waits if wait is None else wait
    made = submitting.resume_batch(
        batch, failed=failed, jobs=jobs, timeout=timeout, budget=budget, runs_dir=runs_dir, wait=False
    )
    return _follow(made, waits, quiet, as_json)


def _begin(spec: Any, more: dict[str, Any], given: dict[str, Any]) -> Answer:
    parameters = gather(given["pairs"], given["raws"], given["yamls"], given["files"])
    names = (
        "jobs", "memory", "timeout", "budget", "grace", "start_timeout", "max_output", "name", "kernel",
        "fail_fast", "max_attempts", "gpus", "gpu_pool",
    )  # fmt: skip
    more = {**more, **{name: given[name] for name in names}}
    more["inputs"] = list(given["inputs"]) or None
    more["allow_unknown"] = True if given["allow_unknown"] else None
    more["parameters"] = parameters or None
    if given["dry_run"]:
        plan = submitting.plan_of(spec, more, force=given["force"])
        submitting.check_machine(plan)
        return _dry_run(plan, given)
    waits = surface().waits if given["wait"] is None else given["wait"]
    made = submitting.batch(
        spec,
        force=given["force"],
        runs_dir=given["runs_dir"],
        ask=_ask,
        wait=False,
        on_note=say,
        **more,
    )
    return _follow(made, waits, given["quiet"], given["as_json"])


def _axes(flag: str, pairs: tuple[tuple[str, str], ...]) -> dict[str, str]:
    axes: dict[str, str] = {}
    for name, values in pairs:
        if name in axes:
            raise UsageError(f"{flag} {name} stands twice; write all values in one: {flag} {name} 1,2,3")
        try:
            split_values(values)
        except UsageError as error:
            raise UsageError(f"{flag} {name}: {error}") from None
        axes[name] = values
    return axes


def _follow(made: Batch, waits: bool, quiet: bool, as_json: bool) -> Answer:
    if not quiet and (surface().prints or waits):
        say(f"batch {made.id}")
    if waits:
        BatchPrinter(made, quiet=quiet, as_json=as_json, since=made.since).follow(None)
    return _answer(made, as_json, code=None if waits else exit_codes.OK)


def _answer(found: Batch, as_json: bool, code: int | None) -> Answer:
    table = found.table
    return Answer(
        document=table.document,
        lines=table.lines(),
        value=found,
        as_json=as_json,
        code=of_batch(table.document) if code is None else code,
    )


def of_batch(document: dict[str, Any]) -> int:
    """The exit code that a batch's end gives to the command that followed it."""
    counts = document["counts"]
    if counts.get(contract.FAILED):
        return exit_codes.RUN_FAILED
    if counts.get(contract.DECLINED):
        return exit_codes.APPROVAL
    return exit_codes.OK if document["state"] == contract.COMPLETED else exit_codes.INTERRUPTED


def _dry_run(plan: Plan, given: dict[str, Any]) -> Answer:
    place = runs_folder(given["runs_dir"])
    done = submitting.already_completed(plan, place)
    total = estimate_total(plan, [run for run in plan.runs if run.index not in done], place)
    runs = [
        {
            "index": run.index,
            "notebook": run.notebook,
            "parameters": run.parameters,
            "timeout": run.timeout,
            "budget": run.budget,
            "key": run.key,
            "completed_run": done.get(run.index),
        }
        for run in plan.runs
    ]
    document = {
        "schema": "grd.batch-plan/1",
        "spec": plan.spec.origin,
        "total": len(runs),
        "to_run": len(runs) - len(done),
        "seconds": total.seconds,
        "high_seconds": total.high,
        "basis": total.basis,
        "runs": runs,
    }
    several = len({run.notebook for run in plan.runs}) > 1
    lines = []
    for run in plan.runs:
        notebook = f"{run.notebook.rpartition('/')[2]} " if several else ""
        found = f"  completed: {done[run.index]}" if run.index in done else ""
        lines.append(f"{run.index + 1:>4}  {notebook}{parameters_text(run.parameters)}{found}".rstrip())
    left = f"{len(runs) - len(done)} to run: {_told(total)}" if total.runs else "all completed already"
    lines.append(f"{len(runs)} runs, {left}; nothing was started")
    for warning in plan.warnings:
        say(warning)
    return Answer(document=document, lines=lines, as_json=given["as_json"])


def _told(total: Total) -> str:
    if total.seconds is None or total.high is None:
        return "nobody knows how long they take"
    unknown = f", and {total.unknown} of which nobody knows" if total.unknown else ""
    return (
        f"together about {format_duration(max(0.1, total.seconds))}, "
        f"at most {format_duration(max(0.1, total.high))}{unknown}"
    )


def _ask(question: BatchQuestion) -> str:
    """Show what is known and what a yes agrees to."""
    total = question.total
    lines = [
        f"{total.runs} runs: {_told(total)}",
        f"  from {total.basis}",
        f"  a yes agrees to {format_duration(question.per_run)} for each run and "
        f"{format_duration(question.in_all)} for all of them together",
    ]
    if question.otherwise is not None:
        lines.append(f"  capped each saves and stops after {format_duration(question.otherwise)}")
    for line in lines:
        say(line)
    return read_answer(PROMPT if question.otherwise is not None else PROMPT_WITHOUT_CAP)
