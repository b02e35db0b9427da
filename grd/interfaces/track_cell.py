"""``%%grd track`` in Jupyter and IPython: executes a cell, and says what it used."""

from __future__ import annotations

import ast
import contextlib
import inspect
import keyword
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import click

from grd.interfaces.cli.answer import Answer
from grd.settings import format_duration
from grd.tracking import ResourceTracker, resource_usage_to_dict

SCHEMA = "grd.track/1"
MEBIBYTE = 1024**2
_CELL = re.compile(r"In\[(\d+)\]")
_FIRST_LINE = re.compile(r"^%%grd[ \t]+(?P<rest>track\b.*)$")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the answer is given: printed as JSON, put into the variable ``into``."""

    as_json: bool
    into: str | None


def _variable(context: click.Context, option: click.Parameter, name: str | None) -> str | None:
    if name is None:
        return None
    if not name.isidentifier() or keyword.iskeyword(name):
        raise click.BadParameter(f"{name!r} is no name of a variable")
    if name.startswith("__"):
        raise click.BadParameter(f"{name!r} is a name of Python's own; choose another variable")
    return name


@click.command()
@click.option(
    "-o", "--into", metavar="NAME", callback=_variable, help="Put what was used into this variable."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def track(into: str | None, as_json: bool) -> Options:
    """Execute the cell, and say what it used: time, the true peak of memory with all children, GPU memory."""
    return Options(as_json=as_json, into=into)


@dataclass(frozen=True, kw_only=True)
class _Program:
    """A cell, compiled: its statements, and its last line's expression where that is one to be shown."""

    statements: CodeType
    expression: CodeType | None
    silent: bool

    @property
    def waits(self) -> bool:
        """Whether there is an ``await`` outside of all functions."""
        return any(code is not None and code.co_flags & inspect.CO_COROUTINE for code in self._codes)

    @property
    def _codes(self) -> tuple[CodeType | None, ...]:
        return self.statements, self.expression


def _number(shell: Any) -> int:
    """The number of the cell that is executed here, as tracebacks are to name it.

    It is that of the cell whose code is on the stack: IPython counts on before a cell in some versions and
    after it in others.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        told = shell.compile.format_code_name(frame.f_code.co_filename)
        number = _CELL.fullmatch(told[1]) if told else None
        if number:
            return int(number[1])
        frame = frame.f_back
    return int(shell.execution_count)


def _compile(shell: Any, cell: str) -> _Program:
    """Raises SyntaxError. Lines are numbered as in the whole cell, whose first is the magic's own."""
    source = "\n" + shell.transform_cell(cell)
    # Known to the compiler's cache under a name of this cell's: so a traceback can show its lines.
    name = shell.compile.cache(source, _number(shell), raw_code=cell)
    awaits = (
        shell.compile.extra_flags(ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        if shell.autoawait
        else contextlib.nullcontext()
    )
    with awaits:
        tree = shell.transform_ast(shell.compile.ast_parse(source, filename=name))
        last, expression, silent = tree.body[-1] if tree.body else None, None, False
        if isinstance(last, ast.Expr):
            line = source.split("\n")[(last.end_lineno or 1) - 1].encode()
            silent = line[last.end_col_offset or 0 :].lstrip().startswith(b";")
            expression = shell.compile(ast.Expression(tree.body.pop().value), name, "eval")
        return _Program(statements=shell.compile(tree, name, "exec"), expression=expression, silent=silent)


class TrackedCells:
    """The cell magic of one IPython shell."""

    def __init__(self, shell: Any) -> None:
        self.shell = shell

    def run(self, options: Options | None, cell: str) -> Any:
        """The cell's value, or where it awaits something, what has to be awaited for that.

        What the cell raises passes, after what was used until then has been shown. Without options (help
        was asked for) nothing is executed. Raises SyntaxError.
        """
        program = _compile(self.shell, cell)
        if program.waits:
            return self._run_awaiting(options, program)
        if options is None:
            return None
        value = None
        with self._tracked(options):
            exec(program.statements, self.shell.user_global_ns, self.shell.user_ns)
            if program.expression is not None:
                value = eval(program.expression, self.shell.user_global_ns, self.shell.user_ns)
        return None if program.silent else value

    async def _run_awaiting(self, options: Options | None, program: _Program) -> Any:
        if options is None:
            return None
        value = None
        with self._tracked(options):
            for code in (program.statements, program.expression):
                value = None
                if code is not None:
                    value = eval(code, self.shell.user_global_ns, self.shell.user_ns)
                    if code.co_flags & inspect.CO_COROUTINE:
                        value = await value
        return None if program.silent else value

    @contextlib.contextmanager
    def _tracked(self, options: Options) -> Iterator[None]:
        tracker, completed = ResourceTracker(gpu_index=None), False
        try:
            with tracker:
                yield
                completed = True
        finally:
            answer = _answer(tracker, completed=completed, as_json=options.as_json)
            if options.into is not None:
                self.shell.user_ns[options.into] = answer.document
            if options.as_json:
                click.echo(answer.text)
            else:
                from IPython.display import display

                display(answer.object())

    def waits(self, cell: str) -> bool:
        """Whether the cell awaits something outside of all functions."""
        try:
            return _compile(self.shell, cell).waits
        except SyntaxError:
            return False  # told when it is executed


class AwaitingCells:
    """An input transformation: a tracked cell that awaits something is awaited by IPython in its turn.

    IPython decides that by the cell's text, where what follows a magic is but a string.
    """

    has_side_effects = True
    """Not for the question whether a cell is complete: below a magic that is told by an empty line."""

    def __init__(self, cells: TrackedCells) -> None:
        self._cells = cells

    def __call__(self, lines: list[str]) -> list[str]:
        first = _FIRST_LINE.match(lines[0].rstrip("\n")) if lines else None
        if first is None or not self._cells.waits(cell := "".join(lines[1:])):
            return lines
        return [f"await get_ipython().run_cell_magic('grd', {first['rest']!r}, {cell!r})\n"]


def _answer(tracker: ResourceTracker, *, completed: bool, as_json: bool) -> Answer:
    usage = tracker.get_usage()
    rise = max(0, tracker.peak_bytes - tracker.start_bytes) / MEBIBYTE
    document = {
        "schema": SCHEMA,
        "completed": completed,
        **resource_usage_to_dict(usage),
        "memory_rise_mb": round(rise, 2),
        "gpu_available": usage.gpu_available,
    }
    wall, cpu, vram = usage.wall_clock_seconds, usage.cpu_time_seconds, usage.gpu_vram_used_mb
    cores = f" ({cpu / wall:.1f} cores)" if wall > 0 else ""
    gpu = "no GPU"
    if usage.gpu_available:
        gpu = "GPU memory unknown" if vram is None else f"GPU memory {vram:.0f} MiB"
    parts = (
        f"wall {_seconds(wall)}",
        f"CPU {_seconds(cpu)}{cores}",
        f"peak memory {usage.peak_memory_mb:.0f} MiB (rose by {rise:.0f})",
        gpu,
    )
    until = "" if completed else "until it failed: "
    return Answer(document=document, lines=[until + ", ".join(parts)], as_json=as_json)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 60 else format_duration(seconds)
