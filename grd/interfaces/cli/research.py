"""``grd research`` and ``grd resume``: start a run, go on with one, follow it to its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from grd import contract
from grd.errors import GrdError, NotFoundError, UsageError
from grd.execution.parameters import RawText
from grd.hardware.pools import POOLS
from grd.interfaces.cli import exit_codes
from grd.interfaces.cli.answer import Answer, AnsweringCommand, Surface, surface
from grd.interfaces.cli.asking import ask
from grd.interfaces.cli.completion import complete_notebooks, run_argument
from grd.interfaces.cli.rendering import ProgressPrinter, describe_end
from grd.interfaces.run_table import RunTable
from grd.runs.folder import RunFolder
from grd.runs.model import RunRecord
from grd.steps.agreeing import Answered, Asker
from grd.steps.run import Run, list_runs, runs_folder

_NOTHING_TO_RESUME = "no interrupted run could be resumed; see: grd status"

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Reporting:
    """Who hears of a run's start, of notes, and of its events."""

    on_start: Callable[[Run], None]
    on_note: Callable[[str], None]
    on_event: Callable[[dict[str, Any]], None] | None = None


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
            "--gpu-pool",
            type=click.Choice(POOLS),
            help="Which of the machine's GPUs. Default: training; a pool without a setting has all of them.",
        ),
        click.option(
            "--gpus",
            type=click.IntRange(0),
            metavar="N",
            help="Lease N GPUs, waiting until they are free; 0 hides them. Default: one where there are any, "
            "unless CUDA_VISIBLE_DEVICES chooses.",
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
    gpus: int | None,
    gpu_pool: str | None,
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
      grd research train.ipynb --gpus 2
      grd research train.ipynb --key nightly --timeout 8m --budget 4h
    """
    from grd.steps import researcher

    waits = surface().waits if wait is None else wait
    parameters = gather(pairs, raws, yamls, files)

    def start(asker: Asker | Answered, reporting: Reporting) -> Run:
        return researcher.research(
            notebook,
            parameters,
            timeout=timeout,
            budget=budget,
            mlflow=mlflow,
            mlflow_experiment=mlflow_experiment,
            gpus=gpus,
            gpu_pool=gpu_pool,
            max_attempts=max_attempts,
            retry_errors=retry_errors,
            ask=asker,
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
            on_start=reporting.on_start,
            on_event=reporting.on_event,
            on_note=reporting.on_note,
        )

    return _begin(start, waits=waits, quiet=quiet, as_json=as_json)


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
    gpus: int | None,
    gpu_pool: str | None,
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

    def resume_one(which: str | Run, asker: Asker | Answered, reporting: Reporting) -> Run:
        return resuming.resume(
            which,
            parameters,
            notebook=notebook,
            from_epoch=from_epoch,
            timeout=timeout,
            budget=budget,
            mlflow=mlflow,
            mlflow_experiment=mlflow_experiment,
            gpus=gpus,
            gpu_pool=gpu_pool,
            max_attempts=max_attempts,
            retry_errors=retry_errors,
            grace=grace,
            start_timeout=start_timeout,
            max_output=max_output,
            runs_dir=runs_dir,
            allow_unknown=allow_unknown,
            now=now,
            ask=asker,
            wait=waits,
            on_start=reporting.on_start,
            on_event=reporting.on_event,
            on_note=reporting.on_note,
        )

    if run is not None:
        return _begin(partial(resume_one, run), waits=waits, quiet=quiet, as_json=as_json)
    return _resume_all(resume_one, runs_dir, waits=waits, quiet=quiet, as_json=as_json)


def _begin(
    start: Callable[[Asker | Answered, Reporting], Run], *, waits: bool, quiet: bool, as_json: bool
) -> Answer:
    """Start a run and say how it went, or leave both to a panel, where one can be shown."""
    here = surface()
    warning = here.warning()
    if here.panels is not None and here.shows_panels and not waits and not as_json:
        remember = partial(_remember, here)
        shown = here.panels.begin(
            lambda asker, on_note: start(asker, Reporting(on_start=remember, on_note=on_note)),
            here.line,
            [] if warning is None else [warning],
        )
        return Answer(document={}, value=shown)
    printer = ProgressPrinter(quiet=quiet, as_json=as_json)
    if warning is not None:
        printer.say(warning)
    run = start(ask, _reporting(printer, printer, quiet, waits))
    return _finish(run, printer, as_json, waits)


def _resume_all(
    resume_one: Callable[[str | Run, Asker | Answered, Reporting], Run],
    runs_dir: str | None,
    *,
    waits: bool,
    quiet: bool,
    as_json: bool,
) -> Answer:
    """Oldest first; one that cannot be resumed is said and does not hold up the others."""
    printer = ProgressPrinter(quiet=quiet, as_json=as_json)
    shown, codes = [], [exit_codes.OK]
    resumed: list[tuple[RunFolder, RunRecord]] = []
    found = list_runs(runs_dir=runs_dir, state=contract.INTERRUPTED)
    for interrupted in sorted(found, key=lambda run: run.record.created_at):
        try:
            reporting = _reporting(printer, printer.of(interrupted.id), quiet, waits)
            run = resume_one(interrupted, ask, reporting)
        except GrdError as error:
            printer.say(f"{interrupted.id}: {error}")
            codes.append(exit_codes.of_error(error))
            continue
        ended = run.to_dict()
        shown.append(ended)
        resumed.append((run.run_folder, run.record))
        if waits:
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


def _reporting(
    printer: ProgressPrinter, on_event: Callable[[dict[str, Any]], None], quiet: bool, waits: bool
) -> Reporting:
    here = surface()

    def announce(run: Run) -> None:
        _remember(here, run)
        if not quiet and (here.prints or waits):  # an object that comes at once says the same
            printer.say(f"run {run.id}")
            printer.say(f"folder {run.folder}")

    return Reporting(on_start=announce, on_note=printer.say, on_event=on_event)


def _remember(here: Surface, run: Run) -> None:
    here.last_run = run.folder


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
