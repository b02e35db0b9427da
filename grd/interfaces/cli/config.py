"""``grd config show``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from grd.interfaces.cli.answer import Answer, AnsweringCommand
from grd.settings import find_project_root, load_settings, state_dir, user_config_file


@click.group()
def config() -> None:
    """The settings in force. Precedence: flag > GRD_* > grd.toml > pyproject.toml > user file > default."""


@config.command(cls=AnsweringCommand)
@click.option("--origin", is_flag=True, help="Say where each value comes from.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(origin: bool, as_json: bool) -> Answer:
    """Show every setting (times in seconds, sizes in bytes)."""
    root = find_project_root(Path.cwd())
    settings, origins = load_settings(root)
    values = asdict(settings)
    document = {
        "schema": "grd.config/1",
        "project_root": str(root),
        "user_file": str(user_config_file()),
        "state_dir": str(state_dir()),
        "settings": {name: {"value": value, "origin": origins[name]} for name, value in values.items()},
    }
    width = max(map(len, values))
    lines = [
        f"{name:<{width}} = {value!r}{f'  ({origins[name]})' if origin else ''}"
        for name, value in values.items()
    ]
    return Answer(document=document, lines=lines, as_json=as_json)
