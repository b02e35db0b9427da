"""``grd mlflow``: send to MLflow what it does not have of a run."""

from __future__ import annotations

import sys
from typing import Any

import click

from grd.errors import UsageError
from grd.interfaces.cli import exit_codes
from grd.interfaces.cli.answer import Answer, AnsweringCommand
from grd.interfaces.cli.completion import run_argument
from grd.interfaces.cli.rendering import say
from grd.runs import recovery
from grd.runs.folder import find_run
from grd.settings import find_project_root, load_settings, parse_duration
from grd.steps import run as runs
from grd.steps.request import read_mlflow


def _seconds(context: click.Context, parameter: click.Parameter, value: str) -> float:
    try:
        return parse_duration(value)
    except ValueError as error:
        raise UsageError(f"--timeout: {error}") from None


@click.group()
def mlflow() -> None:
    """Runs in MLflow: `grd research NB --mlflow [URI]` sends while it runs, `grd mlflow export` afterwards.

    A store that is slow or down never holds up a run: what it did not take stays in the run's folder.
    """


@mlflow.command(cls=AnsweringCommand)
@run_argument(many=True, required=False)
@click.option("--waiting", is_flag=True, help="All ended runs of which a store has not got everything.")
@click.option(
    "--uri", metavar="URI", help="The store. Default: the run's, else where MLFLOW_TRACKING_URI says."
)
@click.option("--experiment", metavar="NAME", help="MLflow's experiment. Default: the notebook's name.")
@click.option(
    "--timeout",
    metavar="TIME",
    default="10m",
    callback=_seconds,
    help="Give up on a run after. Default: 10m.",
)
@click.option("--runs-dir", metavar="DIR", help="Where the runs lie. Default: experiments/.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def export(
    names: tuple[str, ...],
    waiting: bool,
    uri: str | None,
    experiment: str | None,
    timeout: float,
    runs_dir: str | None,
    as_json: bool,
) -> Answer:
    """Send each RUN's parameters, metrics and use of the machine to MLflow; what it has is not sent again.

    Works for runs that were started without --mlflow too. Exit code 69 if a store could not be reached.

    \b
    Examples:
      grd mlflow export last
      grd mlflow export --waiting
      grd mlflow export last --uri sqlite:///mlflow.db
    """
    from grd.steps import mlflow_export

    if bool(names) == waiting:
        raise UsageError("name a RUN or more, or give --waiting")
    place = runs.runs_folder(runs_dir)
    if waiting:
        found = [pair for pair in recovery.all_current(place) if mlflow_export.is_waiting(*pair)]
    else:
        folders = [find_run(place, name) for name in names]
        found = [(folder, recovery.current_record(folder)) for folder in folders]
    settings, _ = load_settings(find_project_root(place))
    rows: list[dict[str, Any]] = []
    lines: list[str] = []
    for folder, record in found:
        store = record.mlflow or {}
        if uri is not None or not store:
            chosen = uri if uri is not None else (settings.mlflow if settings.mlflow != "off" else "on")
            store = read_mlflow(chosen, settings.mlflow_experiment, settings.mlflow_interval) or {}
        if experiment:
            store = {**store, "experiment": experiment}
        if sys.stderr.isatty():
            say(f"sending {folder.run_id}")
        sent = mlflow_export.export(folder, record, store=store, seconds=timeout)
        rows.append({"run": folder.run_id, "uri": store.get("uri"), **sent})
        lines += _lines(rows[-1])
    return Answer(
        document={"schema": "grd.mlflow-export/1", "runs": rows},
        lines=lines or ["nothing waits to be sent"],
        as_json=as_json,
        code=exit_codes.UNAVAILABLE if any(row["error"] for row in rows) else exit_codes.OK,
    )


def _lines(row: dict[str, Any]) -> list[str]:
    where = row["uri"] or "the store of MLFLOW_TRACKING_URI"
    if row["error"]:
        return [
            f"{row['run']}: not sent to {where}: {row['error']}",
            f"  next        grd mlflow export {row['run']}",
        ]
    lines = [f"{row['run']}: in {where} as run {row['run_id']}, {row['metrics']} values of metrics"]
    return lines + [f"  refused     {text}" for text in row["refused"]]
