"""The panels of one kernel, and a run as they show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grd.agreement.person import JUPYTER, who_can_answer
from grd.execution.launch import RunnerProcess
from grd.interfaces.panel.panel import Panel
from grd.interfaces.panel.watching import Watch
from grd.runs.folder import RunFolder
from grd.steps.agreeing import Answered, Asker, Question
from grd.steps.following import is_under_way
from grd.steps.run import Run

Begin = Callable[[Asker | Answered, Callable[[str], None]], Run]


class Asked(Exception):
    """Somebody must be asked first; nothing was started."""

    def __init__(self, question: Question) -> None:
        super().__init__(question.notebook)
        self.question = question


class PanelRun(Run):
    """A run that a notebook shows by its panel. Before somebody has agreed there is none, and it says so."""

    def __init__(self, panel: Panel, shell: Any) -> None:
        self._panel, self._shell = panel, shell
        self._shown_in: int | None = None

    @property
    def _folder(self) -> RunFolder:
        return self._panel.run.run_folder

    @_folder.setter
    def _folder(self, folder: RunFolder) -> None:
        raise AttributeError("the folder is the panel's to know")

    @property
    def _process(self) -> RunnerProcess | None:
        return self._panel.run.process

    @_process.setter
    def _process(self, process: RunnerProcess | None) -> None:
        raise AttributeError("the process is the panel's to know")

    def show(self) -> None:
        """Display the panel below the cell that is executing."""
        self._panel.display()
        self._shown_in = self._shell.execution_count

    def __repr__(self) -> str:
        return repr(self._panel)

    def _ipython_display_(self) -> None:
        if self._shell.execution_count != self._shown_in:  # the cell that started it has its panel already
            self.show()


class Panels:
    """What ``%grd`` asks and shows by, where a front end is there that may show widgets."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._watch = Watch()

    def can_show(self) -> bool:
        """Whether somebody sits at a front end of this kernel: it may show widgets, and shows text if not."""
        return who_can_answer() == JUPYTER

    def begin(self, start: Begin, line: str, warnings: list[str]) -> Run:
        """Start a run, or ask whether it may start; the panel below the cell shows what comes of it.

        Returns at once. Raises what ``start`` raises. ``line`` is what was typed.
        """
        notes = list(warnings)
        try:
            panel = Panel.following(start(_put_off, notes.append), notes)
        except Asked as asked:
            panel = Panel.asking(asked.question, start, line, notes)
        shown = PanelRun(panel, self._shell)
        shown.show()
        self._watch.add(panel)
        return shown

    def of(self, run: Run) -> Run:
        """A run to be looked at: with its panel while it is under way."""
        if not is_under_way(run.run_folder):
            return run
        panel = self._watch.find(run.folder)
        if not isinstance(panel, Panel):
            panel = Panel.following(run, [])
            self._watch.add(panel)
        return PanelRun(panel, self._shell)


def _put_off(question: Question) -> str:
    raise Asked(question)
