"""Time to save: what comes between a stop request and the kill, with steps and saves that really last."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import nbformat
import psutil
import pytest
from conftest import LIMIT_SECONDS, Project, wait_until

pytestmark = pytest.mark.faults

PARAMETERS = "timeout = None\ncheckpoint_dir = ''\nresume = False"

MODEL = """
import ctypes, os, time
from grd.experiment import CheckpointHandler, training

BEGUN = time.monotonic()
DEADLINE = float(os.environ.get("GRD_DEADLINE", "inf"))

def stopping():
    return '"stage": 2' in open(os.environ["GRD_EVENTS"]).read().replace('":2', '": 2')

class Model:
    '''Its state takes 8 s to read once it has seen two steps; afterwards it is quick again.'''
    def __init__(self, until=lambda: True):
        self.steps, self.until = 0, until
    def state_dict(self):
        if self.steps == 2 and not resume:
            print("saving", flush=True)
            begun = time.monotonic()
            while time.monotonic() < begun + 8 or not self.until():
                time.sleep(0.1)
            print("read", flush=True)
        return {"steps": self.steps}
    def load_state_dict(self, state):
        self.steps = state["steps"]

def in_c(seconds):
    '''Holds the GIL for so long: a wait for a mutex, which unlike a sleep no signal cuts short.'''
    libc = ctypes.PyDLL(None)
    mutex = ctypes.create_string_buffer(128)
    until = (ctypes.c_long * 2)(int(time.time() + seconds), 0)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_timedlock(mutex, until)
"""
TRAIN = """
for epoch in training.epochs(4, model=model, checkpoint_dir=checkpoint_dir, resume=resume):
    if epoch == 1 and not resume:
        if {at_deadline}:
            while time.monotonic() < DEADLINE - 0.5: time.sleep(0.1)
        print("the step begins", flush=True)
        time.sleep(0.5)  # until that is sent
        {step}
    model.steps += 1
    epoch.log(steps=model.steps)
"""


def training(step: str = "time.sleep(10)", until: str = "True", at_deadline: bool = False) -> list[str]:
    """Cells of a training whose second epoch is one long step, and whose save after it takes 8 s."""
    loop = TRAIN.replace("{step}", step).replace("{at_deadline}", str(at_deadline))
    return [MODEL, f"model = Model(until=lambda: {until})", loop]


def start(project: Project, *cells: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    project.notebook("run.ipynb", *cells, "print('the last cell', resume)", parameters=PARAMETERS)
    limit = () if "--timeout" in options else ("--timeout", "10m")
    return project.start("research", "run.ipynb", *limit, *options)


def stop_by(project: Project, who: str) -> None:
    runner = int(project.record()["runner"]["pid"])
    if who == "grd stop":
        assert project.grd("stop", "last").code == 0
    elif who == "SIGTERM":
        os.kill(runner, signal.SIGTERM)
    elif who.endswith("to everyone"):
        signum = getattr(signal, who.split()[0])
        children = psutil.Process(runner).children(recursive=True)
        for pid in [*(child.pid for child in children), runner]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
    else:
        assert who == "deadline"


CAUSES = {
    "grd stop": "stopped",
    "SIGTERM": "sigterm",
    "SIGTERM to everyone": "sigterm",
    "SIGINT to everyone": "sigint",
    "deadline": "deadline",
}


def check_polite_end(
    project: Project, process: subprocess.Popen[str], cause: str, *, slow_exit: bool = False
) -> dict[str, Any]:
    """Interrupted for the right cause, nothing killed, nothing left; the record.

    ``slow_exit``: only 5 s were left for the kernel's own exit, which a busy machine may need longer for.
    """
    ended = project.finish(process)
    record = project.record()
    assert (ended.code, record["state"], record["cause"]) == (75, "interrupted", cause), ended.err
    stop = record["attempts"][-1]["stop"]
    assert not stop["killed"], record
    if not slow_exit:
        assert record["detail"] is None, record
        assert "kill" not in [action["action"] for action in stop["actions"]]
        assert [event for event in project.events() if event["kind"] == "stop" and event["stage"] == 3] == []
    wait_until(lambda: project.processes() == [], "the end of every process of the run", 4)
    assert "the last cell" not in project.grd("logs", "last").out
    return record


def check_resume(project: Project, epoch: int) -> None:
    """It goes on after that epoch, and in the end every step was done once."""
    resumed = project.grd("resume", "last", "--timeout", "5m", "--json")
    assert (resumed.code, resumed.json["state"]) == (0, "completed"), resumed.err
    assert [event["epoch"] for event in project.events() if event["kind"] == "resume"] == [epoch]
    assert resumed.json["metrics"]["steps"] == 4


def saves(project: Project, epoch: int) -> list[dict[str, Any]]:
    return [e for e in project.events() if e["kind"] == "checkpoint" and e["epoch"] == epoch]


# --- a training --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "step"),
    [
        ("SIGTERM", "time.sleep(10)"),
        ("SIGTERM to everyone", "in_c(10)"),
        ("grd stop", "time.sleep(10)"),
        ("deadline", "in_c(10)"),
    ],
)
def test_a_save_of_8_s_after_a_step_of_10_s_fits_the_default_grace(
    project: Project, who: str, step: str
) -> None:
    options = ("--timeout", "60s") if who == "deadline" else ()
    process = start(project, *training(step, at_deadline=who == "deadline"), options=options)
    project.wait_for_output("the step begins")
    stop_by(project, who)
    record = check_polite_end(project, process, CAUSES[who])
    assert record["grace"] == 30.0
    assert record["checkpoint"]["epoch"] == 1
    assert len(saves(project, 1)) == 1
    check_resume(project, 1)


@pytest.mark.parametrize("moment", ["the step begins", "saving"])
def test_with_a_grace_of_3_s_it_is_cut_and_said_so_and_the_checkpoint_before_is_used(
    project: Project, moment: str
) -> None:
    process = start(project, *training(), options=("--grace", "3s"))
    project.wait_for_output(moment)
    stop_by(project, "SIGTERM")
    ended = project.finish(process)
    record = project.record()
    assert (ended.code, record["state"], record["cause"]) == (75, "interrupted", "sigterm")
    stop = record["attempts"][-1]["stop"]
    if (
        moment == "the step begins"
    ):  # which a KeyboardInterrupt can end, if the machine is not too busy for it
        assert "interrupt" in [action["action"] for action in stop["actions"]]
    else:
        assert stop["killed"]
    ending = (
        "ran out after 3s and the kernel was killed"
        if stop["killed"]
        else "the grace period of 3s was too short"
    )
    for said in (record["detail"], ended.out, project.grd("status", "last").out):
        assert ending in said
        assert "--grace" in said
    assert record["checkpoint"]["epoch"] == 0 and saves(project, 1) == []
    wait_until(lambda: project.processes() == [], "the end of every process of the run", 4)
    check_resume(project, 0)


def test_the_last_call_before_the_kill_does_not_spoil_a_save_that_fits(project: Project) -> None:
    process = start(project, *training("pass", until="stopping()"), options=("--grace", "16s"))
    project.wait_for_output("saving")
    stop_by(project, "SIGTERM")
    record = check_polite_end(project, process, "sigterm", slow_exit=True)
    actions = [action["action"] for action in record["attempts"][-1]["stop"]["actions"]]
    assert actions[:2] == ["terminate", "interrupt"], "the interrupt has come while the state was being saved"
    assert record["checkpoint"]["epoch"] == 1
    check_resume(project, 1)


@pytest.mark.parametrize("inside", [False, True], ids=["after an epoch", "inside an epoch"])
def test_a_deadline_in_a_save_lets_it_finish_and_makes_no_second(project: Project, inside: bool) -> None:
    loop = """
for epoch in training.epochs(4, model=model, checkpoint_dir=checkpoint_dir, resume=resume, every=every):
    for step in epoch.steps(range(steps)):
        print("step", int(epoch), step, flush=True)
        while not resume and time.monotonic() < DEADLINE - 4 and model.steps == 1:
            time.sleep(0.1)
        time.sleep(0 if resume else 1.5)
        model.steps += 1
    epoch.log(steps=model.steps)
"""
    settings = "steps, every = 8, '1s'" if inside else "steps, every = 1, 1"
    until = "time.monotonic() > DEADLINE + 1"
    process = start(
        project, MODEL, f"model = Model(until=lambda: {until})", settings, loop, options=("--timeout", "60s")
    )
    project.wait_for_output("saving")
    record = check_polite_end(project, process, "deadline")
    expected = {"epoch": 0, "step": 2} if inside else {"epoch": 1, "step": None}
    last = [event for event in project.events() if event["kind"] == "checkpoint"][-1]
    assert record["checkpoint"]["step"] == last["step"] == expected["step"]
    output = project.grd("logs", "last").out
    assert output.splitlines().count("saving") == 1, "what was saved is saved"
    steps = [line for line in output.splitlines() if line.startswith("step ")]
    assert len(steps) == 2, "no further step has begun"
    resumed = project.grd("resume", "last", "--timeout", "5m", "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["metrics"]["steps"] == (32 if inside else 4)


def test_a_killed_runners_guardian_gives_the_training_its_grace(project: Project) -> None:
    process = start(project, *training())
    project.wait_for_output("the step begins")
    os.kill(int(project.record()["runner"]["pid"]), signal.SIGKILL)
    project.finish(process)
    check_resume(project, 1)  # resume waits for the guardian
    assert len(saves(project, 1)) == 1
    first = project.record()["attempts"][0]
    assert (first["state"], first["cause"]) == ("interrupted", "runner_lost")


# --- a loop of its own ------------------------------------------------------------------------


@pytest.mark.parametrize("watches", [True, False], ids=["a handler of another cell", "no handler of signals"])
def test_a_bare_save_is_not_cut_by_the_stop_nor_by_its_last_call(project: Project, watches: bool) -> None:
    made = f"handler = CheckpointHandler(checkpoint_dir, install_signal_handlers={watches})"
    made += "\nhandler.save_checkpoint(0)"
    save = "model.steps = 2\nhandler.save_checkpoint(2, model)\nprint('the save is over', flush=True)"
    process = start(
        project, MODEL, "model = Model(until=stopping)", made, save + "\ntime.sleep(600 * (not resume))",
        options=("--grace", "16s"),
    )  # fmt: skip
    project.wait_for_output("saving")
    stop_by(project, "SIGTERM to everyone")
    ended = project.finish(process)
    assert ended.code == 75, ended.err
    assert len(saves(project, 2)) == 1
    killed = project.record()["attempts"][-1]["stop"]["killed"]
    assert killed is watches, "a handler that nobody asks is a stop that nobody takes"
    wait_until(lambda: project.processes() == [], "the end of every process of the run", 4)


CLEANING = {
    "finally": "try:\n    {step}\nfinally:\n    save()",
    "except": "try:\n    {step}\nexcept KeyboardInterrupt:\n    save()\n    raise",
    "after an except": "try:\n    {step}\nexcept KeyboardInterrupt:\n    pass\nsave()",
}
SAVE = """
import os, time
def save(until=lambda: True):
    print("saving", flush=True)
    begun = time.monotonic()
    while time.monotonic() < begun + 8 or not until():
        time.sleep(0.1)
    open("saved", "w").close()
"""


@pytest.mark.parametrize(
    ("cleaning", "who"),
    [
        ("finally", "SIGTERM to everyone"),
        ("finally", "SIGINT to everyone"),
        ("except", "SIGTERM to everyone"),
        ("after an except", "SIGTERM to everyone"),
    ],
)
def test_what_a_plain_notebook_does_when_interrupted_may_take_its_time(
    project: Project, cleaning: str, who: str
) -> None:
    cell = CLEANING[cleaning].replace("{step}", "print('here', flush=True); time.sleep(600)")
    process = start(project, SAVE, cell)
    project.wait_for_output("here")
    stop_by(project, who)
    check_polite_end(project, process, CAUSES[who])
    assert (project.path / "saved").exists()


def test_the_last_call_does_not_spoil_a_finally_that_fits(project: Project) -> None:
    until = "lambda: '\"interrupt\"' in open(os.environ['GRD_EVENTS']).read()"
    cell = f"try:\n    print('here', flush=True); time.sleep(600)\nfinally:\n    save({until})"
    process = start(project, SAVE, cell, options=("--grace", "16s"))
    project.wait_for_output("here")
    stop_by(project, "SIGTERM")
    check_polite_end(project, process, "sigterm", slow_exit=True)
    assert (project.path / "saved").exists()


WAIT = "while thread.is_alive():\n    time.sleep(0.1)"
"""Not join(): a KeyboardInterrupt in that makes Python 3.11 forget the thread."""


@pytest.mark.parametrize("kind", ["thread", "daemon thread that saves a checkpoint"])
def test_a_save_in_a_thread_goes_on_while_its_cell_is_interrupted(project: Project, kind: str) -> None:
    made = "threading.Thread(target=save)"
    if kind != "thread":
        made = (
            "threading.Thread(target=lambda: handler.save_checkpoint(2, model), daemon=True)\n"
            "handler = CheckpointHandler(checkpoint_dir, install_signal_handlers=False)\n"
            "handler.save_checkpoint(0)\n"
            "model.steps = 2"
        )
    cell = f"import threading\nthread = {made}\nthread.start()\n{WAIT}"
    process = start(project, MODEL, "model = Model()", SAVE, cell)
    project.wait_for_output("saving")
    stop_by(project, "SIGTERM")
    check_polite_end(project, process, "sigterm")
    if kind == "thread":
        assert (project.path / "saved").exists()
    else:
        assert len(saves(project, 2)) == 1


def test_a_thread_that_does_not_end_is_killed_with_the_grace_and_that_is_said(project: Project) -> None:
    cell = "import threading\nthread = threading.Thread(target=time.sleep, args=(600,))\nthread.start()\n"
    process = start(project, SAVE, cell + "print('here', flush=True)\n" + WAIT, options=("--grace", "6s"))
    project.wait_for_output("here")
    stop_by(project, "SIGTERM")
    ended = project.finish(process)
    record = project.record()
    assert (ended.code, record["cause"]) == (75, "sigterm")
    assert "ran out after 6s while the kernel was still ending" in record["detail"]
    assert project.processes() == []


def test_a_killed_runners_guardian_gives_a_finally_its_grace(project: Project) -> None:
    cell = CLEANING["finally"].replace("{step}", "print('here', flush=True); time.sleep(600)")
    process = start(project, SAVE, cell)
    project.wait_for_output("here")
    os.kill(int(project.record()["runner"]["pid"]), signal.SIGKILL)
    project.finish(process)
    wait_until((project.path / "saved").exists, "the end of the cell's finally")
    wait_until(lambda: project.processes() == [], "the kernel's own end", 10)


# --- papermill --------------------------------------------------------------------------------


def papermill(
    project: Project, *cells: str, **environment: str
) -> tuple[subprocess.Popen[str], Callable[[], Any]]:
    project.notebook(
        "in.ipynb", *cells, "print('the last cell')", parameters="checkpoint_dir = 'c'\nresume = False"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "papermill", "--engine", "grd", "in.ipynb", "out.ipynb"],
        cwd=project.path, env={**project.environment, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    project.started.append(process)
    journal = project.path / ".out.ipynb.grd-journal.jsonl"

    def wait_for(text: str) -> None:
        wait_until(lambda: journal.exists() and text in journal.read_text(), f"output {text!r}")

    return process, wait_for


def test_papermills_users_get_the_grace_for_a_finally_and_for_a_training(project: Project) -> None:
    cell = f"try:\n{textwrap.indent(training()[2], '    ')}\nfinally:\n    open('closed', 'w').close()"
    process, wait_for = papermill(project, *training()[:2], cell)
    wait_for("the step begins")
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 1 and "interrupted (sigterm)" in err, err
    assert time.monotonic() - begun > 17 and "grace period" not in err
    assert (project.path / "closed").exists()
    assert (project.path / "c" / "checkpoint_epoch_1.pt").exists()
    notebook = nbformat.read(project.path / "out.ipynb", as_version=4)
    statuses = [cell.metadata.papermill.status for cell in notebook.cells]
    assert statuses[-2:] == ["interrupted", "pending"]


def test_papermills_users_hear_that_the_grace_was_too_short(project: Project) -> None:
    cell = CLEANING["finally"].replace("{step}", "print('here', flush=True); time.sleep(600)")
    process, wait_for = papermill(project, SAVE, cell, GRD_GRACE="3s")
    wait_for("here")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 1
    assert "the grace period ran out after 3s and the kernel was killed" in err and "GRD_GRACE" in err
    assert not (project.path / "saved").exists()


NEVER_FLUSHED = """
import sys, threading, time
kernel = get_ipython().kernel
answer = kernel.control_handlers["shutdown_request"]

async def answer_and_lose_the_thread(*request):
    # as when the main thread ends it between the answer and the flush
    await answer(*request)
    sender = sys.stdout.pub_thread
    LOSE

if not resume:
    kernel.control_handlers["shutdown_request"] = answer_and_lose_the_thread
    print("the step begins", flush=True)
    while True:
        time.sleep(0.1)
"""
LOST = {
    "asked in vain": "sender.schedule = lambda call: None",
    "never asked, for the question blocks": (
        "sender.io_loop.add_callback(sender.io_loop.stop)\n"
        "    sender.thread.join()\n"  # which closes the end of the pipe that hears
        "    sender.thread = threading.Thread(target=time.sleep, args=(2,))\n"
        "    sender.thread.start()  # ended a moment too late to be seen"
    ),
}


@pytest.mark.parametrize("lost", LOST)
def test_a_kernel_whose_last_flush_nobody_answers_still_ends_within_the_grace(
    project: Project, lost: str
) -> None:
    """ipykernel waits 10 s for that, or for ever."""
    process = start(project, NEVER_FLUSHED.replace("LOSE", LOST[lost]), options=("--grace", "8s"))
    project.wait_for_output("the step begins")
    stop_by(project, "SIGTERM")
    check_polite_end(project, process, "sigterm")
    assert "IOStream.flush" not in (project.only_run() / "attempts/1/runner.log").read_text()


HANG = """
def hang():
    open("between", "w").close()
    while True:
        time.sleep(0.05)
"""
BETWEEN = {
    "the handler, which leaves the kernel idle": """
async def not_yet(*request):
    hang()

kernel.shell_handlers["execute_request"] = not_yet
""",
    "the loop, which ends the kernel": """
prepare = kernel.pre_handler_hook

def not_yet():
    kernel.pre_handler_hook = prepare
    prepare()
    hang()

kernel.pre_handler_hook = not_yet
""",
}


@pytest.mark.parametrize("reaches", BETWEEN)
def test_a_cell_that_the_interrupt_took_from_the_kernel_is_not_waited_for(
    project: Project, reaches: str
) -> None:
    """An interrupt between a request's arrival and its cell: ipykernel drops the request without a reply."""
    spoil = f"import time\nkernel = get_ipython().kernel\n{HANG}{BETWEEN[reaches]}"
    spoil = f"if not resume:\n{textwrap.indent(spoil, '    ')}"
    process = start(project, spoil, "print('never reached')", "print('nor this')")
    wait_until((project.path / "between").exists, "the request", LIMIT_SECONDS)
    stop_by(project, "SIGTERM")
    record = check_polite_end(project, process, "sigterm", slow_exit=True)
    ended = "while stopping, the kernel died: exit code 0" if "ends the kernel" in reaches else None
    assert record["detail"] == ended
    assert [action["action"] for action in record["attempts"][-1]["stop"]["actions"]] == ["terminate"]
    notebook = nbformat.read(project.only_run() / "output.ipynb", as_version=4)
    statuses = [cell.metadata.papermill.status for cell in notebook.cells if cell.cell_type == "code"]
    assert statuses[-3:] == ["interrupted", "pending", "pending"]
    resumed = project.grd("resume", "last", "--timeout", "5m", "--json")
    assert (resumed.code, resumed.json["state"]) == (0, "completed"), resumed.err


def test_a_cell_that_the_kernel_aborts_is_interrupted_and_not_completed(project: Project) -> None:
    """ipykernel answers so for a moment after an interrupt."""
    process = start(project, "if not resume:\n    get_ipython().kernel._aborting = True", "print('aborted')")
    ended = project.finish(process)
    record = project.record()
    assert (ended.code, record["state"], record["cause"]) == (75, "interrupted", "sigint"), record
    assert "the kernel aborted the cell" in record["detail"]
    resumed = project.grd("resume", "last", "--timeout", "5m", "--json")
    assert (resumed.code, resumed.json["state"]) == (0, "completed"), resumed.err
