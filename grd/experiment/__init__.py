"""What a notebook imports: checkpoints, the training loop, approval, progress.

Importing it is cheap and needs neither torch nor papermill: every name is loaded on first use. Outside a
run of grd everything here works by hand and reports to nobody.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import grd.experiment.distributed as distributed
    import grd.experiment.training as training
    from grd.errors import ApprovalDeclined as ApprovalDeclined
    from grd.errors import ExperimentInterrupted as ExperimentInterrupted
    from grd.experiment.checkpoint_folder import set_aside as set_aside
    from grd.experiment.checkpoint_handler import CheckpointHandler as CheckpointHandler
    from grd.experiment.graceful import GracefulExperiment as GracefulExperiment
    from grd.experiment.interruption import stop_requested as stop_requested
    from grd.experiment.reporting import log_metrics as log_metrics
    from grd.experiment.reporting import progress as progress
    from grd.experiment.reporting import train_with_progress as train_with_progress
    from grd.experiment.timeout_manager import ExperimentTimeoutManager as ExperimentTimeoutManager

_HOMES = {
    "ApprovalDeclined": "grd.errors",
    "CheckpointHandler": "grd.experiment.checkpoint_handler",
    "ExperimentInterrupted": "grd.errors",
    "ExperimentTimeoutManager": "grd.experiment.timeout_manager",
    "GracefulExperiment": "grd.experiment.graceful",
    "log_metrics": "grd.experiment.reporting",
    "progress": "grd.experiment.reporting",
    "set_aside": "grd.experiment.checkpoint_folder",
    "stop_requested": "grd.experiment.interruption",
    "train_with_progress": "grd.experiment.reporting",
}

__all__ = [
    "ApprovalDeclined",
    "CheckpointHandler",
    "ExperimentInterrupted",
    "ExperimentTimeoutManager",
    "GracefulExperiment",
    "distributed",
    "log_metrics",
    "progress",
    "set_aside",
    "stop_requested",
    "train_with_progress",
    "training",
]


def __getattr__(name: str) -> Any:
    if name in ("distributed", "training"):
        return importlib.import_module(f"grd.experiment.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
