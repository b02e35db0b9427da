"""``grd loop`` and `ContinuousResearchLoop`: cycles that are made once each, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import LIMIT_SECONDS, Project, wait_until
from test_json_shapes import check

import grd
from grd import ContinuousResearchLoop
from grd.batch.loop_plan import read_plan
from grd.errors import NotFoundError, UsageError
from grd.files import read_json_lines
from grd.settings import Settings

PARAMETERS = "cycle = 0\nseconds = 0.0\nresume = False\ncheckpoint_dir = ''"
APPEND = "with open('trace', 'a') as f:\n    f.write(f'NAME {cycle}\\n')"
FLAKY = """
import os
if not os.path.exists('mended'):
    raise ValueError('not yet')
"""
ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)
SLEEPS = "import time\nopen('sleeping', 'w').close()\ntime.sleep(600)"


def plan(project: Project, **words: Any) -> Path:
    path = project.path / "plan.yaml"
    path.write_text(yaml.safe_dump(words))
    return path


def step(project: Project, name: str, *cells: str, **words: Any) -> dict[str, Any]:
    """A step whose notebook leaves its name and the cycle in `trace`."""
    project.notebook(f"{name}.ipynb", *cells, APPEND.replace("NAME", name), parameters=PARAMETERS)
    return {"notebook": f"{name}.ipynb", "parameters": {"cycle": "{cycle}"}, **words}


def trace(project: Project) -> list[str]:
    path = project.path / "trace"
    return path.read_text().splitlines() if path.exists() else []


def memory(project: Project) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((project.path / "loops" / "plan" / "loop.json").read_text())
    return value


def events(project: Project, kind: str) -> list[dict[str, Any]]:
    path = project.path / "loops" / "plan" / "events.jsonl"
    return [event for _, event in read_json_lines(path) if event["kind"] == kind]


def test_cycles_are_made_one_after_another_and_the_next_is_prepared_meanwhile(project: Project) -> None:
    plan(
        project,
        prepare=[step(project, "features")],
        notebooks=[step(project, "train", "import time\ntime.sleep(3)")],
    )
    done = project.grd("loop", "plan.yaml", "--max-cycles", "2", "--json")
    assert done.code == 0, done.err
    assert (done.json["state"], done.json["reason"], done.json["cycles"]) == ("ended", "done", 2)
    assert sorted(trace(project)) == ["features 1", "features 2", "train 1", "train 2"]
    # The second cycle's preparation began before the first one's training had ended.
    order = [(e["kind"], e["cycle"], e["step"]) for e in [*_steps(project)]]
    assert order.index(("step_start", 2, "features")) < order.index(("step_end", 1, "train"))
    assert [e["cycle"] for e in events(project, "cycle_end")] == [1, 2]
    assert events(project, "cycle_end")[0]["phases"]["train"] >= 3
    check(done.json, "grd.loop/1")
    assert set(done.json["timing"]) == {"features", "train"}
    assert done.json["timing"]["train"]["share"] > 0.2
    log = (project.path / "loops" / "plan" / "loop.log").read_text()
    assert "=== cycle 1 ===" in log
    assert "cycle 2 completed successfully" in log
    # The same command again: they are made, and nothing is run.
    again = project.grd("loop", "plan.yaml", "--max-cycles", "2")
    assert (again.code, len(trace(project))) == (0, 4)
    assert "2 of 2 cycles completed" in again.out


def _steps(project: Project) -> list[dict[str, Any]]:
    path = project.path / "loops" / "plan" / "events.jsonl"
    return [e for _, e in read_json_lines(path) if e["kind"] in ("step_start", "step_end")]


@pytest.mark.faults
def test_a_failed_cycle_is_tried_again_and_not_skipped_and_the_loop_gives_up_in_the_end(
    project: Project,
) -> None:
    plan(
        project, notebooks=[step(project, "first"), step(project, "flaky", FLAKY)],
        retry_delay=0.2, max_failures=2,
    )  # fmt: skip
    gave_up = project.grd("loop", "plan.yaml", "--max-cycles", "1")
    assert gave_up.code == 1, gave_up.err
    assert "cycle 1 failed, 2 times in a row by now" in gave_up.out
    assert "ValueError: not yet" in gave_up.out
    assert memory(project)["cycles"] == 0
    (project.path / "mended").touch()
    done = project.grd("loop", "plan.yaml", "--max-cycles", "1")
    assert done.code == 0, done.err
    assert trace(project) == ["first 1", "flaky 1"]
    runs = [folder for folder in project.run_folders() if "flaky" in folder.name]
    assert len(runs) == 1
    assert [a["state"] for a in project.record(runs[0])["attempts"]] == ["failed", "failed", "completed"]


@pytest.mark.faults
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, "--stop"])
def test_a_loop_stops_while_a_notebook_runs_and_goes_on_with_the_same_cycle(
    project: Project, how: signal.Signals | str
) -> None:
    plan(project, notebooks=[step(project, "sleeper", f"if not resume:\n    exec({SLEEPS!r})")])
    process = project.start("loop", "plan.yaml", "--max-cycles", "1")
    wait_until(lambda: (project.path / "sleeping").exists(), "the notebook sleeps")
    second = project.grd("loop", "plan.yaml")
    assert second.code == 69
    assert f"process {process.pid} on" in second.err
    current = project.grd("loop", "plan.yaml", "--status", "--json").json["current"]
    assert (current["cycle"], current["steps"][0]["state"]) == (1, "running")
    if isinstance(how, str):
        assert project.grd("loop", "plan.yaml", "--stop").code == 0
    else:
        os.kill(process.pid, how)
    stopped = project.finish(process)
    assert stopped.code == 75, stopped.err
    assert "the same command goes on" in stopped.out
    assert project.record()["state"] == "interrupted"
    assert project.processes() == []
    if how != signal.SIGTERM:
        return
    done = project.grd("loop", "plan.yaml", "--max-cycles", "1")
    assert done.code == 0, done.err
    assert trace(project) == ["sleeper 1"]
    assert project.record()["attempt"] == 2


@pytest.mark.faults
def test_a_detached_loop_is_looked_at_stopped_and_gone_on_with_by_its_plan(project: Project) -> None:
    plan(project, notebooks=[step(project, "sleeper", f"if not resume:\n    exec({SLEEPS!r})")])
    command = ("loop", "plan.yaml", "--max-cycles", "1", "--detach")
    started = project.grd(*command, "--json")
    assert (started.code, started.json["state"]) == (0, "running"), started.err
    check(started.json, "grd.loop/1")
    assert os.getsid(started.json["loop"]["pid"]) == started.json["loop"]["pid"]
    wait_until(lambda: (project.path / "sleeping").exists(), "the notebook sleeps")
    assert project.grd(*command).code == 69
    stopped = project.grd("loop", "plan.yaml", "--stop")
    assert (stopped.code, "ended (stopped)" in stopped.out) == (0, True), stopped.out
    assert (project.record()["state"], project.record()["cause"]) == ("interrupted", "stopped")
    assert project.processes() == []
    assert project.grd(*command).code == 0
    wait_until(lambda: memory(project)["state"] == "ended", "the end of the loop")
    assert (memory(project)["reason"], trace(project)) == ("done", ["sleeper 1"])


THREAD = """
import threading, time
from pathlib import Path
from grd import ContinuousResearchLoop
loop = ContinuousResearchLoop(None, 1, plan="plan.yaml")
thread = threading.Thread(target=loop.run)
thread.start()
thread.join(100)
print("its own work goes on, and the loop is over:", not thread.is_alive())
"""


@pytest.mark.faults
def test_a_loop_in_a_thread_is_stopped_and_its_program_goes_on(project: Project) -> None:
    plan(project, notebooks=[step(project, "sleeper", SLEEPS)])
    program = subprocess.Popen(
        [sys.executable, "-c", THREAD], cwd=project.path, env=project.environment,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    project.started.append(program)
    wait_until(lambda: (project.path / "sleeping").exists(), "the notebook sleeps")
    killed = project.grd("loop", "plan.yaml", "--stop", "--now", "--json")
    assert (killed.code, killed.json["state"], killed.json["reason"]) == (0, "ended", "stopped")
    out, _ = program.communicate(timeout=LIMIT_SECONDS)
    assert (program.returncode, out) == (0, "its own work goes on, and the loop is over: True\n")
    assert project.record()["attempts"][0]["stop"]["killed"]


def test_a_loop_stops_while_it_sleeps(project: Project) -> None:
    plan(project, notebooks=[step(project, "quick")], pause="10m")
    process = project.start("loop", "plan.yaml")
    wait_until(lambda: (project.path / "loops/plan/loop.json").exists() and memory(project)["cycles"], "one")
    wait_until(lambda: memory(project)["state"] == "pausing", "the pause")
    told = project.grd("loop", "plan.yaml", "--status")
    assert "pausing, 1 cycles completed" in told.out
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert memory(project)["state"] == "ended"


@pytest.mark.faults
def test_a_cycle_has_a_cap_and_nobody_who_could_agree_to_more_ends_the_loop(project: Project) -> None:
    (project.path.parent / "config" / "grd" / "config.toml").write_text("")
    plan(project, notebooks=[step(project, "long", timeout="3h")])
    refused = project.grd("loop", "plan.yaml", "--max-cycles", "1")
    assert refused.code == 77, refused.err
    assert "grd approve" in refused.out
    assert project.run_folders() == []
    plan(
        project, notebooks=[step(project, "long", SLEEPS)], cycle_timeout="5s", max_failures=1,
    )  # fmt: skip
    capped = project.grd("loop", "plan.yaml", "--max-cycles", "1")
    assert capped.code == 1, capped.err
    assert "the time of the cycle was up" in capped.out


def test_no_cycles_and_a_dry_run_leave_nothing_behind(project: Project) -> None:
    plan(project, notebooks=[step(project, "train", role="train")])
    before = sorted(project.path.rglob("*"))
    dry = project.grd("loop", "plan.yaml", "--max-cycles", "2", "--dry-run", "--json")
    assert dry.code == 0, dry.err
    check(dry.json, "grd.loop-dry-run/1")
    assert f"would run {project.path}/train.ipynb cycle=2, at most 1h" in dry.err
    assert (dry.json["cycles"], dry.json["to_make"]) == (0, 2)
    assert sorted(project.path.rglob("*")) == before
    none = project.grd("loop", "plan.yaml", "--max-cycles", "0")
    assert none.code == 0, none.err
    assert trace(project) == [] == project.run_folders()
    plan(project, notebooks=[step(project, "train", parameters={"nothing": 1})])
    for arguments in (["--dry-run"], [], ["--detach"]):
        wrong = project.grd("loop", "plan.yaml", *arguments)
        assert wrong.code == 2
        assert "nothing" in wrong.err
    assert project.run_folders() == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({}, "no notebooks"),
        ({"notebooks": ["a.ipynb"], "puase": 1}, "unknown word 'puase'"),
        ({"notebooks": [{"notebook": "a.ipynb", "timeout": "soon"}]}, "notebooks[0]: timeout"),
        ({"notebooks": [{"notebook": "a.ipynb", "role": "dance"}]}, "role 'dance' is none of explore"),
        ({"notebooks": [{"name": "a"}]}, "a step is a notebook's path"),
        ({"notebooks": ["a.ipynb"], "max_failures": 0}, "max_failures is a number from 1 on, not 0"),
        ({"notebooks": ["a.ipynb"], "max_failures": "3"}, "max_failures is a number from 1 on, not '3'"),
        ({"notebooks": ["a.ipynb"], "max_attempts": 101}, "max_attempts is at most 100, not 101"),
        ({"notebooks": [{"notebook": "a.ipynb", "kernel": 3}]}, "notebooks[0]: kernel is text, not 3"),
        ({"notebooks": [{"notebook": "a.ipynb", "name": [3]}]}, "notebooks[0]: name is text"),
        ({"notebooks": [{"notebook": "a.ipynb", "parameters": {"x": ENDLESS}}]}, "it contains itself"),
        ("notebooks: [a.ipynb]\nnotebooks: [b.ipynb]", "line 2 has 'notebooks' a second time"),
        (f"notebooks: {'[' * 5000}", "nested too deeply"),
        (f"notebooks: [{{notebook: a.ipynb, parameters: {{seed: {'1' * 5000}}}}}]", "no valid YAML"),
    ],
)
def test_a_wrong_plan_is_refused_with_the_place(
    tmp_path: Path, words: dict[str, Any] | str, said: str
) -> None:
    if isinstance(words, str):
        (tmp_path / "plan.yaml").write_text(words)
    with pytest.raises(UsageError) as error:
        read_plan(words if isinstance(words, dict) else tmp_path / "plan.yaml", Settings())
    assert said in str(error.value)


def test_a_number_in_a_plan_is_a_number_as_in_a_batch(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("[{notebook: a.ipynb, parameters: {lr: 1e-3}}]")
    assert read_plan(tmp_path / "plan.yaml", Settings()).steps[0].parameters == {"lr": 0.001}


def test_a_plan_fills_in_the_cycle_and_gives_every_step_a_name_of_its_own(tmp_path: Path) -> None:
    read = read_plan(
        {"notebooks": [{"notebook": "a.ipynb", "parameters": {"n": "{cycle}", "out": "o-{cycle}.csv"}},
                       "a.ipynb"], "max_attempts": 3},
        Settings(),
    )  # fmt: skip
    assert [each.name for each in read.steps] == ["a", "a-2"]
    assert read.steps[0].parameters_of(7) == {"n": 7, "out": "o-7.csv"}
    assert read.steps[1].max_attempts == 3
    with pytest.raises(NotFoundError, match="no plan"):
        read_plan(tmp_path / "none.yaml", Settings())


def test_from_python_it_has_the_plans_signature_and_a_memory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "plan.yaml").write_text("notebooks: [a.ipynb]\n")
    loop = ContinuousResearchLoop("memory", 0, False)
    assert (loop.should_stop, loop.cycle_count) == (False, 0)
    end = loop.run()
    assert (end.reason, end.cycles) == ("done", 0)
    assert grd.ContinuousResearchLoop is ContinuousResearchLoop
    with pytest.raises(UsageError, match="name a plan"):
        ContinuousResearchLoop()
    with pytest.raises(UsageError, match="below 0"):
        ContinuousResearchLoop("memory", -1)
    stopped = ContinuousResearchLoop("memory", None)
    stopped.stop()
    assert stopped.run().reason == "stopped"


def test_the_command_waits_for_nobody_where_there_is_no_plan(project: Project) -> None:
    for arguments, code in (((), 2), (("none.yaml",), 66), (("none.yaml", "--status"), 2)):
        done = project.grd("loop", *arguments)
        assert (done.code, len(done.err.splitlines())) == (code, 1), done.err
