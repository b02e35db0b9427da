"""A bar for each run on a terminal. The only module of the command line that loads rich."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID
from rich.text import Text

from grd import contract
from grd.interfaces.cli.rendering import line_of, metrics_text, progress_text, state_text
from grd.runs.events import LiveView


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
    """One line a run: its outermost progress, the time left, and its newest metrics beside the bar."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="-"),
            _Field("run"),
            BarColumn(bar_width=24),
            _Field("position"),
            _Field("metrics", "cyan"),
            console=Console(stderr=True, highlight=False),
            refresh_per_second=8,
        )
        self._tasks: dict[str, TaskID] = {}
        self._progress.start()

    def show(self, run_id: str, event: dict[str, Any], view: LiveView, *, news: bool) -> None:
        """Move the run's bar; what is no progress and no metric becomes a line above the bars."""
        task = self._tasks.get(run_id)
        if task is None:
            task = self._progress.add_task("", total=None, run=run_id, position="starting", metrics="")
            self._tasks[run_id] = task
        kind = event.get("kind")
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

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._progress.console.print(f"grd: {text}", markup=False)

    def close(self) -> None:
        """Draw the bars a last time; they stay on the screen."""
        self._progress.stop()
