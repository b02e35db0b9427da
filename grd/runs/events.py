"""Events of a run: writing them on the runner's side, and what they say about it now."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grd import contract
from grd.files import JsonLines, read_json_lines


class EventLog:
    """Appends the runner's events of one attempt. A full disk never raises: the run matters more."""

    def __init__(self, path: Path, attempt: int) -> None:
        self._lines = JsonLines(path)
        self._attempt = attempt

    def write(self, kind: str, **values: Any) -> bool:
        """Append one event; False if it could not be stored."""
        record = {
            "v": contract.EVENT_VERSION,
            "t": round(time.time(), 3),
            "pid": os.getpid(),
            "attempt": self._attempt,
            "kind": kind,
            **values,
        }
        try:
            self._lines.append(record)
        except (OSError, ValueError):
            return False
        return True

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


@dataclass
class LiveView:
    """What the events so far say: the newest progress, metrics, checkpoint, and the history of epochs."""

    progress: dict[str, Any] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] | None = None
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Metrics by epoch; a repeated epoch's newest values stand."""
    warnings: list[str] = field(default_factory=list)
    cell: dict[str, Any] | None = None
    offset: int = 0
    _started: dict[str, tuple[float, float]] = field(default_factory=dict)
    _reached: dict[str, float] = field(default_factory=dict)

    def take(self, event: dict[str, Any]) -> None:
        """Account for one event; kinds this version does not know are passed over."""
        kind = event.get("kind")
        if kind == contract.EVENT_PROGRESS:
            self._take_progress(event)
        elif kind == contract.EVENT_METRICS and isinstance(event.get("values"), dict):
            self.metrics.update(event["values"])
            if isinstance(event.get("epoch"), int):
                self.history.setdefault(event["epoch"], {}).update(event["values"])
        elif kind == contract.EVENT_CHECKPOINT:
            self.checkpoint = {name: event.get(name) for name in ("epoch", "step", "path")}
        elif kind == contract.EVENT_CELL:
            self.cell = {name: event.get(name) for name in ("index", "status", "of")}
        elif kind == contract.EVENT_WARNING and event.get("message") not in self.warnings:
            self.warnings.append(str(event.get("message")))
        elif kind == contract.EVENT_STATE and event.get("state") == contract.RUNNING:
            self._started.clear()
            self._reached.clear()
            self.cell = None

    def _take_progress(self, event: dict[str, Any]) -> None:
        name, n, total = str(event.get("name")), event.get("n"), event.get("total")
        now = float(event.get("t", 0.0))
        if not isinstance(n, (int, float)):
            return
        # Work that a resumed attempt skipped is no speed: the rate counts from what this attempt first said.
        start_n, start_t = self._started.setdefault(name, (float(n), now))
        if n < self._reached.get(name, n):  # counted from the start again: another loop of this name
            start_n, start_t = self._started[name] = (float(n), now)
        self._reached[name] = float(n)
        eta = None
        if isinstance(total, (int, float)) and n > start_n and now > start_t:
            eta = round((total - n) * (now - start_t) / (n - start_n), 1)
        previous = self.progress
        if previous and name != previous["name"] and (event.get("within") == previous["name"]):
            return  # steps inside an epoch do not hide the epochs
        self.progress = {"name": name, "n": n, "total": total, "eta_seconds": eta}

    def read(self, path: Path) -> Iterator[dict[str, Any]]:
        """Yield the events written since the last call, each already taken into account."""
        for offset, event in read_json_lines(path, self.offset):
            self.offset = offset
            self.take(event)
            yield event


def view_of(path: Path) -> LiveView:
    """The view after all events in ``path``."""
    view = LiveView()
    for _ in view.read(path):
        pass
    return view
