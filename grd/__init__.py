"""grd runs Jupyter notebooks as ML experiments that survive."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "ContinuousResearchLoop": "grd.batch.loop",
    "Batch": "grd.batch.looking",
    "GrdError": "grd.errors",
    "Run": "grd.steps.run",
    "allocate_gpu": "grd.hardware.own_gpu",
    "aresearch": "grd.steps.awaiting",
    "aresume": "grd.steps.awaiting",
    "estimate_eda_duration": "grd.estimation.eda",
    "estimate_training_duration": "grd.estimation.training",
    "explore": "grd.steps.explorer",
    "gpu_loads": "grd.hardware.leases",
    "list_runs": "grd.steps.run",
    "release_gpu": "grd.hardware.own_gpu",
    "research": "grd.steps.researcher",
    "resume": "grd.steps.resuming",
    "retry_on_timeout": "grd.backoff",
    "run_with_timeout": "grd.execution.command",
    "status": "grd.steps.run",
}

__all__ = [
    "Batch",
    "ContinuousResearchLoop",
    "GrdError",
    "Run",
    "__version__",
    "allocate_gpu",
    "aresearch",
    "aresume",
    "batch",
    "estimate_eda_duration",
    "estimate_training_duration",
    "explore",
    "gpu_loads",
    "list_runs",
    "release_gpu",
    "research",
    "resume",
    "retry_on_timeout",
    "run_with_timeout",
    "status",
]

if TYPE_CHECKING:
    from grd.backoff import retry_on_timeout
    from grd.batch.looking import Batch
    from grd.batch.loop import ContinuousResearchLoop
    from grd.batch.submitting import batch
    from grd.errors import GrdError
    from grd.estimation.eda import estimate_eda_duration
    from grd.estimation.training import estimate_training_duration
    from grd.execution.command import run_with_timeout
    from grd.hardware.leases import gpu_loads
    from grd.hardware.own_gpu import allocate_gpu, release_gpu
    from grd.steps.awaiting import aresearch, aresume
    from grd.steps.explorer import explore
    from grd.steps.researcher import research
    from grd.steps.resuming import resume
    from grd.steps.run import Run, list_runs, status


def __getattr__(name: str) -> Any:
    # Imported on first use: `import grd` must cost nothing in a notebook or a status call.
    if name == "batch":
        return importlib.import_module("grd.batch")  # the package itself can be called
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'grd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(shell: Any) -> None:
    """What ``%load_ext grd`` calls: the line magic ``%grd``."""
    _magics().load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """What ``%unload_ext grd`` calls."""
    _magics().unload(shell)


def _magics() -> Any:
    # By name: the layers below import this package, and must not be seen to import an interface with it.
    return importlib.import_module("grd.interfaces.magics")
