"""Starting a runner: in its own session, deaf to the caller's terminal, with the run's lock in its hands."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from grd import contract
from grd.errors import RunBusy
from grd.files import LOCKS_UNSUPPORTED, open_lock_file, take_lock
from grd.runs import retry
from grd.runs.folder import RunFolder

LOCK_WAIT_SECONDS = 1.0


class RunnerProcess(Protocol):
    """A runner, for whoever started it: as much of subprocess.Popen as is asked of it."""

    pid: int

    def poll(self) -> int | None:
        """None as long as it lives."""

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended. Raises subprocess.TimeoutExpired."""


class StartRunner(Protocol):
    """How a runner is started: `start_runner`, or what does the same."""

    def __call__(
        self, folder: RunFolder, attempt: int, lock: int, environment: Mapping[str, str] | None = None
    ) -> RunnerProcess:
        """See `start_runner`."""


def acquire(folder: RunFolder) -> int:
    """The run's lock as a descriptor. Raises RunBusy if another process executes this run.

    On a file system without flock the descriptor holds no lock; who lives is then told by the runner's
    identity and its heartbeat.
    """
    try:
        lock = take_lock(folder.lock, wait_seconds=LOCK_WAIT_SECONDS)
    except OSError as error:
        if error.errno not in LOCKS_UNSUPPORTED:
            raise
        lock = open_lock_file(folder.lock)
    if lock is None:
        raise RunBusy(
            f"{folder.run_id} is being executed by another process; see: grd status {folder.run_id}"
        )
    return lock


def ensure_retrier(folder: RunFolder) -> None:
    """Start the process that resumes the run after an interruption, unless it is there. Never raises OSError.

    It gets its lock from here, so that there is no moment in which somebody could take the run for one that
    nobody retries.
    """
    with contextlib.suppress(OSError):
        lock: int | None
        try:
            # Somebody who looks may hold it for a moment.
            lock = take_lock(folder.retry_lock, wait_seconds=0.1)
        except OSError as error:
            if error.errno not in LOCKS_UNSUPPORTED or retry.retrier_lives(folder):
                return
            lock = open_lock_file(folder.retry_lock)
        if lock is None:
            return
        environment = {k: v for k, v in os.environ.items() if k not in contract.KERNEL_ENVIRONMENT}
        environment |= {"PYTHONUNBUFFERED": "1", contract.ENV_NONINTERACTIVE: "1"}
        # By its name: it resumes runs, which is a matter of a higher layer.
        command = [sys.executable, "-P", "-m", "grd.steps.retrier", str(folder.path), str(lock)]
        start_with_lock(command, lock, folder.retry_log, environment, folder.path)


def runner_environment(folder: RunFolder, environment: Mapping[str, str] | None) -> dict[str, str]:
    """This process's variables, those of ``environment``, and what makes a runner of it."""
    variables = {k: v for k, v in os.environ.items() if k not in contract.KERNEL_ENVIRONMENT}
    variables |= environment or {}
    variables["PYTHONUNBUFFERED"] = "1"
    variables[contract.ENV_RUNNER] = folder.run_id
    return variables


def runner_command(*arguments: str) -> list[str]:
    """The command line of a runner: folder, attempt, descriptor of the lock."""
    # -P: a file of the working folder must not shadow a module of ours.
    return [sys.executable, "-P", "-m", "grd.execution.runner", *arguments]


def start_runner(
    folder: RunFolder, attempt: int, lock: int, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start the runner of ``attempt`` and hand it ``lock``, which is closed here.

    ``environment`` has variables for runner and kernel besides those of this process.

    The runner survives the caller and its whole process group. A notebook that starts runs of its own does
    not pass its own identity on: they are runs in their own right.
    """
    paths = folder.attempt(attempt)
    paths.path.mkdir(parents=True, exist_ok=True)
    command = runner_command(str(folder.path), str(attempt), str(lock))
    return start_with_lock(command, lock, paths.log, runner_environment(folder, environment), folder.path)


def start_with_lock(
    command: Sequence[str], lock: int, log: Path, environment: Mapping[str, str], working_dir: Path | str
) -> subprocess.Popen[bytes]:
    """Start a process that survives the caller and its whole process group, and hand it ``lock``.

    ``command`` names the descriptor; here it is closed, also where the process cannot be started. What the
    process says goes into ``log``.
    """
    os.set_inheritable(lock, True)
    try:
        with open(log, "ab") as stream:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(lock,),
                start_new_session=True,
                cwd=working_dir,
            )
    finally:
        os.close(lock)
