"""kill -9 of the runner, of the process that retries, and of both, at every stage of a retried run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Project, wait_until
from test_retry import LATE, SOON, retriers

pytestmark = pytest.mark.faults

PARAMETERS = "timeout = None\ncheckpoint_dir = ''\nresume = False"
TRAIN = """
import time
from grd.experiment import training
state = {"total": 0}
for epoch in training.epochs(4, state=state, checkpoint_dir=checkpoint_dir, resume=resume):
    state["total"] += int(epoch) + 1
    epoch.log(total=state["total"])
    if int(epoch) == 1 and not resume:
        open('there', 'w').close()
        time.sleep(600)
print('total', state["total"])
"""


def start(project: Project, environment: dict[str, str], *options: str) -> Path:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    done = project.grd(
        "research", "train.ipynb", "--detach", "--max-attempts", "3", "--grace", "5", *options,
        env=environment,
    )  # fmt: skip
    assert done.code == 0, done.err
    wait_until(lambda: (project.path / "there").exists(), "the second epoch")
    return project.only_run()


def kill(who: psutil.Process | int) -> None:
    os.kill(who if isinstance(who, int) else who.pid, signal.SIGKILL)


def the_retrier(project: Project) -> psutil.Process:
    return wait_until(lambda: retriers(project), "the retrier")[0]


def retry_state(project: Project) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(project.grd("status", "last", "--json").out)["retry"]
    return value


def test_a_killed_runner_is_followed_by_an_attempt_that_goes_on_from_the_checkpoint(project: Project) -> None:
    run = start(project, SOON)
    the_retrier(project)
    kill(int(project.record()["runner"]["pid"]))
    assert project.grd("wait", run.name).code == 0
    record = project.record()
    assert [a["cause"] for a in record["attempts"]] == ["runner_lost", None]
    assert record["metrics"]["total"] == 10
    assert [e["epoch"] for e in project.events() if e["kind"] == "resume"] == [0]


def test_a_killed_retrier_is_replaced_by_the_runner_at_its_end(project: Project) -> None:
    run = start(project, SOON)
    first = the_retrier(project)
    kill(first)
    wait_until(lambda: not first.is_running() or first.status() == psutil.STATUS_ZOMBIE, "its end")
    kill(int(project.record()["kernel_pid"]))
    assert project.grd("wait", run.name).code == 0
    assert [a["cause"] for a in project.record()["attempts"]] == ["kernel_died", None]


def test_a_retrier_killed_while_it_waits_is_told_and_a_person_can_go_on(project: Project) -> None:
    run = start(project, LATE)
    kill(int(project.record()["kernel_pid"]))
    wait_until(lambda: retry_state(project)["state"] == "waiting", "the wait", pause=0.5)
    kill(the_retrier(project))
    assert project.grd("wait", run.name).code == 75
    assert retry_state(project)["state"] == "lost"
    told = project.grd("status").out
    assert "none follows by itself" in told
    assert f"next: grd resume {run.name}" in told
    assert project.grd("resume", run.name).code == 0


def test_when_both_are_killed_nothing_is_lost_and_nothing_lies(project: Project) -> None:
    run = start(project, SOON)
    retrier = the_retrier(project)
    os.kill(retrier.pid, signal.SIGSTOP)  # so that it cannot do anything between the two kills
    kill(int(project.record()["runner"]["pid"]))
    kill(retrier)
    wait_until(lambda: project.grd("status", run.name, "--json").json["state"] == "interrupted", "its end")
    assert retry_state(project)["state"] == "lost"
    assert project.grd("resume", run.name, env=SOON).code == 0
    assert project.record()["metrics"]["total"] == 10
