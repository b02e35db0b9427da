"""Moments: what a run is doing when a fault strikes, and how a test knows that it is.

A notebook says what it says twice: as output, and into the file ``said`` with the time of CLOCK_MONOTONIC, so
that a test can tell which outputs were older than 2 s. With ``resume`` every cell is over at once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from conftest import Project, wait_until

SAVED_WITHIN_SECONDS = 2.0
"""Output that is older is on disk, whatever happens."""

PARAMETERS = "timeout = None\ncheckpoint_dir = ''\nresume = False"

STARTUP = """
import os, sys, threading, time

def _obey():
    held = []
    while True:
        if os.path.exists('do-exit'):
            os._exit(7)
        if os.path.exists('do-allocate'):
            held.append(bytearray(os.urandom(1024)) * 8192)
        else:
            time.sleep(0.02)

threading.Thread(target=_obey, daemon=True).start()
while os.path.exists('hold-start'):
    time.sleep(0.02)
"""
"""Of every kernel: waits while ``hold-start`` exists, exits or takes all memory once told to."""

SETUP = """
import os, subprocess, sys, time

def say(text):
    print(text, flush=True)
    with open('said', 'a') as file:
        file.write(f'{time.monotonic()!r} {text}\\n')

def obey():
    if os.path.exists('do-memory'):
        bytearray(2**60)

if not resume:
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)
    with open('children', 'a') as file:
        file.write(f'{child.pid}\\n')
"""

SILENT = """
say('here')
while not resume:
    obey()
    time.sleep(0.02)
"""
PRINTING = """
say('here')
n = 0
while not resume and n < 10**7:
    n += 1
    print('line', n, flush=n % 50 == 0)
    if n % 200 == 0:
        say(f'line {n} is out')
        obey()
        time.sleep(0.01)
"""
MUCH_OUTPUT = """
say('here')
n = 0
while not resume:
    n += 1
    print('x' * 500_000, flush=True)
    say(f'block {n}')
    obey()
    time.sleep(0.02 if n < 12 else 0.2)
"""
HOLDING_THE_GIL = """
import ctypes
say('here')
if not resume:
    time.sleep(0.5)  # the kernel's own threads cannot send what was printed while the GIL is held
    open('holding', 'w').close()
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)
"""
"""A thread that waits for itself in C: no signal ends that, as it would end a sleep."""

SWALLOWING = """
say('here')
while not resume:
    try:
        time.sleep(1)
    except KeyboardInterrupt:
        pass
"""
TRAINING = """
from grd.experiment import training
last = 8 if resume else 5000
for epoch in training.epochs(last, state={}, checkpoint_dir=checkpoint_dir, resume=resume):
    time.sleep(0.05 if resume else 0.5)
    if resume and int(epoch) + 1 >= last:
        epoch.stop_early()
    say('here')
    epoch.log(value=float(epoch))
"""
SAVING = """
import random
from grd.experiment import training

class Told:
    def state_dict(self):
        obey()
        return {}
    def load_state_dict(self, state):
        pass

size = int(os.environ.get('CHECKPOINT_BYTES', '60_000_000'))
state = {'blob': random.Random(0).randbytes(size), 'seen': 0, 'told': Told()}
last = 5 if resume else 5000
for epoch in training.epochs(last, state=state, checkpoint_dir=checkpoint_dir, resume=resume, every=1):
    state['seen'] += 1
    if resume and int(epoch) + 1 >= last:
        epoch.stop_early()
    say('here' if epoch == 0 else f'epoch {int(epoch)}')
"""
CLEANING_UP = """
say('here')
if not resume:
    try:
        while True:
            obey()
            time.sleep(0.02)
    finally:
        say('cleaning up')
        open('cleaning', 'w').close()
        while not os.path.exists('struck'):
            obey()
            time.sleep(0.02)
        say('cleaned up')
"""


def the_kernel_is_starting(project: Project) -> None:
    wait_until(lambda: project.record()["kernel_pid"], "the kernel's pid")


def a_cell_prints(project: Project) -> None:
    """And has done so for long enough that the fault must not lose it."""
    project.wait_for_output("here")
    wait_until(
        lambda: "here" in said_before(project, time.monotonic() - SAVED_WITHIN_SECONDS), "older output"
    )


def the_gil_is_held(project: Project) -> None:
    a_cell_prints(project)
    wait_until((project.path / "holding").exists, "the cell to hold the GIL")


def much_output_is_being_saved(project: Project) -> None:
    a_cell_prints(project)
    attempt = project.only_run() / "attempts" / "1"

    def saving() -> bool:
        names = [path.name for path in attempt.iterdir()]
        return any(name.startswith(".output.ipynb.") for name in names) and _size(attempt) > 5_000_000

    wait_until(saving, "a snapshot of 5 MB to be written", pause=0.001)


def _size(attempt: Path) -> int:
    with contextlib.suppress(OSError):
        return (attempt / "output.ipynb").stat().st_size + (attempt / "journal.jsonl").stat().st_size
    return 0


def a_checkpoint_is_being_written(project: Project) -> None:
    a_cell_prints(project)

    def temporary() -> bool:
        with contextlib.suppress(OSError):
            names = [path.name for path in (project.only_run() / "checkpoints").iterdir()]
            return any(name.startswith(".") for name in names) and any("checkpoint_epoch" in n for n in names)
        return False

    wait_until(temporary, "a checkpoint's temporary file", pause=0.001)


def the_cell_cleans_up(project: Project) -> None:
    a_cell_prints(project)
    project.start("stop", "last")
    wait_until((project.path / "cleaning").exists, "the cell's cleanup after a stop request")


@dataclass(frozen=True)
class Moment:
    """A cell that lasts until it is resumed, and the wait for what it is to be struck in."""

    cell: str
    reached: Callable[[Project], None]
    grace: str = "8s"
    held_at_start: bool = False


BEFORE_THE_FIRST_CELL = "before the first cell"
CLEANUP = "cleanup"

MOMENTS = {
    BEFORE_THE_FIRST_CELL: Moment(SILENT, the_kernel_is_starting, held_at_start=True),
    "silent cell": Moment(SILENT, a_cell_prints),
    "printing cell": Moment(PRINTING, a_cell_prints),
    "5 MB of output being saved": Moment(MUCH_OUTPUT, much_output_is_being_saved),
    "checkpoint being saved": Moment(SAVING, a_checkpoint_is_being_written),
    CLEANUP: Moment(CLEANING_UP, the_cell_cleans_up, grace="20s"),
    "training": Moment(TRAINING, a_cell_prints),
    "cell holding the GIL": Moment(HOLDING_THE_GIL, the_gil_is_held),
    "cell swallowing interrupts": Moment(SWALLOWING, a_cell_prints),
}


def prepare(project: Project, name: str) -> None:
    """Write the notebook of a moment, and what its kernel obeys, into ``project``."""
    moment = MOMENTS[name]
    startup = Path(project.environment["IPYTHONDIR"]) / "profile_default" / "startup"
    startup.mkdir(parents=True, exist_ok=True)
    (startup / "00-obey.py").write_text(STARTUP)
    if moment.held_at_start:
        (project.path / "hold-start").touch()
    project.notebook("run.ipynb", SETUP, moment.cell, "print('the end')", parameters=PARAMETERS)


def release(project: Project) -> None:
    """Let what waited for the fault go on."""
    (project.path / "struck").touch()
    (project.path / "hold-start").unlink(missing_ok=True)


def said_before(project: Project, moment: float) -> list[str]:
    """What the notebook had said by then (CLOCK_MONOTONIC seconds)."""
    path = project.path / "said"
    if not path.exists():
        return []
    pairs = [line.split(" ", 1) for line in path.read_text().splitlines()]
    return [text for time, text in pairs if float(time) <= moment]


def children(project: Project) -> list[psutil.Process]:
    """What the notebook has started, in sessions of their own."""
    path = project.path / "children"
    found = []
    for pid in path.read_text().split() if path.exists() else []:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(int(pid)))
    return found
