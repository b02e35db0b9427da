"""How events and records look in a terminal, in a pipe, and as JSON."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import click

from grd import contract
from grd.runs import retry
from grd.runs.events import LiveView
from grd.runs.folder import RunFolder
from grd.settings import format_duration

PLAIN_SECONDS = 10.0
"""In a pipe, progress inside an epoch is said at most this often."""


SILENT_SECONDS = 20.0
"""Four missed heartbeats: the runner lives, but something holds it up."""


def say(text: str) -> None:
    """A line for people, on stderr."""
    click.echo(f"grd: {text}", err=True)


class Display(Protocol):
    """Where the events of several runs are shown."""

    def show(self, run_id: str, event: dict[str, Any], view: LiveView, *, news: bool) -> None:
        """Show one event, already in ``view``; without ``news`` it is the past and only sets the scene."""

    def say(self, text: str) -> None:
        """Show a message that belongs to no event."""

    def close(self) -> None:
        """Leave stderr as it was found."""


def is_animated(stream: Any, environment: Mapping[str, str]) -> bool:
    """Whether bars may move on ``stream``: a terminal that can move its cursor. NO_COLOR is about colour."""
    return bool(stream.isatty()) and environment.get("TERM", "") not in ("dumb", "unknown")


class ProgressPrinter:
    """Events of one or several runs on stderr: bars on a terminal, else lines, or JSON lines with --json."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self._views: dict[str, LiveView] = {}
        self._quiet = quiet
        self._as_json = as_json
        self._display: Display | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event of the only run."""
        self._take("", event, news=True)

    def of(self, run_id: str) -> Callable[[dict[str, Any]], None]:
        """What shows the events of one run among several."""
        return lambda event: self._take(run_id, event, news=True)

    def catch_up(self, run_id: str, view: LiveView) -> None:
        """Begin with what had happened before somebody looked: it moves the bar, and makes no line."""
        self._views[run_id] = view
        if not self._quiet and view.state is not None:
            self._shown().show(run_id, view.state, view, news=False)

    def say(self, text: str) -> None:
        """A message among the events; said also where progress is not wanted."""
        if self._quiet:
            say(text)
        else:
            self._shown().say(text)

    def close(self) -> None:
        """Show no more; the next event would open the display again."""
        if self._display is not None:
            self._display.close()
            self._display = None

    def _take(self, run_id: str, event: dict[str, Any], *, news: bool) -> None:
        if self._quiet:
            return
        view = self._views.setdefault(run_id, LiveView())
        view.take(event)
        self._shown().show(run_id, event, view, news=news)

    def _shown(self) -> Display:
        if self._display is None:
            if self._as_json:
                self._display = EventLines()
            elif is_animated(sys.stderr, os.environ):
                from grd.interfaces.cli.progress_bars import ProgressBars  # rich costs 0.1 s

                self._display = ProgressBars()
            else:
                self._display = PlainLines()
        return self._display


class EventLines:
    """The events as they are, one JSON object a line, with their run."""

    def show(self, run_id: str, event: dict[str, Any], view: LiveView, *, news: bool) -> None:
        """One line for each new event."""
        if news:
            self._line({**({"run_id": run_id} if run_id else {}), **event})

    def say(self, text: str) -> None:
        """A message is an event of kind ``note``."""
        self._line({"v": contract.EVENT_VERSION, "t": round(time.time(), 3), "kind": "note", "message": text})

    def close(self) -> None:
        """Nothing is open."""

    def _line(self, value: dict[str, Any]) -> None:
        click.echo(json.dumps(value, ensure_ascii=False), err=True)


class PlainLines:
    """Every epoch and every change as a line; what goes on inside an epoch, now and then."""

    def __init__(self) -> None:
        self._last_progress: dict[str, float] = {}

    def show(self, run_id: str, event: dict[str, Any], view: LiveView, *, news: bool) -> None:
        """At most one line for each new event."""
        if not news:
            return
        prefix = f"{run_id}: " if run_id else ""
        if event.get("kind") == contract.EVENT_PROGRESS:
            now = time.monotonic()
            if view.progress and now - self._last_progress.get(run_id, -math.inf) >= PLAIN_SECONDS:
                self._last_progress[run_id] = now
                say(f"{prefix}{progress_text(view.progress)}")
            return
        line = line_of(event)
        if line is None and run_id and event.get("kind") == contract.EVENT_STATE:
            line = state_text(event)  # with one run only, the command itself ends with it
        if line is not None:
            say(f"{prefix}{line}")

    def say(self, text: str) -> None:
        """A line."""
        say(text)

    def close(self) -> None:
        """Nothing is open."""


def line_of(event: dict[str, Any]) -> str | None:
    """What is said about one event; None where nothing needs to be."""
    kind = event.get("kind")
    if kind == contract.EVENT_METRICS:
        return _metrics_line(event)
    if kind == contract.EVENT_RESUME:
        return f"resumed from the checkpoint of {_position(event)}"
    if kind == contract.EVENT_WARNING:
        return f"warning: {event.get('message')}"
    if kind == contract.EVENT_STATE and event.get("cause") == contract.START_FAILED:
        return f"{state_text(event)}: {event.get('detail')}"
    if kind == contract.EVENT_RETRY:
        return _retry_line(event)
    if kind == contract.EVENT_STOP and event.get("stage") == 0:
        return f"stopping: {event.get('reason')}"
    if kind == contract.EVENT_STOP and event.get("stage") == 3:
        at_once = event.get("action") == "kill at once"
        return "killing at once, as asked" if at_once else "the grace period is over: killing"
    return None


def _retry_line(event: dict[str, Any]) -> str:
    if event.get("state") == retry.WAITING:
        soon = format_duration(max(1.0, float(event.get("seconds") or 0.0)))
        return f"{event.get('why')}; the next attempt starts within {soon}"
    return f"no further attempt: {event.get('why')}"


def state_text(event: dict[str, Any]) -> str:
    """The state that an event tells, with its cause."""
    return f"{event.get('state')} ({event['cause']})" if event.get("cause") else str(event.get("state"))


def progress_text(progress: dict[str, Any]) -> str:
    """``epochs 3/20, about 2m left``, with the interval where there is one."""
    of = f"/{progress['total']}" if progress.get("total") is not None else ""
    eta = progress.get("eta_seconds")
    left = f", about {format_duration(eta)} left" if isinstance(eta, (int, float)) and eta > 0 else ""
    low, high = progress.get("eta_low_seconds"), progress.get("eta_high_seconds")
    if left and isinstance(low, (int, float)) and isinstance(high, (int, float)):
        left += f" ({format_duration(low)} to {format_duration(high)})"
    return f"{progress['name']} {format_count(progress['n'])}{of}{left}"


def metrics_text(metrics: dict[str, Any]) -> str:
    """``loss=0.25 accuracy=0.9``."""
    return " ".join(f"{name}={format_number(value)}" for name, value in metrics.items())


def _metrics_line(event: dict[str, Any]) -> str:
    values = metrics_text(event.get("values", {}))
    return f"epoch {event['epoch']}: {values}" if event.get("epoch") is not None else values


def _position(event: dict[str, Any]) -> str:
    step = f" step {event['step']}" if event.get("step") is not None else ""
    return f"epoch {event.get('epoch')}{step}"


def format_number(value: Any) -> str:
    """Four significant digits for floats, all of them for the rest; None is a metric that was not finite."""
    if value is None:
        return contract.NOT_FINITE
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_size(size: int) -> str:
    """Bytes with a unit, powers of ten as in `grd.settings.parse_size`: ``812 B``, ``1.5 MB``."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def format_count(value: Any) -> str:
    """A count of epochs or steps: one decimal where an epoch is under way."""
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def describe_end(shown: dict[str, Any]) -> list[str]:
    """A run's state in lines: what it is, why, what it has, and the next command."""
    lines = [f"{shown['run_id']}: {headline(shown)}"]
    if shown.get("detail"):
        lines.append(f"  {shown['detail']}")
    return lines + [f"  {_line(*row)}" for row in rows_of(shown)]


def headline(shown: dict[str, Any]) -> str:
    """``interrupted (deadline) after 1h in 2 attempts``."""
    because = f" ({shown['cause']})" if shown.get("cause") else ""
    used = (shown.get("budget") or {}).get("used_seconds")
    spent = f" after {format_duration(used)}" if used else ""
    attempts = f" in {shown['attempt']} attempts" if shown.get("attempt", 1) > 1 else ""
    return f"{shown['state']}{because}{spent}{attempts}"


def rows_of(shown: dict[str, Any]) -> list[tuple[str, str]]:
    """What there is to say about a run beside its state, each with its name; the last is the next command."""
    rows = []
    progress = shown.get("progress")
    if progress:
        going = shown.get("state") in (contract.RUNNING, contract.INTERRUPTED)  # what is left is still to do
        rows.append(("progress", progress_text(progress if going else {**progress, "eta_seconds": None})))
    leased = (shown.get("attempts") or [{}])[-1].get("gpus") or []
    if leased:
        rows.append(("leased", ", ".join(f"GPU {each['gpu']} ({each['uuid']})" for each in leased)))
    rows += resources_rows(shown)
    rows += [("warning", text) for text in shown.get("warnings") or []]
    rows += _mlflow_rows(shown)
    if shown.get("metrics"):
        rows.append(("metrics", metrics_text(shown["metrics"])))
    if shown.get("checkpoint"):
        rows.append(("checkpoint", f"{_position(shown['checkpoint'])}: {shown['checkpoint'].get('path')}"))
    if shown.get("batch"):
        rows.append(("batch", f"{shown['batch']['id']}, its run {shown['batch']['index'] + 1}"))
    rows.append(("folder", str(shown["folder"])))
    if shown.get("cause") == contract.START_FAILED:
        rows.append(("log", str(RunFolder(Path(shown["folder"])).attempt(shown["attempt"]).log)))
    if shown.get("state") == contract.RUNNING and shown.get("runner"):
        silent = shown.get("heartbeat_seconds") or 0.0
        hung = f", silent for {format_duration(silent)}: stopped or hung?" if silent > SILENT_SECONDS else ""
        rows.append(("runner", f"pid {shown['runner']['pid']} on {shown['runner']['host']}{hung}"))
    retried = retry.text(shown.get("retry"))
    if retried is not None:
        rows.append(("retry", retried))
    if shown.get("resume_command"):
        rows.append(("next", shown["resume_command"]))
    elif shown.get("state") == contract.COMPLETED:
        rows.append(("next", f"grd result {shown['run_id']}"))
    return rows


def _line(name: str, text: str) -> str:
    return f"{name:<12}{text}"


def resources_text(shown: dict[str, Any]) -> list[str]:
    """`resources_rows` as lines."""
    return [_line(*row) for row in resources_rows(shown)]


def resources_rows(shown: dict[str, Any]) -> list[tuple[str, str]]:
    """What the newest attempt uses, or used: memory, processors, GPUs, beside how fast it goes."""
    attempts = shown.get("attempts") or [{}]
    used = shown.get("resources") or attempts[-1].get("resources") or {}
    going = shown.get("state") == contract.RUNNING
    rates = _rates(shown.get("progress") or {})
    rows = [("resources", _usage_text(used, going=going))] if used.get("peak_memory_bytes") else []
    if rates:
        rows.append(
            ("rates", f"{', '.join(rates)}: of all the time, loading, validating and saving included")
        )
    gpus = used.get("gpus") or []
    now = {each.get("uuid"): each for each in used.get("gpu_now") or []} if going else {}
    rows += [("gpu", _gpu_text(gpu, now.get(gpu.get("uuid")))) for gpu in gpus]
    if any(gpu.get("mean_utilization_percent") is not None for gpu in gpus):
        # Utilisation is the share of time in which any kernel ran, on however few of a device's units.
        compare = "the rates" if rates else "how fast the training goes"
        rows.append(
            (
                "",
                f"time in which something ran says nothing of how much of the GPU it used: compare {compare}",
            )
        )
    return rows


def _usage_text(used: dict[str, Any], *, going: bool) -> str:
    peak = format_size(used["peak_memory_bytes"])
    memory = used.get("rss_bytes") if used.get("processes") == 1 else used.get("pss_bytes")
    parts = [f"memory {format_size(memory)}, peak {peak}" if going and memory else f"peak memory {peak}"]
    if used.get("mean_cores") is not None:
        parts.append(f"{used['mean_cores']:.2f} cores on average")
    if used.get("throttled_seconds"):
        parts.append(f"held back for {format_duration(used['throttled_seconds'])} by the container's limit")
    return ", ".join(parts)


def _rates(progress: dict[str, Any]) -> list[str]:
    told = []
    for key, unit in (
        ("samples_per_second", "samples"),
        ("steps_per_second", "steps"),
        ("per_second", progress.get("name")),
    ):
        if progress.get(key):
            told.append(f"{format_number(progress[key])} {unit}/s")
    return told


def _gpu_text(gpu: dict[str, Any], now: dict[str, Any] | None) -> str:
    """One device over the whole attempt, and at this moment."""
    busy, most = gpu.get("mean_utilization_percent"), gpu.get("peak_memory_mb")
    told = [f"{gpu.get('name')}: "]
    told.append("memory unknown" if most is None else f"peak {most:.0f} MiB ({gpu['memory_source']})")
    told.append(", activity unknown" if busy is None else f", something ran on it {busy:.0f} % of the time")
    if now is not None and now.get("utilization_percent") is not None:
        told.append(f", now {now['utilization_percent']} %")
    return "".join(told)


def _mlflow_rows(shown: dict[str, Any]) -> list[tuple[str, str]]:
    """What has arrived in MLflow, and what to type where not all of it has."""
    chosen = shown.get("mlflow")
    if chosen is None:
        return []
    ended = shown.get("state") in contract.ENDED_STATES
    command = f"; grd mlflow export {shown['run_id']}" if ended else ""
    rows = []
    for store in chosen.get("stores") or []:
        text = f"run {store['run_id']} in {store['uri']}" if store["run_id"] else f"{store['uri']}"
        if store["error"]:
            text += f": not all has arrived: {store['error']}{command}"
        elif ended and not store["complete"]:
            text += f": not all has arrived{command}"
        if store["refused"]:
            text += f" ({store['refused']} values were refused)"
        rows.append(("mlflow", text))
    return rows or [("mlflow", f"nothing has arrived yet{command}")]


def local_time(iso: str | None) -> str:
    """A UTC time of the record in this machine's time zone, to the second."""
    if not iso:
        return "-"
    return datetime.fromisoformat(iso).astimezone().strftime("%Y-%m-%d %H:%M:%S")
