"""What every notebook is told where its ``parameters`` cell declares the name."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from grd.errors import ConfigurationError
from grd.runs.model import Attempt, RunRecord
from grd.settings import find_project_root, load_settings

EPOCHS = "epochs"


def injected_parameters(record: RunRecord, attempt: Attempt, *, seconds: float) -> dict[str, Any]:
    """Always ``timeout`` (the ``seconds`` that are left), ``checkpoint_dir`` and ``resume``.

    ``epochs`` is everybody's name: the setting ``default_epochs`` is given only where the notebook leaves it
    None and nobody gave it.
    """
    values: dict[str, Any] = {
        "timeout": round(seconds, 3),
        "checkpoint_dir": record.checkpoint_dir,
        "resume": attempt.resume,
    }
    open_epochs = record.defaults.get(EPOCHS, ...) is None and EPOCHS not in attempt.parameters
    if open_epochs and (epochs := _default_epochs(record)) is not None:
        values[EPOCHS] = epochs
    return {name: value for name, value in values.items() if name in record.declared}


def _default_epochs(record: RunRecord) -> int | None:
    with contextlib.suppress(ConfigurationError):
        settings, _ = load_settings(find_project_root(Path(record.working_dir)))
        return settings.default_epochs
    return None  # a setting that cannot be read: the notebook's own None stays
