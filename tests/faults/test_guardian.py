"""Runner, kernel and guardian are killed in every combination: no process of the run is left behind.

Nobody looks at the run before its processes have ended, so that looking cannot be what ended them; only
where all who could act were killed at once does the next look have to.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import psutil
import pytest
from conftest import Project, wait_until

pytestmark = pytest.mark.faults

PARAMETERS = "timeout = None\ncheckpoint_dir = ''\nresume = False"
SLEEPER = "[sys.executable, '-c', 'import time; time.sleep(600)']"

CHILDREN = f"""
import multiprocessing, os, subprocess, sys, time

def note(kind, pids):
    with open('children', 'a') as file:
        file.writelines(f'{{kind}} {{pid}}\\n' for pid in pids)

if not resume:
    kept = [subprocess.Popen({SLEEPER}), subprocess.Popen({SLEEPER}, start_new_session=True),
            subprocess.Popen({SLEEPER}, start_new_session=True, env={{}})]
    for kind, child in zip(('popen', 'setsid', 'unmarked'), kept):
        note(kind, [child.pid])
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            note('double-fork', [os.getpid()])
            time.sleep(600)
        os._exit(0)
    os.wait()
    pool = multiprocessing.get_context('fork').Pool(2)
    note('pool', [worker.pid for worker in pool._pool])
"""
WORKERS = """
import time, torch
from torch.utils.data import DataLoader, Dataset

class Slow(Dataset):
    def __len__(self): return 1000
    def __getitem__(self, index): return index

if not resume:
    batches = iter(DataLoader(Slow(), num_workers=2))
    next(batches)
    with open('children', 'a') as file:
        file.writelines(f'worker {worker.pid}\\n' for worker in batches._workers)
"""
SLEEPING = "print('here', flush=True)\nif not resume:\n    time.sleep(600)"
IN_C = """
import ctypes
print('here', flush=True)
if not resume:
    time.sleep(0.5)  # the kernel's own threads cannot send what was printed while the GIL is held
    open('holding', 'w').close()
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # waits for itself: a signal would end a sleep
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)
"""

CELLS = {"children": [CHILDREN, SLEEPING], "GIL held in C": [CHILDREN, IN_C], "workers": [WORKERS, SLEEPING]}
KINDS = {"popen", "setsid", "unmarked", "double-fork", "pool"}

KILLED = [
    ("runner",),
    ("kernel",),
    ("guardian",),
    ("watcher",),
    ("runner", "kernel"),
    ("runner", "guardian"),
    ("runner", "watcher"),
    ("kernel", "guardian"),
    ("guardian", "watcher"),
    ("runner", "kernel", "guardian"),
]
ALL = ("runner", "kernel", "guardian", "watcher")


def start(project: Project, *cells: str, options: tuple[str, ...] = ()) -> dict[str, psutil.Process]:
    """A detached run whose cell has begun; its processes by name."""
    project.notebook("run.ipynb", *cells, "print('the end')", parameters=PARAMETERS)
    started = project.grd("research", "run.ipynb", "--detach", "--timeout", "10m", "--grace", "4s", *options)
    assert started.code == 0, started.err
    project.wait_for_output("here")
    record = project.record()
    identities = {"runner": record["runner"], **record["processes"]}
    assert record["guardian_pid"] == identities["guardian"]["pid"]
    return {name: psutil.Process(who["pid"]) for name, who in identities.items()}


def children(project: Project) -> dict[str, psutil.Process]:
    lines = (project.path / "children").read_text().split("\n")[:-1]
    return {line: psutil.Process(int(line.split()[1])) for line in lines}


def living(processes: dict[str, psutil.Process]) -> list[str]:
    """Which are still there; psutil compares start times, so that a reused pid is nobody's."""
    found = []
    for name, process in processes.items():
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(name)
        except psutil.NoSuchProcess:
            pass
    return found


def end_unmarked(processes: dict[str, psutil.Process]) -> list[psutil.Process]:
    """Kill the children that had no environment, and return them."""
    unmarked = [process for name, process in processes.items() if name.startswith("unmarked")]
    for process in unmarked:
        process.kill()
    return unmarked


def wait_for_the_end_of(processes: dict[str, psutil.Process]) -> None:
    wait_until(lambda: not living(processes), f"the end of {sorted(processes)}", 30)


def resumes(project: Project) -> None:
    resumed = project.grd("resume", "last", "--timeout", "5m", "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["state"] == "completed"
    assert project.processes() == []


@pytest.mark.usefixtures("torch_in_kernels")
@pytest.mark.parametrize("cells", CELLS)
@pytest.mark.parametrize("killed", KILLED, ids="+".join)
def test_nothing_is_left_alive_after_sigkill_of(
    project: Project, killed: tuple[str, ...], cells: str
) -> None:
    if cells == "workers":
        pytest.importorskip("torch")
    processes = start(project, *CELLS[cells])
    if cells == "GIL held in C":
        wait_until((project.path / "holding").exists, "the cell to hold the GIL")
    left = children(project)
    assert {name.split()[0] for name in left} == ({"worker"} if cells == "workers" else KINDS)
    for name in killed:
        processes[name].kill()
    wait_for_the_end_of({**processes, **left})
    shown = project.grd("status", "last", "--json").json
    cause = "runner_lost" if "runner" in killed else "kernel_died"
    assert (shown["state"], shown["cause"], shown["resumable"]) == ("interrupted", cause, True)
    assert shown == project.record()
    if set(killed) & {"guardian", "watcher"} and not set(killed) & {"runner", "kernel"}:
        assert "guardian" in shown["detail"]
    resumes(project)


def test_where_all_who_could_act_were_killed_at_once_the_next_look_ends_the_rest(project: Project) -> None:
    processes = start(project, *CELLS["children"])
    left = children(project)
    for name in ALL:
        processes[name].kill()
    wait_for_the_end_of(processes)
    shown = project.grd("status", "last", "--json").json
    assert (shown["state"], shown["cause"]) == ("interrupted", "runner_lost")
    wait_for_the_end_of({name: process for name, process in left.items() if "unmarked" not in name})
    end_unmarked(left)  # without the mark, and without anybody of the run, nobody can know it
    resumes(project)


@pytest.mark.parametrize("then", ["runner SIGTERM", "kernel SIGKILL", "watcher stopped too"])
def test_a_guardian_that_stands_still_leaves_nothing_to_live_on(project: Project, then: str) -> None:
    processes = start(project, *CELLS["children"])
    left = children(project)
    processes["guardian"].suspend()
    if then == "watcher stopped too":
        processes["watcher"].suspend()
    if then == "kernel SIGKILL":
        processes["kernel"].kill()
    else:
        processes["runner"].terminate()
    wait_for_the_end_of({**processes, **left})
    shown = project.grd("status", "last", "--json").json
    assert shown["state"] == "interrupted"
    if then == "kernel SIGKILL":
        assert shown["cause"] == "kernel_died" and "guardian did not answer" in shown["detail"]
    else:
        assert shown["cause"] == "sigterm"
    resumes(project)


def test_a_stopped_runner_cannot_keep_the_kernel_beyond_the_deadline(project: Project) -> None:
    project.notebook("run.ipynb", CHILDREN, SLEEPING, "print('the end')", parameters=PARAMETERS)
    process = project.start("research", "run.ipynb", "--timeout", "15s", "--grace", "2s")
    project.wait_for_output("here")
    record = project.record()
    kernel = psutil.Process(record["kernel_pid"])
    left = children(project)
    os.kill(record["runner"]["pid"], signal.SIGSTOP)
    try:
        wait_for_the_end_of({"kernel": kernel, **left})
    finally:
        os.kill(record["runner"]["pid"], signal.SIGCONT)
    assert project.finish(process).code == 75
    shown = project.grd("status", "last", "--json").json
    assert (shown["state"], shown["cause"]) == ("interrupted", "deadline")
    resumes(project)


SAVING = """
import time
print('here', flush=True)
if not resume:
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        open('saving', 'w').close()
        time.sleep(3)
        open('saved', 'w').close()
        raise
"""


def test_the_kernel_of_a_lost_runner_may_save_and_resume_waits_for_it(project: Project) -> None:
    processes = start(project, SAVING, options=("--grace", "60s"))
    processes["runner"].kill()
    wait_until((project.path / "saving").exists, "the kernel to save")
    shown = project.grd("status", "last", "--json").json
    assert (shown["state"], shown["cause"]) == ("interrupted", "runner_lost")
    assert "guardian" in shown["detail"]
    assert not (project.path / "saved").exists(), "the machine is too slow to see it saving"
    assert project.grd("rm", "last").code == 69
    resumed = project.grd("resume", "last", "--timeout", "5m")
    assert resumed.code == 0, resumed.err
    assert "--now" in resumed.err
    assert (project.path / "saved").exists()
    # The grace is a minute: the kernel had nothing left to do, and nobody waited for its end.
    assert project.processes() == []


@pytest.mark.parametrize(
    "command", [("resume", "last", "--now", "--timeout", "5m"), ("stop", "last", "--now")]
)
def test_now_kills_a_kernel_that_is_still_saving(project: Project, command: tuple[str, ...]) -> None:
    processes = start(project, SAVING.replace("sleep(3)", "sleep(50)"), options=("--grace", "60s"))
    processes["runner"].kill()
    wait_until((project.path / "saving").exists, "the kernel to save")
    ended = project.grd(*command)
    assert ended.code == 0, ended.err
    assert living(processes) == []
    assert not (project.path / "saved").exists()


def test_a_run_that_a_notebook_started_outlives_the_end_of_that_notebooks_run(project: Project) -> None:
    project.notebook("inner.ipynb", "import time\nprint('inner', flush=True)\ntime.sleep(600)")
    inner = "[sys.executable, '-m', 'grd', 'research', 'inner.ipynb', '--detach', '--timeout', '8m']"
    outer = f"import subprocess, sys, time\nsubprocess.run({inner}, check=True)\nprint('here', flush=True)"
    project.notebook("outer.ipynb", outer, "time.sleep(600)")
    assert project.grd("research", "outer.ipynb", "--detach", "--timeout", "8m").code == 0

    def runs() -> dict[str, Path]:
        return {path.name.split("-")[2]: path for path in project.run_folders() if path.name[0] != "."}

    wait_until(lambda: "inner" in runs(), "the inner run")
    found = runs()
    journal = found["inner"] / "attempts" / "1" / "journal.jsonl"
    wait_until(lambda: journal.exists() and "inner" in journal.read_text(), "the inner run's output")
    outer_kernel = psutil.Process(project.record(found["outer"])["kernel_pid"])
    stopped = project.grd("stop", found["outer"].name, "--now")
    assert stopped.code == 0, stopped.err
    wait_for_the_end_of({"outer kernel": outer_kernel})
    assert project.grd("status", found["inner"].name, "--json").json["state"] == "running"
    assert project.grd("stop", found["inner"].name).code == 0
    assert project.grd("status", found["inner"].name, "--json").json["state"] == "interrupted"


def test_the_kernel_is_the_first_to_go_when_memory_runs_out(project: Project) -> None:
    def score(process: psutil.Process) -> int:
        return int(Path(f"/proc/{process.pid}/oom_score_adj").read_text())

    processes = start(project, "import time", SLEEPING)
    assert score(processes["kernel"]) > score(processes["runner"])
    assert score(processes["guardian"]) == score(processes["runner"])
    assert project.grd("stop", "last", "--now").code == 0


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("os._exit(3)", "exit code 3"),
    ],
)
def test_what_ended_the_kernel_is_told_as_it_was(project: Project, cell: str, said: str) -> None:
    project.notebook("run.ipynb", f"import os\n{cell}")
    ended = project.grd("research", "run.ipynb", "--json")
    assert (ended.code, ended.json["cause"]) == (75, "kernel_died")
    assert f"the kernel died in cell 0: {said}" in ended.json["detail"]


@pytest.mark.parametrize("end", ["stopped", "completed"])
def test_children_that_a_cell_left_hold_up_no_end_of_the_run(project: Project, end: str) -> None:
    cells = [CHILDREN] if end == "completed" else [CHILDREN, SLEEPING]
    project.notebook("run.ipynb", *cells, "print('the end')", parameters=PARAMETERS)
    process = project.start("research", "run.ipynb", "--timeout", "10m", "--grace", "100s")
    if end == "stopped":
        project.wait_for_output("here")
        assert project.grd("stop", "last").code == 0
    ended = project.finish(process, 60)
    assert ended.code == (75 if end == "stopped" else 0), ended.err
    wait_for_the_end_of(children_known(project))
    killed = [event for event in project.events() if event["kind"] == "stop" and event["stage"] == 3]
    assert killed == [], "the kernel had to be killed"
    attempt = project.record()["attempts"][0]
    assert attempt["seconds"] < 50, "the kernel's own exit took long"


def children_known(project: Project) -> dict[str, psutil.Process]:
    """Those of the notebook's children that are still there."""
    found = {}
    for line in (project.path / "children").read_text().split("\n")[:-1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            found[line] = psutil.Process(int(line.split()[1]))
    return found
