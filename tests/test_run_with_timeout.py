"""`grd.run_with_timeout`: a limit that holds, output that survives, and nothing left alive."""

from __future__ import annotations

import inspect
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import LIMIT_SECONDS, Project, wait_until

import grd
from grd import run_with_timeout
from grd.errors import CommandTimedOut

SLEEP = "import time; time.sleep(600)"
DEAF = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); "
    "time.sleep(600)"
)

# What a command leaves behind, each as the body of a Python program; `here` is its folder.
LEFT = {
    "a child": "subprocess.Popen(asleep)",
    "a child that ignores SIGTERM": "subprocess.Popen(deaf)",
    "a session of its own": "subprocess.Popen(deaf, start_new_session=True)",
    "a daemon": """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execve(deaf[0], deaf, {})
    os._exit(0)
os.wait()
""",
    "a stopped child": "os.kill(subprocess.Popen(deaf, start_new_session=True).pid, signal.SIGSTOP)",
    "a pool": "pool = multiprocessing.get_context('fork').Pool(3)",
}
LEADERS = {
    "stays": "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); " + SLEEP,
    "exits at SIGTERM": "print('up', flush=True); " + SLEEP,
    "has ended": "print('up', flush=True); os._exit(0)",
}
PROGRAM = f"""
import multiprocessing, os, signal, subprocess, sys, time
here = sys.argv[1]
asleep = [sys.executable, '-c', {SLEEP!r}, here]
deaf = [sys.executable, '-c', {DEAF!r}, here]
"""


def program(folder: Path, *bodies: str) -> list[str]:
    """A Python program whose processes all have ``folder`` on their command line."""
    return [sys.executable, "-c", PROGRAM + "\n".join(bodies), str(folder)]


def living(folder: Path) -> list[int]:
    """Processes that have ``folder`` on their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            pass
    return found


def caller(folder: Path, code: str) -> subprocess.Popen[str]:
    """A process that calls ``run_with_timeout``; ``command`` is a deaf daemon below a deaf child."""
    command = program(
        folder, LEFT["a child that ignores SIGTERM"], LEFT["a daemon"], "open(here + '/up', 'w')", SLEEP
    )
    return subprocess.Popen(
        [sys.executable, "-c", f"command = {command!r}\nimport signal, sys, grd\n{code}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_signature_is_the_one_that_was_agreed_on() -> None:
    parameters = inspect.signature(grd.run_with_timeout).parameters
    assert list(parameters) == ["command", "timeout_seconds"]
    assert parameters["timeout_seconds"].default == 600


def test_a_command_tells_its_status_and_both_streams() -> None:
    done = run_with_timeout(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert done == {"returncode": 3, "stdout": "out\n", "stderr": "err\n"}
    assert run_with_timeout(["sh", "-c", "kill -9 $$"], 60)["returncode"] == -signal.SIGKILL
    assert run_with_timeout([Path("/bin/sh"), b"-c", "exit 0"], timeout_seconds=60)["returncode"] == 0


def test_the_callers_folder_and_environment_arrive_and_stdin_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OF_THE_CALLER", "here")
    done = run_with_timeout(["sh", "-c", 'cat; pwd; echo "$OF_THE_CALLER"; readlink /proc/self/fd/0'], 60)
    assert done["stdout"] == f"{tmp_path}\nhere\n/dev/null\n"


def test_bytes_that_are_no_text_survive_and_line_ends_stay() -> None:
    every_byte = bytes(range(256)) + b"\xed\xb3\xbf\xc3"  # a surrogate's own bytes, and a cut character
    code = f"import sys; sys.stdout.buffer.write({every_byte!r}); sys.stderr.buffer.write(b'a\\r\\n\\xff')"
    done = run_with_timeout([sys.executable, "-c", code], 60)
    assert done["stdout"].encode("utf-8", "surrogateescape") == every_byte
    assert done["stderr"].encode("utf-8", "surrogateescape") == b"a\r\n\xff"
    assert run_with_timeout(["printf", "äß∂"], 60)["stdout"] == "äß∂"


def test_much_output_on_both_streams_does_not_block() -> None:
    code = (
        "import sys\nfor i in range(400):\n  sys.stdout.write('o' * 50000)\n  sys.stderr.write('e' * 50000)"
    )
    done = run_with_timeout([sys.executable, "-c", code], 120)
    assert (len(done["stdout"]), len(done["stderr"])) == (20_000_000, 20_000_000)


def test_a_command_that_closed_its_streams_is_waited_for(tmp_path: Path) -> None:
    code = f"import os, time; os.close(1); os.close(2); time.sleep(1); open({str(tmp_path / 'end')!r}, 'w')"
    assert run_with_timeout([sys.executable, "-c", code], 60)["returncode"] == 0
    assert (tmp_path / "end").exists()


def test_a_timeout_is_an_error_that_has_the_output_so_far(tmp_path: Path) -> None:
    command = program(
        tmp_path, "print('so far', flush=True); sys.stderr.buffer.write(b'\\xfe'); sys.stderr.flush()", SLEEP
    )
    with pytest.raises(TimeoutError, match=r"^Command timed out after 3 seconds$") as raised:
        run_with_timeout(command, 3)
    assert isinstance(raised.value, CommandTimedOut)
    assert (raised.value.stdout, raised.value.stderr) == ("so far\n", "\udcfe")
    assert living(tmp_path) == []
    again = pickle.loads(pickle.dumps(raised.value))
    assert (str(again), again.stdout) == (str(raised.value), "so far\n")


def test_what_is_written_while_it_is_being_ended_is_kept_too(tmp_path: Path) -> None:
    handler = "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), os._exit(0)))"
    with pytest.raises(CommandTimedOut) as raised:
        run_with_timeout(program(tmp_path, handler, "print('ready', flush=True)", SLEEP), 3)
    assert raised.value.stdout == "ready\nsaved\n"


def test_grandchildren_have_the_grace_to_save_after_the_leader_is_gone(tmp_path: Path) -> None:
    saver = (
        "import os, signal, sys, time\n"
        "def save(*_):\n  time.sleep(2)\n  open(sys.argv[1] + '/saved', 'w')\n  os._exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\nopen(sys.argv[1] + '/up', 'w')\ntime.sleep(600)"
    )
    start = f"subprocess.Popen([sys.executable, '-c', {saver!r}, here])"
    up = "while not os.path.exists(here + '/up'): time.sleep(0.01)"
    assert run_with_timeout(program(tmp_path, start, up), 60)["returncode"] == 0
    assert (tmp_path / "saved").exists()
    assert living(tmp_path) == []


def cases() -> list[Any]:
    """Every kind of process, and every way of the leader's; most of them wait for the grace to pass."""
    found = []
    for left in LEFT:
        for leader in LEADERS:
            quick = (left, leader != "stays") == ("a daemon", True) or (left, leader) == (
                "a child",
                "has ended",
            )
            found.append(pytest.param(left, leader, marks=() if quick else pytest.mark.faults))
    return found


@pytest.mark.parametrize(("left", "leader"), cases())
def test_nothing_of_a_command_outlives_the_call(left: str, leader: str, tmp_path: Path) -> None:
    last = LEADERS[leader]
    command = program(tmp_path, LEFT[left], last)
    began = time.monotonic()
    if leader == "has ended":
        # What was started in the background holds the pipes, and is not waited for till the limit.
        done = run_with_timeout(command, 120)
        assert done["returncode"] == 0
        said = done["stdout"]
        assert time.monotonic() - began < 60
    else:
        with pytest.raises(CommandTimedOut) as raised:
            run_with_timeout(command, 4)
        said = raised.value.stdout
    assert living(tmp_path) == []
    assert "up" in said


@pytest.mark.parametrize("how", ["KeyboardInterrupt", "SystemExit", "SIGKILL"])
def test_nothing_is_left_when_the_caller_goes(how: str, tmp_path: Path) -> None:
    exits = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))"
    process = caller(tmp_path, f"{exits}\ngrd.run_with_timeout(command, 300)")
    wait_until((tmp_path / "up").exists, "the command to be up")
    signum = {"KeyboardInterrupt": signal.SIGINT, "SystemExit": signal.SIGTERM, "SIGKILL": signal.SIGKILL}[
        how
    ]
    process.send_signal(signum)
    _, err = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == {"SIGKILL": -signal.SIGKILL, "SystemExit": 7}.get(how, -signal.SIGINT), err
    if how != "SIGKILL":
        assert living(tmp_path) == []
    wait_until(lambda: living(tmp_path) == [], "the end of all that was started")


def test_whoever_interrupts_twice_does_not_wait_for_the_grace(tmp_path: Path) -> None:
    process = caller(tmp_path, "grd.run_with_timeout(command, 300)")
    wait_until((tmp_path / "up").exists, "the command to be up")
    process.send_signal(signal.SIGINT)
    leaders = [pid for pid in living(tmp_path) if "open(here" in " ".join(psutil.Process(pid).cmdline())]
    wait_until(lambda: not any(pid in living(tmp_path) for pid in leaders), "SIGTERM to have arrived")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == -signal.SIGINT
    assert living(tmp_path) == []


@pytest.mark.faults
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_guardian_that_is_lost_leaves_nothing_but_what_wiped_its_environment(
    fault: signal.Signals, tmp_path: Path
) -> None:
    attempt = "try:\n  grd.run_with_timeout(command, 5)\n  print('ended')\n"
    code = f"{attempt}except TimeoutError as error:\n  print(error)"
    process = caller(tmp_path, code)
    wait_until((tmp_path / "up").exists, "the command to be up")
    (guardian,) = psutil.Process(process.pid).children()
    unmarked = [pid for pid in living(tmp_path) if not psutil.Process(pid).environ()]
    assert len(unmarked) == 1
    guardian.send_signal(fault)
    out, err = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, err
    assert out == ("ended\n" if fault == signal.SIGKILL else "Command timed out after 5 seconds\n")
    assert set(living(tmp_path)) <= set(unmarked)
    for pid in living(tmp_path):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("command", "timeout_seconds", "error"),
    [
        ("touch started", 5, TypeError),
        (None, 5, TypeError),
        ({"touch": "started"}, 5, TypeError),
        (iter(["touch", "started"]), 5, TypeError),
        ([], 5, ValueError),
        ([""], 5, ValueError),
        (["touch", 5], 5, TypeError),
        (["touch", None], 5, TypeError),
        (["touch", "a\0b"], 5, ValueError),
        (["touch", "started"], 0, ValueError),
        (["touch", "started"], -1, ValueError),
        (["touch", "started"], float("nan"), ValueError),
        (["touch", "started"], float("inf"), ValueError),
        (["touch", "started"], 10**400, ValueError),
        (["touch", "started"], True, TypeError),
        (["touch", "started"], None, TypeError),
        (["touch", "started"], "5", TypeError),
        (["touch", "started"], Decimal(5), TypeError),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_starts(
    command: Any,
    timeout_seconds: Any,
    error: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=r"command|timeout_seconds"):
        run_with_timeout(command, timeout_seconds)
    assert list(tmp_path.iterdir()) == []
    assert psutil.Process().children() == []


def test_a_program_that_cannot_be_executed_is_told_as_subprocess_tells_it(tmp_path: Path) -> None:
    (tmp_path / "no-program").write_text("text")
    for name in ("no-such-program-anywhere", str(tmp_path / "no-program"), str(tmp_path)):
        with pytest.raises(OSError) as theirs:
            subprocess.run([name], timeout=60)
        with pytest.raises(OSError) as ours:
            run_with_timeout([name], 60)
        assert type(ours.value) is type(theirs.value)
        assert str(ours.value) == str(theirs.value)
        assert (ours.value.errno, ours.value.filename) == (theirs.value.errno, theirs.value.filename)


def test_fractions_of_a_second_and_very_long_limits_are_limits_too(tmp_path: Path) -> None:
    with pytest.raises(CommandTimedOut, match=r"after 0\.5 seconds"):
        run_with_timeout(program(tmp_path, SLEEP), 0.5)  # type: ignore[arg-type]
    assert run_with_timeout(["echo", "long"], 10**12)["stdout"] == "long\n"


def test_calls_from_many_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    answers: dict[int, Any] = {}

    def call(number: int) -> None:
        command = program(tmp_path, f"print({number}, flush=True)", SLEEP if number % 2 else "")
        try:
            answers[number] = run_with_timeout(command, 6)["stdout"]
        except CommandTimedOut as error:
            answers[number] = ("late", error.stdout)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_SECONDS)
    assert answers == {n: (("late", f"{n}\n") if n % 2 else f"{n}\n") for n in range(6)}
    assert living(tmp_path) == []


def test_calls_leave_no_descriptor_and_no_zombie() -> None:
    run_with_timeout(["true"], 60)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        run_with_timeout(["true"], 60)
        with pytest.raises(FileNotFoundError):
            run_with_timeout(["no-such-program-anywhere"], 60)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert psutil.Process().children() == []


@pytest.mark.faults
def test_a_notebook_can_limit_a_command(project: Project) -> None:
    command = program(project.path, LEFT["a daemon"], "print('so far', flush=True)", SLEEP)
    attempt = f"import grd\ntry:\n    grd.run_with_timeout({command!r}, 2)\n"
    cell = f"{attempt}except TimeoutError as error:\n    print(error, [error.stdout])"
    project.notebook("plain.ipynb", cell)
    done = project.grd("research", "plain.ipynb")
    assert done.code == 0, done.err
    assert "Command timed out after 2 seconds ['so far" in project.grd("logs", "last").out
    assert living(project.path) == []


WITHOUT_GUARDIAN = """
import sys, grd
command, sys.executable = sys.argv[1:], ''
done = grd.run_with_timeout(['sh', '-c', 'echo hi; exit 4'], 60)
assert done == {'returncode': 4, 'stdout': 'hi\\n', 'stderr': ''}, done
try:
    grd.run_with_timeout(command, 4)
except TimeoutError as error:
    print(error, error.stdout)
"""


@pytest.mark.faults
def test_where_there_can_be_no_guardian_session_and_mark_do(tmp_path: Path) -> None:
    unseen = "subprocess.Popen(deaf, start_new_session=True)"
    command = program(
        tmp_path, LEFT["a child that ignores SIGTERM"], unseen, "print('so far', flush=True)", SLEEP
    )
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_GUARDIAN, *command],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert "Command timed out after 4 seconds" in done.stdout, done.stderr
    assert "so far" in done.stdout
    assert living(tmp_path) == []


@pytest.mark.faults
def test_a_detached_run_that_a_command_starts_is_a_run_in_its_own_right(project: Project) -> None:
    project.notebook("plain.ipynb", "import time; time.sleep(3); print('the end')")
    before = Path.cwd()
    os.chdir(project.path)
    try:
        done = run_with_timeout([sys.executable, "-m", "grd", "research", "plain.ipynb", "--detach"], 120)
    finally:
        os.chdir(before)
    assert done["returncode"] == 0, done["stderr"]
    ended: Callable[[], bool] = lambda: project.record()["state"] not in ("queued", "running")  # noqa: E731
    wait_until(ended, "the run's end")
    assert project.record()["state"] == "completed"
