"""The command ``grd``: commands are imported when they are typed, so that ``grd status`` starts fast."""

from __future__ import annotations

import importlib
import io
import os
import sys
from pathlib import Path

import click
from click.shell_completion import CompletionItem

import grd
from grd.contract import EVENT_VERSION
from grd.errors import GrdError
from grd.interfaces.cli import exit_codes
from grd.interfaces.cli.answer import Surface

_COMMANDS = {
    "explore": ("grd.interfaces.cli.explore", "explore", "Profile this machine into the report."),
    "estimate": ("grd.interfaces.cli.estimate", "estimate", "How long a notebook will take."),
    "research": ("grd.interfaces.cli.research", "research", "Run a training notebook that survives."),
    "resume": ("grd.interfaces.cli.research", "resume", "Go on with an interrupted or failed run."),
    "loop": ("grd.interfaces.cli.loop", "loop", "Run a plan of notebooks again and again."),
    "sweep": ("grd.interfaces.cli.batch", "sweep", "Run a notebook with every combination of parameters."),
    "batch": ("grd.interfaces.cli.batch", "batch", "Many runs from one spec; steer and show batches."),
    "stop": ("grd.interfaces.cli.steering", "stop", "Ask a run to save and stop."),
    "wait": ("grd.interfaces.cli.steering", "wait", "Wait until runs have ended."),
    "status": ("grd.interfaces.cli.looking", "status", "What a run, or the whole project, is doing."),
    "list": ("grd.interfaces.cli.looking", "list_runs", "This project's runs, newest first."),
    "events": ("grd.interfaces.cli.looking", "events", "The events of a run as JSON lines."),
    "logs": ("grd.interfaces.cli.looking", "logs", "What a run's cells printed."),
    "result": ("grd.interfaces.cli.looking", "result", "Metrics of a run and where its files lie."),
    "checkpoints": (
        "grd.interfaces.cli.checkpoints",
        "checkpoints",
        "What a run has saved, and whether it is good.",
    ),
    "approve": ("grd.interfaces.cli.approval", "approve", "Agree to long runs, with caps and an end."),
    "revoke": ("grd.interfaces.cli.approval", "revoke", "Take an agreement back, also in mid-run."),
    "approvals": ("grd.interfaces.cli.approval", "approvals", "What was agreed to, and what is left."),
    "rm": ("grd.interfaces.cli.tidying", "rm", "Delete runs that are not under way."),
    "gc": ("grd.interfaces.cli.tidying", "gc", "Delete what runs no longer need."),
    "hardware": ("grd.interfaces.cli.machine", "hardware", "Show this machine's profile; compare machines."),
    "gpus": ("grd.interfaces.cli.machine", "gpus", "What each GPU is doing now."),
    "benchmark": ("grd.interfaces.cli.machine", "benchmark", "Measure this machine for five seconds."),
    "recover": ("grd.interfaces.cli.recover", "recover", "Rebuild a notebook whose papermill was killed."),
    "mlflow": ("grd.interfaces.cli.mlflow", "mlflow", "Send runs to MLflow afterwards."),
    "mcp": ("grd.interfaces.cli.mcp", "mcp", "Tools for agents, for an MCP client to start."),
    "skill": ("grd.interfaces.cli.skill", "skill", "What an agent should know, as a skill file."),
    "kernelspec": ("grd.interfaces.cli.kernelspec", "kernelspec", "A kernel for tools without engines."),
    "config": ("grd.interfaces.cli.config", "config", "The settings in force and where they come from."),
}


class LazyGroup(click.Group):
    """A group whose commands' modules are imported only when used; help texts need none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of a working day."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in _COMMANDS:
            return None
        module, name, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Command names without importing the commands, and the group's own options."""
        found = [
            CompletionItem(name, help=text)
            for name, (_, _, text) in _COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in _COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest command for a misspelt one."""
        misspelt = bool(args) and args[0] not in _COMMANDS and not args[0].startswith("-")
        if misspelt and not ctx.resilient_parsing:
            import difflib

            close = difflib.get_close_matches(args[0], _COMMANDS, 1)
            hint = f"did you mean: grd {close[0]}" if close else "see: grd --help"
            raise click.UsageError(f"no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(grd.__version__, "-V", "--version", prog_name="grd")
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Run Jupyter notebooks as ML experiments that survive.

    Data goes to stdout, progress and messages to stderr. Exit codes: 0 ok, 1 the run failed, 2 usage,
    66 no such run or notebook, 69 resource unavailable, 75 interrupted and resumable, 77 approval required,
    78 bad configuration, 124 `wait` ran out of time and the run goes on.
    """
    ctx.ensure_object(Surface).debug = debug


def _folder_is_gone() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def _prepare_streams(*, as_json: bool) -> None:
    """Nothing is opened as stdin, stdout or stderr by accident where a caller has closed these; and names of
    files that are no UTF-8 can be printed: as they are, or as escapes of JSON."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free: this one
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(fd, "w", encoding="utf-8", closefd=False))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if as_json else "surrogateescape")


def _say_as_json(text: str, code: int) -> None:
    """A refusal where stderr is read by a program: a message as any other, with the exit code."""
    import json
    import time

    told = {"v": EVENT_VERSION, "t": round(time.time(), 3), "kind": "note", "message": text, "code": code}
    click.echo(json.dumps(told), err=True)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a command and exits with its code; errors are one line."""
    args = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in args
    _prepare_streams(as_json=as_json)
    debug = "--debug" in args or bool(os.environ.get("GRD_DEBUG"))
    try:
        code = cli.main(args=args, prog_name="grd", standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        code = error.exit_code
        if as_json:
            _say_as_json(error.format_message(), code)
        else:
            error.show()
    except (click.Abort, KeyboardInterrupt):
        click.echo("grd: interrupted", err=True)
        code = 130
    except GrdError as error:
        if debug:
            raise
        code = exit_codes.of_error(error)
        text = " ".join(str(error).split())
        if as_json:
            _say_as_json(text, code)
        else:
            click.echo(f"grd: {text}", err=True)
    except FileNotFoundError:
        if debug or not _folder_is_gone():
            raise
        click.echo("grd: the folder this was typed in was deleted; cd to one that is there", err=True)
        code = exit_codes.USAGE
    except BrokenPipeError:
        # The reader went away (`grd logs | head`): nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code if isinstance(code, int) else 0)
