"""A run as a Python object, and looking at runs."""

from __future__ import annotations

import html
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grd import contract
from grd.estimation.live import progress_with_interval
from grd.execution.launch import RunnerProcess
from grd.runs import listing, notebook_journal, recovery, resource_samples, retry
from grd.runs.events import LiveView, view_of
from grd.runs.folder import RunFolder, find_run
from grd.runs.liveness import heartbeat_age
from grd.runs.model import RunRecord
from grd.runs.stop_request import ask_to_stop
from grd.settings import find_project_root, load_settings
from grd.tracking.mlflow import state as mlflow_state

if TYPE_CHECKING:
    from grd.steps.checkpoints import Listed


def runs_folder(runs_dir: str | Path | None = None, project_dir: Path | None = None) -> Path:
    """Where this project's runs lie, absolute."""
    root = find_project_root(project_dir or Path.cwd())
    settings, _ = load_settings(root, {"runs_dir": str(runs_dir) if runs_dir is not None else None})
    chosen = Path(settings.runs_dir).expanduser()
    if runs_dir is not None and not chosen.is_absolute():
        return Path.cwd() / chosen  # a flag is relative to where it was typed
    return root / chosen


class Run:
    """One run. Every attribute is read anew from its folder, so that it is true when it is asked for."""

    def __init__(self, folder: RunFolder | Path | str, *, process: RunnerProcess | None = None) -> None:
        self._folder = folder if isinstance(folder, RunFolder) else RunFolder(Path(folder).resolve())
        self._process = process  # the runner, where this process started it: it must be waited for

    @property
    def run_folder(self) -> RunFolder:
        """The folder with its named places."""
        return self._folder

    @property
    def process(self) -> RunnerProcess | None:
        """The runner, where this process started it."""
        return self._process

    @property
    def id(self) -> str:
        """The run id."""
        return self._folder.run_id

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self._folder.path

    @property
    def record(self) -> RunRecord:
        """The record as it truly is now; a run whose runner is gone is recovered by looking at it."""
        return recovery.current_record(self._folder)

    @property
    def state(self) -> str:
        """queued, running, completed, failed, interrupted, declined or cancelled."""
        return self.record.state

    @property
    def cause(self) -> str | None:
        """Why it is not completed, or None."""
        return self.record.cause

    @property
    def resumable(self) -> bool:
        """Whether `resume` goes on with it as it is."""
        return self.record.resumable

    @property
    def parameters(self) -> dict[str, Any]:
        """The user's parameters of the newest attempt."""
        return self.record.parameters

    @property
    def metrics(self) -> dict[str, Any]:
        """The newest value of every metric."""
        return dict(view_of(self._folder).metrics)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The metrics of every epoch, those of earlier attempts too."""
        return history_of(view_of(self._folder))

    @property
    def output_notebook(self) -> Path:
        """The newest attempt's notebook; while it runs, `notebook` has what came since its last snapshot."""
        return self._folder.attempt(self.record.attempt).output

    @property
    def checkpoint_dir(self) -> Path:
        """Where the notebook saves its checkpoints."""
        return Path(self.record.checkpoint_dir)

    def checkpoints(self, *, verify: bool = False) -> list[Listed]:
        """Its checkpoints, newest first; with ``verify`` every byte of them is read."""
        from grd.steps.checkpoints import list_checkpoints

        return list_checkpoints(self.checkpoint_dir, verify=verify)

    def notebook(self) -> dict[str, Any]:
        """The newest attempt's notebook as plain nbformat JSON, complete with its journal."""
        record = self.record
        attempt = self._folder.attempt(record.attempt)
        notebook = notebook_journal.rebuild(attempt.output, attempt.journal)
        if record.state in contract.ENDED_STATES:
            notebook_journal.mark_lost(notebook)  # its last snapshot may not have found room on the disk
        return notebook

    def events(self, since: int = 0) -> Iterator[dict[str, Any]]:
        """The events from byte ``since`` of events.jsonl on."""
        view = LiveView(offset=since)
        yield from view.read(self._folder.events)

    def logs(self) -> str:
        """What the cells of the newest attempt printed, errors included."""
        return text_of(self.notebook())

    def stop(self, *, now: bool = False) -> None:
        """Ask the run to save and stop; ``now`` kills it without a grace."""
        ask_to_stop(self._folder, contract.STOPPED, at_once=now)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the attempt under way has ended; False if ``timeout`` seconds ran out before."""
        from grd.steps.following import follow

        return follow(self._folder, self._process, since=self._end_of_events(), seconds=timeout, listen=False)

    def reap(self) -> None:
        """Wait for the end of the runner, where this process started it, so that no zombie stays."""
        if self._process is not None:
            self._process.wait()

    async def await_end(self, timeout: float | None = None) -> bool:
        """`wait` for an event loop: nothing is blocked meanwhile."""
        import asyncio  # dear, and nothing else that looks at runs needs it

        from grd.steps.following import POLL_SECONDS, is_under_way

        give_up = None if timeout is None else time.monotonic() + timeout
        while is_under_way(self._folder, self._process):
            if give_up is not None and time.monotonic() >= give_up:
                return False
            await asyncio.sleep(POLL_SECONDS)
        return True

    def _end_of_events(self) -> int:
        return self._folder.events.stat().st_size if self._folder.events.exists() else 0

    def resume(self, **options: Any) -> Run:
        """Go on with it; see `grd.resume`."""
        from grd.steps.resuming import resume

        return resume(self, **options)

    def to_dict(self) -> dict[str, Any]:
        """What ``grd status RUN --json`` prints."""
        return status_of(self._folder)

    def result(self) -> dict[str, Any]:
        """What ``grd result RUN --json`` prints: state, metrics, history, and where the artefacts lie."""
        return result_of(self._folder)

    def __repr__(self) -> str:
        record = self.record
        because = f" ({record.cause})" if record.cause else ""
        return f"<Run {record.run_id} {record.state}{because}>"

    def _repr_html_(self) -> str:
        shown = self.to_dict()
        rows = [
            (name, shown[name]) for name in ("run_id", "state", "cause", "attempt", "progress", "metrics")
        ]
        rows += [(name, shown[name]) for name in ("checkpoint", "resume_command", "folder")]
        cells = "".join(
            f"<tr><th style='text-align:left'>{name}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in rows
            if value not in (None, {}, "")
        )
        return f"<table>{cells}</table>"


def status(run: str | Run = "last", *, runs_dir: str | Path | None = None) -> Run:
    """The run called ``run`` (an id, a unique part of one, a folder, ``last``). Raises RunNotFound."""
    return run if isinstance(run, Run) else Run(find_run(runs_folder(runs_dir), run))


def list_runs(*, runs_dir: str | Path | None = None, state: str | None = None) -> list[Run]:
    """This project's runs, newest first."""
    return [
        Run(entry.folder)
        for entry in listing.list_all(runs_folder(runs_dir))
        if state is None or entry.state == state
    ]


def status_of(folder: RunFolder, *, view: LiveView | None = None) -> dict[str, Any]:
    """The record's words with live progress, metrics and checkpoint where the run is under way.

    ``view`` spares reading the events: the view after all of them, of somebody who looks again and again.
    """
    record = recovery.current_record(folder)
    shown = record.to_dict()
    stores = mlflow_state.summary(folder, record.attempt)
    if record.mlflow is not None or stores:
        shown["mlflow"] = {**(record.mlflow or {}), "stores": stores}
    shown["retry"] = retry.shown(folder, record)
    if record.state in (contract.RUNNING, contract.QUEUED):
        view = view or view_of(folder)
        shown["progress"] = progress_with_interval(view, record.estimate)
        shown["metrics"] = view.metrics
        shown["checkpoint"] = view.checkpoint or record.checkpoint
        shown["warnings"] = list(dict.fromkeys([*record.warnings, *view.warnings]))
        shown["cell"] = view.cell
        shown["heartbeat_seconds"] = heartbeat_age(folder)
        shown["resources"] = resource_samples.newest(folder.attempt(record.attempt).resources)
    return shown


def result_of(folder: RunFolder) -> dict[str, Any]:
    """State, metrics and the places of what the run made."""
    record = recovery.current_record(folder)
    view = view_of(folder)
    return {
        "schema": "grd.result/1",
        "run_id": record.run_id,
        "state": record.state,
        "cause": record.cause,
        "attempts": len(record.attempts),
        "seconds": record.budget.get("used_seconds"),
        "parameters": record.parameters,
        "metrics": view.metrics,
        "history": history_of(view),
        "checkpoint": view.checkpoint or record.checkpoint,
        "output_notebook": str(folder.attempt(record.attempt).output),
        "folder": str(folder.path),
        "resume_command": record.resume_command,
    }


def history_of(view: LiveView) -> list[dict[str, Any]]:
    """Metrics by epoch, in order."""
    return [{"epoch": epoch, **values} for epoch, values in sorted(view.history.items())]


def text_of(notebook: dict[str, Any]) -> str:
    """The text outputs of a notebook's cells in order: streams, results, tracebacks."""
    parts: list[str] = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            kind = output["output_type"]
            if kind == "stream":
                parts.append(_joined(output["text"]))
            elif kind == "error":
                parts.append("\n".join(output.get("traceback", [])) + "\n")
            elif "text/plain" in output.get("data", {}):
                parts.append(_joined(output["data"]["text/plain"]) + "\n")
    return "".join(parts)


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)
