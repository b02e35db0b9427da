"""Starting, steering and tidying runs as typed: detach, keys, wait, stop, on-end, rm, gc, config, events."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Project, wait_until
from test_research import PARAMETERS, TICKS, TRAIN

from grd.files import take_lock


def detached(project: Project, *arguments: str, **options: Any) -> dict[str, Any]:
    """Start a run and leave it."""
    started = project.grd("research", *arguments, "--detach", "--json", **options)
    assert started.code == 0, started.err
    shown: dict[str, Any] = started.json
    return shown


def trained(project: Project, run: Path | None = None) -> list[int]:
    """Epochs in the order they were trained."""
    return [e["epoch"] for e in project.events(run) if e["kind"] == "metrics" and e.get("epoch") is not None]


def test_detach_answers_soon_and_the_run_outlives_the_whole_group_that_started_it(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    began = time.monotonic()
    command = shlex.join(
        [sys.executable, "-m", "grd", "research", "train.ipynb", "-p", "seconds", "1", "--detach", "--json"]
    )
    shell = subprocess.Popen(
        ["bash", "-c", f"{command}; sleep 600"],
        cwd=project.path,
        env=project.environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert shell.stdout is not None
    answer = ""
    while not answer.endswith("\n}\n"):
        line = shell.stdout.readline()
        assert line, answer
        answer += line
    seconds = time.monotonic() - began
    os.killpg(shell.pid, signal.SIGKILL)
    shell.wait()
    shell.stdout.close()
    shown = json.loads(answer)
    assert set(shown) >= {"run_id", "state", "folder"}
    assert shown["state"] in ("queued", "running") and Path(shown["folder"]).is_dir()
    assert seconds < 60, f"--detach took {seconds:.1f} s"  # 2 s on a machine that does nothing else
    done = project.grd("wait", shown["run_id"], "--timeout", "100", "--json")
    assert (done.code, done.json["timed_out"], done.json["runs"][0]["metrics"]["final"]) == (0, False, 10)


def test_wait_tells_the_end_by_its_exit_code(project: Project) -> None:
    project.notebook("good.ipynb", "1")
    project.notebook("bad.ipynb", "1 / 0")
    project.notebook("ticks.ipynb", TICKS)
    good = detached(project, "good.ipynb")["run_id"]
    bad = detached(project, "bad.ipynb")["run_id"]
    assert project.grd("wait", good).code == 0
    assert project.grd("wait", bad).code == 1
    assert project.grd("wait", good, bad).code == 1
    assert project.grd("wait", "nothing-of-this-name").code == 66
    ticks = detached(project, "ticks.ipynb")["run_id"]
    project.wait_for_event("cell", project.runs_dir / ticks, status="running")
    late = project.grd("wait", ticks, "--timeout", "0.5", "--json")
    assert (late.code, late.json["timed_out"], late.json["runs"][0]["state"]) == (124, True, "running")
    assert project.grd("wait", good, ticks, "--any", "--timeout", "60").code == 0
    stopped = project.grd("stop", ticks, "--json")
    assert (stopped.code, stopped.json["runs"][0]["cause"]) == (0, "stopped")
    assert project.grd("wait", ticks).code == 75
    assert project.grd("wait", good, ticks).code == 75
    assert project.grd("wait", good, "--timeout", "soon").code == 2


def test_stop_saves_and_stop_now_kills(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    run = detached(project, "train.ipynb", "-p", "seconds", "0.5", "-p", "epochs", "60")["run_id"]
    folder = project.runs_dir / run
    project.wait_for_event("metrics", folder, epoch=1)
    assert project.grd("stop", run).code == 0
    first = project.record(folder)
    assert (first["state"], first["cause"], first["attempts"][0]["stop"]["killed"]) == (
        "interrupted",
        "stopped",
        False,
    )
    assert first["checkpoint"]["epoch"] >= 1
    seen = len(trained(project, folder))
    resumed = project.grd("resume", run, "--detach")
    assert resumed.code == 0 and "next" not in resumed.out, "it is resumed already"
    wait_until(lambda: len(trained(project, folder)) > seen, "an epoch of the second attempt")
    assert project.grd("stop", run, "--now").code == 0
    second = project.record(folder)
    assert (second["attempts"][1]["cause"], second["attempts"][1]["stop"]["killed"]) == ("stopped", True)
    assert project.processes() == []
    again = project.grd("stop", run)
    assert (again.code, "is not running" in again.err) == (0, True)


def test_two_calls_with_one_key_at_once_start_one_run(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    command = ("research", "train.ipynb", "-p", "seconds", "0.5", "--key", "nightly", "--json")
    calls = [project.start(*command) for _ in range(3)]
    ended = [project.finish(call) for call in calls]
    assert [call.code for call in ended] == [0, 0, 0], [call.err for call in ended]
    assert len({call.json["run_id"] for call in ended}) == 1
    run = project.only_run()
    assert trained(project, run) == [0, 1, 2, 3]
    assert project.record(run)["attempt"] == 1
    shown = project.grd(*command)
    assert (shown.code, shown.json["attempt"], shown.json["state"]) == (0, 1, "completed")
    assert project.record(run)["attempt"] == 1


@pytest.mark.faults
def test_a_key_with_other_parameters_is_refused(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    assert project.grd("research", "train.ipynb", "-p", "epochs", "2", "--key", "k").code == 0
    other = project.grd("research", "train.ipynb", "-p", "epochs", "3", "--key", "k")
    assert (other.code, "another key" in other.err) == (2, True)
    fewer = project.grd("research", "train.ipynb", "--key", "k")
    assert fewer.code == 2, fewer.err
    assert project.grd("research", "train.ipynb", "--key", " ").code == 2
    assert project.record()["attempt"] == 1


def test_a_key_resumes_what_was_interrupted_and_what_failed_once_it_was_edited(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, "1 / 0", parameters=PARAMETERS)
    failed = project.grd("research", "train.ipynb", "--key", "k")
    assert failed.code == 1
    assert project.grd("research", "train.ipynb", "--key", "k").code == 1
    assert project.record()["attempt"] == 1  # unchanged: a failure is not tried again by itself
    project.notebook("train.ipynb", TRAIN, "print('fixed')", parameters=PARAMETERS)
    fixed = project.grd("research", "train.ipynb", "--key", "k", "--json")
    assert (fixed.code, fixed.json["attempt"]) == (0, 2), fixed.err
    assert trained(project) == [0, 1, 2, 3]


@pytest.mark.faults
def test_a_slurm_job_has_a_key_of_its_own_and_goes_on_when_it_is_requeued(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    slurm = {"SLURM_JOB_ID": "4242", "SLURM_ARRAY_JOB_ID": "4200", "SLURM_ARRAY_TASK_ID": "7"}
    command = ("research", "train.ipynb", "-p", "seconds", "0.5", "-p", "epochs", "6", "--json")
    process = project.start(*command, env=slurm)
    project.wait_for_event("metrics", epoch=1)
    process.send_signal(signal.SIGTERM)
    assert project.finish(process).code == 75
    requeued = project.grd(*command, env={**slurm, "SLURM_JOB_ID": "4243", "SLURM_RESTART_COUNT": "1"})
    assert requeued.code == 0, requeued.err
    assert (requeued.json["attempt"], trained(project)) == (2, [0, 1, 2, 3, 4, 5])
    assert requeued.json["key"].startswith("slurm-4200_7-")
    sibling = project.grd(*command, env={**slurm, "SLURM_ARRAY_TASK_ID": "8"})
    assert (sibling.code, sibling.json["run_id"] != requeued.json["run_id"]) == (0, True)


@pytest.mark.faults
def test_all_interrupted_runs_are_resumed_and_the_rest_is_left_alone(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    project.notebook("good.ipynb", "1")
    assert project.grd("research", "good.ipynb").code == 0
    runs = [
        detached(project, "train.ipynb", "-p", "seconds", "0.4", "-p", "epochs", "6")["run_id"]
        for _ in range(2)
    ]
    for run in runs:
        project.wait_for_event("metrics", project.runs_dir / run, epoch=0)
    assert project.grd("stop", *runs).code == 0
    done = project.grd("resume", "--all-interrupted", "--json")
    assert done.code == 0, done.err
    assert [(r["run_id"], r["state"], r["attempt"]) for r in done.json["runs"]] == [
        (run, "completed", 2) for run in runs
    ]
    none = project.grd("resume", "--all-interrupted")
    assert (none.code, "no interrupted run" in none.out) == (0, True)
    assert project.grd("resume").code == project.grd("resume", runs[0], "--all-interrupted").code == 2


@pytest.mark.faults
def test_the_command_at_the_end_knows_the_run_and_may_resume_it(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    grd = shlex.join([sys.executable, "-m", "grd"])
    command = (
        'echo "$GRD_RUN_ID $GRD_RUN_STATE $GRD_RUN_CAUSE" >> ended.txt; '
        f'test "$GRD_RUN_STATE" = interrupted && {grd} resume "$GRD_RUN_ID" --timeout 2m --detach'
    )
    first = project.grd(
        "research", "train.ipynb", "-p", "seconds", "1", "-p", "epochs", "6", "--timeout", "5s",
        "--on-end", command, "--json",
    )  # fmt: skip
    assert (first.code, first.json["cause"]) == (75, "deadline")
    run = first.json["run_id"]
    ended = project.path / "ended.txt"
    wait_until(lambda: ended.exists() and len(ended.read_text().splitlines()) == 2, "two ends")
    assert ended.read_text() == f"{run} interrupted deadline\n{run} completed \n"
    assert trained(project) == [0, 1, 2, 3, 4, 5]


@pytest.mark.faults
def test_rm_refuses_a_run_under_way_and_dry_runs_delete_nothing(project: Project) -> None:
    project.notebook("ticks.ipynb", TICKS)
    run = detached(project, "ticks.ipynb")["run_id"]
    project.wait_for_event("cell", status="running")
    busy = project.grd("rm", run)
    assert (busy.code, f"grd stop {run}" in busy.err) == (69, True)
    assert project.grd("stop", run).code == 0
    before = sorted(project.runs_dir.rglob("*"))
    for command in (("rm", run, "--dry-run"), ("gc", "--dry-run")):
        would = project.grd(*command, "--json")
        assert (would.code, would.json["dry_run"]) == (0, True)
        assert sorted(project.runs_dir.rglob("*")) == before
    assert project.grd("gc", "--dry-run", "--json").json["removed"]
    assert project.grd("gc").code == 0
    assert project.grd("resume", run, "--timeout", "3s").code == 75  # what a resume needs has stayed
    removed = project.grd("rm", run, "--json")
    assert (removed.code, len(removed.json["removed"])) == (0, 1)
    assert not (project.runs_dir / run).exists()
    assert project.grd("rm", run).code == 66


def test_the_state_page_keeps_every_other_byte(project: Project) -> None:
    page = project.path / ".planning" / "STATE.md"
    mine = "# State\r\n\r\nmine: \xe9 \r\n".encode("latin-1")
    page.write_bytes(mine)
    project.notebook("bad.ipynb", "1 / 0")
    assert project.grd("research", "bad.ipynb").code == 1
    run = project.only_run().name
    first = page.read_bytes()
    assert first.startswith(mine) and f"grd resume {run}".encode() in first
    tail = b"\r\nafter, without a last line end"
    page.write_bytes(first + tail)
    project.notebook("good.ipynb", "1")
    assert project.grd("research", "good.ipynb").code == 0
    second = page.read_bytes()
    assert second.startswith(mine) and second.endswith(tail) and b"1 completed" in second
    assert second.count(b"grd:runs:start") == 1


def test_config_show_tells_where_each_setting_comes_from_in_the_order_of_precedence(project: Project) -> None:
    user = Path(project.environment["XDG_CONFIG_HOME"]) / "grd" / "config.toml"

    def grace(**env: str) -> tuple[Any, str]:
        shown = project.grd("config", "show", "--json", env=env)
        assert shown.code == 0, shown.err
        setting = shown.json["settings"]["grace"]
        return setting["value"], setting["origin"]

    assert grace() == (30.0, "default")
    user.parent.mkdir(parents=True, exist_ok=True)
    user.write_text("grace = '11s'\n")
    assert grace() == (11.0, str(user))
    (project.path / "pyproject.toml").write_text("[tool.grd]\ngrace = 12\n")
    assert grace() == (12.0, str(project.path / "pyproject.toml"))
    (project.path / "grd.toml").write_text("grace = '13s'\n")
    assert grace() == (13.0, str(project.path / "grd.toml"))
    assert grace(GRD_GRACE="14s") == (14.0, "GRD_GRACE")
    assert "(GRD_GRACE)" in project.grd("config", "show", "--origin", env={"GRD_GRACE": "14s"}).out
    project.notebook("one.ipynb", "1")
    ran = project.grd("research", "one.ipynb", "--grace", "15s", "--json", env={"GRD_GRACE": "14s"})
    assert ran.json["grace"] == 15.0


@pytest.mark.parametrize("grace", ["-5", "nan", "4000d", "soon"])
def test_a_grace_that_cannot_be_used_is_an_error_before_anything_starts(project: Project, grace: str) -> None:
    project.notebook("one.ipynb", "1")
    typed = project.grd("research", "one.ipynb", "--grace", grace)
    assert (typed.code, len(typed.err.splitlines())) == (2, 1)
    assert "--grace" in typed.err and grace in typed.err
    setting = project.grd("research", "one.ipynb", env={"GRD_GRACE": grace})
    assert (setting.code, len(setting.err.splitlines())) == (78, 1)
    assert "GRD_GRACE" in setting.err
    assert not project.runs_dir.exists()


@pytest.mark.faults
def test_a_limit_of_months_and_a_grace_longer_than_the_limit_are_limits_like_others(project: Project) -> None:
    project.notebook("one.ipynb", "1")
    for limits in (("--timeout", "60d"), ("--timeout", "5m", "--grace", "10m")):
        ran = project.grd("research", "one.ipynb", *limits, "--json")
        assert (ran.code, ran.json["state"]) == (0, "completed"), ran.err


@pytest.mark.parametrize("text", ["grace = 'never'\n", "grcae = 5\n", "grace = [\n"])
def test_a_setting_that_cannot_be_used_is_exit_78_with_its_place(project: Project, text: str) -> None:
    (project.path / "grd.toml").write_text(text)
    for command in (("config", "show"), ("status",)):
        bad = project.grd(*command)
        assert (bad.code, len(bad.err.splitlines())) == (78, 1)
        assert "grd.toml" in bad.err


@pytest.mark.faults
def test_logs_follow_goes_on_from_the_tail_to_the_end(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, "print('the end')", parameters=PARAMETERS)
    run = detached(project, "train.ipynb", "-p", "seconds", "0.8")["run_id"]
    project.wait_for_event("metrics", epoch=1)
    wait_until(lambda: "epoch 1" in project.grd("logs", run).out, "the output of epoch 1")
    followed = project.grd("logs", run, "--follow", "--tail", "1")
    assert followed.code == 0
    lines = followed.out.splitlines()
    assert lines[-1] == "the end" and "epoch 0" not in lines
    assert len(set(lines)) == len(lines)
    assert project.grd("logs", run, "--tail", "1").out == "the end\n"
    assert project.grd("logs", run, "--tail", "0").out == ""


def test_events_since_an_offset_are_exactly_the_rest(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    run = detached(project, "train.ipynb", "-p", "seconds", "0.4")["run_id"]
    project.wait_for_event("metrics", epoch=0)
    first = [json.loads(line) for line in project.grd("events", run).out.splitlines()]
    rest = project.grd("events", run, "--since", str(first[-1]["offset"]), "--follow")
    second = [json.loads(line) for line in rest.out.splitlines()]
    everything = [{k: v for k, v in event.items() if k != "offset"} for event in first + second]
    assert everything == project.events()
    assert second[-1]["state"] == "completed"
    assert project.grd("events", run, "--since", str(second[-1]["offset"])).out == ""


@pytest.mark.faults
def test_a_record_of_a_newer_version_is_read_said_and_kept(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    assert project.grd("research", "train.ipynb").code == 0
    path = project.only_run() / "run.json"
    record = json.loads(path.read_text()) | {"schema": "grd.run/2", "colour": {"is": "new"}}
    record["attempts"][0]["mood"] = "fine"
    path.write_text(json.dumps(record))
    for command in (("status", "last"), ("status",), ("list",)):
        shown = project.grd(*command)
        assert shown.code == 0, shown.err
        assert "another version of grd (grd.run/2" in shown.err
    as_json = project.grd("status", "last", "--json").json
    assert (as_json["colour"], as_json["attempts"][0]["mood"]) == ({"is": "new"}, "fine")
    assert project.grd("resume", "last", "-p", "epochs", "5").code == 0
    after = project.record()
    assert (after["colour"], after["attempts"][0]["mood"], after["attempt"]) == ({"is": "new"}, "fine", 2)


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
