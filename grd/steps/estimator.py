"""How long a notebook will take, before it is run: what `grd estimate` shows and `grd research` keeps."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grd.estimation.before import Before, code_sha256, estimate_before, read_past
from grd.estimation.estimate import Estimate
from grd.estimation.history import Job, PastRun
from grd.estimation.speed import machine_speed
from grd.settings import find_project_root, load_settings
from grd.steps.request import Request, check
from grd.steps.run import runs_folder


@dataclass(frozen=True, kw_only=True)
class Estimated:
    """A notebook, what it would be given, and how long it will take."""

    notebook: str
    parameters: dict[str, Any]
    estimate: Estimate
    threshold: float
    """Seconds beyond which somebody must agree: the setting ``long_running_threshold``."""

    def to_dict(self) -> dict[str, Any]:
        """What ``grd estimate NOTEBOOK --json`` prints."""
        long_running = self.estimate.exceeds(self.threshold)
        return {
            "schema": "grd.estimate/1",
            "notebook": self.notebook,
            "parameters": self.parameters,
            **self.estimate.to_dict(),
            "threshold_seconds": self.threshold,
            "is_long_running": long_running,
            "requires_user_confirmation": long_running is not False,
        }


def estimate_request(request: Request, runs_dir: Path) -> Before:
    """The estimate of a checked request by the runs in ``runs_dir``; takes two tenths of a second."""
    return Estimator(runs_dir).estimate(request)


class Estimator:
    """Estimates by the runs in one folder, for many requests: runs and the machine's speed are looked at anew
    when what is known of them is older than ``fresh_seconds``."""

    def __init__(self, runs_dir: Path, fresh_seconds: float = 60.0) -> None:
        self._runs_dir = runs_dir
        self._fresh_seconds = fresh_seconds
        self._looked: float | None = None
        self._past: list[PastRun] = []
        self._speed: float | None = None
        self._profile: Mapping[str, Any] | None = None

    def estimate(self, request: Request) -> Before:
        """The estimate of a checked request."""
        now = time.monotonic()
        if self._looked is None or now - self._looked > self._fresh_seconds:
            self._past = []  # before a thousand others take its place
            self._looked, self._past, self._speed = now, read_past(self._runs_dir), machine_speed()
            self._profile = None
        return estimate_before(
            job_of(request),
            self._runs_dir,
            speed=self._speed,
            profile=self._hardware,
            past=self._past,
        )

    def _hardware(self) -> Mapping[str, Any]:
        from grd.hardware import capture_hardware_profile

        if self._profile is None:
            self._profile = capture_hardware_profile()
        return self._profile


def job_of(request: Request) -> Job:
    """What is to be estimated."""
    declared = request.cell.declared.values()
    return Job(
        notebook=request.source.location,
        sha256=request.source.sha256,
        code_sha256=code_sha256(request.source.notebook),
        defaults={each.name: each.default for each in declared if each.default is not ...},
        parameters=request.parameters,
    )


def estimate_notebook(
    notebook: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    kernel: str | None = None,
    runs_dir: str | Path | None = None,
    allow_unknown: bool = False,
) -> Estimated:
    """How long ``notebook`` will take with ``parameters``, by this project's earlier runs of it.

    Starts no kernel and makes no run folder. Raises NotebookNotFound, NotebookError, ParameterError,
    KernelUnavailable or ConfigurationError.
    """
    settings, _ = load_settings(find_project_root(Path.cwd()))
    request = check(str(notebook), parameters or {}, kernel=kernel, allow_unknown=allow_unknown)
    return Estimated(
        notebook=request.source.location,
        parameters=request.parameters,
        estimate=estimate_request(request, runs_folder(runs_dir)).estimate,
        threshold=settings.long_running_threshold,
    )
