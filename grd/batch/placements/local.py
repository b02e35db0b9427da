"""Runs as processes of this machine, each with its own runner."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence
from pathlib import Path

from grd.batch.jobs import Job, Starter
from grd.batch.placements import Handle
from grd.execution.launch import RunnerProcess
from grd.execution.runner_template import RunnerTemplate
from grd.runs import store
from grd.runs.folder import RunFolder
from grd.runs.processes import open_process
from grd.runs.stop_request import ask_to_stop
from grd.steps.following import is_under_way
from grd.steps.started import OnNote

PAUSE_SECONDS = 0.1


class LocalPlacement:
    """Starts runners directly: none of them waits for a command of its own."""

    name = "local"

    def __init__(self, on_note: OnNote | None = None) -> None:
        self._template = RunnerTemplate()
        self._starter = Starter(on_note, self._template.start)
        self._runners: dict[str, RunnerProcess] = {}

    def close(self) -> None:
        """End what only starts runners. They go on."""
        self._template.close()

    def start(self, job: Job) -> Handle:
        """Begin a job; the runner survives this process."""
        begun = self._starter.start(job)
        folder, process = begun.started.folder, begun.started.process
        if process is not None:
            self._runners[folder.run_id] = process
        return {
            "placement": self.name,
            "run_id": folder.run_id,
            "folder": str(folder.path),
            "action": begun.action,
            "pid": None if process is None else process.pid,
        }

    def is_under_way(self, handle: Handle) -> bool:
        """Whether its runner lives, or its guardian after it."""
        going = is_under_way(RunFolder(Path(handle["folder"])), self._runners.get(handle["run_id"]))
        if not going:
            self._runners.pop(handle["run_id"], None)
        return going

    def stop(self, handle: Handle, reason: str, *, at_once: bool) -> None:
        """Leave the request in the run's folder, where runner and notebook look for it."""
        ask_to_stop(RunFolder(Path(handle["folder"])), reason, at_once=at_once)

    def wait(self, handles: Sequence[Handle], seconds: float) -> None:
        """Sleep on the runners' own ends where the system can tell them."""
        fds = [fd for fd in map(self._open, handles) if fd >= 0]
        try:
            if not fds:
                time.sleep(min(seconds, PAUSE_SECONDS))
                return
            poll = select.poll()
            for fd in fds:
                poll.register(fd, select.POLLIN)
            # A runner that is gone while its guardian is at work would answer at once, again and again.
            if poll.poll(seconds * 1000) and all(self.is_under_way(handle) for handle in handles):
                time.sleep(min(seconds, PAUSE_SECONDS))
        finally:
            for fd in fds:
                os.close(fd)

    def _open(self, handle: Handle) -> int:
        process = self._runners.get(handle["run_id"])
        try:
            if process is not None and hasattr(os, "pidfd_open"):
                return os.pidfd_open(process.pid)
            runner = store.load(RunFolder(Path(handle["folder"]))).runner
        except Exception:  # it has ended just now, or was deleted: the next look tells
            return -1
        return -1 if runner is None else open_process(int(runner["pid"]), runner["started"])
