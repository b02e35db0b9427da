"""``grd skill``: what an agent should know of grd, as a skill file in its project."""

from __future__ import annotations

import hashlib
import re
import shlex
from pathlib import Path

import click

from grd.errors import UsageError
from grd.files import atomic_write, shipped_file
from grd.interfaces.cli.answer import Answer, AnsweringCommand
from grd.settings import find_project_root

_SHIPPED = "templates/skills/grd/SKILL.md"
_SEAL = re.compile(rb"\n<!-- grd skill install: ([0-9a-f]{16}) -->\n\Z")


@click.group()
def skill() -> None:
    """A skill file with the recipes for agents: detached runs, slices, MCP, exit codes, agreement."""


@skill.command(cls=AnsweringCommand)
@click.option(
    "--to",
    "skills",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="In DIR/grd. Default: the project's .claude/skills, or .agents/skills where there is .agents.",
)
@click.option("--replace", is_flag=True, help="Also replace a skill file that somebody edited.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def install(skills: Path | None, replace: bool, as_json: bool) -> Answer:
    """Write the skill file where agents look for it, or bring it up to date; twice changes nothing."""
    root = find_project_root(Path.cwd())
    path = (default_place(root) if skills is None else skills.expanduser().absolute()) / "grd" / "SKILL.md"
    wanted = sealed(shipped_file(_SHIPPED).read_bytes())
    try:
        there = path.read_bytes() if path.exists() else None
        edited = there is not None and there != wanted and not is_ours(there)
        if edited and not replace:
            again = "grd skill install --replace" + (
                "" if skills is None else f" --to {shlex.quote(str(skills))}"
            )
            raise UsageError(f"{path} was edited by somebody; to lose that: {again}")
        if there != wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, wanted)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror or error}; choose another folder: "
            "grd skill install --to DIR"
        ) from None
    changed = there != wanted
    verb = "replaced" if edited else "installed" if changed else "was up to date:"
    document = {
        "schema": "grd.skill-install/1",
        "path": str(path),
        "changed": changed,
        "replaced": edited,
    }
    return Answer(document=document, lines=[f"{verb} {path}"], as_json=as_json)


@skill.command(cls=AnsweringCommand)
def show() -> Answer:
    """Print the skill file as it ships with grd; it is text, so there is no --json."""
    return Answer(lines=[shipped_file(_SHIPPED).read_text(encoding="utf-8").rstrip("\n")])


def default_place(root: Path) -> Path:
    """The folder of skills of a project: that of the agent that is used there."""
    for name in (".claude", ".agents"):
        if (root / name).is_dir():
            return root / name / "skills"
    return root / ".claude" / "skills"


def sealed(text: bytes) -> bytes:
    """``text`` with a last line by which its next version knows that nobody has edited it."""
    return text.rstrip(b"\n") + f"\n\n<!-- grd skill install: {_digest(text)} -->\n".encode()


def is_ours(text: bytes) -> bool:
    """Whether ``text`` is what some version of grd has written, to the byte."""
    seal = _SEAL.search(text)
    return seal is not None and seal[1].decode() == _digest(text[: seal.start()])


def _digest(text: bytes) -> str:
    return hashlib.sha256(text.rstrip(b"\n")).hexdigest()[:16]
