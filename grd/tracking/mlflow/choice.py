"""Where a run is to be sent: what was typed or set, as the run's record keeps it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

INSTALL = "pip install 'grd-notebooks[mlflow]'"


def is_installed() -> bool:
    """Whether MLflow is, without importing it: that takes two seconds."""
    return find_spec("mlflow") is not None


def chosen(setting: str, experiment: str | None, interval: float, working_dir: Path) -> dict[str, Any] | None:
    """The record's ``mlflow`` for a setting (`grd.settings.parse_mlflow`): None for ``off``.

    Files named relatively lie in ``working_dir``, wherever the run is sent from.
    """
    if setting == "off":
        return None
    uri = None if setting == "on" else _absolute(setting, working_dir)
    return {"uri": uri, "experiment": experiment or None, "interval": interval}


def _absolute(uri: str, working_dir: Path) -> str:
    scheme, _, path = uri.partition(":///")
    if scheme.startswith("sqlite") and path and not path.startswith("/") and path != ":memory:":
        return f"{scheme}:///{working_dir / path}"
    scheme, _, path = uri.partition(":")
    if scheme == "file" and path and not path.startswith("/"):
        return f"file:{working_dir / path}"
    return uri
