"""A batch whose coordinator is killed: whenever that is, nothing is run twice and nothing is forgotten."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Project, has_ended, wait_until

from grd.execution import runner_template
from grd.files import read_json_lines
from grd.runs.batch_folder import BatchFolder
from grd.runs.folder import RunFolder

pytestmark = pytest.mark.faults

MOST_KILOBYTES = 3500
"""For 750 more ended runs: a list of all of them while the project's page is written, and what an estimate
needs of each."""

PARAMETERS = "seed: int = 0\ntimeout = None\ncheckpoint_dir = ''\nresume = False"
TOLD = """
import pathlib, time
def tell(word):
    with open("told.txt", "a") as told:
        told.write(f"{word} {seed}\\n")
tell("resumed" if resume else "begun")
"""
TRAIN = """
from grd.experiment import training
state = {"n": 0}
for epoch in training.epochs(4, state=state, checkpoint_dir=checkpoint_dir, resume=resume):
    for _ in epoch.steps(range(5)):
        time.sleep(0.02)
    if int(epoch) == 1:
        tell("at 1")
        while not pathlib.Path("go").exists() and not resume:
            for _ in epoch.steps(range(1)):
                time.sleep(0.05)
    state["n"] += 1
"""
DONE = "tell('done')"

STRIKE = '''
"""A coordinator that kills itself, as kill -9 would, at the chosen moment."""
import os, signal, sys
from grd.batch import coordinator, jobs, record
from grd.execution import runner_template
from grd.steps import keys

moment, folder, lock = sys.argv[1:4]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def after(owner, name):
    whole = getattr(owner, name)
    def wrapped(*a, **k):
        whole(*a, **k)
        die()
    setattr(owner, name, wrapped)

def at_step(step, then):
    write = record.BatchEvents.write
    def wrapped(self, kind, **values):
        if values.get("step") == step and not then:
            die()
        write(self, kind, **values)
        if values.get("step") == step:
            die()
    record.BatchEvents.write = wrapped

if moment == "before anything":
    record.save = die
elif moment == "before a run is written down":
    at_step("starting", then=False)
elif moment == "between writing and start":
    at_step("starting", then=True)
elif moment == "when the key has its run":
    after(keys.Slot, "assign")
elif moment == "when the folder is there":
    jobs.launch = die
elif moment == "when the runner is forked and waits for its word":
    after(runner_template.ForkedRunner, "__init__")
elif moment == "when the runner has started":
    after(jobs, "launch")
elif moment == "when the start is written down":
    at_step("started", then=True)
elif moment == "before an end is written down":
    at_step("ended", then=False)
elif moment == "before the end of the batch":
    coordinator.Coordinator._end = die
sys.exit(coordinator.main([folder, lock]))
'''

SUBMIT = """
import subprocess, sys
from grd.batch import submitting
def launch(folder, lock, working_dir):
    import os
    os.set_inheritable(lock, True)
    process = subprocess.Popen(
        [sys.executable, "strike.py", sys.argv[1], str(folder.path), str(lock)],
        pass_fds=(lock,), start_new_session=True,
    )
    os.close(lock)
    return process
submitting.launch_coordinator = launch
made = submitting.batch(
    {"notebook": "held.ipynb", "grid": {"seed": [1, 2]}, "jobs": 1}, wait=True
)
print(made.id)
"""


def told(project: Project) -> Counter[str]:
    path = project.path / "told.txt"
    return Counter(path.read_text().splitlines()) if path.exists() else Counter()


def status(project: Project) -> dict[str, Any]:
    shown: dict[str, Any] = project.grd("batch", "status", "--json").json
    return shown


def nothing_is_left(project: Project) -> None:
    assert project.processes() == []
    folders = [path.name for path in project.run_folders()]
    assert not [name for name in folders if name.startswith(".")], folders
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        assert "grd.batch.coordinator" not in line or str(project.path) not in line
    wait_until(lambda: templates(project) == [], "the end of what forks runners", 10)


def templates(project: Project) -> list[psutil.Process]:
    """Processes that runners of this project are forked from."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "grd.execution.runner_template" in process.cmdline() and process.cwd() == str(project.path):
                found.append(process)
    return found


def open_files(pid: int) -> list[str]:
    """What its descriptors are, from 0 on."""
    links = sorted(Path(f"/proc/{pid}/fd").iterdir(), key=lambda link: int(link.name))
    return [str(link.readlink()) for link in links]


def begin_held(project: Project, seeds: str) -> int:
    """A batch of trainings, one at a time, of which the first waits for a file; that one's runner."""
    project.notebook("train.ipynb", TOLD, TRAIN, DONE, parameters=PARAMETERS)
    started = project.grd("sweep", "train.ipynb", "-g", "seed", seeds, "--jobs", "1", "--detach")
    assert started.code == 0, started.err
    wait_until(lambda: told(project)["at 1 1"], "epoch 1")
    run = project.runs_dir / status(project)["runs"][0]["run_id"]
    return int(project.record(run)["runner"]["pid"])


@pytest.mark.skipif(sys.platform != "linux", reason="runners are forked on Linux only")
def test_a_forked_runner_is_a_runner_like_any_other(project: Project) -> None:
    runner = psutil.Process(begin_held(project, "1..1"))
    [template] = templates(project)
    assert runner.ppid() == template.pid
    assert os.getsid(runner.pid) == runner.pid
    run = project.run_folders()[0]
    assert [word for word in runner.cmdline() if word][1:6] == [
        "-P", "-m", "grd.execution.runner", str(run), "1",
    ]  # fmt: skip
    assert runner.environ()["GRD_RUNNER"] == run.name
    shared = set(open_files(template.pid)) & set(open_files(runner.pid))
    assert not {name for name in shared if name.startswith(("socket:", "pipe:"))}
    assert open_files(runner.pid)[:3] == [os.devnull, *[str(run / "attempts/1/runner.log")] * 2]
    (project.path / "go").touch()
    assert project.grd("batch", "wait", "last").code == 0
    nothing_is_left(project)


@pytest.mark.skipif(sys.platform != "linux", reason="runners are forked on Linux only")
def test_a_batch_goes_on_when_what_forks_its_runners_is_killed(project: Project) -> None:
    runner = begin_held(project, "1..3")
    [template] = templates(project)
    template.kill()
    wait_until(lambda: templates(project) == [], "its end")
    assert psutil.pid_exists(runner)
    (project.path / "go").touch()
    assert project.grd("batch", "wait", "last").code == 0
    assert status(project)["counts"] == {"completed": 3}
    assert [told(project)[f"begun {seed}"] for seed in (1, 2, 3)] == [1, 1, 1]
    nothing_is_left(project)


@pytest.mark.skipif(sys.platform != "linux", reason="runners are forked on Linux only")
def test_a_batch_goes_on_within_seconds_when_what_forks_its_runners_is_stopped(project: Project) -> None:
    begin_held(project, "1..2")
    [template] = templates(project)
    template.suspend()
    (project.path / "go").touch()
    assert project.grd("batch", "wait", "last").code == 0
    [events] = project.runs_dir.glob("batches/*/events.jsonl")
    steps = {(e["index"], e["step"]): e["t"] for _, e in read_json_lines(events) if e["kind"] == "run"}
    assert steps[1, "started"] - steps[0, "ended"] < 40
    assert has_ended(template)
    assert status(project)["counts"] == {"completed": 2}
    nothing_is_left(project)


@pytest.mark.skipif(sys.platform != "linux", reason="runners are forked on Linux only")
def test_what_forks_runners_is_gone_with_a_killed_coordinator_also_where_it_is_stopped(
    project: Project,
) -> None:
    begin_held(project, "1..2")
    [template] = templates(project)
    template.suspend()
    os.kill(status(project)["coordinator"]["pid"], signal.SIGKILL)
    wait_until(lambda: has_ended(template), "the end of the template")
    (project.path / "go").touch()
    assert project.grd("batch", "resume", "last").code == 0
    assert status(project)["counts"] == {"completed": 2}
    nothing_is_left(project)


@pytest.mark.skipif(sys.platform != "linux", reason="runners are forked on Linux only")
def test_an_environment_too_large_for_a_message_starts_no_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(runner_template, "start_runner", lambda *given: started.append(given))
    template = runner_template.RunnerTemplate()
    large = {f"LARGE_{number}": "x" * 50_000 for number in range(5)}
    template.start(RunFolder(tmp_path / "run"), 1, -1, large)
    assert (template.pid, started) == (None, [(RunFolder(tmp_path / "run"), 1, -1, large)])


@pytest.mark.skipif(sys.platform != "linux", reason="runners are forked on Linux only")
def test_a_killed_coordinator_leaves_nothing_that_forks_runners(project: Project) -> None:
    runner = begin_held(project, "1..2")
    os.kill(status(project)["coordinator"]["pid"], signal.SIGKILL)
    wait_until(lambda: templates(project) == [], "its end")
    assert psutil.pid_exists(runner)
    follower = project.start("batch", "resume", "last", "--json")
    (project.path / "go").touch()
    ended = project.finish(follower)
    assert ended.json["counts"] == {"completed": 2}, ended.err
    nothing_is_left(project)


@pytest.mark.parametrize(
    "moment",
    [
        "before anything",
        "before a run is written down",
        "between writing and start",
        "when the key has its run",
        "when the folder is there",
        "when the runner is forked and waits for its word",
        "when the runner has started",
        "when the start is written down",
        "before an end is written down",
        "before the end of the batch",
    ],
)
def test_a_coordinator_killed_at_any_moment_loses_nothing_and_repeats_nothing(
    project: Project, moment: str
) -> None:
    project.notebook("held.ipynb", TOLD, DONE, parameters=PARAMETERS)
    (project.path / "strike.py").write_text(STRIKE)
    done = subprocess.run(
        [sys.executable, "-c", SUBMIT, moment],
        cwd=project.path,
        env=project.environment | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    shown = status(project)
    assert (shown["state"], shown["cause"]) in (
        ("interrupted", "coordinator_lost"),
        ("completed", None),  # every run had its end, and only the word of it is missing
    )
    assert (shown["state"] == "completed") == (moment == "before the end of the batch")
    if shown["state"] != "completed":
        assert shown["resume_command"] == f"grd batch resume {shown['batch_id']}"
        assert shown["resume_command"] in project.grd("status").out
    resumed = project.grd("batch", "resume", "last", "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["counts"] == {"completed": 2}
    # A start that was cut off before its kernel counts as an attempt; the notebook itself ran once.
    counts = told(project)
    assert counts["done 1"] == counts["done 2"] == 1
    assert sum(count for word, count in counts.items() if not word.startswith("done")) == 2
    assert len(project.run_folders()) == 2
    nothing_is_left(project)


def test_a_coordinator_and_a_runner_killed_in_mid_run_go_on_and_no_run_starts_again(project: Project) -> None:
    project.notebook("train.ipynb", TOLD, TRAIN, DONE, parameters=PARAMETERS)
    done = project.grd("sweep", "train.ipynb", "-g", "seed", "1..3", "--jobs", "2", "--detach", "--json")
    at_once = done.json["jobs"] or status(project)["jobs"]
    wait_until(lambda: sum(told(project)[f"at 1 {seed}"] for seed in (1, 2, 3)) >= (at_once or 1), "epoch 1")
    shown = status(project)
    assert shown["state"] == "running"
    os.kill(shown["coordinator"]["pid"], signal.SIGKILL)
    lost = status(project)
    assert (lost["state"], lost["cause"], lost["resumable"]) == ("interrupted", "coordinator_lost", True)
    assert lost["counts"]["running"] == shown["jobs"]
    os.kill(project.record(project.runs_dir / lost["runs"][0]["run_id"])["runner"]["pid"], signal.SIGKILL)
    follower = project.start("batch", "resume", "last", "--json")
    wait_until(lambda: told(project)["resumed 1"], "the killed run goes on")
    (project.path / "go").touch()
    ended = project.finish(follower)
    assert ended.code == 0, ended.err
    assert ended.json["counts"] == {"completed": 3}
    counts = told(project)
    assert [counts[f"begun {seed}"] for seed in (1, 2, 3)] == [1, 1, 1]
    assert [counts[f"done {seed}"] for seed in (1, 2, 3)] == [1, 1, 1]
    assert sum(counts[f"resumed {seed}"] for seed in (1, 2, 3)) == 1
    assert ended.json["runs"][0]["attempts"] == 2
    nothing_is_left(project)


@pytest.mark.parametrize("how", ["stop", "SIGINT", "stop without a coordinator"])
def test_a_stopped_batch_saves_and_can_be_resumed(project: Project, how: str) -> None:
    project.notebook("train.ipynb", TOLD, TRAIN, DONE, parameters=PARAMETERS)
    sweep = ["sweep", "train.ipynb", "-g", "seed", "1,2", "--jobs", "1"]
    follower = project.start(*sweep, *(["--timeout", "12m"] if how == "stop" else []))
    wait_until(lambda: told(project)["at 1 1"], "epoch 1")
    if how == "SIGINT":
        follower.send_signal(signal.SIGINT)
    else:
        if how != "stop":
            os.kill(status(project)["coordinator"]["pid"], signal.SIGKILL)
        stopped = project.grd("batch", "stop", "last")
        assert stopped.code == 0, stopped.err
    ended = project.finish(follower)
    assert ended.code == 75, ended.err
    wait_until(lambda: project.processes() == [], "the end of all runs")
    shown = status(project)
    assert (shown["state"], shown["counts"]) == ("interrupted", {"interrupted": 1, "cancelled": 1})
    assert shown["cause"] == {"SIGINT": "sigint", "stop": "stopped"}.get(how, "coordinator_lost")
    assert shown["runs"][0]["cause"] == "stopped"
    (project.path / "go").touch()
    if how == "stop":
        settings = project.path.parent / "config" / "grd" / "config.toml"
        allowed = settings.read_text()
        settings.write_text("")
        assert project.grd("batch", "resume", "last", "--timeout", "2h").code == 77
        assert status(project)["counts"] == {"interrupted": 1, "cancelled": 1}
        settings.write_text(allowed)
        assert project.grd("batch", "resume", "last", "--timeout", "soon").code == 2
    caps = ["--timeout", "11m", "--budget", "13m"] if how == "stop" else []
    resumed = project.grd("batch", "resume", "last", "--json", *caps)
    assert resumed.code == 0, resumed.err
    assert resumed.json["counts"] == {"completed": 2}
    if how == "stop":
        kept = [project.record(project.runs_dir / run["run_id"]) for run in resumed.json["runs"]]
        assert [(each["timeout"], each["budget"]["typed"]) for each in kept] == [(660, 780)] * 2
        log = Path(project.environment["GRD_STATE_DIR"], "approvals.jsonl").read_text().splitlines()
        allowed_now = [entry for entry in map(json.loads, log) if entry["timeout"] == 660]
        assert [(e["kind"], e["budget"], e["attempt"]) for e in allowed_now] == [
            ("allowed", 780, 2), ("allowed", 780, 1)
        ]  # fmt: skip
    assert told(project)["begun 1"] == told(project)["resumed 1"] == 1
    nothing_is_left(project)


def test_a_second_ctrl_c_kills_and_a_hang_up_changes_nothing(project: Project) -> None:
    stubborn = "while True:\n  try:\n    time.sleep(1)\n  except KeyboardInterrupt:\n    tell('asked')"
    project.notebook("stubborn.ipynb", TOLD, stubborn, parameters=PARAMETERS)
    follower = project.start("sweep", "stubborn.ipynb", "-g", "seed", "1", "--timeout", "1h")
    wait_until(lambda: told(project)["begun 1"], "the cell")
    follower.send_signal(signal.SIGINT)
    wait_until(lambda: told(project)["asked 1"], "the request")
    follower.send_signal(signal.SIGINT)
    ended = project.finish(follower, 60)
    assert ended.code == 75, ended.err
    assert status(project)["counts"] == {"interrupted": 1}
    nothing_is_left(project)


def many_completed(project: Project, keys: list[str], run: Path) -> None:
    """Completed runs with these keys, each as ``run`` is; all but the kernels that made them."""
    record = project.record(run)
    (project.runs_dir / ".keys").mkdir(exist_ok=True)
    for number, key in enumerate(keys):
        run_id = f"20200101-000000-held-{number:06d}"
        copy = project.runs_dir / run_id
        copy.mkdir()
        parameters = {"seed": number + 10, "note": f"{number} " * 5}
        changed = {"run_id": run_id, "key": key, "folder": str(copy), "parameters": parameters}
        (copy / "run.json").write_text(json.dumps(record | changed))
        slot = hashlib.sha256(key.encode()).hexdigest()[:32]
        (project.runs_dir / ".keys" / slot).write_text(f"{run_id}\n")


def has_started(batch: BatchFolder, index: int) -> bool:
    return any(
        (event.get("index"), event.get("step")) == (index, "started")
        for _, event in read_json_lines(batch.events)
    )


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told by /proc")
@pytest.mark.timeout(600)
def test_a_coordinator_takes_no_more_memory_for_four_times_as_many_ended_runs(project: Project) -> None:
    """All of its runs but the last have ended, and all are earlier runs for the last one's estimate."""
    waits = "import pathlib, time\nwhile seed == 1 and not pathlib.Path('go').exists():\n    time.sleep(0.05)"
    project.notebook("held.ipynb", waits, parameters="seed: int = 0\nnote: str = ''")
    assert project.grd("research", "held.ipynb", "-p", "seed", "2").code == 0
    [model] = project.run_folders()
    taken = []
    for count in (250, 1000):
        rows = [{"seed": number + 10, "note": f"{number} " * 5} for number in range(count)]
        (project.path / "rows.json").write_text(json.dumps([*rows, {"seed": 1, "note": f"of {count}"}]))
        sweep = ("sweep", "held.ipynb", "--file", "rows.json", "--jobs", "1")
        planned = project.grd(*sweep, "--dry-run", "--json").json["runs"]
        for old in project.runs_dir.glob("20200101-*"):
            shutil.rmtree(old)
        many_completed(project, [run["key"] for run in planned[:-1]], model)
        (project.path / "go").unlink(missing_ok=True)
        started = project.grd(*sweep, "--detach", "--json")
        assert started.code == 0, started.err
        batch = BatchFolder(Path(started.json["folder"]))
        wait_until(lambda of=batch, last=count: has_started(of, last), "the start of the last run")
        pid = status(project)["coordinator"]["pid"]
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        taken.append(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
        (project.path / "go").touch()
        assert project.grd("batch", "wait", "last").code == 0
        assert status(project)["counts"] == {"completed": count + 1}
    assert taken[1] - taken[0] < MOST_KILOBYTES, taken
