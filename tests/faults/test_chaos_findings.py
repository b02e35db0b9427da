"""What chaos found, each made certain: the moment that a random kill met is brought about on purpose."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from conftest import Project, wait_until

from grd.files import JsonLines, read_json_lines

pytestmark = pytest.mark.faults

PARAMETERS = "timeout = None\ncheckpoint_dir = ''\nresume = False"

HEADLESS = """
import ctypes, platform, subprocess, threading, time
child = subprocess.Popen(["sleep", "600"], start_new_session=True, env={})
threading.Thread(target=time.sleep, args=(600,)).start()
print(child.pid, flush=True)
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)  # the main thread alone ends
"""
"""A process that looks like a zombie though one of its threads lives, as every multi-threaded process does
for a moment while it is being killed; and its child."""


def a_headless_process(project: Project) -> list[psutil.Process]:
    """Runner, guardian, watcher, kernel of a run; then a process without its main thread, and its child."""
    starting = f"""
import subprocess, sys, time
headless = subprocess.Popen([sys.executable, '-c', {HEADLESS!r}], stdout=subprocess.PIPE, text=True)
child = headless.stdout.readline().strip()
print('pids', headless.pid, child, flush=True)
time.sleep(600)
"""
    project.notebook("run.ipynb", starting, parameters=PARAMETERS)
    started = project.grd("research", "run.ipynb", "--detach", "--timeout", "10m", "--grace", "3s")
    assert started.code == 0, started.err
    project.wait_for_output("pids ")
    pids = project.grd("logs", "last").out.split()[1:3]
    record = project.record()
    found = [
        record["runner"]["pid"],
        *(record["processes"][n]["pid"] for n in ("guardian", "watcher", "kernel")),
    ]
    headless, child = (psutil.Process(int(pid)) for pid in pids)
    wait_until(lambda: headless.status() == psutil.STATUS_ZOMBIE, "the end of the main thread")
    assert threads(headless) > 1
    assert child.ppid() == headless.pid
    return [*map(psutil.Process, found), headless, child]


def threads(process: psutil.Process) -> int:
    return len(list(Path(f"/proc/{process.pid}/task").iterdir()))


def has_ended(process: psutil.Process) -> bool:
    """Whether no thread of it is left."""
    if not process.is_running():
        return True
    try:
        return process.status() == psutil.STATUS_ZOMBIE and threads(process) < 2
    except (psutil.NoSuchProcess, FileNotFoundError):
        return True


@pytest.mark.parametrize("killed", [("kernel",), ("runner",), ("guardian",), ("runner", "guardian")])
def test_a_process_without_its_main_thread_is_not_taken_for_dead(
    project: Project, killed: tuple[str, ...]
) -> None:
    runner, guardian, _, kernel, headless, child = a_headless_process(project)
    for name in killed:
        {"runner": runner, "guardian": guardian, "kernel": kernel}[name].send_signal(signal.SIGKILL)
    wait_until(lambda: has_ended(child), "the end of the child", 30)
    wait_until(lambda: has_ended(headless), "the end of the process without main thread", 30)


def test_the_next_look_reaps_a_process_without_its_main_thread(project: Project) -> None:
    *everybody, headless, child = a_headless_process(project)
    for process in everybody:
        process.send_signal(signal.SIGKILL)
    for process in everybody:
        wait_until(lambda process=process: has_ended(process), "the end of those killed", 30)  # type: ignore[misc]
    assert not has_ended(headless)
    assert project.grd("status", "last", "--json").json["cause"] == "runner_lost"
    wait_until(lambda: has_ended(headless) and has_ended(child), "the end of what was left", 5)


def test_a_resume_that_was_killed_before_its_runner_began_blames_no_other_runner(project: Project) -> None:
    project.notebook("run.ipynb", "import time\nprint('here', flush=True)\ntime.sleep(0 if resume else 600)",
                     parameters=PARAMETERS)  # fmt: skip
    assert project.grd("research", "run.ipynb", "--detach", "--timeout", "10m").code == 0
    project.wait_for_output("here")
    first = project.record()["runner"]["pid"]
    assert project.grd("stop", "last", "--now").code == 0
    resume = project.start("resume", "last")
    wait_until(lambda: project.record()["attempt"] == 2, "the second attempt")
    assert project.record()["state"] == "queued", "the machine is too quick to be met"
    runners = [p for p in psutil.process_iter() if str(project.only_run()) in " ".join(cmdline(p))]
    for process in (psutil.Process(resume.pid), *runners):
        process.kill()
    shown = project.grd("status", "last", "--json").json
    assert (shown["state"], shown["cause"], shown["attempt"]) == ("interrupted", "runner_lost", 2)
    assert str(first) not in shown["detail"], "it is the runner of attempt 1"
    assert shown["runner"] is None
    assert project.grd("resume", "last").code == 0


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_resume_and_gc_remove_what_killed_writers_left_half_written(project: Project) -> None:
    project.notebook("run.ipynb", "1", parameters=PARAMETERS)
    assert project.grd("research", "run.ipynb").code == 0
    run = project.only_run()
    names = [".run.json.a1b2c3d4.tmp", ".events.digest.json.a1b2c3d4.tmp", ".output.4711.tmp"]
    left = [run / name for name in names] + [run / "attempts/1/.output.ipynb.a1b2c3d4.tmp"]
    asked = run / ".stop.a1b2c3d4.tmp"
    page = project.path / ".planning" / ".STATE.md.a1b2c3d4.tmp"

    def leave() -> None:
        for path in (*left, asked, page):
            path.write_text("{")

    leave()
    assert project.grd("gc").code == 0
    assert [path for path in left if path.exists()] == []
    leave()
    assert asked.exists(), "somebody may be asking just now"
    assert project.grd("resume", "last", "--notebook", edited(project)).code == 0
    assert [path for path in (*left, page) if path.exists()] == []
    os.utime(asked, (0, 0))
    assert project.grd("gc").code == 0
    assert not asked.exists()


def edited(project: Project) -> Path:
    return project.notebook("edited.ipynb", "2", parameters=PARAMETERS)


def test_a_line_is_not_written_onto_what_another_killed_writer_left_of_its_own(tmp_path: Path) -> None:
    runner, kernel = JsonLines(tmp_path / "events.jsonl"), JsonLines(tmp_path / "events.jsonl")
    kernel.append({"kind": "progress"})
    with open(kernel.path, "ab") as torn:
        torn.write(b'{"kind": "metr')  # SIGKILL in the middle of a write
    runner.append({"kind": "state"})
    runner.append_bytes(b'{"kind": "last"}\n')
    assert [event["kind"] for _, event in read_json_lines(runner.path)] == ["progress", "state", "last"]


SAVES_FOR_EVER = """
import os, time
from grd.experiment import CheckpointHandler
handler = CheckpointHandler(checkpoint_dir)
handler.save_checkpoint(0, {"w": [1.0]})
def never(descriptor):
    print("half-written", flush=True)
    time.sleep(600)
os.fsync = never
handler.save_checkpoint(1, {"w": [2.0]})
"""


@pytest.mark.parametrize("killed", [("kernel",), ("kernel", "runner")], ids="+".join)
def test_a_checkpoint_that_a_killed_kernel_left_half_written_is_swept_at_the_end(
    project: Project, killed: tuple[str, ...]
) -> None:
    project.notebook("run.ipynb", SAVES_FOR_EVER, parameters=PARAMETERS)
    assert project.grd("research", "run.ipynb", "--detach", "--timeout", "10m", "--grace", "3s").code == 0
    project.wait_for_output("half-written")
    record, folder = project.record(), project.only_run() / "checkpoints"
    assert len(list(folder.glob(".*.tmp"))) == 1
    for role in reversed(killed):  # the runner first: it must not see the kernel's end
        pid = record["runner"]["pid"] if role == "runner" else record["processes"][role]["pid"]
        os.kill(pid, signal.SIGKILL)
    assert project.grd("wait", "last").code == 75
    wait_until(
        lambda: project.grd("status", "last", "--json").json["processes"] == {}, "the end of the guardian"
    )
    assert sorted(path.name for path in folder.glob("*.pt")) == [
        "checkpoint_epoch_0.pt",
        "checkpoint_latest.pt",
    ]
    assert not list(folder.glob(".*.tmp"))
