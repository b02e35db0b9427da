"""Faults: what strikes a run, and what its record must call it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from conftest import Project, cannot_be_had, has_ended, wait_until
from disks import Disk, FullDisk, GoneReadOnly, Quota

Follower = subprocess.Popen[str]
Strike = Callable[[Project, Follower], None]

DEADLINE_SECONDS = 20
"""Far enough away that a busy machine has reached the moment before."""


def _runner(project: Project) -> int:
    return int(project.record()["runner"]["pid"])


def _kernel(project: Project) -> int:
    return int(project.record()["kernel_pid"])


def to_runner(signum: int) -> Strike:
    return lambda project, follower: os.kill(_runner(project), signum)


def to_kernel(signum: int) -> Strike:
    return lambda project, follower: os.kill(_kernel(project), signum)


def to_follower(signum: int) -> Strike:
    return lambda project, follower: follower.send_signal(signum)


def to_everyone(signum: int, *, with_follower: bool = True) -> Strike:
    """As scancel, systemd and docker stop do."""

    def send(project: Project, follower: Follower) -> None:
        tree = [follower.pid, _runner(project)] if with_follower else [_runner(project)]
        tree += [child.pid for child in psutil.Process(_runner(project)).children(recursive=True)]
        for pid in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    return send


def twice(signum: int) -> Strike:
    """The second comes while the first stop is under way; it must not spoil the saving."""

    def send(project: Project, follower: Follower) -> None:
        runner = _runner(project)
        os.kill(runner, signum)
        project.wait_for_event("stop", stage=0)
        with contextlib.suppress(ProcessLookupError):
            os.kill(runner, signum)

    return send


def again_while_stopping(first: int, second: int) -> Strike:
    """Another signal, to every process, while the first stop is under way."""

    def send(project: Project, follower: Follower) -> None:
        os.kill(_runner(project), first)
        project.wait_for_event("stop", stage=0)
        with contextlib.suppress(psutil.NoSuchProcess):
            to_everyone(second, with_follower=False)(project, follower)

    return send


def hang_up(project: Project, follower: Follower) -> None:
    """The terminal is closed: the command ends, the run does not, until somebody asks."""
    follower.send_signal(signal.SIGHUP)
    follower.wait(60)
    assert project.grd("status", "last", "--json").json["state"] == "running"
    assert project.grd("stop", "last").code == 0


def tell_the_kernel(what: str) -> Strike:
    return lambda project, follower: (project.path / f"do-{what}").touch()


def stop_the_runner_beyond_the_deadline(project: Project, follower: Follower) -> None:
    """SIGSTOP; the guardian has to keep the deadline in its place."""
    runner, kernel = _runner(project), psutil.Process(_kernel(project))
    os.kill(runner, signal.SIGSTOP)
    try:
        wait_until(lambda: has_ended(kernel), "the kernel's end")
    finally:
        os.kill(runner, signal.SIGCONT)


def wait_for_the_deadline(project: Project, follower: Follower) -> None:
    project.wait_for_event("stop", stage=0)


def delete_the_run(project: Project, follower: Follower) -> None:
    run = project.only_run()
    while run.exists():  # what is being written meanwhile may be missed, or may vanish by itself
        shutil.rmtree(run, ignore_errors=True)


def clock_environment(project: Project) -> dict[str, str]:
    """For processes whose wall clock a test can set; their monotonic clock stays what it is."""
    library, setting = project.path / "wall_clock.so", project.path / "clock"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        cannot_be_had("setting the wall clock of a run's processes takes a C compiler")
    source = Path(__file__).with_name("wall_clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    setting.write_text("0")
    return {"LD_PRELOAD": str(library), "GRD_TEST_CLOCK": str(setting)}


def set_the_clock_back(project: Project, follower: Follower) -> None:
    """By an hour, for every process of the run."""
    (project.path / "clock").write_text("-3600")
    wait_for_the_deadline(project, follower)


@dataclass(frozen=True)
class Fault:
    """What strikes, and the end that must be recorded."""

    strike: Strike
    cause: str
    timeout: str = "5m"
    state: str = "interrupted"
    kernel_alone: bool = False
    """Only the kernel is hit: before its first cell that is a start that failed."""
    disk: type[Disk] | None = None
    memory_limit: bool = False
    clock: bool = False
    record_is_gone: bool = False


UNTIL_THE_DEADLINE = f"{DEADLINE_SECONDS}s"

FAULTS = {
    "kernel SIGKILL": Fault(to_kernel(signal.SIGKILL), "kernel_died", kernel_alone=True),
    "kernel SIGSEGV": Fault(to_kernel(signal.SIGSEGV), "kernel_died", kernel_alone=True),
    "kernel os._exit": Fault(tell_the_kernel("exit"), "kernel_died", kernel_alone=True),
    "MemoryError": Fault(tell_the_kernel("memory"), "notebook_error", state="failed"),
    "out of memory": Fault(
        tell_the_kernel("allocate"), "out_of_memory", kernel_alone=True, memory_limit=True
    ),
    "runner SIGTERM": Fault(to_runner(signal.SIGTERM), "sigterm"),
    "runner SIGINT": Fault(to_runner(signal.SIGINT), "sigint"),
    "runner SIGHUP": Fault(to_runner(signal.SIGHUP), "sighup"),
    "runner SIGUSR1": Fault(to_runner(signal.SIGUSR1), "preempted"),
    "runner SIGUSR2": Fault(to_runner(signal.SIGUSR2), "preempted"),
    "runner SIGKILL": Fault(to_runner(signal.SIGKILL), "runner_lost"),
    "runner SIGSTOP": Fault(stop_the_runner_beyond_the_deadline, "deadline", UNTIL_THE_DEADLINE),
    "everyone SIGTERM": Fault(to_everyone(signal.SIGTERM), "sigterm"),
    "deadline": Fault(wait_for_the_deadline, "deadline", UNTIL_THE_DEADLINE),
    "disk full": Fault(lambda project, follower: None, "disk_full", disk=FullDisk),
    "quota": Fault(lambda project, follower: None, "disk_full", disk=Quota),
    "read-only": Fault(lambda project, follower: None, "storage", disk=GoneReadOnly),
    "run deleted": Fault(delete_the_run, "storage", record_is_gone=True),
    "clock set back": Fault(set_the_clock_back, "deadline", UNTIL_THE_DEADLINE, clock=True),
}
"""Struck at every moment."""

SIGNALS = {
    "runner SIGTERM twice": Fault(twice(signal.SIGTERM), "sigterm"),
    "runner SIGINT twice": Fault(twice(signal.SIGINT), "sigint"),
    "runner SIGHUP twice": Fault(twice(signal.SIGHUP), "sighup"),
    "runner SIGUSR1 twice": Fault(twice(signal.SIGUSR1), "preempted"),
    "runner SIGUSR2 twice": Fault(twice(signal.SIGUSR2), "preempted"),
    "follower SIGTERM": Fault(to_follower(signal.SIGTERM), "sigterm"),
    "follower SIGINT": Fault(to_follower(signal.SIGINT), "sigint"),
    "follower SIGHUP, then stop": Fault(hang_up, "stopped"),
    "everyone SIGINT": Fault(to_everyone(signal.SIGINT), "sigint"),
    "everyone SIGHUP": Fault(to_everyone(signal.SIGHUP, with_follower=False), "sighup"),
    "everyone SIGUSR1": Fault(to_everyone(signal.SIGUSR1, with_follower=False), "preempted"),
    "everyone SIGUSR2": Fault(to_everyone(signal.SIGUSR2, with_follower=False), "preempted"),
    "everyone SIGTERM during a stop": Fault(
        again_while_stopping(signal.SIGUSR1, signal.SIGTERM), "preempted"
    ),
    "everyone SIGINT during a stop": Fault(again_while_stopping(signal.SIGTERM, signal.SIGINT), "sigterm"),
    "everyone SIGUSR1 during a stop": Fault(again_while_stopping(signal.SIGTERM, signal.SIGUSR1), "sigterm"),
    "everyone SIGUSR2 during a stop": Fault(again_while_stopping(signal.SIGHUP, signal.SIGUSR2), "sighup"),
    "everyone SIGHUP during a stop": Fault(again_while_stopping(signal.SIGTERM, signal.SIGHUP), "sigterm"),
}
"""What differs is the signal, not the cell: struck in a training, and where it is one more than a signal."""


def now() -> float:
    """CLOCK_MONOTONIC, that of the notebook too."""
    return time.monotonic()
