"""A bar for each run on a terminal. The only module of the command line that loads rich."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from grd import contract
from grd.interfaces.cli.rendering import line_of, metrics_text, progress_text, state_text
from grd.runs.events import LiveView
from grd.runs.pace import number_of


class _Field(ProgressColumn):
    """Plain text of a task, never read as markup: names and metrics are the user's."""

    def __init__(self, name: str, style: str = "") -> None:
        super().__init__()
        self._name, self._style = name, style

    def render(self, task: Task) -> Text:
        return Text(
            str(task.fields.get(self._name) or ""), style=self._style, overflow="ellipsis", no_wrap=True
        )


class ProgressBars:
    """One line a run: its outermost progress, the time left, and its newest metrics beside the bar.

    Below it, while it moves, what goes on inside of that: the steps of an epoch, a bar of the notebook's.
    """

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="-"),
            _Field("run"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            _Field("position"),
            _Field("metrics", "cyan"),
            console=Console(stderr=True, highlight=False),
            refresh_per_second=8,
        )
        self._tasks: dict[str, TaskID] = {}
        self._inner: dict[str, tuple[str, TaskID]] = {}
        self._progress.start()

    def show(self, run_id: str, event: dict[str, Any], view: LiveView, *, news: bool) -> None:
        """Move the run's bar; what is no progress and no metric becomes a line above the bars."""
        task = self._tasks.get(run_id)
        if task is None:
            task = self._progress.add_task("", total=None, run=run_id, position="starting", metrics="")
            self._tasks[run_id] = task
        kind = event.get("kind")
        if kind == contract.EVENT_PROGRESS:
            self._show_inner(run_id, event)
        elif kind == contract.EVENT_STATE:
            self._remove_inner(run_id)
        line = None if kind == contract.EVENT_METRICS and event.get("epoch") is None else line_of(event)
        if news and line is not None:
            self._progress.console.print(f"grd: {run_id + ': ' if run_id else ''}{line}", markup=False)
        if view.progress is not None:
            self._progress.update(
                task,
                completed=float(view.progress["n"]),
                total=view.progress["total"],
                position=progress_text(view.progress),
            )
        self._progress.update(task, metrics=metrics_text(view.metrics))
        if kind == contract.EVENT_STATE and event.get("state") in contract.ENDED_STATES:
            reached = {**view.progress, "eta_seconds": None} if view.progress else None
            shown = f", {progress_text(reached)}" if reached else ""
            self._progress.update(task, position=f"{state_text(event)}{shown}")
            self._progress.stop_task(task)

    def _show_inner(self, run_id: str, event: dict[str, Any]) -> None:
        name, n, total = str(event.get("name")), number_of(event.get("n")), number_of(event.get("total"))
        known = self._inner.get(run_id)
        if event.get("within") is None or n is None:
            return
        ended = total is not None and n >= total
        if known is not None and (known[0] != name or ended):
            self._remove_inner(run_id)
            known = None
        if ended:
            return
        if known is None:
            known = name, self._progress.add_task("", total=None, run="", metrics="")
            self._inner[run_id] = known
        position = progress_text({"name": name, "n": n, "total": total})
        self._progress.update(known[1], completed=float(n), total=total, position=position)

    def _remove_inner(self, run_id: str) -> None:
        known = self._inner.pop(run_id, None)
        if known is not None:
            self._progress.remove_task(known[1])

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._progress.console.print(f"grd: {text}", markup=False)

    def close(self) -> None:
        """Draw the bars a last time; those of whole runs stay on the screen."""
        for run_id in list(self._inner):
            self._remove_inner(run_id)
        self._progress.stop()
