"""Asking a batch to stop: by its coordinator, or run by run where that is gone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from grd import contract
from grd.batch import record as records
from grd.batch.view import look
from grd.errors import ResourceUnavailable
from grd.files import atomic_write
from grd.runs.batch_folder import BatchFolder
from grd.runs.folder import RunFolder
from grd.runs.stop_request import ask_to_stop
from grd.steps.following import is_under_way


def ask_batch_to_stop(
    folder: BatchFolder,
    reason: str,
    *,
    at_once: bool = False,
    on_note: Callable[[str], None] = lambda text: None,
) -> None:
    """Leave the request where the coordinator looks for it; without one ask its runs themselves.

    Raises ResourceUnavailable where the request finds no room.
    """
    request = {"reason": reason, "now": at_once, "t": time.time()}
    try:
        atomic_write(folder.stop_file, json.dumps(request) + "\n", durable=False)
    except OSError as error:
        raise ResourceUnavailable(
            f"{folder.batch_id} cannot be asked to stop: {error.strerror or error}"
        ) from None
    if not folder.has_coordinator():
        stop_runs(folder, at_once=at_once, on_note=on_note)


def stop_runs(
    folder: BatchFolder, *, at_once: bool, on_note: Callable[[str], None] = lambda text: None
) -> None:
    """Ask every run of the batch that is under way."""
    for run in runs_under_way(folder):
        try:
            ask_to_stop(run, contract.STOPPED, at_once=at_once)
        except ResourceUnavailable as error:
            on_note(str(error))


def runs_under_way(folder: BatchFolder) -> list[RunFolder]:
    """The runs of a batch that somebody works on, whoever started them."""
    rows = list(look(folder, records.load(folder), records.planned_runs(folder)))
    found = [RunFolder(folder.runs_dir / row.run_id) for row in rows if row.run_id is not None]
    ended = {
        row.run_id for row in rows if row.state in (contract.COMPLETED, contract.FAILED)
    }  # of the others a guardian may still be at work
    return [run for run in found if run.run_id not in ended and is_under_way(run)]
