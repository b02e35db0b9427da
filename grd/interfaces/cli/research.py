"""``grd research`` and ``grd resume``: start a run, go on with one, follow it to its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from grd import contract
from grd.errors import GrdError, NotFoundError, UsageError
from grd.execution.parameters import RawText
from grd.interfaces.cli import exit_codes
from grd.interfaces.cli.answer import Answer, AnsweringCommand, surface
from grd.interfaces.cli.asking import ask
from grd.interfaces.cli.completion import complete_notebooks, run_argument
from grd.interfaces.cli.rendering import ProgressPrinter, describe_end
from grd.interfaces.run_table import RunTable
from grd.runs.folder import RunFolder
from grd.runs.model import RunRecord
from grd.steps.run import Run, list_runs, runs_folder

_NOTHING_TO_RESUME = "no interrupted run could be resumed; see: grd status"

Command = TypeVar("Command", bound=Callable[..., Any])


def parameter_options(command: Command) -> Command:
    """The flags that give a notebook parameters; `gather` takes what they were given."""
    for option in (
        click.option(
            "--allow-unknown", is_flag=True, help="Inject parameters the notebook does not declare."
        ),
        click.option(
            "-f",
            "--parameters-file",
            "files",
            multiple=True,
            metavar="FILE",
            help="Parameters from YAML or JSON.",
        ),
        click.option(
            "-y", "--parameters-yaml", "yamls", multiple=True, metavar="YAML", help="Parameters as YAML."
        ),
        click.option(
            "-r",
            "--raw",
            "raws",
            nargs=2,
            multiple=True,
            metavar="NAME VALUE",
            help="A parameter that is text.",
        ),
        click.option(
            "-p",
            "--parameter",
            "pairs",
            nargs=2,
            multiple=True,
            metavar="NAME VALUE",
            help="A parameter; its type is the one the notebook declares.",
        ),
    ):
        command = option(command)
    return command


def _check_store(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and value.endswith(".ipynb"):
        raise click.UsageError(f"--mlflow took {value} for its URI: write --mlflow behind it, or --mlflow=on")
    return value


def _limit_options(command: Command) -> Command:
    for option in (
        click.option(
            "--wait/--detach",
            default=None,
            help="Follow the run to its end, or just start it. Default: --wait in a shell, --detach in %grd.",
        ),
        click.option("-q", "--quiet", is_flag=True, help="No progress on stderr."),
        click.option(
            "--json", "as_json", is_flag=True, help="Print the ended run as JSON (schema grd.run/1)."
        ),
        click.option("--runs-dir", metavar="DIR", help="Where the runs lie. Default: experiments/."),
        click.option(
            "--grace", metavar="TIME", help="From a stop request to the kill, time to save. Default: 30s."
        ),
        click.option(
            "--start-timeout",
            metavar="TIME",
            help="Time for the kernel to answer after its start. Default: 1m.",
        ),
        click.option(
            "--max-output",
            metavar="SIZE",
            help="Output the notebook keeps: its first and last half. Default: 100MB.",
        ),
        click.option(
            "--mlflow-experiment", metavar="NAME", help="MLflow's experiment. Default: the notebook's name."
        ),
        click.option(
            "--mlflow",
            is_flag=False,
            flag_value="on",
            metavar="[URI]",
            callback=_check_store,
            help="Send the run to MLflow while it runs: to this store, or where MLFLOW_TRACKING_URI says. "
            "Write it behind the notebook.",
        ),
        click.option(
            "--retry-errors",
            is_flag=True,
            default=None,
            help="With --max-attempts: also after an error of the notebook, which mostly comes again.",
        ),
        click.option(
            "--max-attempts",
            metavar="N",
            help="Resume by itself, after a growing pause, when kernel, runner or machine fail: N attempts "
            "in all. Default: 1.",
        ),
        click.option("--budget", metavar="TIME", help="Cap on all attempts of the run together, such as 4h."),
        click.option(
            "--timeout",
            metavar="TIME",
            help="Cap on one attempt, such as 90s, 30m, 3h; then it saves and stops, and can be resumed. "
            "Without it and without --budget all attempts together get 10m.",
        ),
    ):
        command = option(command)
    return command


@click.command(cls=AnsweringCommand)
@click.argument("notebook", shell_complete=complete_notebooks)
@parameter_options
@_limit_options
@click.option("--name", metavar="NAME", help="Part of the run id. Default: the notebook's file name.")
@click.option("--kernel", metavar="NAME", help="Kernel to use. Default: the one the notebook names.")
@click.option("--checkpoint-dir", metavar="DIR", help="Where checkpoints go. Default: in the run's folder.")
@click.option(
    "--key",
    metavar="K",
    help="Make the command idempotent: start a run, or attach to, resume, or show the one that has this key.",
)
@click.option("--on-end", metavar="CMD", help="Shell command for the runner to start when the run has ended.")
def research(
    notebook: str,
    pairs: tuple[tuple[str, str], ...],
    raws: tuple[tuple[str, str], ...],
    yamls: tuple[str, ...],
    files: tuple[str, ...],
    allow_unknown: bool,
    name: str | None,
    kernel: str | None,
    checkpoint_dir: str | None,
    key: str | None,
    on_end: str | None,
    timeout: str | None,
    budget: str | None,
    max_attempts: str | None,
    retry_errors: bool | None,
    mlflow: str | None,
    mlflow_experiment: str | None,
    grace: str | None,
    start_timeout: str | None,
    max_output: str | None,
    runs_dir: str | None,
    as_json: bool,
    quiet: bool,
    wait: bool | None,
) -> Answer:
    """Run NOTEBOOK with a deadline and a checkpoint folder.

    Ctrl-C or SIGTERM asks the run to save and stop (a second one kills it). Exit code: 0 completed,
    1 the notebook failed, 75 interrupted: the command to go on with is printed.

    \b
    Examples:
      grd research train.ipynb
      grd research train.ipynb -p lr 0.01 -p epochs 40 --timeout 2h
      grd research train.ipynb --timeout 3h --detach
      grd research train.ipynb --key nightly --timeout 8m --budget 4h
    """
    from grd.steps import researcher

    waits = surface().waits if wait is None else wait
    printer = ProgressPrinter(quiet=quiet, as_json=as_json)
    run = researcher.research(
        notebook,
        gather(pairs, raws, yamls, files),
        timeout=timeout,
        budget=budget,
        mlflow=mlflow,
        mlflow_experiment=mlflow_experiment,
        max_attempts=max_attempts,
        retry_errors=retry_errors,
        ask=ask,
        name=name,
        kernel=kernel,
        checkpoint_dir=checkpoint_dir,
        key=key,
        on_end=on_end,
        grace=grace,
        start_timeout=start_timeout,
        max_output=max_output,
        runs_dir=runs_dir,
        allow_unknown=allow_unknown,
        wait=waits,
        on_start=lambda started: _announce(started, printer, quiet, waits),
        on_event=printer,
        on_note=printer.say,
    )
    return _finish(run, printer, as_json, waits)


@click.command(cls=AnsweringCommand)
@run_argument(required=False)
@click.option(
    "--all-interrupted", is_flag=True, help="Every interrupted run of the project, one after another."
)
@click.option("--notebook", metavar="EDITED", help="Go on with this notebook instead of the run's own copy.")
@click.option(
    "--from", "from_epoch", type=int, metavar="EPOCH", help="Go back to the checkpoint after this epoch."
)
@click.option("--now", is_flag=True, help="Kill an old kernel that is still saving; do not wait for it.")
@parameter_options
@_limit_options
def resume(
    run: str | None,
    all_interrupted: bool,
    notebook: str | None,
    from_epoch: int | None,
    now: bool,
    pairs: tuple[tuple[str, str], ...],
    raws: tuple[tuple[str, str], ...],
    yamls: tuple[str, ...],
    files: tuple[str, ...],
    allow_unknown: bool,
    timeout: str | None,
    budget: str | None,
    max_attempts: str | None,
    retry_errors: bool | None,
    mlflow: str | None,
    mlflow_experiment: str | None,
    grace: str | None,
    start_timeout: str | None,
    max_output: str | None,
    runs_dir: str | None,
    as_json: bool,
    quiet: bool,
    wait: bool | None,
) -> Answer:
    """Go on with RUN (an id, a unique part of one, or "last") from its last good checkpoint.

    Takes interrupted and failed runs; completed ones if something changed. Every change is recorded.

    \b
    Examples:
      grd resume last
      grd resume 4f2a --notebook train_fixed.ipynb
      grd resume last -p epochs 80 --timeout 1h
    """
    from grd.steps import resuming

    if (run is None) != all_interrupted:
        raise UsageError("name one RUN, or give --all-interrupted")
    if all_interrupted and (notebook is not None or from_epoch is not None):
        raise UsageError("--notebook and --from go with one RUN, not with --all-interrupted")
    parameters = gather(pairs, raws, yamls, files)
    waits = surface().waits if wait is None else wait

    printer = ProgressPrinter(quiet=quiet, as_json=as_json)

    def resume_one(which: str | Run, on_event: Callable[[dict[str, Any]], None]) -> Run:
        return resuming.resume(
            which,
            parameters,
            notebook=notebook,
            from_epoch=from_epoch,
            timeout=timeout,
            budget=budget,
            mlflow=mlflow,
            mlflow_experiment=mlflow_experiment,
            max_attempts=max_attempts,
            retry_errors=retry_errors,
            grace=grace,
            start_timeout=start_timeout,
            max_output=max_output,
            runs_dir=runs_dir,
            allow_unknown=allow_unknown,
            now=now,
            ask=ask,
            wait=waits,
            on_start=lambda started: _announce(started, printer, quiet, waits),
            on_event=on_event,
            on_note=printer.say,
        )

    if run is not None:
        return _finish(resume_one(run, printer), printer, as_json, waits)
    return _resume_all(resume_one, printer, runs_dir, as_json, waits)


def _resume_all(
    resume_one: Callable[[str | Run, Callable[[dict[str, Any]], None]], Run],
    printer: ProgressPrinter,
    runs_dir: str | None,
    as_json: bool,
    waited: bool,
) -> Answer:
    """Oldest first; one that cannot be resumed is said and does not hold up the others."""
    shown, codes = [], [exit_codes.OK]
    resumed: list[tuple[RunFolder, RunRecord]] = []
    found = list_runs(runs_dir=runs_dir, state=contract.INTERRUPTED)
    for interrupted in sorted(found, key=lambda run: run.record.created_at):
        try:
            run = resume_one(interrupted, printer.of(interrupted.id))
        except GrdError as error:
            printer.say(f"{interrupted.id}: {error}")
            codes.append(exit_codes.of_error(error))
            continue
        ended = run.to_dict()
        shown.append(ended)
        resumed.append((run.run_folder, run.record))
        if waited:
            codes.append(exit_codes.of_run(ended["state"], ended["cause"]))
    printer.close()
    return Answer(
        document={"schema": "grd.resume-all/1", "runs": shown},
        lines=[line for ended in shown for line in describe_end(ended)] or [_NOTHING_TO_RESUME],
        value=RunTable(resumed, runs_dir=runs_folder(runs_dir)) if resumed else None,
        as_json=as_json,
        code=exit_codes.worst(codes),
    )


def gather(
    pairs: tuple[tuple[str, str], ...],
    raws: tuple[tuple[str, str], ...],
    yamls: tuple[str, ...],
    files: tuple[str, ...],
) -> dict[str, Any]:
    """All parameters of a command line; what is more specific wins: file < yaml < -p < -r."""
    found: dict[str, Any] = {}
    for path in files:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise NotFoundError(f"no parameters file {path}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"parameters file {path} cannot be read: {error}") from None
        found.update(_mapping(text, path))
    for text in yamls:
        found.update(_mapping(text, "-y"))
    found.update({name: RawText(value) for name, value in pairs})
    found.update({name: str(value) for name, value in raws})
    return found


def _mapping(text: str, origin: str) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{origin}: no valid YAML: {' '.join(str(error).split())}") from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UsageError(f"{origin}: parameters must be a mapping of names to values")
    return value


def _announce(run: Run, printer: ProgressPrinter, quiet: bool, waits: bool) -> None:
    here = surface()
    here.last_run = run.folder
    if not quiet and (here.prints or waits):  # an object that comes at once says the same
        printer.say(f"run {run.id}")
        printer.say(f"folder {run.folder}")


def _finish(run: Run, printer: ProgressPrinter, as_json: bool, waited: bool) -> Answer:
    printer.close()
    shown = run.to_dict()
    started = not waited and shown["state"] in (contract.QUEUED, contract.RUNNING)
    return Answer(
        document=shown,
        lines=describe_end(shown),
        value=run,
        as_json=as_json,
        code=exit_codes.OK if started else exit_codes.of_run(shown["state"], shown["cause"]),
    )
