"""Runs that nobody follows: start, look, wait, stop, and the same command typed again."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from conftest import Project, wait_until

from grd.files import take_lock

PARAMETERS = "epochs = 4\nseconds = 0.0\ntimeout = None\ncheckpoint_dir = ''\nresume = False"
TRAIN = """
import time
from grd.experiment import log_metrics, training
state = {"total": 0}
for epoch in training.epochs(epochs, state=state, checkpoint_dir=checkpoint_dir, resume=resume):
    time.sleep(seconds)
    state["total"] += int(epoch) + 1
    print("epoch", int(epoch), flush=True)
    epoch.log(total=state["total"])
log_metrics(final=state["total"])
"""
SLEEP = "import time\nprint('here', flush=True)\nif not resume:\n    time.sleep(600)"


def test_a_detached_run_survives_the_death_of_everything_that_started_it(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    starter = project.start("research", "train.ipynb", "-p", "seconds", "0.5", "--detach", "--json")
    started = project.finish(starter, 20)
    assert started.code == 0, started.err
    assert set(started.json) >= {"run_id", "state", "folder"}
    assert started.json["state"] in ("queued", "running")
    try:
        os.killpg(starter.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nothing is left in the starter's group: the run never was in it
    waited = project.grd("wait", started.json["run_id"], "--timeout", "100", "--json")
    assert waited.code == 0, waited.err
    assert waited.json["runs"][0]["metrics"]["final"] == 10


def test_wait_tells_by_its_exit_code_what_became_of_the_runs(project: Project) -> None:
    project.notebook("sleep.ipynb", SLEEP, parameters=PARAMETERS)
    project.notebook("good.ipynb", "1")
    project.notebook("bad.ipynb", "1 / 0")
    runs = {
        name: project.grd("research", f"{name}.ipynb", "--detach", "--json").json["run_id"]
        for name in ("good", "bad", "sleep")
    }
    assert project.grd("wait", runs["good"]).code == 0
    assert project.grd("wait", runs["bad"]).code == 1
    out_of_time = project.grd("wait", runs["sleep"], "--timeout", "0.5", "--json")
    assert (out_of_time.code, out_of_time.json["timed_out"]) == (124, True)
    assert project.grd("wait", runs["sleep"], runs["good"], "--any", "--timeout", "60").code == 0
    assert project.grd("wait", "nope").code == 66
    assert project.grd("wait", runs["good"], "--timeout", "soon").code == 2
    stopped = project.grd("stop", runs["sleep"], "--json")
    assert stopped.code == 0, stopped.err
    assert (stopped.json["runs"][0]["state"], stopped.json["runs"][0]["cause"]) == ("interrupted", "stopped")
    assert project.grd("wait", *runs.values()).code == 1
    assert project.processes() == []
    again = project.grd("stop", runs["sleep"])
    assert (again.code, "is not running" in again.err) == (0, True)


def test_stop_now_kills_without_waiting_for_the_grace(project: Project) -> None:
    loop = "while True:\n  try:\n    time.sleep(1)\n  except BaseException:\n    pass"
    stubborn = f"import time\nprint('here', flush=True)\n{loop}"
    project.notebook("stubborn.ipynb", stubborn, parameters=PARAMETERS)
    project.grd("research", "stubborn.ipynb", "--detach", "--grace", "10m")
    project.wait_for_output("here")
    began = time.monotonic()
    assert project.grd("stop", "last", "--now").code == 0
    assert time.monotonic() - began < 60
    record = project.record()
    assert (record["cause"], record["attempts"][0]["stop"]["killed"]) == ("stopped", True)
    assert project.processes() == []


def test_two_calls_with_one_key_at_the_same_moment_start_one_run(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    command = ["research", "train.ipynb", "-p", "seconds", "0.3", "--key", "nightly", "--json"]
    both = [project.finish(process) for process in [project.start(*command), project.start(*command)]]
    assert [call.code for call in both] == [0, 0], both
    assert both[0].json["run_id"] == both[1].json["run_id"]
    assert len([path for path in project.run_folders() if not path.name.startswith(".")]) == 1
    third = project.grd(*command)
    assert (third.code, third.json["attempt"], third.json["metrics"]["final"]) == (0, 1, 10)
    other = project.grd("research", "train.ipynb", "-p", "seconds", "9", "--key", "nightly")
    assert (other.code, "other parameters" in other.err) == (2, True)


def test_the_same_command_again_resumes_until_it_is_done(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    slice_ = ["research", "train.ipynb", "-p", "seconds", "1.0", "-p", "epochs", "12", "--key", "k"]
    codes = []
    while not codes or codes[-1] == 75:
        assert len(codes) < 40
        call = project.grd(*slice_, "--timeout", "8s", "--budget", "15m", "--json")
        codes.append(call.code)
    assert codes[-1] == 0 and 75 in codes, codes
    assert call.json["metrics"]["final"] == 78
    trained = [e["epoch"] for e in project.events() if e["kind"] == "metrics" and e.get("epoch") is not None]
    assert sorted(trained) == list(range(12))


def test_a_key_whose_run_failed_goes_on_only_after_the_notebook_was_edited(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, "1 / 0", parameters=PARAMETERS)
    command = ["research", "train.ipynb", "--key", "k", "--json"]
    assert project.grd(*command).code == 1
    same = project.grd(*command)
    assert (same.code, same.json["attempt"]) == (1, 1)
    project.notebook("train.ipynb", TRAIN, "print('mended')", parameters=PARAMETERS)
    mended = project.grd(*command)
    assert (mended.code, mended.json["attempt"]) == (0, 2)
    assert project.grd("logs", "last").out == "mended\n"


def test_inside_a_slurm_job_a_requeued_script_goes_on_where_it_was(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    job = {"SLURM_JOB_ID": "4711"}
    command = ["research", "train.ipynb", "-p", "seconds", "1", "--timeout", "3s", "--json"]
    first = project.grd(*command, env=job)
    assert first.code == 75
    second = project.grd(
        "research", "train.ipynb", "-p", "seconds", "1", "--timeout", "2m", "--json", env=job
    )
    assert (second.code, second.json["run_id"]) == (0, first.json["run_id"])
    task = project.grd(*command, env=job | {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "2"})
    assert task.json["run_id"] != first.json["run_id"]


def test_the_command_at_the_end_hears_how_it_ended_and_may_resume(project: Project) -> None:
    project.notebook("sleep.ipynb", SLEEP, parameters=PARAMETERS)
    again = f"{sys.executable} -m grd resume $GRD_RUN_ID --timeout 2m"
    command = f'echo "$GRD_RUN_STATE $GRD_RUN_CAUSE" >> ended; test -e once || {{ touch once; {again}; }}'
    started = project.grd("research", "sleep.ipynb", "--timeout", "3s", "--on-end", command)
    assert started.code == 75, started.err
    ended = project.path / "ended"
    wait_until(lambda: ended.exists() and len(ended.read_text().splitlines()) == 2, "both ends")
    assert ended.read_text().splitlines() == ["interrupted deadline", "completed "]


def test_every_interrupted_run_is_resumed_by_one_command(project: Project) -> None:
    project.notebook("sleep.ipynb", SLEEP, parameters=PARAMETERS)
    for _ in range(2):
        assert project.grd("research", "sleep.ipynb", "--timeout", "2s").code == 75
    done = project.grd("resume", "--all-interrupted", "--timeout", "2m", "--json")
    assert done.code == 0, done.err
    assert [run["state"] for run in done.json["runs"]] == ["completed", "completed"]
    assert project.grd("resume", "--all-interrupted").code == 0
    assert project.grd("resume").code == 2
    assert project.grd("resume", "last", "--all-interrupted").code == 2


def test_events_and_logs_can_be_followed_from_a_position(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    project.grd("research", "train.ipynb", "-p", "seconds", "0.5", "--detach")
    project.wait_for_event("metrics", epoch=0)
    following = project.start("logs", "last", "--follow")
    events = project.grd("events", "last", "--follow")
    lines = [json.loads(line) for line in events.out.splitlines()]
    assert lines[-1]["state"] == "completed"
    cut = lines[3]["offset"]
    rest = project.grd("events", "last", "--since", str(cut)).out.splitlines()
    assert [json.loads(line) for line in rest] == lines[4:]
    assert project.finish(following).out == "epoch 0\nepoch 1\nepoch 2\nepoch 3\n"
    assert project.grd("logs", "last", "--tail", "2").out == "epoch 2\nepoch 3\n"


def test_rm_and_gc_delete_what_they_say_and_never_what_is_in_use(project: Project) -> None:
    project.notebook("sleep.ipynb", SLEEP, parameters=PARAMETERS)
    project.grd("research", "sleep.ipynb", "--detach")
    project.wait_for_output("here")
    refused = project.grd("rm", "last")
    assert (refused.code, "grd stop" in refused.err) == (69, True)
    assert project.grd("gc", "--dry-run", "--json").json["removed"] == []
    project.grd("stop", "last")
    run = project.only_run()
    before = sorted(path.name for path in run.iterdir())
    listed = project.grd("gc", "--dry-run", "--json").json["removed"]
    assert listed and sorted(path.name for path in run.iterdir()) == before
    removed = project.grd("gc", "--json").json["removed"]
    assert [item["path"] for item in removed] == [item["path"] for item in listed]
    assert not any(Path(item["path"]).exists() for item in removed)
    assert project.grd("resume", "last", "--timeout", "2m").code == 0
    assert project.grd("rm", "last", "--dry-run").code == 0
    assert run.exists()
    assert project.grd("rm", run.name).code == 0
    assert not run.exists()


def test_gc_sweeps_what_a_runner_that_was_killed_left_beside_the_state_page(project: Project) -> None:
    project.notebook("run.ipynb", "1")
    assert project.grd("research", "run.ipynb").code == 0
    planning = project.path / ".planning"
    half, mine = planning / ".STATE.md.8a7b6c5d.tmp", planning / ".notes.tmp"
    for path in (half, mine):
        path.write_text("half")
    listed = project.grd("gc", "--dry-run", "--json").json["removed"]
    assert str(half) in [item["path"] for item in listed]
    assert half.exists()
    writing = take_lock(project.runs_dir / ".state-page.lock")
    assert writing is not None
    try:  # somebody writes the page just now: it is theirs
        assert project.grd("gc").code == 0
        assert half.exists()
    finally:
        os.close(writing)
    assert project.grd("gc").code == 0
    assert (half.exists(), mine.exists()) == (False, True)


def test_the_state_page_keeps_every_other_byte_and_names_the_next_command(project: Project) -> None:
    page = project.path / ".planning" / "STATE.md"
    page.write_bytes(b"# State\r\n\r\nmine \xff\r\n")
    project.notebook("bad.ipynb", "1 / 0")
    assert project.grd("research", "bad.ipynb").code == 1
    written = page.read_bytes()
    assert written.startswith(b"# State\r\n\r\nmine \xff\r\n")
    assert f"grd resume {project.only_run().name}".encode() in written
    project.notebook("good.ipynb", "1")
    assert project.grd("research", "good.ipynb").code == 0
    assert page.read_bytes().count(b"grd:runs:start") == 1
    assert b"1 completed" in page.read_bytes()


def test_settings_say_where_they_come_from_and_bad_ones_are_exit_78(project: Project, tmp_path: Path) -> None:
    def shown(**env: str) -> dict[str, dict[str, object]]:
        found: dict[str, dict[str, object]] = project.grd("config", "show", "--json", env=env).json[
            "settings"
        ]
        return found

    (tmp_path / "config" / "grd").mkdir(parents=True, exist_ok=True)
    (tmp_path / "config" / "grd" / "config.toml").write_text('grace = "11s"\nstart_timeout = "70s"\n')
    assert shown()["grace"]["value"] == 11
    (project.path / "pyproject.toml").write_text('[tool.grd]\ngrace = "12s"\n')
    assert shown()["grace"]["value"] == 12
    (project.path / "grd.toml").write_text('grace = "13s"\n')
    assert shown()["grace"] == {"value": 13.0, "origin": str(project.path / "grd.toml")}
    assert shown(GRD_GRACE="14s")["grace"] == {"value": 14.0, "origin": "GRD_GRACE"}
    assert shown()["start_timeout"]["origin"] == str(tmp_path / "config" / "grd" / "config.toml")
    assert "(default)" in project.grd("config", "show", "--origin").out
    (project.path / "grd.toml").write_text('grace = "soon"\n')
    bad = project.grd("config", "show")
    assert (bad.code, len(bad.err.strip().splitlines())) == (78, 1)
    (project.path / "grd.toml").write_text("grcae = 3\n")
    assert "unknown setting 'grcae'" in project.grd("status").err


def test_a_run_of_a_newer_grd_is_still_read(project: Project) -> None:
    project.notebook("good.ipynb", "1")
    assert project.grd("research", "good.ipynb").code == 0
    path = project.only_run() / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": "grd.run/9", "novelty": {"x": 1}}))
    shown = project.grd("status", "last")
    assert shown.code == 0
    assert "completed" in shown.out
    assert "another version of grd (grd.run/9" in shown.err
