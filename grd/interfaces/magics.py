"""``%grd SUB ...`` in Jupyter and IPython: the commands of the command line, answered with objects.

The very same click commands parse and execute the line; only `Surface` and how errors are shown differ.
``%%grd track`` is the only one that takes a cell.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem, ShellComplete
from IPython.core.error import UsageError

from grd.errors import GrdError
from grd.interfaces.cli.answer import Answer, Report, Surface
from grd.interfaces.cli.main import cli
from grd.interfaces.panel.panels import Panels
from grd.interfaces.track_cell import AwaitingCells, Options, TrackedCells, track
from grd.tracking.gpu_held import warning_of_this_process

NAME = "grd"
_TYPED = re.compile(r"^(?:.*=)?\s*%grd\s+(?P<rest>.*)$", re.DOTALL)
_ASSIGNED = r"^[^#'\"]*=\s*%grd\s"
_NO_ARGUMENTS: tuple[type[click.ClickException], ...] = tuple(
    # click >= 8.2; before it, help was printed and the command left.
    kind
    for kind in (getattr(click.exceptions, "NoArgsIsHelpError", None),)
    if kind is not None
)


class GrdMagic:
    """The magic of one IPython shell; it remembers which run was started last."""

    def __init__(self, shell: Any) -> None:
        self.shell = shell
        self.surface = Surface(
            waits=False, prints=False, panels=Panels(shell), warning=warning_of_this_process
        )
        self.cells = TrackedCells(shell)

    def run_line(self, line: str) -> Any:
        """Execute one line; an error is one line too, as IPython shows its own usage errors."""
        if line.split() in ([], ["help"]):
            click.echo(_help())
            return None
        arguments = _split(f"%{NAME}", line)
        self.surface.line = f"%{NAME} {line.strip()}"
        if arguments[:1] == [track.name]:
            raise UsageError(f"{track.name} is for a cell: put %%{NAME} {track.name} above its code")
        return self._shown(self._execute(cli, _as_help(arguments), f"%{NAME}"))

    def run_cell(self, line: str, cell: str) -> Any:
        """Execute a cell below ``%%grd track``; its value, or what has to be awaited for it."""
        arguments = _split(f"%%{NAME}", line)
        if arguments[:1] != [track.name]:
            told = f"%%{NAME} {arguments[0]}" if arguments else f"%%{NAME}"
            raise UsageError(
                f"{told}: only %%{NAME} {track.name} takes a cell; commands are %{NAME} SUB, with one %"
            )
        options = self._execute(track, arguments[1:], f"%%{NAME} {track.name}")
        return self.cells.run(options if isinstance(options, Options) else None, cell)

    def _execute(self, command: click.Command, arguments: list[str], name: str) -> Any:
        try:
            return command.main(arguments, prog_name=name, standalone_mode=False, obj=self.surface)
        except _NO_ARGUMENTS as error:
            click.echo(error.format_message())
            return None
        except click.ClickException as error:
            raise UsageError(_one_line(error.format_message() + _where_to_look(error))) from None
        except (click.Abort, KeyboardInterrupt):
            raise UsageError("interrupted; runs that are under way go on") from None
        except GrdError as error:
            if self.surface.debug:
                raise
            raise UsageError(_one_line(str(error))) from None

    def _shown(self, answer: Any) -> Any:
        if not isinstance(answer, Answer):
            return None  # --help or --version, which click has printed
        value = answer.object()
        if isinstance(value, Report):
            click.echo(value.text)
            value.printed_in = self.shell.execution_count
        return value

    def complete(self, shell: Any, event: Any) -> list[str]:
        """What can follow; click knows the grammar, this only reads the line."""
        typed = _TYPED.match(event.text_until_cursor)
        if typed is None:
            return []
        words, incomplete = _words(typed["rest"])
        if words[:1] == ["help"]:
            words = []
        found = ShellComplete(cli, {}, NAME, "_GRD_COMPLETE").get_completions(words, incomplete)
        options = (
            [] if incomplete else ShellComplete(cli, {}, NAME, "_GRD_COMPLETE").get_completions(words, "-")
        )
        texts: list[str] = []
        for item in [*found, *options]:
            texts += _files(item) if item.type in ("file", "dir") else [item.value]
        # IPython replaces only what follows the last delimiter, such as the "=" of --name=VALUE.
        cut = len(incomplete) - len(event.symbol) if incomplete.endswith(event.symbol) else 0
        return [text[cut:] for text in texts]


def load(shell: Any) -> None:
    """Register ``%grd``, ``%%grd`` and their completion; once is enough, twice does no harm."""
    if NAME in shell.magics_manager.magics["line"]:
        return
    magic = GrdMagic(shell)

    def grd(line: str) -> Any:
        return magic.run_line(line)

    def grd_cell(line: str, cell: str) -> Any:
        return magic.run_cell(line, cell)

    for function, kind in ((grd, "line"), (grd_cell, "cell")):
        function.__doc__ = _help()
        function.__module__ = __name__
        shell.register_magic_function(function, kind, NAME)
    shell.input_transformers_cleanup.append(AwaitingCells(magic.cells))
    for key in ({"str_key": f"%{NAME}"}, {"re_key": _ASSIGNED}):
        shell.set_hook("complete_command", magic.complete, **key)


def unload(shell: Any) -> None:
    """Take ``%grd``, ``%%grd`` and their completion away; IPython has no call for that."""
    for kind in ("line", "cell"):
        shell.magics_manager.magics[kind].pop(NAME, None)
    transformers = shell.input_transformers_cleanup
    transformers[:] = [each for each in transformers if not isinstance(each, AwaitingCells)]
    hooks = shell.strdispatchers.get("complete_command")
    if hooks is not None:
        hooks.strs.pop(f"%{NAME}", None)
        hooks.regexs.pop(re.compile(_ASSIGNED), None)


def _help() -> str:
    with cli.make_context(f"%{NAME}", [], resilient_parsing=True) as context:
        commands = cli.get_help(context)
    return (
        f"{commands}\n\n"
        "%grd help SUB explains one command. Results are objects: runs = %grd list. {name} stands for the\n"
        "value of a variable; quote it where it may hold spaces. research and resume return at once and\n"
        "show a panel, unless --wait; status without RUN is about the run last started here, unless --all.\n"
        f"%%{NAME} {track.name} above a cell says what the cell used (%%{NAME} {track.name} --help)."
    )


def _split(magic: str, line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{error}: {magic} {line}") from None


def _as_help(arguments: list[str]) -> list[str]:
    return [*arguments[1:], "--help"] if arguments[0] == "help" else arguments


def _where_to_look(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return "" if context is None or context.command is cli else f" See: {context.command_path} --help"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _words(rest: str) -> tuple[list[str], str]:
    """The complete words of a line that is being typed, and the one the cursor is in."""
    words = rest.split()
    if not rest or rest[-1].isspace():
        return words, ""
    return words[:-1], words[-1]


def _files(item: CompletionItem) -> list[str]:
    """Files and folders that the completion stands for, as typed; folders end with a slash."""
    folder, slash, start = item.value.rpartition("/")
    place = Path(f"{folder}{slash}").expanduser() if slash else Path()
    found = []
    try:
        for path in sorted(place.iterdir()):
            if path.name.startswith(start) and (start or not path.name.startswith(".")):
                if path.is_dir():
                    found.append(f"{folder}{slash}{path.name}/")
                elif item.type == "file" and path.match(item.pattern or "*"):
                    found.append(f"{folder}{slash}{path.name}")
    except OSError:
        return []
    return found
