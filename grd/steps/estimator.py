"""How long a notebook will take, before it is run: what `grd estimate` shows and `grd research` keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grd.estimation.before import Before, code_sha256, estimate_before
from grd.estimation.estimate import Estimate
from grd.estimation.history import Job
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
    from grd.hardware import capture_hardware_profile

    declared = request.cell.declared.values()
    job = Job(
        notebook=request.source.location,
        sha256=request.source.sha256,
        code_sha256=code_sha256(request.source.notebook),
        defaults={each.name: each.default for each in declared if each.default is not ...},
        parameters=request.parameters,
    )
    return estimate_before(job, runs_dir, speed=machine_speed(), profile=capture_hardware_profile)


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
