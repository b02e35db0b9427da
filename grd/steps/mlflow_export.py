"""Sending runs to MLflow after the fact: what could not be sent while they ran, or was never asked for."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grd import contract
from grd.errors import ResourceUnavailable
from grd.runs.folder import RunFolder
from grd.runs.model import RunRecord
from grd.tracking.mlflow import choice, follower, state


def is_waiting(folder: RunFolder, record: RunRecord) -> bool:
    """Whether an ended run that was to be sent has not arrived whole in a store."""
    if record.state not in contract.ENDED_STATES:
        return False
    stores = state.load(folder)
    return any(shipped.whole < record.attempt for shipped in stores.values()) or (
        bool(record.mlflow) and not stores
    )


def export(
    folder: RunFolder,
    record: RunRecord,
    *,
    store: Mapping[str, Any] | None = None,
    seconds: float,
) -> dict[str, Any]:
    """Send what the store lacks of a run: ``run_id`` there, number of ``metrics``, ``refused``, ``error``.

    ``store``: as the record keeps it (`choice.chosen`); by default the record's own. It gives up after
    ``seconds``; what has arrived by then need not be sent again. Raises ResourceUnavailable without MLflow.
    """
    if not choice.is_installed():
        raise ResourceUnavailable(f"MLflow is not installed; {choice.INSTALL}")
    target = store or record.mlflow or {}
    command = [sys.executable, "-P", "-m", follower.__name__, str(folder.path)]
    for flag in ("uri", "experiment", "interval"):
        if target.get(flag) is not None:
            command += [f"--{flag}", str(target[flag])]
    result: dict[str, Any] = {"run_id": None, "metrics": 0, "refused": [], "error": None}
    # a URI without a folder is relative to where the notebook runs
    place = record.working_dir if Path(record.working_dir).is_dir() else str(folder.path)
    with tempfile.TemporaryFile() as log:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                timeout=seconds,
                cwd=place,
            )
        except subprocess.TimeoutExpired:
            return {**result, "error": f"not finished after {seconds:.0f} s; the rest was not sent"}
        if done.returncode == follower.BUSY:
            return {**result, "error": "another process is sending it just now"}
        try:
            return {**result, **json.loads(done.stdout.splitlines()[-1])}
        except (ValueError, IndexError, TypeError):
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines() or ["nothing was said"]
            return {**result, "error": f"the sending process failed: {said[-1]}"}
