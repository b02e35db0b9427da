"""The process that sends a run to MLflow while it runs: ``python -m grd.tracking.mlflow.follower FOLDER``.

A process of its own, so that a store that is slow, hangs or is down costs the run nothing: what was not sent
lies in the run's folder and is sent by the next try, by the next attempt, or by ``grd mlflow export``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grd import contract
from grd.errors import GrdError
from grd.files import take_lock
from grd.runs import recovery
from grd.runs.folder import RunFolder
from grd.runs.model import RunRecord
from grd.tracking.mlflow import state
from grd.tracking.mlflow.state import Shipped

LOOK_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 30.0
"""Between two tries at a store that does not answer."""

AFTER_END_SECONDS = 10.0
"""A store that fails is tried again for so long after the run's end."""

LIMIT_SECONDS = 60.0
"""After the run's end it is over at the latest: MLflow takes seconds to import, and a store may be slow."""

REQUEST_SECONDS = 10
DEFAULT_INTERVAL_SECONDS = 10.0

COULD_NOT = 1
BUSY = 3

_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_SECONDS),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # tries again by itself, and knows when it is over
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


@dataclass(frozen=True)
class Target:
    """Where to send to: a URI, or None for what MLflow's own environment says."""

    uri: str | None
    experiment: str | None
    interval: float = DEFAULT_INTERVAL_SECONDS


def target_of(record: RunRecord) -> Target:
    """What the run was started with."""
    chosen = record.mlflow or {}
    return Target(
        uri=chosen.get("uri"),
        experiment=chosen.get("experiment"),
        interval=float(chosen.get("interval") or DEFAULT_INTERVAL_SECONDS),
    )


def start(folder: RunFolder, record: RunRecord) -> subprocess.Popen[bytes] | None:
    """Start following the attempt of ``record``; None where it could not be started."""
    command = [sys.executable, "-P", "-m", __name__, str(folder.path), "--attempt", str(record.attempt)]
    # It is none of the run's own processes, which must not outlive it.
    own = (*contract.KERNEL_ENVIRONMENT, contract.ENV_RUNNER)
    environment = {name: value for name, value in os.environ.items() if name not in own}
    with contextlib.suppress(OSError), open(folder.attempt(record.attempt).mlflow_log, "ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=record.working_dir,
            start_new_session=True,
        )
    return None


class Sender:
    """Tries to send what one store does not have of a run."""

    def __init__(self, folder: RunFolder, target: Target) -> None:
        self._folder = folder
        self._target = target
        self._client: Any = None
        self._uri = ""
        self._stores = state.load(folder)

    def send(self) -> tuple[RunRecord, Shipped]:
        """Send once, and store how far it came; the second tells whether it was all, or why not."""
        record = recovery.current_record(self._folder)
        try:
            self._connect()
            shipped = self._stores[self._uri]
            from grd.tracking.mlflow.shipping import Shipment, experiment_name

            experiment = experiment_name(record, self._target.experiment)
            Shipment(self._client, self._folder, shipped, self._keep, experiment).send(
                record, self._target.interval
            )
        except (GrdError, FileNotFoundError):
            raise
        except Exception as error:  # whatever a store, its client or the network may come up with
            shipped = self._stores.setdefault(self._uri or (self._target.uri or "default"), Shipped())
            first = (str(error).strip().splitlines() or [""])[0]
            shipped.error = f"{type(error).__name__}: {first}"[:500]
            with contextlib.suppress(OSError):
                self._keep()
        return record, shipped

    def _keep(self) -> None:
        state.store(self._folder, self._stores)

    def _connect(self) -> None:
        if self._client is not None:
            return
        import mlflow
        from mlflow.tracking import MlflowClient

        self._uri = without_password(self._target.uri or mlflow.get_tracking_uri())
        self._client = MlflowClient(tracking_uri=self._target.uri or mlflow.get_tracking_uri())
        self._stores.setdefault(self._uri, Shipped())


def without_password(uri: str) -> str:
    """``uri`` as it may be shown and stored."""
    scheme, separator, rest = uri.partition("://")
    secret, at, place = rest.partition("@")
    if not (separator and at and ":" in secret and "/" not in secret):
        return uri
    return f"{scheme}://{secret.partition(':')[0]}:***@{place}"


def follow(folder: RunFolder, attempt: int) -> int:
    """Send what comes until the attempt has ended and everything was sent, or its time is over."""
    _watch_over(folder, attempt)
    lock = None
    while lock is None:  # an earlier attempt's follower may still be sending
        lock = take_lock(folder.mlflow_lock, wait_seconds=LOOK_SECONDS)
    sender = Sender(folder, target_of(recovery.current_record(folder)))
    pause, give_up = LOOK_SECONDS, None
    while True:
        record, shipped = sender.send()
        if record.attempt > attempt:
            return 0  # that attempt has a follower of its own
        if record.state in contract.ENDED_STATES:
            give_up = give_up or time.monotonic() + AFTER_END_SECONDS
            pause = min(pause, LOOK_SECONDS)
            if shipped.error is None:
                return 0
            if time.monotonic() >= give_up:
                return COULD_NOT
        pause = LOOK_SECONDS if shipped.error is None else min(2 * pause, LONGEST_PAUSE_SECONDS)
        _rest(folder, attempt, pause)


def _rest(folder: RunFolder, attempt: int, seconds: float) -> None:
    """Wait; the end of the attempt ends it, since there is something to tell then."""
    until = time.monotonic() + seconds
    over = _is_over(folder, attempt)
    while time.monotonic() < until and (over or not _is_over(folder, attempt)):
        time.sleep(min(0.5, seconds))


def _is_over(folder: RunFolder, attempt: int) -> bool:
    record = recovery.current_record(folder)
    return record.attempt > attempt or record.state in contract.ENDED_STATES


def _watch_over(folder: RunFolder, attempt: int) -> None:
    """End this process soon after the attempt, also in the midst of a call that never returns."""

    def watch() -> None:
        with contextlib.suppress(GrdError, OSError):
            while not _is_over(folder, attempt):
                time.sleep(1.0)
        time.sleep(LIMIT_SECONDS)
        os._exit(COULD_NOT)

    threading.Thread(target=watch, name="grd-mlflow-limit", daemon=True).start()


def send_once(folder: RunFolder, target: Target) -> int:
    """Send everything there is now; prints the outcome as JSON. Exit status 0 if all has arrived."""
    lock = take_lock(folder.mlflow_lock, wait_seconds=LOOK_SECONDS)
    if lock is None:
        return BUSY
    _, shipped = Sender(folder, target).send()
    print(
        json.dumps(
            {
                "run_id": shipped.run_id,
                "metrics": shipped.metrics,
                "refused": shipped.refused,
                "error": shipped.error,
            }
        )
    )
    return 0 if shipped.error is None else COULD_NOT


def main(arguments: list[str]) -> int:
    """Follow an attempt, or send a run once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--attempt", type=int)
    parser.add_argument("--uri")
    parser.add_argument("--experiment")
    parser.add_argument("--interval", type=float, default=DEFAULT_INTERVAL_SECONDS)
    options = parser.parse_args(arguments)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    with contextlib.suppress(OSError):
        os.nice(5)
    folder = RunFolder(options.folder)
    try:
        if options.attempt is not None:
            return follow(folder, options.attempt)
        return send_once(folder, Target(options.uri, options.experiment, options.interval))
    except (GrdError, FileNotFoundError) as error:  # the run was deleted meanwhile
        print(error, file=sys.stderr)
        return COULD_NOT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
