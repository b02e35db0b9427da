"""Kernels that do not come up: soon or in time, with what they said, and nothing left alive."""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest
from conftest import LIMIT_SECONDS, Finished, Project, wait_until, write_notebook

import grd
from grd.errors import UsageError
from grd.execution.kernel_start import KernelStartError, last_words, lost_a_port, taken_ports

# A kernel program's body. It has its arguments; what it needs to be told it finds in its folder `here`.
DIES = "print('the licence has run out', file=sys.stderr); sys.exit(3)"
NO_IPYKERNEL = "import ipykernel_that_nobody_has"
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
HANGS = "print('waiting for the licence server', file=sys.stderr, flush=True); time.sleep(600)"
STOPPED = "print('going to sleep', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGSTOP)"
BINDS_AND_IS_SILENT = """
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', here], start_new_session=True)
bound = []
for name in ('shell', 'iopub', 'stdin', 'hb', 'control'):
    bound.append(socket.create_server(('127.0.0.1', json.load(open(sys.argv[1]))[name + '_port'])))
time.sleep(600)
"""
LOSES_A_PORT = """
PORT = None
count = len([name for name in os.listdir(here) if name.startswith('try-')])
open(here + f'/try-{count}', 'w').write(open(sys.argv[1]).read())
port = json.load(open(sys.argv[1]))['shell_port' if PORT is None else PORT + '_port']
if count < LOSES:
    taken = f"taken = socket.create_server(('127.0.0.1', {port}))"
    taker = f"import socket, time; {taken}; print('has it'); time.sleep(600)"
    thief = subprocess.Popen([sys.executable, '-u', '-c', taker, here], stdout=subprocess.PIPE)
    thief.stdout.readline()
os.execv(sys.executable, [sys.executable, '-m', 'ipykernel_launcher', '-f', sys.argv[1]])
"""


def kernelspec(project: Project, name: str, argv: list[str]) -> None:
    """Install a kernelspec that only this project sees."""
    folder = project.path.parent / "jupyter" / "kernels" / name
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": name, "language": "python"})
    )
    project.environment["JUPYTER_PATH"] = str(project.path.parent / "jupyter")


def kernel_program(project: Project, name: str, body: str) -> None:
    """A kernel that is a Python program; its processes have the project's folder on their command line."""
    program = project.path.parent / f"{name}.py"
    here = project.path
    program.write_text(
        f"import json, os, signal, socket, subprocess, sys, time\nhere = {str(here)!r}\n{body}",
        encoding="utf-8",
    )
    kernelspec(project, name, [sys.executable, str(program), "{connection_file}", str(here)])
    project.notebook("plain.ipynb", "print('it runs')", kernel=name)


def research(project: Project, *options: str) -> tuple[Finished, float]:
    began = time.monotonic()
    done = project.grd("research", "plain.ipynb", "--json", *options)
    return done, time.monotonic() - began


def left_alive(project: Project) -> list[Any]:
    found = []
    for process in psutil.process_iter():
        try:
            if str(project.path) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.cmdline())
        except psutil.Error:
            pass
    return found


def runner_log(project: Project) -> str:
    return (project.only_run() / "attempts" / "1" / "runner.log").read_text()


@pytest.mark.parametrize(
    ("body", "said", "exit_words"),
    [
        pytest.param(DIES, "the licence has run out", "exit code 3", id="exits"),
        pytest.param(
            NO_IPYKERNEL,
            "No module named 'ipykernel_that_nobody_has'",
            "exit code 1",
            marks=pytest.mark.faults,
            id="import error",
        ),
        pytest.param(
            KILLED,
            "it wrote nothing to stderr",
            "killed by SIGKILL",
            marks=pytest.mark.faults,
            id="killed",
        ),
    ],
)
def test_a_kernel_that_dies_at_its_start_is_told_soon_with_what_it_said(
    body: str, said: str, exit_words: str, project: Project
) -> None:
    kernel_program(project, "dying", body)
    done, seconds = research(project, "--start-timeout", "10m")
    assert done.code == 69, done.err
    assert (done.json["state"], done.json["cause"]) == ("failed", "start_failed")
    assert said in done.json["detail"]
    assert exit_words in done.json["detail"]
    assert "\n" not in done.json["detail"]
    assert "Traceback" not in done.err
    assert said in done.err  # the event that ends the run
    assert seconds < 90
    if body != KILLED:
        assert said in runner_log(project)
    assert not [e for e in project.events() if e["kind"] == "warning" and "try" in e["message"]]
    assert project.processes() == []


@pytest.mark.faults
def test_what_is_printed_for_people_names_reason_and_log(project: Project) -> None:
    kernel_program(project, "dying", DIES)
    done = project.grd("research", "plain.ipynb")
    assert done.code == 69
    log = project.only_run() / "attempts" / "1" / "runner.log"
    assert "the licence has run out" in done.out
    assert f"log         {log}" in done.out
    assert "the licence has run out" in done.err
    assert "Traceback" not in done.out + done.err


@pytest.mark.faults
def test_the_whole_stderr_is_in_the_log_and_only_its_end_in_the_record(project: Project) -> None:
    kernel_program(
        project, "noisy", "sys.stderr.write('first words\\n' + 'noise\\n' * 60000 + 'last words\\n')"
    )
    done, _ = research(project)
    assert done.code == 69
    assert "last words" in done.json["detail"]
    assert "first words" not in done.json["detail"]
    assert len(done.json["detail"]) < 700
    log = runner_log(project)
    assert "first words" in log
    assert log.count("noise") == 60000


@pytest.mark.faults
@pytest.mark.parametrize(
    ("body", "said"),
    [
        (HANGS, "waiting for the licence server"),
        (STOPPED, "going to sleep"),
        (BINDS_AND_IS_SILENT, "nothing"),
    ],
    ids=["hangs", "is stopped", "binds and is silent"],
)
def test_a_kernel_that_hangs_is_given_up_within_the_start_timeout(
    body: str, said: str, project: Project
) -> None:
    kernel_program(project, "hanging", body)
    done, seconds = research(project, "--start-timeout", "4s", "--timeout", "1h")
    assert done.code == 69, done.err
    assert (done.json["state"], done.json["cause"]) == ("failed", "start_failed")
    assert "didn't respond in 4s" in done.json["detail"]
    assert said in done.json["detail"]
    assert done.json["start_timeout"] == 4.0
    assert done.json["budget"]["used_seconds"] < 4 + 20
    assert seconds < 60
    assert "Traceback" not in done.err
    assert project.processes() == []
    assert left_alive(project) == []


@pytest.mark.parametrize(
    "there",
    [
        pytest.param(False, id="missing"),
        pytest.param(True, marks=pytest.mark.faults, id="not executable"),
    ],
)
def test_a_kernel_whose_program_cannot_be_executed_is_told_without_a_traceback(
    there: bool, project: Project
) -> None:
    program = project.path / "kernel-program"
    if there:
        program.write_text("no program")
    kernelspec(project, "broken", [str(program), "{connection_file}"])
    project.notebook("plain.ipynb", "1", kernel="broken")
    done, seconds = research(project)
    assert done.code == 69, done.err
    assert (done.json["state"], done.json["cause"]) == ("failed", "start_failed")
    assert str(program) in done.json["detail"]
    assert ("Permission denied" if there else "No such file") in done.json["detail"]
    assert "Traceback" not in done.err
    assert seconds < 90


@pytest.mark.faults
def test_resume_takes_another_start_timeout_and_goes_on(project: Project) -> None:
    slow = "while not os.path.exists(here + '/mended'): time.sleep(0.1)\n" + LOSES_A_PORT.replace(
        "LOSES", "0"
    )
    kernel_program(project, "slow", slow)
    done, _ = research(project, "--start-timeout", "2s")
    assert done.code == 69, done.err
    (project.path / "mended").touch()
    resumed = project.grd("resume", "last", "--start-timeout", "2m", "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["start_timeout"] == 120.0
    assert "it runs" in project.grd("logs", "last").out


@pytest.mark.parametrize("value", ["0", "-1s", "nan", "inf", "soon", "", 0, -1, float("nan"), True, []])
def test_a_start_timeout_that_is_none_is_a_usage_error_before_anything_starts(
    value: Any, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.notebook("plain.ipynb", "1")
    monkeypatch.chdir(project.path)
    with pytest.raises(UsageError, match="--start-timeout"):
        grd.research("plain.ipynb", start_timeout=value)
    if value == "soon":
        done = project.grd("research", "plain.ipynb", "--start-timeout", "soon")
        assert done.code == 2, done.err
        assert "--start-timeout" in done.err
    assert project.run_folders() == []


@pytest.mark.parametrize("loses", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_a_kernel_that_lost_a_port_is_started_again_with_other_ports(loses: int, project: Project) -> None:
    kernel_program(project, "unlucky", LOSES_A_PORT.replace("LOSES", str(loses)))
    done, _ = research(project, "--start-timeout", "2m")
    assert done.code == 0, done.err
    assert "it runs" in project.grd("logs", "last").out
    tries = [json.loads(path.read_text()) for path in sorted(project.path.glob("try-*"))]
    assert len(tries) == loses + 1
    assert len({given["shell_port"] for given in tries}) == loses + 1
    warnings = [e["message"] for e in project.events() if e["kind"] == "warning" and "port" in e["message"]]
    assert [message.rpartition("(")[2] for message in warnings] == [
        f"try {number} of 3)" for number in range(2, loses + 2)
    ]
    assert any("port" in warning for warning in done.json["warnings"])
    assert "Address already in use" in runner_log(project)
    wait_until(lambda: not project.processes() and not left_alive(project), "the end of all processes")


@pytest.mark.parametrize(
    "port",
    ["iopub", *(pytest.param(name, marks=pytest.mark.faults) for name in ("control", "stdin"))],
)
def test_whichever_port_it_was_the_kernel_is_started_again_soon(port: str, project: Project) -> None:
    """ipykernel does not end for each of them."""
    body = LOSES_A_PORT.replace("LOSES", "1").replace("PORT = None", f"PORT = {port!r}")
    kernel_program(project, "unlucky", body)
    done, seconds = research(project, "--start-timeout", "10m")
    assert done.code == 0, done.err
    assert len(list(project.path.glob("try-*"))) == 2
    assert seconds < 120
    assert project.processes() == []


@pytest.mark.faults
def test_a_kernel_that_loses_its_port_every_time_is_given_up(project: Project) -> None:
    kernel_program(project, "unlucky", LOSES_A_PORT.replace("LOSES", "99"))
    done, _ = research(project, "--start-timeout", "2m")
    assert done.code == 69, done.err
    assert "Address already in use" in done.json["detail"]
    assert len(list(project.path.glob("try-*"))) == 3
    assert project.processes() == []
    wait_until(lambda: not left_alive(project), "the end of all processes")


# --- papermill --engine grd ------------------------------------------------------------------------------


def papermill(project: Project, *options: str) -> tuple[Finished, float]:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "--engine", "grd", "plain.ipynb", "out.ipynb", *options],
        cwd=project.path,
        env=project.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    return Finished(done.returncode, done.stdout, done.stderr), time.monotonic() - began


def test_papermills_users_get_its_error_with_what_the_kernel_said(project: Project) -> None:
    kernel_program(project, "dying", DIES)
    done, seconds = papermill(project)
    assert done.code == 1
    assert "RuntimeError" in done.err or "KernelStartError" in done.err
    assert "Kernel died before replying to kernel_info (exit code 3)" in done.err
    assert "its stderr ends: the licence has run out" in done.err
    assert seconds < 90


@pytest.mark.faults
def test_papermills_start_timeout_is_kept(project: Project) -> None:
    kernel_program(project, "hanging", HANGS)
    done, seconds = papermill(project, "--start-timeout", "3")
    assert done.code == 1
    assert "Kernel didn't respond in 3s" in done.err
    assert "its stderr ends: waiting for the licence server" in done.err
    assert seconds < 60
    assert left_alive(project) == []


@pytest.mark.faults
def test_papermills_users_get_another_try_after_a_lost_port_and_all_stderr(project: Project) -> None:
    writer = """
if count == 1 and os.fork() == 0:
    while not os.path.exists(here + '/go'):
        time.sleep(0.05)
    for i in range(20000):
        os.write(2, b'late line %d\\n' % i)
    open(here + '/written', 'w')
    os._exit(0)
"""
    body = LOSES_A_PORT.replace("LOSES", "1").replace("if count <", writer + "if count <")
    kernel_program(project, "unlucky", body)
    waiting = "while not os.path.exists('written'): time.sleep(0.05)"
    write_notebook(
        project.path / "plain.ipynb", f"import os, time\nopen('go', 'w')\n{waiting}", kernel="unlucky"
    )
    done, _ = papermill(project, "--start-timeout", "100")
    assert done.code == 0, done.err
    assert "starting the kernel again (try 2 of 3)" in done.err
    assert "Address already in use" in done.err
    assert len(list(project.path.glob("try-*"))) == 2
    assert done.err.count("late line") == 20000
    assert "late line 19999" in done.err


def test_the_error_is_the_kind_that_papermill_raises_and_can_be_sent_to_another_process() -> None:
    error = KernelStartError("Kernel died", said="why", died=True)
    assert isinstance(error, RuntimeError)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.said, again.died) == ("Kernel died", "why", True)


@pytest.mark.faults
@pytest.mark.parametrize("missing", [False, True], ids=["dies", "missing"])
def test_explore_tells_why_its_kernel_did_not_start(missing: bool, project: Project) -> None:
    if missing:
        kernelspec(project, "python3", ["/no/such/python", "{connection_file}"])
    else:
        kernel_program(project, "python3", DIES)
    done = project.grd("explore")
    assert done.code == 69, done.err
    assert ("No such file" if missing else "its stderr ends: the licence has run out") in done.err
    assert "Traceback" not in done.err


# --- what is decided -------------------------------------------------------------------------------------


def test_only_a_port_of_the_kernels_own_makes_a_port_race() -> None:
    theirs = "OSError: [Errno 98] Address already in use ('127.0.0.1', 8080)"
    ours = "zmq.error.ZMQError: Address already in use (addr='tcp://127.0.0.1:5001')"
    assert lost_a_port("", ports=[5001, 5002], taken=[5002])
    assert lost_a_port(ours, ports=[5001, 5002], taken=[])
    assert not lost_a_port(theirs, ports=[5001, 5002], taken=[])
    assert not lost_a_port("ImportError: port 5001", ports=[5001, 5002], taken=[])
    assert not lost_a_port(ours, ports=[], taken=[])


def test_a_taken_port_is_told_from_a_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert taken_ports("127.0.0.1", [port]) == [port]
    assert taken_ports("127.0.0.1", [port]) == []


def test_last_words_are_the_last_lines_on_one_line() -> None:
    assert last_words("") == ""
    assert last_words("a\n\n \x1b[31mb\x1b[0m  c\n\nd\ne\n\n") == "b c / d / e"
    assert len(last_words("x" * 10000)) < 510
