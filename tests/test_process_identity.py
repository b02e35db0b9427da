"""A pid is nobody: whoever is signalled, believed alive or measured is known by its start time too."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

from conftest import LIMIT_SECONDS, cannot_be_had

import grd
from grd.execution import guardian
from grd.runs import processes

PACKAGE = Path(grd.__file__).parent

SIGNALLED_BY_PID = {
    "execution/guardian.py": "its own child, not yet waited for; or after a look at the start time",
    "execution/kernel_signals.py": "itself",
    "experiment/interruption.py": "itself",
    "experiment/checkpoint_folder.py": "signal 0, beside the start time",
    "experiment/exchange.py": "signal 0: whoever has the pid now, its folder is left for a later look",
    "hardware/facts.py": "its own child, not yet waited for",
    "runs/processes.py": "after a look at the start time, where there is no pidfd",
}


def test_signals_go_to_a_bare_pid_only_where_it_cannot_be_another_process() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.kill", "os.killpg"):
                found.add(str(path.relative_to(PACKAGE)))
    assert found == set(SIGNALLED_BY_PID)


def test_a_process_with_another_start_time_is_another_process() -> None:
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        who = processes.identity(child.pid)
        assert processes.is_alive(who)
        earlier = {**who, "started": who["started"] - 1}
        assert not processes.is_alive(earlier)
        assert not processes.is_alive({**who, "boot_id": "another boot"})
        assert not processes.send_signal(child.pid, earlier["started"], signal.SIGKILL)
        guardian.send_signal(child.pid, int(earlier["started"]), signal.SIGKILL)
        processes.end_group(child.pid, earlier["started"])
        nobody = "GRD_PROCESS_MARKER=nobody"
        assert processes.reap(nobody, session=child.pid, session_started=earlier["started"]) == []
        assert processes.open_process(child.pid, earlier["started"]) == -1
        assert child.poll() is None
        guardian.send_signal(child.pid, int(who["started"]), signal.SIGKILL)
        assert child.wait(LIMIT_SECONDS) == -signal.SIGKILL
    finally:
        child.kill()
        child.wait()


RECYCLED = """
import os, signal, subprocess, sys, time
from pathlib import Path

from grd.execution import guardian
from grd.experiment import checkpoint_folder
from grd.runs import processes
from grd.tracking import ResourceTracker

folder = Path(sys.argv[1])
BIG = "kept = b'1' * 300_000_000\\nprint('big', flush=True)\\nimport time\\ntime.sleep(600)"
WRITER = (
    "import sys, time\\nfrom pathlib import Path\\n"
    "from grd.experiment.checkpoint_folder import temporary_name\\n"
    "with temporary_name(Path(sys.argv[1]), 'checkpoint_epoch_1.pt') as path:\\n"
    "    path.write_bytes(b'half')\\n    print('written', flush=True)\\n    time.sleep(600)"
)

def start(*command, pid=None):
    if pid is not None:
        time.sleep(0.05)  # start times are told in hundredths of a second
        Path('/proc/sys/kernel/ns_last_pid').write_text(str(pid - 1))
    child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert pid is None or child.pid == pid, (child.pid, pid)
    return child

def end(child):
    child.kill()
    child.wait()

first = start('sleep', '600')
who = processes.identity(first.pid)
assert processes.is_alive(who)
end(first)
second = start('sleep', '600', pid=first.pid)
assert not processes.is_alive(who)
assert not processes.send_signal(first.pid, who['started'], signal.SIGKILL)
guardian.send_signal(first.pid, int(who['started']), signal.SIGKILL)
processes.end_group(first.pid, who['started'])
processes.reap('GRD_PROCESS_MARKER=nobody', session=first.pid, session_started=who['started'])
assert second.poll() is None, 'another process was killed'
end(second)

writer = start(sys.executable, '-c', WRITER, str(folder))
assert writer.stdout.readline()
checkpoint_folder.sweep(folder)
assert len(list(folder.iterdir())) == 1, 'the file of a living writer was removed'
end(writer)
second = start('sleep', '600', pid=writer.pid)
checkpoint_folder.sweep(folder)
assert list(folder.iterdir()) == [], 'a dead writer was taken for alive'
end(second)

measured = start('sleep', '600')
with ResourceTracker(measured.pid) as tracker:
    end(measured)
    second = start(sys.executable, '-c', BIG, pid=measured.pid)
    assert second.stdout.readline() == b'big\\n'
    time.sleep(0.5)
assert tracker.get_usage().peak_memory_mb < 100, tracker.get_usage()
end(second)
print('all well')
"""


def can_choose_pids() -> bool:
    """Whether this user may make a pid namespace and say which pid comes next there."""
    trial = "echo 100 > /proc/sys/kernel/ns_last_pid"
    command = ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", trial]
    try:
        return subprocess.run(command, capture_output=True, timeout=LIMIT_SECONDS).returncode == 0
    except OSError:
        return False


def test_a_pid_that_was_given_to_another_process_harms_nobody(tmp_path: Path) -> None:
    if not can_choose_pids():
        cannot_be_had("a pid namespace needs the right to make one")
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", RECYCLED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.stdout == "all well\n", done.stderr
