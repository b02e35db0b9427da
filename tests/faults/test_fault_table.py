"""Fault x moment: whatever kills a run, and whenever, the same invariants hold afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
import psutil
import pytest
from conftest import Project, wait_until

from grd.files import is_locked

pytestmark = pytest.mark.faults

PARAMETERS = "timeout = None\ncheckpoint_dir = ''\nresume = False"

# --- moments: a cell that lasts, until it is resumed --------------------------------------------------------

SILENT = "import time\nprint('here', flush=True)\nif not resume:\n    time.sleep(600)"
PRINTING = """
import time
print('here', flush=True)
n = 0
while not resume and n < 10**7:
    n += 1
    print('line', n, flush=n % 50 == 0)
    if n % 200 == 0:
        time.sleep(0.01)
"""
HOLDING_THE_GIL = """
import re, time
print('here', flush=True)
if not resume:
    time.sleep(0.5)  # the kernel's own threads cannot send what was printed while the GIL is held
    open('holding', 'w').close()
    re.match('(a+)+b', 'a' * 60)
"""
SWALLOWING = """
import time
print('here', flush=True)
while not resume:
    try:
        time.sleep(1)
    except KeyboardInterrupt:
        pass
"""
TRAINING = """
import time
from grd.experiment import training
for epoch in training.epochs(8, state={}, checkpoint_dir=checkpoint_dir, resume=resume):
    time.sleep(0.05 if resume else 0.5)
    print('here', int(epoch), flush=True)
    epoch.log(value=float(epoch))
"""
SAVING = """
import time, os, random
from grd.experiment import training
state = {"blob": random.Random(0).randbytes(60_000_000), "seen": 0}
last = 5 if resume else 500
for epoch in training.epochs(last, state=state, checkpoint_dir=checkpoint_dir, resume=resume, every=1):
    state["seen"] += 1
    print('here', flush=True)
"""


def a_cell_prints(project: Project) -> None:
    project.wait_for_output("here")


def the_gil_is_held(project: Project) -> None:
    a_cell_prints(project)
    wait_until((project.path / "holding").exists, "the cell to hold the GIL")


def the_kernel_is_starting(project: Project) -> None:
    wait_until(lambda: project.record()["kernel_pid"], "the kernel's pid")


def a_checkpoint_is_being_written(project: Project) -> None:
    a_cell_prints(project)

    def temporary() -> bool:
        with contextlib.suppress(OSError):
            names = [path.name for path in (project.only_run() / "checkpoints").iterdir()]
            return any(name.startswith(".") for name in names) and any("checkpoint_epoch" in n for n in names)
        return False

    wait_until(temporary, "a checkpoint's temporary file")


@dataclass(frozen=True)
class Moment:
    cell: str
    reached: Callable[[Project], None]


MOMENTS = {
    "kernel starting": Moment(SILENT, the_kernel_is_starting),
    "silent cell": Moment(SILENT, a_cell_prints),
    "printing cell": Moment(PRINTING, a_cell_prints),
    "cell holding the GIL": Moment(HOLDING_THE_GIL, the_gil_is_held),
    "cell swallowing interrupts": Moment(SWALLOWING, a_cell_prints),
    "training": Moment(TRAINING, a_cell_prints),
    "saving a checkpoint": Moment(SAVING, a_checkpoint_is_being_written),
}

# --- faults ---------------------------------------------------------------------------------------------


def _runner(project: Project) -> int:
    return int(project.record()["runner"]["pid"])


def _kernel(project: Project) -> int:
    return int(project.record()["kernel_pid"])


def to_runner(signum: int) -> Callable[[Project, subprocess.Popen[str]], None]:
    return lambda project, process: os.kill(_runner(project), signum)


def to_kernel(signum: int) -> Callable[[Project, subprocess.Popen[str]], None]:
    return lambda project, process: os.kill(_kernel(project), signum)


def to_everyone(signum: int, *, follower: bool = True) -> Callable[[Project, subprocess.Popen[str]], None]:
    """As scancel, systemd and docker stop do."""

    def send(project: Project, process: subprocess.Popen[str]) -> None:
        tree = [process.pid, _runner(project)] if follower else [_runner(project)]
        tree += [child.pid for child in psutil.Process(_runner(project)).children(recursive=True)]
        for pid in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    return send


def twice(signum: int) -> Callable[[Project, subprocess.Popen[str]], None]:
    """The second comes while the first stop is under way; it must not spoil the saving."""

    def send(project: Project, process: subprocess.Popen[str]) -> None:
        runner = _runner(project)
        os.kill(runner, signum)
        project.wait_for_event("stop", stage=0)
        with contextlib.suppress(ProcessLookupError):
            os.kill(runner, signum)

    return send


def again_while_stopping(first: int, second: int) -> Callable[[Project, subprocess.Popen[str]], None]:
    """Another signal, to every process, while the first stop is under way."""

    def send(project: Project, process: subprocess.Popen[str]) -> None:
        os.kill(_runner(project), first)
        project.wait_for_event("stop", stage=0)
        with contextlib.suppress(psutil.NoSuchProcess):
            to_everyone(second, follower=False)(project, process)

    return send


def hang_up(project: Project, process: subprocess.Popen[str]) -> None:
    """The terminal is closed: the command ends, the run does not, until somebody asks."""
    process.send_signal(signal.SIGHUP)
    process.wait(60)
    assert project.grd("status", "last", "--json").json["state"] == "running"
    assert project.grd("stop", "last").code == 0


def nothing(project: Project, process: subprocess.Popen[str]) -> None:
    """The deadline does it."""


@dataclass(frozen=True)
class Fault:
    strike: Callable[[Project, subprocess.Popen[str]], None]
    cause: str
    options: tuple[str, ...] = ("--timeout", "5m", "--grace", "8s")


FAULTS = {
    "kernel SIGKILL": Fault(to_kernel(signal.SIGKILL), "kernel_died"),
    "kernel SIGSEGV": Fault(to_kernel(signal.SIGSEGV), "kernel_died"),
    "runner SIGTERM": Fault(to_runner(signal.SIGTERM), "sigterm"),
    "runner SIGINT": Fault(to_runner(signal.SIGINT), "sigint"),
    "runner SIGHUP": Fault(to_runner(signal.SIGHUP), "sighup"),
    "runner SIGUSR1": Fault(to_runner(signal.SIGUSR1), "preempted"),
    "runner SIGUSR2": Fault(to_runner(signal.SIGUSR2), "preempted"),
    "runner SIGTERM twice": Fault(twice(signal.SIGTERM), "sigterm"),
    "runner SIGINT twice": Fault(twice(signal.SIGINT), "sigint"),
    "follower SIGTERM": Fault(lambda project, process: process.terminate(), "sigterm"),
    "runner SIGKILL": Fault(to_runner(signal.SIGKILL), "runner_lost"),
    "everyone SIGTERM": Fault(to_everyone(signal.SIGTERM), "sigterm"),
    "everyone SIGINT": Fault(to_everyone(signal.SIGINT), "sigint"),
    "everyone SIGHUP": Fault(to_everyone(signal.SIGHUP, follower=False), "sighup"),
    "everyone SIGUSR1": Fault(to_everyone(signal.SIGUSR1, follower=False), "preempted"),
    "everyone SIGUSR2": Fault(to_everyone(signal.SIGUSR2, follower=False), "preempted"),
    "runner SIGHUP twice": Fault(twice(signal.SIGHUP), "sighup"),
    "runner SIGUSR1 twice": Fault(twice(signal.SIGUSR1), "preempted"),
    "runner SIGUSR2 twice": Fault(twice(signal.SIGUSR2), "preempted"),
    "everyone SIGTERM during a stop": Fault(
        again_while_stopping(signal.SIGUSR1, signal.SIGTERM), "preempted"
    ),
    "everyone SIGINT during a stop": Fault(again_while_stopping(signal.SIGTERM, signal.SIGINT), "sigterm"),
    "everyone SIGUSR1 during a stop": Fault(again_while_stopping(signal.SIGTERM, signal.SIGUSR1), "sigterm"),
    "everyone SIGUSR2 during a stop": Fault(again_while_stopping(signal.SIGHUP, signal.SIGUSR2), "sighup"),
    "everyone SIGHUP during a stop": Fault(again_while_stopping(signal.SIGTERM, signal.SIGHUP), "sigterm"),
    "follower SIGHUP, then stop": Fault(hang_up, "stopped"),
    "follower SIGINT": Fault(lambda project, process: process.send_signal(signal.SIGINT), "sigint"),
    "deadline": Fault(nothing, "deadline", ("--timeout", "4s", "--grace", "8s")),
}

AT_ONE_MOMENT = [
    fault for fault in FAULTS if "twice" in fault or "during" in fault or "follower SIG" in fault
]
"""Rows that are tried in a training only, unless they are older: what differs is the signal, not the cell."""

CASES = [
    (fault, moment)
    for fault in FAULTS
    for moment in MOMENTS
    if moment == "training"
    or fault not in AT_ONE_MOMENT
    or fault in ("runner SIGTERM twice", "runner SIGINT twice", "follower SIGTERM")
]

START_FAILS = {("kernel SIGKILL", "kernel starting"), ("kernel SIGSEGV", "kernel starting")}
"""A kernel that dies before it has answered has not started: a failure, not an interruption."""


def check_invariants(project: Project, fault: str, moment: str) -> None:
    """What must hold after any fault at any moment."""
    run = project.only_run()
    shown = project.grd("status", run.name, "--json").json
    expected = (
        ("failed", "start_failed") if (fault, moment) in START_FAILS else ("interrupted", FAULTS[fault].cause)
    )
    assert (shown["state"], shown["cause"]) == expected
    assert shown["resumable"] and shown["resume_command"]
    assert shown == project.record(run), "status and run.json disagree"
    states = [event["state"] for event in project.events(run) if event["kind"] == "state"]
    assert states[-1] == shown["state"], "events and run.json disagree"
    assert not is_locked(run / "runner.lock")
    wait_until(lambda: project.processes() == [], "the end of every process of the run", 2 + 2)
    output = run / "output.ipynb"
    if output.exists():
        _check_notebook(output, moment)


def _check_notebook(output: Path, moment: str) -> None:
    notebook = nbformat.reads(output.read_text(), as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    statuses = [cell.metadata.papermill.status for cell in cells]
    assert statuses[-1] == "pending", f"a cell that never ran is called {statuses[-1]}"
    if moment != "kernel starting":
        assert statuses[-2] in ("interrupted", "failed", "completed")
        assert "here" in json.dumps([cell.get("outputs") for cell in cells]), "an output is lost"


@pytest.mark.parametrize(("fault", "moment"), CASES)
def test_a_run_is_whole_and_resumable_after(project: Project, fault: str, moment: str) -> None:
    project.notebook("run.ipynb", MOMENTS[moment].cell, "print('the end')", parameters=PARAMETERS)
    process = project.start("research", "run.ipynb", *FAULTS[fault].options)
    MOMENTS[moment].reached(project)
    FAULTS[fault].strike(project, process)
    stopped = project.finish(process)
    if FAULTS[fault].strike is hang_up:
        assert stopped.code == -signal.SIGHUP
    else:
        assert stopped.code == (69 if (fault, moment) in START_FAILS else 75), stopped.err
    assert "Traceback" not in stopped.err
    check_invariants(project, fault, moment)
    resumed = project.grd("resume", "last", "--timeout", "5m", "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["state"] == "completed"
    assert project.grd("logs", "last").out.endswith("the end\n")
    assert project.processes() == []
