"""What a loop remembers: one folder with its state, its events, its log and the lock of who runs it.

loop.json is replaced atomically before and after each step, so that whoever is killed has lost nothing: the
cycle under way is there with the key of each of its runs, and a key starts one run only.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grd import contract
from grd.batch.loop_plan import Plan, Step
from grd.errors import ConfigurationError, GrdError, ResourceUnavailable, UsageError
from grd.files import JsonLines, is_locked, read_json, take_lock, write_json
from grd.runs.model import now_iso
from grd.runs.processes import identity

SCHEMA = "grd.loop/1"

RUNNING, PAUSING, WAITING, ENDED, LOST = "running", "pausing", "waiting", "ended", "lost"
"""A cycle is under way; between cycles; before a failed one is tried again; over; who ran it is gone."""

LOCK_WAIT_SECONDS = 0.5

PREPARE, STEP = "prepare", "step"

Entry = dict[str, Any]
"""A step in one cycle: what is run, with which key, and what became of it."""


class LoopMemory:
    """The folder of one loop. Nothing is created before `held`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.value: dict[str, Any] = {}

    @property
    def file(self) -> Path:
        """loop.json"""
        return self.path / "loop.json"

    @property
    def events(self) -> Path:
        """events.jsonl"""
        return self.path / "events.jsonl"

    @property
    def log(self) -> Path:
        """loop.log, for people."""
        return self.path / "loop.log"

    @property
    def lock(self) -> Path:
        """Held by who runs the loop."""
        return self.path / "lock"

    @property
    def stop_file(self) -> Path:
        """Where a request to stop is left."""
        return self.path / "stop.json"

    @property
    def process_log(self) -> Path:
        """stdout and stderr of a loop that runs detached."""
        return self.path / "process.log"

    @contextlib.contextmanager
    def held(self, lock: int | None = None) -> Iterator[None]:
        """The folder, for one loop alone; ``lock`` is its lock, where it was taken before.

        Raises what `take` raises.
        """
        lock = self.take() if lock is None else lock
        try:
            yield
        finally:
            os.close(lock)

    def take(self) -> int:
        """Its lock, as a descriptor. Raises ResourceUnavailable with who has it, UsageError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = take_lock(self.lock, wait_seconds=LOCK_WAIT_SECONDS)
        except OSError as error:
            raise UsageError(f"no loop can remember in {self.path}: {error.strerror or error}") from None
        if lock is None:
            raise ResourceUnavailable(
                f"{self._holder()} runs a loop with {self.path}; see: "
                f"grd loop --memory-path {shlex.quote(str(self.path))} --status"
            )
        with contextlib.suppress(FileNotFoundError):
            self.stop_file.unlink()  # what stopped the last one must not stop this one
        return lock

    def ask_to_stop(self, *, now: bool = False) -> None:
        """Leave a request where the loop looks for it, wherever that runs. Raises ResourceUnavailable."""
        try:
            write_json(self.stop_file, {"reason": contract.STOPPED, "now": now, "t": time.time()})
        except OSError as error:
            raise ResourceUnavailable(
                f"the loop of {self.path} cannot be asked to stop: {error.strerror or error}"
            ) from None

    def request(self) -> tuple[str, bool] | None:
        """Why to stop, and whether at once; None where nobody has asked."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found = read_json(self.stop_file)
            return str(found.get("reason")), bool(found.get("now"))
        return None

    def is_held(self) -> bool:
        """Whether somebody runs this loop now."""
        with contextlib.suppress(OSError):
            return is_locked(self.lock)
        return self.read().get("state") != ENDED  # a file system without locks

    def _holder(self) -> str:
        with contextlib.suppress(ConfigurationError):
            who = self.read().get("loop") or {}
            if who:
                return f"process {who.get('pid')} on {who.get('host')}"
        return "another process"

    def read(self) -> dict[str, Any]:
        """loop.json, empty if there is none. Raises ConfigurationError where it is no loop's."""
        try:
            value = read_json(self.file)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{self.file} cannot be read: {error}") from None
        if not isinstance(value, dict) or value.get("schema") != SCHEMA:
            raise ConfigurationError(f"{self.file} is no loop's")
        return value

    def begin(self, plan: Plan, max_cycles: int | None) -> None:
        """Take over what is there, or begin anew."""
        self.value = {
            "schema": SCHEMA,
            "loop_id": secrets.token_hex(4),
            "memory_path": str(self.path),
            "cycles": 0,
            "failures": 0,
            "failed_tries": 0,
            "current": None,
            "prepared": None,
            "timing": {},
            "last": None,
            "detail": None,
            "created_at": now_iso(),
        } | self.read()
        self.value |= {"plan": plan.origin, "max_cycles": max_cycles, "loop": identity(), "failures": 0}
        self.save(state=RUNNING, reason=None, detail=None, next_at=None, started_at=now_iso(), ended_at=None)

    def save(self, **values: Any) -> None:
        """Change some values, and store all. Raises OSError."""
        self.value |= values
        write_json(self.file, self.value)

    def tell(self, kind: str, **values: Any) -> None:
        """Append an event. A full disk never raises."""
        with contextlib.suppress(OSError, ValueError):
            lines = JsonLines(self.events)
            try:
                lines.append({"v": 1, "t": round(time.time(), 3), "pid": os.getpid(), "kind": kind, **values})
            finally:
                lines.close()

    def note(self, text: str) -> None:
        """A line of the log. A full disk never raises."""
        with contextlib.suppress(OSError), open(self.log, "a", encoding="utf-8") as stream:
            stream.write(f"{now_iso()} {text}\n")

    # --- cycles --------------------------------------------------------------------------------------------

    def cycle(self, number: int, plan: Plan) -> dict[str, Any]:
        """The cycle of this number: what was started of it stays, the rest is as the plan has it now."""
        found: dict[str, Any] = {"cycle": number, "tries": 0, "started_at": None}
        started: dict[str, Entry] = {}
        for kept in (self.value["current"], self.value["prepared"]):
            if kept is not None and kept["cycle"] == number:
                found = kept
                started = {entry["name"]: entry for entry in kept["steps"] if entry["run_id"] is not None}
                break
        planned = [(PREPARE, step) for step in plan.prepare] + [(STEP, step) for step in plan.steps]
        found["steps"] = [
            started.get(step.name) or self._entry(number, phase, step) for phase, step in planned
        ]
        return found

    def _entry(self, number: int, phase: str, step: Step) -> Entry:
        return {
            "name": step.name,
            "phase": phase,
            "notebook": step.notebook,
            "parameters": step.parameters_of(number),
            "timeout": step.timeout,
            "budget": step.budget,
            "max_attempts": step.max_attempts,
            "kernel": step.kernel,
            "key": f"loop-{self.value['loop_id']}-{number}-{step.name}",
            "run_id": None,
            "folder": None,
            "state": None,
            "cause": None,
            "detail": None,
            "seconds": 0.0,
        }

    def count_time(self, phase: str, seconds: float) -> None:
        """Add what a phase of a cycle has taken to the sums over all cycles."""
        kept = self.value["timing"].setdefault(phase, {"count": 0, "seconds": 0.0})
        kept["count"] += 1
        kept["seconds"] = round(kept["seconds"] + seconds, 3)


def shown(memory: LoopMemory) -> dict[str, Any]:
    """What is true of a loop now, and the phases that take the most. Raises ConfigurationError."""
    value = memory.read()
    if not value:
        raise UsageError(f"no loop has been run with {memory.path}; start it: grd loop PLAN")
    if value["state"] != ENDED and not memory.is_held():
        value["state"], value["reason"] = LOST, "the process that ran it is gone"
    for cycle in (value["current"], value["prepared"]):
        for entry in (cycle or {}).get("steps", ()):
            _as_it_is(entry)
    total = sum(kept["seconds"] for kept in value["timing"].values())
    for kept in value["timing"].values():
        kept["mean_seconds"] = round(kept["seconds"] / kept["count"], 3)
        kept["share"] = round(kept["seconds"] / total, 3) if total else None
    return value


def _as_it_is(entry: Entry) -> None:
    """Let a step say of its run what is true of that now: the loop writes it down when it has ended."""
    from grd.runs.folder import RunFolder
    from grd.runs.recovery import current_record

    if entry.get("folder") is None or entry["state"] == contract.COMPLETED:
        return
    with contextlib.suppress(GrdError, OSError):
        record = current_record(RunFolder(Path(entry["folder"])))
        entry |= {"state": record.state, "cause": record.cause, "detail": record.detail}
