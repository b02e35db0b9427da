"""Both recipes of AGENTS.md, run by a caller whose every call is short and ends with a massacre.

GRD_TEST_TRAINING_SECONDS and GRD_TEST_CALL_SECONDS set the length of the training and of a call.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Project

pytestmark = pytest.mark.faults

TRAINING_SECONDS = float(os.environ.get("GRD_TEST_TRAINING_SECONDS", "25"))
CALL_SECONDS = float(os.environ.get("GRD_TEST_CALL_SECONDS", "10"))
EPOCHS = 50
MOST_CALLS = 60

PARAMETERS = "epochs = 50\nseconds = 0.0\ntimeout = None\ncheckpoint_dir = ''\nresume = False"
TRAIN = """
import random, time
from grd.experiment import log_metrics, training
state = {"weight": 0.5}
random.seed(7)
for epoch in training.epochs(epochs, state=state, checkpoint_dir=checkpoint_dir, resume=resume, every=1):
    time.sleep(seconds)
    state["weight"] = 0.9 * state["weight"] + 0.1 * random.random()
    epoch.log(weight=state["weight"])
    print("trained", int(epoch), flush=True)
log_metrics(final=state["weight"])
"""


def uninterrupted(project: Project) -> dict[str, Any]:
    """Metrics and history of the same training in one go, which only waits less."""
    done = project.grd("research", "train.ipynb", "-p", "epochs", str(EPOCHS), "--json")
    assert done.code == 0, done.err
    result: dict[str, Any] = project.grd("result", done.json["run_id"], "--json").json
    assert project.grd("rm", done.json["run_id"]).code == 0
    return result


def call(
    project: Project, *arguments: str, everything: bool, limit: float = CALL_SECONDS
) -> tuple[int | None, str]:
    """One tool call: at its end, or when its time is up, what it started is killed.

    ``everything`` kills whatever descends from the call, in whatever session; else its process group only.
    """
    process = project.start(*arguments)
    known: dict[int, psutil.Process] = {}
    give_up = time.monotonic() + limit
    out = ""
    ended = False
    while not ended and time.monotonic() < give_up:
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                known.setdefault(child.pid, child)
        with contextlib.suppress(subprocess.TimeoutExpired):
            out, _ = process.communicate(timeout=0.1)
            ended = True
    code = process.returncode if ended else None
    if everything:
        for found in [*known.values(), *project.processes()]:
            with contextlib.suppress(psutil.Error):
                known.update({child.pid: child for child in found.children(recursive=True)})
                known[found.pid] = found
        for victim in known.values():
            with contextlib.suppress(psutil.Error):
                victim.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if code is None:
        process.communicate()
    return code, out


def epochs_by_attempt(project: Project, run: Path) -> dict[int, list[int]]:
    """The epochs that each attempt trained."""
    found: dict[int, list[int]] = {}
    for event in project.events(run):
        if event["kind"] == "metrics" and event.get("epoch") is not None:
            found.setdefault(event["attempt"], []).append(event["epoch"])
    return found


def check_result(project: Project, expected: dict[str, Any]) -> Path:
    run = project.only_run()
    result = project.grd("result", run.name, "--json").json
    assert result["state"] == "completed"
    assert result["metrics"] == expected["metrics"]
    assert result["history"] == expected["history"]
    assert [row["epoch"] for row in result["history"]] == list(range(EPOCHS))
    return run


@pytest.mark.timeout(900)
def test_slices_finish_where_everything_is_killed_at_the_end_of_each_call(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    expected = uninterrupted(project)
    slice_seconds = f"{CALL_SECONDS * 0.5:g}s"
    command = (
        "research", "train.ipynb", "-p", "epochs", str(EPOCHS), "-p", "seconds",
        str(TRAINING_SECONDS / EPOCHS), "--key", "agent", "--timeout", slice_seconds, "--budget", "4h",
        "--grace", f"{CALL_SECONDS * 0.2:g}s", "--json",
    )  # fmt: skip
    codes: list[int | None] = []
    while not codes or codes[-1] != 0:
        code, out = call(project, *command, everything=True)
        codes.append(code)
        assert code in (None, 0, 75), out
        assert len(codes) < MOST_CALLS, codes
    run = check_result(project, expected)
    assert len(codes) > 1
    _nothing_twice(epochs_by_attempt(project, run))
    again, out = call(project, *command, everything=True)
    assert (again, json.loads(out)["attempt"]) == (0, project.record(run)["attempt"])
    assert project.processes() == []


@pytest.mark.timeout(900)
def test_slices_finish_also_where_no_slice_ever_ends_by_itself(project: Project) -> None:
    """The call is cut off in mid-training each time: runner and kernel die with kill -9."""
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    expected = uninterrupted(project)
    command = (
        "research", "train.ipynb", "-p", "epochs", str(EPOCHS), "-p", "seconds",
        str(TRAINING_SECONDS / EPOCHS), "--key", "agent", "--timeout", "8m", "--budget", "4h", "--json",
    )  # fmt: skip
    codes: list[int | None] = []
    while not codes or codes[-1] != 0:
        code, out = call(project, *command, everything=True)
        codes.append(code)
        assert code in (None, 0), out
        assert len(codes) < MOST_CALLS, codes
    run = check_result(project, expected)
    assert len(codes) > 1
    # A kill can fall between the report of an epoch and its checkpoint: that epoch was under way.
    _nothing_twice(epochs_by_attempt(project, run), under_way=1)
    causes = {attempt["cause"] for attempt in project.record(run)["attempts"][:-1]}
    assert causes == {"runner_lost"}


@pytest.mark.timeout(900)
def test_a_detached_run_finishes_where_each_call_loses_its_process_group(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    expected = uninterrupted(project)
    code, out = call(
        project,
        "research", "train.ipynb", "-p", "epochs", str(EPOCHS), "-p", "seconds",
        str(TRAINING_SECONDS / EPOCHS), "--timeout", "1h", "--detach", "--json", everything=False,
    )  # fmt: skip
    assert code == 0, out
    run_id = json.loads(out)["run_id"]
    codes: list[int | None] = []
    while not codes or codes[-1] != 0:
        code, out = call(
            project, "wait", run_id, "--timeout", f"{CALL_SECONDS * 0.6:g}", "--json", everything=False
        )
        codes.append(code)
        assert code in (0, 124), out
        assert len(codes) < MOST_CALLS, codes
    assert len(codes) > 1
    run = check_result(project, expected)
    assert epochs_by_attempt(project, run) == {1: list(range(EPOCHS))}


def _nothing_twice(by_attempt: dict[int, list[int]], *, under_way: int = 0) -> None:
    ends = [epochs for _, epochs in sorted(by_attempt.items())]
    for before, after in itertools.pairwise(ends):
        assert 0 <= before[-1] + 1 - after[0] <= under_way, by_attempt
    assert ends[0][0] == 0 and ends[-1][-1] == EPOCHS - 1
    for epochs in ends:
        assert epochs == list(range(epochs[0], epochs[-1] + 1))
