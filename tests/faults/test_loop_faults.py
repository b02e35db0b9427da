"""kill -9 of a loop at any moment: every cycle is made once, whatever was lost with it."""

from __future__ import annotations

import random

import pytest
from conftest import Project, wait_until
from test_loop import events, memory, plan, step, trace

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("moment", ["while a notebook runs", "between two cycles", "while it prepares"])
def test_a_killed_loop_goes_on_where_it_was(project: Project, moment: str) -> None:
    waits = "import os, time\nopen('here', 'w').close()\nwhile not os.path.exists('go'):\n    time.sleep(0.1)"
    steps = {"notebooks": [step(project, "train", "" if moment == "between two cycles" else waits)]}
    if moment == "while it prepares":
        steps["prepare"] = [step(project, "features")]
    if moment == "between two cycles":
        steps["pause"] = "2s"  # type: ignore[assignment]
    plan(project, **steps)
    loop = project.start("loop", "plan.yaml", "--max-cycles", "2")
    if moment == "between two cycles":
        wait_until(lambda: events(project, "cycle_end"), "the first cycle's end")
    elif moment == "while it prepares":
        wait_until(
            lambda: any(e["cycle"] == 2 for e in events(project, "step_start")), "the second one prepared"
        )
    else:
        wait_until(lambda: (project.path / "here").exists(), "the notebook")
    loop.kill()
    loop.wait(20)
    lost = project.grd("loop", "plan.yaml", "--status", "--json").json
    assert lost["state"] == "lost"
    if moment == "while a notebook runs":
        ended = project.grd("loop", "plan.yaml", "--stop")
        assert (ended.code, "is asked to stop" in ended.err) == (0, True), ended.err
        assert (project.record()["state"], project.record()["cause"]) == ("interrupted", "stopped")
    (project.path / "go").touch()
    done = project.grd("loop", "plan.yaml", "--max-cycles", "2")
    assert done.code == 0, done.err
    prepared = ["features 1", "features 2"] if moment == "while it prepares" else []
    assert sorted(trace(project)) == [*prepared, "train 1", "train 2"]
    assert memory(project)["cycles"] == 2
    assert len(project.run_folders()) == 2 + len(prepared)


def test_loops_killed_at_random_moments_make_every_cycle_once(project: Project) -> None:
    plan(project, notebooks=[step(project, "one"), step(project, "two")])
    chance = random.Random(11)
    for _ in range(8):
        loop = project.start("loop", "plan.yaml", "--max-cycles", "3")
        try:
            loop.wait(chance.uniform(0.3, 4.0))
        except Exception:
            loop.kill()
            loop.wait(20)
    done = project.grd("loop", "plan.yaml", "--max-cycles", "3")
    assert done.code == 0, done.err
    assert sorted(trace(project)) == sorted(f"{name} {n}" for n in (1, 2, 3) for name in ("one", "two"))
    assert len(project.run_folders()) == 6
