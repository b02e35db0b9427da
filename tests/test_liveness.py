""" "running" is only ever said of a runner that lives, wherever it lives and whatever became of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import LIMIT_SECONDS, Project, cannot_be_had, wait_until

from grd.runs.folder import RunFolder
from grd.runs.liveness import LEASE_SECONDS
from grd.runs.recovery import current_record

SLEEP = "import time\nprint('here', flush=True)\nif not resume:\n    time.sleep(600)"
PARAMETERS = "timeout = None\ncheckpoint_dir = ''\nresume = False"

NO_FLOCK = """
import errno, fcntl
def flock(fd, operation):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
"""


@pytest.fixture
def running(project: Project) -> Project:
    project.notebook("sleep.ipynb", SLEEP, parameters=PARAMETERS)
    assert project.grd("research", "sleep.ipynb", "--detach", "--timeout", "10m").code == 0
    project.wait_for_output("here")
    return project


def rewrite(project: Project, **changes: Any) -> None:
    path = project.only_run() / "run.json"
    record = json.loads(path.read_text())
    record["runner"].update(changes)
    path.write_text(json.dumps(record))


def kill_runner(project: Project) -> None:
    runner = int(project.record()["runner"]["pid"])
    os.kill(runner, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{runner}").exists(), "the runner's end")


def status(project: Project) -> dict[str, Any]:
    shown: dict[str, Any] = project.grd("status", "last", "--json").json
    return shown


@pytest.mark.parametrize("closed", ["<&-", "<&- >&- 2>&-"])
def test_whoever_closes_the_streams_has_a_run_with_its_lock_all_the_same(
    project: Project, closed: str
) -> None:
    project.notebook("sleep.ipynb", SLEEP, parameters=PARAMETERS)
    command = [sys.executable, "-m", "grd", "research", "sleep.ipynb", "--detach", "--timeout", "10m"]
    started = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *command],
        cwd=project.path, env=project.environment, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert started.returncode == 0
    project.wait_for_output("here")
    shown = status(project)
    assert (shown["state"], shown["cause"]) == ("running", None)
    assert project.grd("resume", "last").code == 69, "one process holds the run's lock"
    assert project.grd("stop", "last").code == 0


def test_a_run_after_a_reboot_is_lost_even_if_its_pid_is_somebody_elses(running: Project) -> None:
    kill_runner(running)
    rewrite(running, boot_id="00000000-another-boot", pid=os.getpid())
    shown = status(running)
    assert (shown["state"], shown["cause"]) == ("interrupted", "host_lost")
    assert running.grd("resume", "last").code == 0


def test_a_run_of_another_host_lives_as_long_as_its_heartbeat(running: Project) -> None:
    kill_runner(running)
    rewrite(running, host="another-host", boot_id="another-boot")
    run = running.only_run()
    assert status(running)["state"] == "running"
    long_ago = time.time() - LEASE_SECONDS - 5
    os.utime(run / "runner.heartbeat", (long_ago, long_ago))
    shown = status(running)
    assert (shown["state"], shown["cause"]) == ("interrupted", "host_lost")


@pytest.mark.faults
def test_without_flock_a_live_runner_is_running_and_a_dead_one_is_not(
    project: Project, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_FLOCK)
    others = os.environ.get("PYTHONPATH")
    project.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tmp_path / "site"), others]))
    project.notebook("sleep.ipynb", SLEEP, parameters=PARAMETERS)
    assert project.grd("research", "sleep.ipynb", "--detach", "--timeout", "10m").code == 0
    project.wait_for_output("here")
    assert status(project)["state"] == "running"
    # A recycled pid: the process lives, but it is not the one that was recorded.
    kill_runner(project)
    sleeper = subprocess.Popen(["sleep", "600"])
    try:
        rewrite(project, pid=sleeper.pid)
        shown = status(project)
        assert (shown["state"], shown["cause"]) == ("interrupted", "runner_lost")
        assert sleeper.poll() is None, "a stranger with the runner's pid was killed"
    finally:
        sleeper.kill()
        sleeper.wait()
    assert project.grd("resume", "last").code == 0


def test_a_folder_that_cannot_be_written_is_reported_truly_and_left_alone(running: Project) -> None:
    kill_runner(running)
    run = running.only_run()
    mounted = subprocess.run(["mount", "--bind", str(run), str(run)], capture_output=True)
    if mounted.returncode != 0:
        cannot_be_had(f"nothing can be mounted here: {mounted.stderr.decode().strip()}")
    subprocess.run(["mount", "-o", "remount,ro,bind", str(run)], check=True)
    try:
        before = (run / "run.json").read_bytes()
        shown = status(running)
        assert (shown["state"], shown["cause"], shown["resumable"]) == ("interrupted", "runner_lost", True)
        assert shown["budget"]["used_seconds"] > 0  # though nobody could write it down
        assert "here" in running.grd("logs", "last").out
        assert (run / "run.json").read_bytes() == before
    finally:
        subprocess.run(["umount", str(run)], check=True)
    assert status(running)["state"] == "interrupted"
    assert running.record()["state"] == "interrupted"


def test_a_stopped_runner_is_said_to_be_silent(running: Project) -> None:
    runner = int(running.record()["runner"]["pid"])
    os.kill(runner, signal.SIGSTOP)
    try:
        stat = Path(f"/proc/{runner}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "the runner to stand still")
        long_ago = time.time() - 100
        os.utime(running.only_run() / "runner.heartbeat", (long_ago, long_ago))
        began = time.monotonic()
        shown = running.grd("status", "last")
        assert time.monotonic() - began < 10
        assert "silent for" in shown.out
        assert status(running)["heartbeat_seconds"] > 50
    finally:
        os.kill(runner, signal.SIGCONT)
    assert running.grd("stop", "last").code == 0


def test_looking_from_many_processes_at_once_recovers_once(running: Project) -> None:
    kill_runner(running)
    wait_until(lambda: running.processes() == [], "the guardian's end: until then a look stores nothing")
    looks = [running.start("status", "last", "--json") for _ in range(6)]
    assert {running.finish(look).json["cause"] for look in looks} == {"runner_lost"}
    ended = [event for event in running.events() if event["kind"] == "state" and event["state"] != "running"]
    assert len(ended) == 1


def test_a_run_whose_start_was_cut_off_is_not_running(project: Project) -> None:
    project.notebook("sleep.ipynb", SLEEP, parameters=PARAMETERS)
    assert project.grd("research", "sleep.ipynb", "--detach").code == 0
    run = project.only_run()
    project.wait_for_output("here")
    kill_runner(project)
    record = json.loads((run / "run.json").read_text())
    record.update(state="queued", runner=None)
    (run / "run.json").write_text(json.dumps(record))
    found = current_record(RunFolder(run))
    assert (found.state, found.cause) == ("interrupted", "runner_lost")
