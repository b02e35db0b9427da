"""The flags that ``grd batch`` and ``grd sweep`` have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from grd.hardware.pools import POOLS
from grd.settings import MOST_ATTEMPTS

Command = TypeVar("Command", bound=Callable[..., Any])

runs_dir_option = click.option("--runs-dir", metavar="DIR", help="Where the runs lie. Default: experiments/.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def follow_options(command: Command) -> Command:
    """The flags of what starts a batch and may follow it."""
    for option in (
        click.option(
            "--wait/--detach",
            default=None,
            help="Follow the batch to its end, or just start it. Default: --wait, in %grd --detach.",
        ),
        click.option("-q", "--quiet", is_flag=True, help="No progress on stderr."),
        click.option("--json", "as_json", is_flag=True, help="Print the batch as JSON (schema grd.batch/1)."),
        runs_dir_option,
    ):
        command = option(command)
    return command


def spec_options(command: Command) -> Command:
    """The flags that say what is run, and how."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Check everything and list the runs; start nothing."),
        click.option("--force", is_flag=True, help="Run also what is completed already."),
        click.option(
            "--fail-fast/--keep-going",
            default=None,
            help="Start no more runs once one has failed. Default: --keep-going.",
        ),
        click.option("--name", metavar="NAME", help="Part of the ids of the batch and its runs."),
        click.option("--kernel", metavar="NAME", help="Kernel to use. Default: the one the notebook names."),
        click.option(
            "--input",
            "inputs",
            multiple=True,
            metavar="PATH",
            help="A file or folder the runs read: if it changes, they are other runs.",
        ),
        click.option("--max-output", metavar="SIZE", help="Output that each notebook keeps. Default: 100MB."),
        click.option(
            "--start-timeout",
            metavar="TIME",
            help="Time for a kernel to answer. Default: 1m.",
        ),
        click.option(
            "--grace", metavar="TIME", help="From a stop request to the kill, time to save. Default: 30s."
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
            help="Each run leases N GPUs, waiting until they are free; 0 hides them. Default: one where "
            "there are any, unless CUDA_VISIBLE_DEVICES chooses.",
        ),
        click.option(
            "--max-attempts",
            type=click.IntRange(1, MOST_ATTEMPTS),
            metavar="N",
            help="Resume a run, after a growing pause, when kernel, runner or machine fail: N attempts of "
            "each in all. Default: 1.",
        ),
        click.option("--budget", metavar="TIME", help="Cap on all attempts of one run together."),
        click.option(
            "--timeout",
            metavar="TIME",
            help="Cap on one attempt of one run. Without it and without --budget each run gets 10m in all.",
        ),
        click.option("--memory", metavar="SIZE", help="What one run needs: no more are under way than fit."),
        click.option(
            "-j",
            "--jobs",
            type=click.IntRange(1),
            metavar="N",
            help="So many at once, at most one for each usable core. Default: one for each.",
        ),
    ):
        command = option(command)
    return command
