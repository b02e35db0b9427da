"""The events of a batch on stderr: a line for each run, or JSON lines with --json."""

from __future__ import annotations

import json
from typing import Any

import click

from grd import contract
from grd.batch import record as records
from grd.batch.following import follow
from grd.batch.looking import Batch
from grd.batch.plan import parameters_text
from grd.interfaces.cli.rendering import metrics_text, say
from grd.settings import format_duration


class BatchPrinter:
    """Follows one batch and shows what is new."""

    def __init__(self, made: Batch, *, quiet: bool, as_json: bool, since: int | None = None) -> None:
        self._made = made
        self._quiet = quiet
        self._as_json = as_json
        events = made.batch_folder.events
        self._since = (events.stat().st_size if events.exists() else 0) if since is None else since
        self._runs = {run.index: run for run in records.planned_runs(made.batch_folder)}
        self._ended: set[int] = set()

    def follow(self, seconds: float | None) -> bool:
        """Until the batch has ended; False if ``seconds`` ran out before."""
        return follow(
            self._made.batch_folder,
            self._made.process,
            since=self._since,
            on_event=None if self._quiet else self._show,
            on_note=say,
            seconds=seconds,
        )

    def _show(self, event: dict[str, Any]) -> None:
        if self._as_json:
            click.echo(json.dumps({**event, "batch_id": self._made.id}, ensure_ascii=False), err=True)
            return
        line = self._line(event)
        if line is not None:
            say(line)

    def _line(self, event: dict[str, Any]) -> str | None:
        if event.get("kind") == records.EVENT_NOTE:
            return str(event.get("message"))
        run = self._runs.get(event.get("index", -1))
        if event.get("kind") != records.EVENT_RUN or run is None:
            return None
        step = event.get("step")
        width = len(str(len(self._runs)))
        head = f"{run.index + 1:>{width}}/{len(self._runs)} {parameters_text(run.parameters)}".rstrip()
        if step == records.STARTED and event.get("action") in ("start", "resume", "attach"):
            word = {"start": "started", "resume": "resumed", "attach": "under way already"}[event["action"]]
            return f"{head}: {word}, {event.get('run_id')}"
        if step == records.REFUSED:
            return f"{head}: {event.get('state')}: {event.get('detail')}"
        if step == records.ENDED:
            return f"{head}: {_end_text(event)}"
        return None


def _end_text(event: dict[str, Any]) -> str:
    because = f" ({event['cause']})" if event.get("cause") else ""
    if event.get("action") == "show" and event.get("state") == contract.COMPLETED:
        return f"completed before, {event.get('run_id')}"
    spent = f" after {format_duration(event['seconds'])}" if event.get("seconds") else ""
    metrics = f", {metrics_text(event['metrics'])}" if event.get("metrics") else ""
    return f"{event.get('state')}{because}{spent}{metrics}"
