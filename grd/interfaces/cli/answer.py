"""What a command answers, apart from how it is shown: the shell gets text or JSON, ``%grd`` gets objects.

Commands return an `Answer` and never ask where they were typed; what truly differs is in `Surface`.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

if TYPE_CHECKING:
    from grd.steps.agreeing import Answered, Asker
    from grd.steps.run import Run


class Panels(Protocol):
    """Asks and shows runs by something that stays, while the command itself returns at once."""

    def can_show(self) -> bool:
        """Whether somebody is there now who would see it."""

    def begin(
        self, start: Callable[[Asker | Answered, Callable[[str], None]], Run], line: str, notes: list[str]
    ) -> Run:
        """Start a run, or ask first and start it then."""

    def of(self, run: Run) -> Run:
        """A run to be looked at."""


@dataclass
class Surface:
    """Where commands are typed, and what differs there. The defaults are those of the command line."""

    waits: bool = True
    """Whether ``research`` and ``resume`` follow the run unless told otherwise."""
    prints: bool = True
    """Whether the answer is text on stdout, rather than an object."""
    debug: bool = False
    last_run: Path | None = None
    """Folder of the newest run this surface started: in Jupyter it is what ``status`` is about."""
    panels: Panels | None = None
    line: str = ""
    """What was typed, as it is typed there again."""
    warning: Callable[[], str | None] = lambda: None
    """What to say before a start about the process that asks for it."""

    @property
    def shows_panels(self) -> bool:
        """Whether a run is shown by a panel here and now."""
        return self.panels is not None and self.panels.can_show()


def surface() -> Surface:
    """The surface of the command that is being executed."""
    return click.get_current_context().find_object(Surface) or Surface()


class AnsweringCommand(click.Command):
    """A command whose `Answer` is printed, with its exit code, except where the object itself is wanted."""

    def invoke(self, ctx: click.Context) -> Answer:
        """Execute the command. Raises click's Exit where its answer was printed."""
        answer: Answer = super().invoke(ctx)
        if not (ctx.find_object(Surface) or Surface()).prints:
            return answer
        if answer.text:
            click.echo(answer.text)
        raise click.exceptions.Exit(answer.code)


class Report(Mapping[str, Any]):
    """An answer that has no class of its own: a mapping that shows itself as the command line would."""

    def __init__(self, document: dict[str, Any], text: str) -> None:
        self._document = document
        self.text = text
        self.printed_in: int | None = None
        """The IPython cell that has printed the text already: its own display would be a second copy."""

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return self._document

    def __getitem__(self, name: str) -> Any:
        return self._document[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._document)

    def __len__(self) -> int:
        return len(self._document)

    def __repr__(self) -> str:
        return f"<{self._document.get('schema', 'Report')}: {', '.join(self._document)}>"

    def _ipython_display_(self) -> None:
        from IPython.core.getipython import get_ipython

        shell = get_ipython()
        if shell is None or shell.execution_count != self.printed_in:
            raise NotImplementedError  # IPython then shows the representations below

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self) if cycle else self.text)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.text)}</pre>"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command has found out. Without a document everything was printed as it came."""

    document: dict[str, Any] | None = None
    """What ``--json`` prints, with its ``schema``."""
    lines: Sequence[str] = ()
    """The same for people."""
    value: Any = None
    """The same as an object, where it has a class of its own."""
    as_json: bool = False
    code: int = 0
    """The exit code."""

    @property
    def text(self) -> str:
        """What the command line prints."""
        if self.as_json:
            return json.dumps(self.document, indent=2, ensure_ascii=False, allow_nan=False, default=str)
        return "\n".join(self.lines)

    def object(self) -> Any:
        """What a Python caller gets."""
        if self.document is None:
            return None
        return self.value if self.value is not None and not self.as_json else Report(self.document, self.text)
