"""``grd kernelspec``: the kernelspec for tools that cannot name an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from grd.errors import UsageError
from grd.interfaces.cli.answer import Answer, AnsweringCommand

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _where(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--prefix", metavar="DIR", help="In DIR/share/jupyter/kernels."),
        click.option("--user", is_flag=True, help="In the user's Jupyter folder, for all environments."),
        click.option("--sys-prefix", is_flag=True, help="In this Python's environment (the default)."),
        click.option("--name", metavar="NAME", default="grd-python3", show_default=True, help="Its name."),
    ):
        command = option(command)
    return command


def _kernels(sys_prefix: bool, user: bool, prefix: str | None) -> Path:
    from grd.execution.kernelspec import kernels_folder

    if sys_prefix + user + (prefix is not None) > 1:
        raise UsageError("--sys-prefix, --user and --prefix exclude each other")
    return kernels_folder(user=user, prefix=prefix)


@click.group()
def kernelspec() -> None:
    """The kernelspec grd-python3, for tools that cannot name an engine.

    Airflow, dagstermill, nbconvert, jupyter execute and Lab name a kernel at most. A kernel started by this
    one's name has a guardian: whatever kills the tool, nothing that the kernel started stays behind, and a
    cell has GRD_GRACE (30 s) to save. grd must be installed where the tool is.
    """


@kernelspec.command(cls=AnsweringCommand)
@_where
@click.option("--display-name", metavar="TEXT", help="What front ends show. Default: Python 3 (grd).")
@click.option(
    "--env",
    "environment",
    nargs=2,
    multiple=True,
    metavar="NAME VALUE",
    help="Set for its kernels: GRD_GRACE 2m.",
)
@click.option("--replace", is_flag=True, help="Also replace a kernelspec that grd did not install.")
@_json
def install(
    name: str,
    sys_prefix: bool,
    user: bool,
    prefix: str | None,
    display_name: str | None,
    environment: tuple[tuple[str, str], ...],
    replace: bool,
    as_json: bool,
) -> Answer:
    """Install it for this Python, or bring it up to date; installing twice changes nothing."""
    from grd.execution import kernelspec as specs

    done = specs.install(
        _kernels(sys_prefix, user, prefix),
        name=name,
        display_name=display_name,
        environment=dict(environment),
        replace=replace,
    )
    hidden = specs.hidden_by(done.spec)
    verb = "replaced" if done.replaced else "installed" if done.changed else "was up to date:"
    lines = [f"{verb} {name} in {done.spec.folder}"]
    lines.append(f"but tools here do not get it: {hidden}" if hidden else f"use it by its name: -k {name}")
    document = {
        "schema": "grd.kernelspec-install/1",
        **_shown(done.spec),
        "changed": done.changed,
        "replaced": done.replaced,
        "hidden": hidden,
    }
    return Answer(document=document, lines=lines, as_json=as_json)


@kernelspec.command(cls=AnsweringCommand)
@_where
@_json
def remove(name: str, sys_prefix: bool, user: bool, prefix: str | None, as_json: bool) -> Answer:
    """Remove it from where install put it; never one that grd did not install."""
    from grd.execution import kernelspec as specs

    folder = specs.remove(_kernels(sys_prefix, user, prefix), name=name)
    stays = folder.exists()
    lines = [f"removed {name} from {folder.parent}"]
    if stays:
        lines.append(f"{folder} stays: it holds files that are not grd's")
    document = {
        "schema": "grd.kernelspec-remove/1",
        "name": name,
        "folder": str(folder),
        "folder_stays": stays,
    }
    return Answer(document=document, lines=lines, as_json=as_json)


@kernelspec.command("list", cls=AnsweringCommand)
@_json
def list_kernelspecs(as_json: bool) -> Answer:
    """grd's kernelspecs among those that Jupyter finds here."""
    from grd.execution import kernelspec as specs

    found = specs.find()
    lines = [
        f"{spec.name}  {spec.folder}" + (f"  (unusable: {spec.problem})" if spec.problem else "")
        for spec in found
    ]
    document = {"schema": "grd.kernelspec-list/1", "kernelspecs": [_shown(spec) for spec in found]}
    return Answer(document=document, lines=lines or ["none; see: grd kernelspec install"], as_json=as_json)


def _shown(spec: Any) -> dict[str, Any]:
    return {
        "name": spec.name,
        "display_name": spec.display_name,
        "folder": str(spec.folder),
        "python": spec.python,
        "problem": spec.problem,
    }
