"""``grd estimate``: how long a notebook will take, before anything is started."""

from __future__ import annotations

import click

from grd.interfaces.cli.answer import Answer, AnsweringCommand
from grd.interfaces.cli.completion import complete_notebooks
from grd.interfaces.cli.research import gather, parameter_options
from grd.settings import format_duration
from grd.steps import estimator


@click.command(cls=AnsweringCommand)
@click.argument("notebook", shell_complete=complete_notebooks)
@parameter_options
@click.option("--kernel", metavar="NAME", help="Kernel to use. Default: the one the notebook names.")
@click.option("--runs-dir", metavar="DIR", help="Where the runs lie. Default: experiments/.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (schema grd.estimate/1).")
def estimate(
    notebook: str,
    pairs: tuple[tuple[str, str], ...],
    raws: tuple[tuple[str, str], ...],
    yamls: tuple[str, ...],
    files: tuple[str, ...],
    allow_unknown: bool,
    kernel: str | None,
    runs_dir: str | None,
    as_json: bool,
) -> Answer:
    """How long NOTEBOOK will take, by this project's earlier runs of it, scaled to its size.

    Starts no kernel and makes no run folder. Without an earlier run the answer is that it is not known;
    `grd status RUN` tells the time left once a run has made its first steps.

    \b
    Examples:
      grd estimate train.ipynb
      grd estimate train.ipynb -p epochs 40 --json
    """
    found = estimator.estimate_notebook(
        notebook,
        gather(pairs, raws, yamls, files),
        kernel=kernel,
        runs_dir=runs_dir,
        allow_unknown=allow_unknown,
    )
    return Answer(document=found.to_dict(), lines=_lines(found), as_json=as_json)


def _lines(found: estimator.Estimated) -> list[str]:
    known, threshold = found.estimate, format_duration(found.threshold)
    if known.seconds is None or known.high is None:
        takes = f"unknown, at least {format_duration(known.low)}"
    else:
        about = format_duration(known.seconds)
        takes = f"about {about} ({format_duration(known.low)} to {format_duration(known.high)})"
    asks = {
        True: f"yes: it may take more than {threshold}; agree by: grd approve, or by typing --timeout",
        False: f"no: less than {threshold}",
        None: f"cannot be told (from {threshold} on); without --timeout a run is capped, and can be resumed",
    }[known.exceeds(found.threshold)]
    return [
        f"Takes       {takes}",
        f"Known from  {known.basis}",
        f"Confidence  {known.confidence}",
        f"Must agree  {asks}",
    ]
