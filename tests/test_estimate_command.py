"""``grd estimate`` on real runs, what a run's record keeps of it, and the time left while one runs."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import Project, wait_until

pytestmark = pytest.mark.faults

PARAMETERS = "epochs = 3\nseconds = 0.05\ntimeout = None\ncheckpoint_dir = ''\nresume = False"

TRAIN = """
import time
from grd.experiment import training
for epoch in training.epochs(epochs, state={"a": 1}, checkpoint_dir=checkpoint_dir, resume=resume):
    for step in epoch.steps(range(20)):
        time.sleep(seconds)
    epoch.log(loss=1.0)
"""


def estimated(project: Project, *arguments: str) -> dict[str, Any]:
    done = project.grd("estimate", "train.ipynb", *arguments, "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = done.json
    assert found["schema"] == "grd.estimate/1"
    return found


def took(record: dict[str, Any]) -> float:
    return sum(attempt["seconds"] for attempt in record["attempts"])


def test_before_the_first_run_it_is_unknown_then_known_and_scaled_by_the_epochs(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    first = estimated(project)
    assert (first["seconds"], first["high_seconds"], first["confidence"]) == (None, None, "UNKNOWN")
    assert (first["is_long_running"], first["requires_user_confirmation"]) == (None, True)
    assert "unknown" in project.grd("estimate", "train.ipynb").out
    assert project.run_folders() == [], "an estimate starts nothing"
    assert not project.runs_dir.exists() and project.processes() == []

    ended = project.grd("research", "train.ipynb", "--json")
    assert ended.code == 0, ended.err
    kept = ended.json["estimate"]
    assert {name: kept[name] for name in ("seconds", "low_seconds", "method")} == {
        name: first[name] for name in ("seconds", "low_seconds", "method")
    }, "what was predicted before the start"
    assert kept["speed_mbs"] > 0 and kept["probe"] is None

    known = estimated(project)
    assert (known["method"], known["n_runs"], known["confidence"]) == ("history", 1, "LOW")
    assert known["low_seconds"] <= took(ended.json) <= known["high_seconds"]
    assert known["is_long_running"] is False
    assert "no: less than 10m" in project.grd("estimate", "train.ipynb").out

    again = project.grd("research", "train.ipynb", "--json").json
    assert again["estimate"]["low_seconds"] <= took(again) <= again["estimate"]["high_seconds"]

    more = estimated(project, "-p", "epochs", "300")
    assert more["parameters"] == {"epochs": 300}
    assert "epochs 3 to 300" in more["basis"] and more["method"] == "history"
    loop = 60 * 0.05  # asleep alone
    assert more["high_seconds"] > 100 * loop and more["seconds"] > 40 * loop
    assert more["seconds"] < 100 * took(ended.json) * 2, "the kernel's start does not grow with the epochs"
    assert more["is_long_running"] is (more["high_seconds"] > 600)


def test_the_threshold_is_a_setting(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    assert project.grd("research", "train.ipynb", "-p", "epochs", "1").code == 0
    (project.path / "grd.toml").write_text('long_running_threshold = "1s"\n')
    found = estimated(project, "-p", "epochs", "1")
    assert (found["threshold_seconds"], found["is_long_running"]) == (1.0, True)
    assert "yes: it may take more than 1s" in project.grd("estimate", "train.ipynb").out
    (project.path / "grd.toml").write_text('long_running_threshold = "soon"\n')
    assert project.grd("estimate", "train.ipynb").code == 78


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("missing.ipynb",), 66, "no notebook"),
        (("train.ipynb", "-p", "epoch", "3"), 2, "epoch"),
        (("train.ipynb", "-p", "epochs", "many"), 2, "epochs"),
        (("train.ipynb", "--kernel", "no-such"), 69, "no-such"),
        ((), 2, "NOTEBOOK"),
    ],
    ids=str,
)
def test_what_could_not_be_run_cannot_be_estimated(
    project: Project, arguments: tuple[str, ...], code: int, said: str
) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    done = project.grd("estimate", *arguments)
    assert done.code == code
    assert said in done.err and "Traceback" not in done.err
    assert done.out == ""


def test_a_run_tells_its_time_left_and_a_resumed_one_does_not_take_skipped_work_for_speed(
    project: Project,
) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    process = project.start("research", "train.ipynb", "-p", "epochs", "40", "-p", "seconds", "0.1")

    def told(attempt: int, *, interval: bool) -> dict[str, Any]:
        """The progress of an attempt, once it knows a time left, or its interval."""
        name = "eta_high_seconds" if interval else "eta_seconds"

        def look() -> dict[str, Any] | None:
            shown = project.grd("status", "last", "--json").json
            found: dict[str, Any] | None = shown["progress"] if shown["attempt"] == attempt else None
            return found if found and shown["state"] == "running" and found[name] is not None else None

        progress: dict[str, Any] = wait_until(look, f"{name} of attempt {attempt}")
        return progress

    project.wait_for_event("progress")
    early = told(1, interval=False)
    if early["eta_high_seconds"] is None:  # looked at before the first 10 s were over
        assert "too little" in early["eta_basis"]
    late = told(1, interval=True)
    assert late["eta_low_seconds"] < late["eta_seconds"] < late["eta_high_seconds"]
    # Each step sleeps 0.1 s and takes little more, even on a busy machine.
    left = (40 - late["n"]) * 20 * 0.1
    assert 0.95 * left < late["eta_seconds"] < 2 * left
    assert "left (" in project.grd("status", "last").out
    os.kill(process.pid, signal.SIGTERM)
    assert project.finish(process).code == 75
    reached = project.record()["progress"]["n"]
    assert reached > 4

    resumed = project.start("resume", "last")
    again = told(2, interval=False)
    left = (40 - again["n"]) * 20 * 0.1
    assert again["n"] > 4 and 0.9 * left < again["eta_seconds"] < 3 * left
    os.kill(resumed.pid, signal.SIGTERM)
    assert project.finish(resumed).code == 75

    # How long it would have taken in all is what an estimate makes of it.
    found = estimated(project, "-p", "epochs", "40", "-p", "seconds", "0.1")
    assert found["method"] == "history" and "interrupted" in found["basis"]
    assert found["low_seconds"] < 80 < found["high_seconds"]


def test_a_run_longer_than_its_probe_keeps_what_the_probe_predicted_and_what_came_of_it(
    project: Project,
) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    ended = project.grd("research", "train.ipynb", "-p", "epochs", "8", "-p", "seconds", "0.1", "--json")
    assert ended.code == 0, ended.err
    probe = ended.json["estimate"]["probe"]
    assert probe["name"] == "epochs" and probe["after_seconds"] >= 10
    assert probe["took_seconds"] > 0
    # A quarter of a second between two reports: of so short a rest it is the grain.
    assert probe["remaining_seconds"] == pytest.approx(probe["took_seconds"], rel=1.0, abs=1.0)


def test_python_has_the_same(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from grd.steps.estimator import estimate_notebook

    notebook: Path = project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    monkeypatch.chdir(project.path)
    found = estimate_notebook(notebook, {"epochs": 5})
    assert found.to_dict()["notebook"] == str(notebook) and found.estimate.seconds is None


def test_a_number_with_four_hundred_digits_is_estimated_run_and_looked_at_without_a_traceback(
    project: Project,
) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    assert project.grd("research", "train.ipynb").code == 0
    huge = ("-p", "epochs", "1" + 400 * "0", "-p", "seconds", "0.001")
    assert estimated(project, *huge)["seconds"] is None
    assert project.grd("research", "train.ipynb", *huge, "--detach").code == 0
    project.wait_for_event("progress", project.run_folders()[-1], name="epochs")
    shown = project.grd("status", "last", "--json")
    assert shown.code == 0, shown.err
    stopped = project.grd("stop", "last", "--now")
    assert stopped.code == 0, stopped.err


def test_a_notebook_that_is_nested_too_deeply_is_one_line(project: Project) -> None:
    (project.path / "deep.ipynb").write_text("[" * 100_000)
    for command in ("estimate", "research"):
        refused = project.grd(command, "deep.ipynb")
        assert refused.code == 2
        assert refused.err == "grd: deep.ipynb is no notebook: its JSON is nested too deeply\n"
