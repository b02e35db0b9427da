"""Sends what MLflow does not have of a run yet; asked again and again, it sends each thing once.

MLflow's client is given, so that nothing here needs MLflow to be imported but its entities.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from grd import contract
from grd.files import read_json, read_json_lines
from grd.runs.folder import RunFolder
from grd.runs.model import RunRecord
from grd.tracking.mlflow import translation
from grd.tracking.mlflow.state import Shipped
from grd.tracking.mlflow.translation import Metric

BATCH_METRICS = 500
"""MLflow takes 1,000 a call; smaller calls are sooner safe."""
BATCH_PARAMETERS = 100

MOST_REFUSED = 20

RUN_TAG = "grd.run_id"


class Shipment:
    """One run and one store. ``keep`` stores ``shipped`` after each step that has arrived."""

    def __init__(
        self, client: Any, folder: RunFolder, shipped: Shipped, keep: Callable[[], None], experiment: str
    ) -> None:
        self._client = client
        self._folder = folder
        self._shipped = shipped
        self._keep = keep
        self._experiment = experiment

    def send(self, record: RunRecord, interval: float) -> None:
        """Send what is new of the run, whose record is ``record``; raises what the client raises.

        ``interval``: seconds between two samples of what the run uses. The first and, once the run has
        ended, the last are always sent.
        """
        shipped = self._shipped
        ended = record.state in contract.ENDED_STATES
        run_id = self._find_or_create(record)
        status = translation.status_of(record.state)
        if shipped.status != status and status == "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
            shipped.status = status
        self._send_facts(run_id, record)
        self._send_events(run_id)
        for attempt in record.attempts:
            over = ended or attempt.number < record.attempt
            self._send_samples(run_id, attempt.number, interval, over=over)
        if shipped.status != status:
            self._client.set_terminated(
                run_id, status=status, end_time=translation.milliseconds(record.ended_at)
            )
            shipped.status = status
        if ended:
            shipped.whole = record.attempt
        shipped.error = None
        self._keep()

    def _find_or_create(self, record: RunRecord) -> str:
        shipped = self._shipped
        if shipped.run_id is not None:
            return shipped.run_id
        experiment_id = self._experiment_id()
        # It may have been made by one who was killed before it could write that down.
        found = self._client.search_runs(
            [experiment_id], filter_string=f"tags.`{RUN_TAG}` = '{record.run_id}'", max_results=1
        )
        if found:
            run = found[0]
        else:
            run = self._client.create_run(
                experiment_id,
                start_time=translation.milliseconds(record.started_at or record.created_at),
                tags={RUN_TAG: record.run_id, **_user()},
                run_name=record.run_id,
            )
        shipped.run_id = str(run.info.run_id)
        self._keep()
        return shipped.run_id

    def _experiment_id(self) -> str:
        known = self._client.get_experiment_by_name(self._experiment)
        if known is None:
            try:
                return str(self._client.create_experiment(self._experiment))
            except Exception:
                known = self._client.get_experiment_by_name(self._experiment)
                if known is None:  # it was not another run that made it just now
                    raise
        return str(known.experiment_id)

    def _send_facts(self, run_id: str, record: RunRecord) -> None:
        from mlflow.entities import Param, RunTag

        shipped = self._shipped
        profile = self._profile(record.attempt)
        first = {**record.defaults, **record.attempts[0].parameters}
        newest = {**record.defaults, **record.parameters}
        hardware = {} if profile is None else translation.hardware_parameters(profile)
        parameters, changed = translation.parameters_and_changes(
            {**hardware, **first}, {**hardware, **newest}, shipped.parameters, record.attempt
        )
        tags = {**translation.tags_of(record.to_dict(), profile), **changed}
        tags = {name: value for name, value in tags.items() if shipped.tags.get(name) != value}
        if not parameters and not tags:
            return
        items = [Param(key, value) for key, value in parameters.items()]
        for batch in _batches(items, BATCH_PARAMETERS):
            self._log(run_id, params=batch)
        for batch in _batches([RunTag(key, value) for key, value in tags.items()], BATCH_PARAMETERS):
            self._log(run_id, tags=batch)
        shipped.parameters |= parameters
        shipped.tags |= tags
        self._keep()

    def _profile(self, attempt: int) -> dict[str, Any] | None:
        with contextlib.suppress(OSError, ValueError):
            return dict(read_json(self._folder.attempt(attempt).hardware))
        return None

    def _send_events(self, run_id: str) -> None:
        waiting: list[Metric] = []
        end = self._shipped.events_offset
        for end, event in read_json_lines(self._folder.events, end):  # noqa: B020
            waiting += translation.metrics_of(event)
            if len(waiting) >= BATCH_METRICS:
                self._send_metrics(run_id, waiting)
                waiting, self._shipped.events_offset = [], end
                self._keep()
        self._send_metrics(run_id, waiting)
        self._shipped.events_offset = end

    def _send_samples(self, run_id: str, attempt: int, interval: float, *, over: bool) -> None:
        shipped, key = self._shipped, str(attempt)
        path = self._folder.attempt(attempt).resources
        profile = self._profile(attempt)
        window: list[dict[str, Any]] = []
        end = shipped.samples_offsets.get(key, 0)
        for end, sample in read_json_lines(path, end):  # noqa: B020
            window.append(sample)
            before = shipped.last_samples.get(key)
            if translation.is_due(sample, None if before is None else before["t"], interval):
                self._send_window(run_id, key, window, profile)
                window, shipped.samples_offsets[key] = [], end
        if window and over:
            self._send_window(run_id, key, window, profile)
            shipped.samples_offsets[key] = end

    def _send_window(
        self, run_id: str, key: str, window: Sequence[Mapping[str, Any]], profile: Mapping[str, Any] | None
    ) -> None:
        shipped = self._shipped
        before = shipped.last_samples.get(key)
        values = translation.system_metrics(window, before, profile)
        t = float(window[-1]["t"])
        self._send_metrics(
            run_id, [Metric(name, value, t, shipped.samples) for name, value in values.items()]
        )
        shipped.last_samples[key] = {"t": t, "cpu_seconds": window[-1]["cpu_seconds"]}
        shipped.samples += 1

    def _send_metrics(self, run_id: str, metrics: Sequence[Metric]) -> None:
        from mlflow import entities

        items = [entities.Metric(m.key, m.value, round(m.t * 1000), m.step) for m in metrics]
        for batch in _batches(items, BATCH_METRICS):
            self._log(run_id, metrics=batch)
            self._shipped.metrics += len(batch)

    def _log(self, run_id: str, **items: Sequence[Any]) -> None:
        """Log a batch; where the store refuses it for what it holds, all of it that it does take."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(run_id, **items)
            return
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            ((kind, batch),) = items.items()
            if len(batch) == 1:
                self._refuse(f"{batch[0].key}: {' '.join(str(error).split())[:300]}")
                return
        for item in batch:
            self._log(run_id, **{kind: [item]})

    def _refuse(self, text: str) -> None:
        if text not in self._shipped.refused and len(self._shipped.refused) < MOST_REFUSED:
            self._shipped.refused.append(text)


def experiment_name(record: RunRecord, configured: str | None) -> str:
    """The run's experiment: as configured, else MLFLOW_EXPERIMENT_NAME, else the notebook's name."""
    name = configured or os.environ.get("MLFLOW_EXPERIMENT_NAME")
    return name or Path(record.notebook.split("?")[0]).stem or record.name


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _user() -> dict[str, str]:
    import getpass

    with contextlib.suppress(Exception):  # a uid without a name
        return {"mlflow.user": getpass.getuser()}
    return {}
