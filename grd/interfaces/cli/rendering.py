"""How events and records look in a terminal, in a pipe, and as JSON."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from typing import Any

import click

from grd import contract
from grd.runs.events import LiveView
from grd.settings import format_duration

PLAIN_SECONDS = 10.0
"""In a pipe, progress inside an epoch is said at most this often."""


SILENT_SECONDS = 20.0
"""Four missed heartbeats: the runner lives, but something holds it up."""


def say(text: str) -> None:
    """A line for people, on stderr."""
    click.echo(f"grd: {text}", err=True)


class ProgressPrinter:
    """Events as lines on stderr: every epoch, checkpoint and state; steps in place on a terminal only."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._view = LiveView()
        self._quiet = quiet
        self._live = sys.stderr.isatty() and not quiet
        self._open_line = False
        self._last_progress = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        self._view.take(event)
        if self._quiet:
            return
        kind = event.get("kind")
        if kind == contract.EVENT_PROGRESS:
            self._progress(event)
        elif kind == contract.EVENT_METRICS:
            self._line(_metrics_line(event))
        elif kind == contract.EVENT_RESUME:
            self._line(f"resumed from the checkpoint of {_position(event)}")
        elif kind == contract.EVENT_WARNING:
            self._line(f"warning: {event.get('message')}")
        elif kind == contract.EVENT_STOP and event.get("stage") == 0:
            self._line(f"stopping: {event.get('reason')}")
        elif kind == contract.EVENT_STOP and event.get("stage") == 3:
            at_once = event.get("action") == "kill at once"
            self._line("killing at once, as asked" if at_once else "the grace period is over: killing")

    def _progress(self, event: dict[str, Any]) -> None:
        n, total = format_count(event.get("n")), event.get("total")
        of = f"/{total}" if total is not None else ""
        progress = self._view.progress or {}
        eta = progress.get("eta_seconds")
        left = f", about {format_duration(eta)} left" if isinstance(eta, (int, float)) and eta > 0 else ""
        text = f"{event.get('name')} {n}{of}{left}"
        if self._live:
            click.echo(f"\r\x1b[2Kgrd: {text}", nl=False, err=True)
            self._open_line = True
        elif time.monotonic() - self._last_progress >= PLAIN_SECONDS:
            self._last_progress = time.monotonic()
            say(text)

    def _line(self, text: str) -> None:
        if self._open_line:
            click.echo("\r\x1b[2K", nl=False, err=True)
            self._open_line = False
        say(text)

    def close(self) -> None:
        """End a line that is still open."""
        if self._open_line:
            click.echo("", err=True)
            self._open_line = False


def _metrics_line(event: dict[str, Any]) -> str:
    values = " ".join(f"{name}={format_number(value)}" for name, value in event.get("values", {}).items())
    return f"epoch {event['epoch']}: {values}" if event.get("epoch") is not None else values


def _position(event: dict[str, Any]) -> str:
    step = f" step {event['step']}" if event.get("step") is not None else ""
    return f"epoch {event.get('epoch')}{step}"


def format_number(value: Any) -> str:
    """Four significant digits for floats, all of them for the rest."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_count(value: Any) -> str:
    """A count of epochs or steps: one decimal where an epoch is under way."""
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def describe_end(shown: dict[str, Any]) -> list[str]:
    """A run's state in lines: what it is, why, what it has, and the next command."""
    because = f" ({shown['cause']})" if shown.get("cause") else ""
    used = (shown.get("budget") or {}).get("used_seconds")
    spent = f" after {format_duration(used)}" if used else ""
    attempts = f" in {shown['attempt']} attempts" if shown.get("attempt", 1) > 1 else ""
    lines = [f"{shown['run_id']}: {shown['state']}{because}{spent}{attempts}"]
    if shown.get("detail"):
        lines.append(f"  {shown['detail']}")
    progress = shown.get("progress")
    if progress:
        of = f"/{progress['total']}" if progress.get("total") is not None else ""
        lines.append(f"  progress    {progress['name']} {format_count(progress['n'])}{of}")
    if shown.get("metrics"):
        lines.append(
            "  metrics     " + " ".join(f"{k}={format_number(v)}" for k, v in shown["metrics"].items())
        )
    if shown.get("checkpoint"):
        lines.append(f"  checkpoint  {_position(shown['checkpoint'])}: {shown['checkpoint'].get('path')}")
    lines.append(f"  folder      {shown['folder']}")
    if shown.get("state") == contract.RUNNING and shown.get("runner"):
        silent = shown.get("heartbeat_seconds") or 0.0
        hung = f", silent for {format_duration(silent)}: stopped or hung?" if silent > SILENT_SECONDS else ""
        lines.append(f"  runner      pid {shown['runner']['pid']} on {shown['runner']['host']}{hung}")
    if shown.get("resume_command"):
        lines.append(f"  next        {shown['resume_command']}")
    elif shown.get("state") == contract.COMPLETED:
        lines.append(f"  next        grd result {shown['run_id']}")
    return lines


def local_time(iso: str | None) -> str:
    """A UTC time of the record in this machine's time zone, to the second."""
    if not iso:
        return "-"
    return datetime.fromisoformat(iso).astimezone().strftime("%Y-%m-%d %H:%M:%S")
