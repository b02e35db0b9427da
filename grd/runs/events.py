"""Events of a run: writing them on the runner's side, and what they say about it now.

A long training has some 100,000 events. Its runner stores what they said so far, with the position, now and
then: whoever looks reads that and the rest. A digest that does not fit its events is passed over.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grd import contract
from grd.files import JsonLines, atomic_write, read_json, read_json_lines
from grd.runs.folder import RunFolder
from grd.runs.pace import Pace, number_of

PACES_KEPT = 8
"""Loops whose pace is known at a time; a notebook may have many, one after another."""

DIGEST_BYTES = 256 * 1024
"""A digest is worth it when so much is new: some 2,000 events, which take 10 ms to read."""

DIGEST_SCHEMA = "grd.digest/3"
"""To be counted up when `LiveView` sees other things in the same events."""

_TAIL_BYTES = 64


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
            if kind == contract.EVENT_STATE:
                self._lines.sync()  # run.json is; the two must not disagree after a power cut
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
    state: dict[str, Any] | None = None
    """The newest event of kind ``state``."""
    offset: int = 0
    paces: dict[str, Pace] = field(default_factory=dict)
    """How fast each loop of this attempt goes, by name; inner loops are left out."""
    _ends: dict[str, float] = field(default_factory=dict)
    _inside: bool = False
    _counted: dict[str, dict[str, float]] = field(default_factory=dict)
    """By progress: the time ``t`` and the counts that this attempt first told."""

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
        elif kind == contract.EVENT_STATE:
            self.state = event
            if event.get("state") == contract.RUNNING:
                ends = {name: pace.end_seconds() for name, pace in self.paces.items()}
                self._ends.update({name: seconds for name, seconds in ends.items() if seconds is not None})
                self.paces.clear()
                self._inside = False
                self._counted.clear()
                self.cell = None
        elif kind == contract.EVENT_RESUME:
            self._inside = event.get("step") is not None

    def _take_progress(self, event: dict[str, Any]) -> None:
        name, n, total = str(event.get("name")), event.get("n"), number_of(event.get("total"))
        previous = self.progress
        if previous and name != previous["name"] and event.get("within") == previous["name"]:
            return  # steps inside an epoch do not hide the epochs
        # Work that a resumed attempt skipped is no speed: a pace counts from what this attempt first said.
        pace = self.paces.get(name)
        if pace is None or not pace.take(event):
            pace = Pace.begin(event, earlier_end=self._ends.get(name), skips=self._inside)
            if pace is None:
                return
            self.paces.pop(name, None)  # so that the newest stand last
            self.paces[name] = pace
            self._inside = False
            for oldest in list(self.paces)[:-PACES_KEPT]:
                del self.paces[oldest]
        per_second = pace.per_second()
        left = None if total is None else pace.remaining(total)
        now = float(event["t"]) if isinstance(event.get("t"), int | float) else 0.0
        self.progress = {
            "name": name,
            "n": n,
            "total": total,
            "eta_seconds": None if left is None else round(left, 1),
            "eta_low_seconds": None,
            "eta_high_seconds": None,
            "eta_basis": None,
            "per_second": None if per_second is None else float(f"{per_second:.4g}"),
            "steps_per_second": self._rate(name, "batches", event.get("batches"), now),
            "samples_per_second": self._rate(name, "samples", event.get("samples"), now),
        }

    def _rate(self, name: str, what: str, count: Any, now: float) -> float | None:
        """Of what a training has counted since the attempt began, whatever else it did meanwhile."""
        if not isinstance(count, int) or number_of(count) is None:
            return None
        first = self._counted.setdefault(name, {"t": now})
        done, seconds = count - first.setdefault(what, count), now - first["t"]
        return float(f"{done / seconds:.4g}") if done > 0 and seconds > 0 else None

    def read(self, path: Path) -> Iterator[dict[str, Any]]:
        """Yield the events written since the last call, each already taken into account."""
        for offset, event in read_json_lines(path, self.offset):
            self.offset = offset
            self.take(event)
            yield event

    def to_dict(self) -> dict[str, Any]:
        """JSON values that `from_dict` takes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> LiveView:
        """The view that `to_dict` gave. Raises TypeError or ValueError for anything else."""
        view = cls(**value)
        view.history = {int(epoch): values for epoch, values in view.history.items()}
        view.paces = {name: Pace.from_dict(pace) for name, pace in value["paces"].items()}
        return view


class Digest:
    """Keeps the view of a run's events on the disk, for those who look. One writer: the run's runner."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._view = _stored_view(folder) or LiveView()

    def keep_up(self) -> None:
        """Store the view if much has happened since it was stored. Raises OSError."""
        path = self._folder.events
        if not path.exists() or path.stat().st_size - self._view.offset < DIGEST_BYTES:
            return
        for _ in self._view.read(path):
            pass
        value = {
            "schema": DIGEST_SCHEMA,
            "tail": _tail(path, self._view.offset),
            "view": self._view.to_dict(),
        }
        atomic_write(self._folder.digest, json.dumps(value), durable=False)


def view_of(folder: RunFolder) -> LiveView:
    """The view after all events of a run."""
    view = _stored_view(folder) or LiveView()
    for _ in view.read(folder.events):
        pass
    return view


def _stored_view(folder: RunFolder) -> LiveView | None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        value = read_json(folder.digest)
        view = LiveView.from_dict(value["view"])
        fits = value["tail"] == _tail(folder.events, view.offset)
        return view if fits and value["schema"] == DIGEST_SCHEMA else None
    return None


def _tail(path: Path, offset: int) -> str:
    """The last bytes before ``offset``; they hold a time, so that another file's are different."""
    with open(path, "rb") as stream:
        stream.seek(max(0, offset - _TAIL_BYTES))
        return stream.read(min(offset, _TAIL_BYTES)).hex()
