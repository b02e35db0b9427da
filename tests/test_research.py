"""``grd research`` and ``grd resume`` as typed, on notebooks that need no framework."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import Project, wait_until

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

TICKS = "import time\nfor i in range(3000):\n    print('tick', i, flush=True)\n    time.sleep(0.05)"


def outputs(run: Path) -> str:
    notebook = nbformat.read(run / "output.ipynb", as_version=4)
    nbformat.validate(notebook)
    return "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))


def statuses(run: Path) -> list[str]:
    notebook = nbformat.read(run / "output.ipynb", as_version=4)
    return [c.metadata.papermill.status for c in notebook.cells if c.cell_type == "code"]


def test_a_completed_run_tells_the_same_on_disk_in_status_and_in_its_events(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    finished = project.grd("research", "train.ipynb", "-p", "epochs", "3", "--json")
    assert finished.code == 0, finished.err
    run = project.only_run()
    record = project.record()
    assert finished.json == json.loads(project.grd("status", run.name, "--json").out) == record
    assert (record["state"], record["cause"], record["attempt"], record["resumable"]) == (
        "completed",
        None,
        1,
        False,
    )
    assert record["metrics"] == {"total": 6, "final": 6}
    assert record["progress"]["total"] == 3
    assert record["schema"] == "grd.run/1"
    assert {e["state"] for e in project.events() if e["kind"] == "state"} == {"running", "completed"}
    assert (run / "input.ipynb").read_bytes() == (project.path / "train.ipynb").read_bytes()
    assert (run / "output.ipynb").resolve() == run / "attempts" / "1" / "output.ipynb"
    assert outputs(run) == "epoch 0\nepoch 1\nepoch 2\n" == project.grd("logs", "last").out
    assert set(statuses(run)) == {"completed"}
    assert not (run / "attempts" / "1" / "journal.jsonl").exists()
    metrics = json.loads((run / "metrics.json").read_text())
    assert [row["total"] for row in metrics["history"]] == [1, 3, 6]
    result = project.grd("result", "last", "--json").json
    assert result["metrics"]["final"] == 6
    assert Path(result["output_notebook"]).is_file()
    assert project.processes() == []


def test_injected_parameters_are_what_the_run_was_given(project: Project) -> None:
    project.notebook("show.ipynb", "print(timeout, checkpoint_dir, resume)", parameters=PARAMETERS)
    assert project.grd("research", "show.ipynb", "--timeout", "100s").code == 0
    timeout, folder, resume = project.grd("logs", "last").out.split()
    assert 80 < float(timeout) <= 100
    assert folder == project.record()["checkpoint_dir"] == str(project.only_run() / "checkpoints")
    assert resume == "False"


def test_a_notebook_error_fails_the_run_and_an_edited_notebook_goes_on_without_training_again(
    project: Project,
) -> None:
    project.notebook("train.ipynb", TRAIN, "print('total', stat['total'])", parameters=PARAMETERS)
    failed = project.grd("research", "train.ipynb")
    assert failed.code == 1
    assert "NameError: name 'stat'" in failed.out
    run = project.only_run()
    assert statuses(run)[-1] == "failed"
    project.notebook("fixed.ipynb", TRAIN, "print('total', state['total'])", parameters=PARAMETERS)
    done = project.grd("resume", "last", "--notebook", "fixed.ipynb", "--json")
    assert done.code == 0, done.err
    assert outputs(run) == "total 10\n"
    assert (
        done.json["attempts"][1]["changes"]["notebook"]["from"] == done.json["attempts"][0]["notebook_sha256"]
    )
    assert (run / "attempts" / "1" / "output.ipynb").exists()
    assert (run / "input.ipynb").read_bytes() == (project.path / "train.ipynb").read_bytes()
    assert done.json["metrics"]["final"] == 10


@pytest.mark.parametrize(
    ("to_whom", "signum", "cause"),
    [("follower", signal.SIGINT, "sigint"), ("runner", signal.SIGTERM, "sigterm")],
)
def test_a_signal_stops_after_the_epoch_with_its_checkpoint_and_resume_completes(
    project: Project, to_whom: str, signum: signal.Signals, cause: str
) -> None:
    project.notebook("train.ipynb", TRAIN, "print('after')", parameters=PARAMETERS)
    process = project.start("research", "train.ipynb", "-p", "epochs", "6", "-p", "seconds", "0.4")
    project.wait_for_event("metrics", epoch=1)
    os.kill(process.pid if to_whom == "follower" else project.record()["runner"]["pid"], signum)
    stopped = project.finish(process)
    assert stopped.code == 75, stopped.err
    record = project.record()
    assert (record["state"], record["cause"], record["resumable"]) == ("interrupted", cause, True)
    assert record["resume_command"] == f"grd resume {record['run_id']}"
    assert record["resume_command"] in stopped.out
    run = project.only_run()
    assert statuses(run)[-2:] == ["interrupted", "pending"]
    assert project.processes() == []
    resumed = project.grd("resume", record["run_id"], "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["metrics"]["final"] == 21
    trained = [e["epoch"] for e in project.events() if e["kind"] == "metrics" and e.get("epoch") is not None]
    assert trained == [0, 1, 2, 3, 4, 5]


def test_a_second_ctrl_c_kills_at_once(project: Project) -> None:
    loop = "while True:\n  try:\n    time.sleep(1)\n  except KeyboardInterrupt:\n    pass"
    stubborn = f"import time\nprint('in', flush=True)\n{loop}"
    project.notebook("train.ipynb", stubborn, parameters=PARAMETERS)
    process = project.start("research", "train.ipynb")
    project.wait_for_output("in\\n")
    process.send_signal(signal.SIGINT)
    project.wait_for_event("stop", stage=1)
    process.send_signal(signal.SIGINT)
    stopped = project.finish(process, 20)  # the grace alone would be 30 s
    assert stopped.code == 75
    record = project.record()
    assert (record["cause"], record["attempts"][0]["stop"]["killed"]) == ("sigint", True)
    assert project.processes() == []


@pytest.mark.faults
def test_the_timeout_bounds_one_attempt_and_the_budget_all_of_them(project: Project) -> None:
    project.notebook("train.ipynb", TICKS, parameters=PARAMETERS)
    first = project.grd("research", "train.ipynb", "--timeout", "12s", "--budget", "20s", "--json")
    assert first.code == 75
    assert (first.json["cause"], first.json["budget"]["agreed"]) == ("deadline", "allowed")
    second = project.grd("resume", "last", "--json")
    assert (second.code, second.json["cause"]) == (75, "budget")
    third = project.grd("resume", "last")
    assert third.code == 77
    assert "grd resume" in third.err and "--budget" in third.err
    assert project.record()["attempt"] == 2
    fourth = project.grd("resume", "last", "--budget", "40s", "--json")
    assert (fourth.code, fourth.json["attempt"]) == (75, 3)


def test_without_any_agreement_the_default_cap_counts_for_all_attempts_together(project: Project) -> None:
    project.notebook("train.ipynb", TICKS, parameters=PARAMETERS)
    first = project.grd("research", "train.ipynb", "--json", env={"GRD_DEFAULT_TIMEOUT": "3s"})
    assert (first.code, first.json["cause"]) == (75, "approval_required")
    assert first.json["resume_command"].endswith("--timeout 1h")
    assert project.grd("resume", "last").code == 77
    more = project.grd("resume", "last", "--timeout", "2s", "--json")
    assert (more.code, more.json["cause"]) == (75, "deadline")


def test_at_the_default_cap_the_time_that_is_left_is_told_and_asked_for(project: Project) -> None:
    loop = "from grd.experiment import training\nimport time\n"
    loop += "for epoch in training.epochs(10**6, state={}, checkpoint_dir=checkpoint_dir, resume=resume):\n"
    project.notebook("long.ipynb", loop + "    time.sleep(0.1)", parameters=PARAMETERS)
    ended = project.grd("research", "long.ipynb", "--json", env={"GRD_DEFAULT_TIMEOUT": "4s"})
    assert (ended.code, ended.json["cause"]) == (75, "approval_required")
    left = ended.json["progress"]["eta_seconds"]
    assert left > 90_000
    flag, hours = ended.json["resume_command"].split()[-2:]
    assert flag == "--timeout" and left <= int(hours.removesuffix("h")) * 3600
    assert re.search(r"progress +epochs \d+/1000000, about \S.* left", project.grd("status", "last").out)


def test_a_killed_runner_is_never_shown_as_running_and_its_outputs_are_there(project: Project) -> None:
    project.notebook("train.ipynb", TICKS, parameters=PARAMETERS)
    process = project.start("research", "train.ipynb", "--timeout", "5m")
    project.wait_for_output("tick 20")
    run = project.only_run()
    assert project.grd("status", run.name, "--json").json["state"] == "running"
    os.kill(project.record()["runner"]["pid"], signal.SIGKILL)
    stopped = project.finish(process)
    assert stopped.code == 75, stopped.err
    record = project.grd("status", run.name, "--json").json
    assert (record["state"], record["cause"]) == ("interrupted", "runner_lost")
    assert record == project.record()
    assert "tick 20" in outputs(run)
    assert statuses(run)[-1] == "interrupted"
    assert project.processes() == []
    assert [e["state"] for e in project.events() if e["kind"] == "state"] == ["running", "interrupted"]


def test_a_run_outlives_the_process_that_started_it(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    process = project.start("research", "train.ipynb", "-p", "seconds", "0.3")
    project.wait_for_event("state", state="running")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    project.wait_for_event("state", state="completed")
    wait_until(lambda: project.record()["state"] == "completed", "the record")


@pytest.mark.faults
def test_only_one_process_executes_a_run(project: Project) -> None:
    project.notebook("train.ipynb", TICKS, parameters=PARAMETERS)
    process = project.start("research", "train.ipynb", "--timeout", "5m")
    project.wait_for_output("tick 1")
    busy = project.grd("resume", "last")
    assert busy.code == 69
    assert "grd status" in busy.err
    process.send_signal(signal.SIGTERM)
    assert project.finish(process).code == 75
    assert project.record()["attempt"] == 1


def test_a_completed_run_is_resumed_only_if_something_changed(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    assert project.grd("research", "train.ipynb", "-p", "epochs", "2").code == 0
    same = project.grd("resume", "last")
    assert (same.code, "nothing changed" in same.err) == (2, True)
    longer = project.grd("resume", "last", "-p", "epochs", "4", "--json")
    assert longer.code == 0, longer.err
    assert "epochs changed; what the checkpoint restores" in longer.err
    assert longer.json["metrics"]["final"] == 10
    assert longer.json["attempts"][1]["changes"]["parameters"] == {"epochs": {"from": 2, "to": 4}}
    assert outputs(project.only_run()) == "epoch 2\nepoch 3\n"


@pytest.mark.faults
def test_resume_goes_back_to_a_named_epoch_and_refuses_one_that_is_not_there(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    assert project.grd("research", "train.ipynb", "-p", "seconds", "0.6").code == 0
    missing = project.grd("resume", "last", "--from", "9")
    assert (missing.code, "0, 1, 2, 3" in missing.err) == (2, True)
    back = project.grd("resume", "last", "--from", "1", "--json")
    assert back.code == 0, back.err
    assert outputs(project.only_run()) == "epoch 2\nepoch 3\n"
    assert (back.json["lineage"], back.json["metrics"]["final"]) == (2, 10)


@pytest.mark.faults
def test_a_changed_original_is_pointed_out_but_not_used(project: Project) -> None:
    project.notebook("my train.ipynb", "print('old')\n1 / 0", parameters=PARAMETERS)
    assert project.grd("research", "my train.ipynb").code == 1
    project.notebook("my train.ipynb", "print('new')", parameters=PARAMETERS)
    resumed = project.grd("resume", "last")
    assert resumed.code == 1
    assert "has changed since" in resumed.err
    assert outputs(project.only_run()).startswith("old")
    command = shlex.split(resumed.err.split("To use the changed one: grd ", 1)[1].splitlines()[0])
    assert project.grd(*command).code == 0
    assert outputs(project.only_run()) == "new\n"


def test_the_kernels_folder_is_the_callers_at_the_first_start_also_on_resume(project: Project) -> None:
    (project.path / "sub").mkdir()
    project.notebook("train.ipynb", "import os; print(os.getcwd())\n1 / 0", parameters=PARAMETERS)
    assert project.grd("research", "train.ipynb").code == 1
    project.path = project.path / "sub"
    assert project.grd("resume", "last", "--runs-dir", "../experiments").code == 1
    assert project.grd("logs", "last", "--runs-dir", "../experiments").out.startswith(
        str(project.path.parent) + "\n"
    )


def test_a_project_path_with_braces_and_spaces_is_a_path_like_any_other(project: Project) -> None:
    project.path = project.path / "{x} my {run_uuid}"
    (project.path / ".planning").mkdir(parents=True)
    project.notebook("my train.ipynb", "print('fine')")
    finished = project.grd("research", "my train.ipynb")
    assert finished.code == 0, finished.err
    assert outputs(project.only_run()) == "fine\n"


def test_an_exit_in_mid_notebook_is_no_completed_run(project: Project) -> None:
    project.notebook("early.ipynb", "import sys; sys.exit(0)", "print('never')")
    early = project.grd("research", "early.ipynb")
    assert early.code == 1
    assert "cells after it never ran" in early.out
    project.notebook("last.ipynb", "import sys; sys.exit(0)")
    assert project.grd("research", "last.ipynb").code == 0


def test_a_kernel_that_cannot_start_is_exit_69_and_a_failed_run(project: Project) -> None:
    spec = project.path / "kernels" / "broken"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-c", "import sys; sys.exit('no such luck')", "{connection_file}"]
    (spec / "kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "broken", "language": "python"})
    )
    project.notebook("train.ipynb", "print('never')", kernel="broken")
    failed = project.grd("research", "train.ipynb", "--json", env={"JUPYTER_PATH": str(project.path)})
    assert failed.code == 69, failed.err
    assert (failed.json["state"], failed.json["cause"]) == ("failed", "start_failed")


def test_a_notebook_of_another_language_gets_deadline_saving_and_truth(project: Project) -> None:
    spec = project.path / "kernels" / "bash"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-m", "bash_kernel", "-f", "{connection_file}"]
    described = {"argv": argv, "display_name": "Bash", "language": "bash"}
    (spec / "kernel.json").write_text(json.dumps(described))
    environment = {"JUPYTER_PATH": str(project.path)}
    bash: dict[str, Any] = {"kernel": "bash", "language": "bash"}
    project.notebook("ok.ipynb", "echo count is $count", parameters="count=1", **bash)
    done = project.grd("research", "ok.ipynb", "-p", "count", "7", env=environment)
    assert done.code == 0, done.err
    assert project.grd("logs", "last").out.strip() == "count is 7"
    project.notebook("slow.ipynb", "echo started; sleep 600", "echo never", **bash)
    stopped = project.grd(
        "research", "slow.ipynb", "--timeout", "12s", "--grace", "6s", "--json", env=environment
    )
    assert (stopped.code, stopped.json["cause"]) == (75, "deadline")
    slow = Path(stopped.json["folder"])
    assert statuses(slow) == ["interrupted", "pending"]
    assert "started" in outputs(slow)
    assert project.processes() == []


def test_status_and_list_name_the_next_command_of_every_run(project: Project) -> None:
    assert project.grd("status").code == 0
    project.notebook("bad.ipynb", "1 / 0")
    project.notebook("good.ipynb", "1")
    project.grd("research", "bad.ipynb")
    project.grd("research", "good.ipynb")
    bad, good = (p.name for p in sorted(project.run_folders(), key=lambda p: "good" in p.name))
    shown = project.grd("status").out
    assert f"grd resume {bad}" in shown and "1 completed" in shown
    listed = project.grd("list", "--json").json
    assert [r["run_id"] for r in listed["runs"]] == [good, bad]
    assert project.grd("list", "--state", "failed", "--json").json["total"] == 1
    for command in (("status", "nope"), ("logs", "nope"), ("result", "nope"), ("resume", "nope")):
        missing = project.grd(*command)
        assert (missing.code, len(missing.err.strip().splitlines())) == (66, 1)
    ambiguous = project.grd("status", "20")
    assert ambiguous.code == 66 and "fits 2 runs" in ambiguous.err


def test_the_python_interface_runs_interrupts_and_resumes(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    script = project.path / "use.py"
    script.write_text(
        "import grd\n"
        "run = grd.research('train.ipynb', {'seconds': 1.0, 'epochs': 4}, timeout=4)\n"
        "assert (run.state, run.cause, run.resumable) == ('interrupted', 'deadline', True), run\n"
        "assert 'interrupted' in repr(run) and '<table>' in run._repr_html_()\n"
        "again = grd.resume(run, timeout='1m')\n"
        "assert again.state == 'completed', again\n"
        "assert again.metrics['final'] == 10 and [row['total'] for row in again.history] == [1, 3, 6, 10]\n"
        "assert grd.status().id == run.id and [r.id for r in grd.list_runs()] == [run.id]\n"
        "try:\n    grd.research('train.ipynb', {'epoch': 1})\n"
        "except grd.GrdError as error:\n    assert 'epochs' in str(error)\n"
        "else:\n    raise SystemExit('no error')\n"
    )
    import subprocess

    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=project.path,
        env=project.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
