"""grd as the first process of a container: signals to it have no default action, its end ends everything."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
from conftest import Project, cannot_be_had, wait_until

NEW_NAMESPACE = ["unshare", "--fork", "--pid", "--mount-proc"]
TRAIN = """
from grd.experiment import log_metrics, training
import time
state = {"total": 0}
for epoch in training.epochs(5, state=state, checkpoint_dir=checkpoint_dir, resume=resume):
    for _ in epoch.steps(range(1000)):
        time.sleep(0.1 if int(epoch) == 2 and not resume else 0)
    state["total"] += int(epoch) + 1
    epoch.log(total=state["total"])
log_metrics(final=state["total"])
"""


def can_make_a_pid_namespace() -> bool:
    """Whether this user may be process 1 of a namespace here."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*NEW_NAMESPACE, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.faults
def test_sigterm_to_process_1_of_a_container_saves_and_the_run_is_resumed_outside(project: Project) -> None:
    if not can_make_a_pid_namespace():
        cannot_be_had("no PID namespace can be made here")
    project.notebook("train.ipynb", TRAIN, parameters="timeout = None\ncheckpoint_dir = ''\nresume = False")
    with (project.path / "log").open("wb") as log:
        container = subprocess.Popen(
            [*NEW_NAMESPACE, sys.executable, "-m", "grd", "research", "train.ipynb", "--timeout", "10m"],
            cwd=project.path,
            env=project.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    project.wait_for_event("checkpoint", epoch=1)
    (first,) = psutil.Process(container.pid).children()
    os.kill(first.pid, signal.SIGTERM)
    assert container.wait(60) == 75, (project.path / "log").read_text()
    record = project.record()
    assert (record["state"], record["cause"]) == ("interrupted", "sigterm")
    wait_until(lambda: not first.is_running(), "the container's end")
    resumed = project.grd("resume", "last", "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["metrics"]["final"] == 15
