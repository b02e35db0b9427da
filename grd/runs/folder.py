"""Where everything of a run lies: the one owner of the paths in a run folder."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from grd import contract
from grd.errors import ResourceUnavailable, RunNotFound

_SLUG_LENGTH = 40
_RUN_ID = re.compile(r"\d{8}-\d{6}-[a-z0-9-]+-[0-9a-f]{4}")


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run. Nothing is created by asking for a path."""

    path: Path

    @property
    def run_id(self) -> str:
        """The run's id is its folder's name."""
        return self.path.name

    @property
    def record(self) -> Path:
        """run.json, replaced atomically by the runner or recovery."""
        return self.path / "run.json"

    @property
    def input(self) -> Path:
        """The notebook as first submitted."""
        return self.path / "input.ipynb"

    @property
    def output(self) -> Path:
        """Link to the newest attempt's notebook."""
        return self.path / "output.ipynb"

    @property
    def events(self) -> Path:
        """events.jsonl, the one source of live truth."""
        return self.path / "events.jsonl"

    @property
    def digest(self) -> Path:
        """What the events said up to a position: a cache of the runner's, and never the truth."""
        return self.path / "events.digest.json"

    @property
    def metrics(self) -> Path:
        """metrics.json, written at the end of each attempt."""
        return self.path / "metrics.json"

    @property
    def hardware(self) -> Path:
        """hardware.json: what the newest attempt ran on."""
        return self.path / "hardware.json"

    @property
    def mlflow(self) -> Path:
        """mlflow.json: how far the run is in MLflow; absent where it is not sent there."""
        return self.path / "mlflow.json"

    @property
    def mlflow_lock(self) -> Path:
        """Held by whoever sends the run to MLflow."""
        return self.path / "mlflow.lock"

    @property
    def lock(self) -> Path:
        """runner.lock, flocked by the runner for its whole life."""
        return self.path / "runner.lock"

    @property
    def heartbeat(self) -> Path:
        """Touched by the runner; for hosts and file systems where the lock cannot be seen."""
        return self.path / "runner.heartbeat"

    @property
    def recovery_lock(self) -> Path:
        """Held while somebody moves a dead run to its end state."""
        return self.path / "recovery.lock"

    @property
    def stop_file(self) -> Path:
        """Exists once somebody asked the current attempt to stop; JSON with the reason."""
        return self.path / "stop"

    @property
    def retry_lock(self) -> Path:
        """Held by the process that resumes the run after interruptions, for its whole life."""
        return self.path / "retry.lock"

    @property
    def retry(self) -> Path:
        """retry.json: what that process will do next."""
        return self.path / "retry.json"

    @property
    def retry_log(self) -> Path:
        """What that process had to say."""
        return self.path / "retry.log"

    @property
    def fence(self) -> Path:
        """Holds the number of the newest attempt; older ones may not write checkpoints."""
        return self.path / "fence"

    @property
    def reserve(self) -> Path:
        """Space kept while an attempt runs, so that its end can be recorded on a full disk."""
        return self.path / "reserve"

    @property
    def checkpoints(self) -> Path:
        """Default checkpoint folder."""
        return self.path / "checkpoints"

    def attempt(self, number: int) -> AttemptFolder:
        """The folder of one attempt."""
        return AttemptFolder(self.path / "attempts" / str(number), number)

    def newest_input(self, up_to_attempt: int) -> Path:
        """The notebook that attempt ``up_to_attempt`` runs: the newest edited copy, else the original."""
        for number in range(up_to_attempt, 0, -1):
            edited = self.attempt(number).input
            if edited.exists():
                return edited
        return self.input


@dataclass(frozen=True)
class AttemptFolder:
    """The folder of one papermill execution."""

    path: Path
    number: int

    @property
    def input(self) -> Path:
        """An edited notebook submitted with this attempt; absent if nothing was edited."""
        return self.path / "input.ipynb"

    @property
    def output(self) -> Path:
        """The notebook with its outputs: the last snapshot; with its journal it is complete."""
        return self.path / "output.ipynb"

    @property
    def journal(self) -> Path:
        """What happened since the snapshot, a line for each output and cell event."""
        return self.path / "journal.jsonl"

    @property
    def resources(self) -> Path:
        """resources.jsonl: what the attempt used, a line a second, later more seldom."""
        return self.path / "resources.jsonl"

    @property
    def hardware(self) -> Path:
        """What this attempt ran on; the run's own ``hardware`` is that of the newest attempt."""
        return self.path / "hardware.json"

    @property
    def on_end_log(self) -> Path:
        """stdout and stderr of the command that ``--on-end`` named."""
        return self.path / "on_end.log"

    @property
    def mlflow_log(self) -> Path:
        """stdout and stderr of the process that sends the attempt to MLflow."""
        return self.path / "mlflow.log"

    @property
    def log(self) -> Path:
        """stdout and stderr of runner and kernel process."""
        return self.path / "runner.log"


def new_run_id(name: str, now: datetime | None = None) -> str:
    """A sortable id, unique without a counter: ``20261123-191405-train-digits-4f2a`` (UTC)."""
    moment = (now or datetime.now(UTC)).strftime("%Y%m%d-%H%M%S")
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_SLUG_LENGTH].strip("-") or "run"
    return f"{moment}-{slug}-{secrets.token_hex(2)}"


def staging_of(run: Path) -> Path:
    """Where a run's folder is made before it gets its name."""
    return run.with_name(f".new-{run.name}")


def run_folders(runs_dir: Path) -> Iterator[RunFolder]:
    """The runs in ``runs_dir``, newest first; folders without a record are no runs.

    Raises ResourceUnavailable where ``runs_dir`` cannot be read.
    """
    for name in sorted(names_in(runs_dir), reverse=True):
        folder = RunFolder(runs_dir / name)
        if is_there(folder.record):
            yield folder


def names_in(place: Path) -> list[str]:
    """What lies in ``place`` and is not hidden, in no order; nothing where there is no such folder.

    Raises ResourceUnavailable where it cannot be read.
    """
    try:
        return [entry.name for entry in os.scandir(place) if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ResourceUnavailable(
            f"{place} cannot be read: {error.strerror or error}; make it readable, or name another folder: "
            "--runs-dir DIR"
        ) from None


def is_there(path: Path) -> bool:
    """Whether ``path`` can be seen; what cannot be looked at is nothing of ours."""
    try:
        path.stat()
    except (OSError, ValueError):  # Path.exists() lets some of these out
        return False
    return True


def find_run(runs_dir: Path, name: str) -> RunFolder:
    """The run called ``name``: an id, the path of a run folder, an unambiguous part of an id, or ``last``.

    Raises RunNotFound with what to type next.
    """
    as_path = Path(name)
    if ("/" in name or name in (".", "..")) and is_there(RunFolder(as_path).record):
        return RunFolder(as_path.resolve())
    exact = RunFolder(runs_dir / name)
    if name and "/" not in name and is_there(exact.record):
        return exact
    if name == "last":
        for folder in run_folders(runs_dir):
            return folder
        raise RunNotFound(f"no runs in {runs_dir} yet; start one: grd research NOTEBOOK")
    matches = [folder for folder in run_folders(runs_dir) if name and name in folder.run_id]
    if len(matches) == 1:
        return matches[0]
    if matches:
        listed = ", ".join(folder.run_id for folder in matches[:4])
        more = ", ..." if len(matches) > 4 else ""
        raise RunNotFound(f"{name!r} fits {len(matches)} runs ({listed}{more}); type more of it")
    raise RunNotFound(f"no run {name!r} in {runs_dir}; see: grd list")


def is_run_id(name: str) -> bool:
    """Whether ``name`` has the form of a run id."""
    return _RUN_ID.fullmatch(name) is not None


def process_marker(run_id: str, attempt: int) -> str:
    """The value of GRD_PROCESS_MARKER that every process of one attempt carries."""
    return f"{contract.ENV_MARKER}={run_id}/{attempt}"
