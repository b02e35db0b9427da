"""``grd checkpoints``: what is listed, verified and pruned, as typed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Project
from test_json_shapes import documented
from test_research import PARAMETERS, TICKS

from grd import Run

pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("torch_in_kernels")

SAVES = """import torch
from grd.experiment import CheckpointHandler
handler = CheckpointHandler(checkpoint_dir)
for epoch in range(4):
    handler.save_checkpoint(epoch, {"w": torch.full((3000,), float(epoch))}, loss=1 / (epoch + 1))
handler.save_checkpoint(4, {"w": torch.ones(3000)}, step=7)
handler.close()
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose only run saved four epochs and seven steps of the fifth."""
    folder = tmp_path_factory.mktemp("checkpoints") / "project"
    (folder / ".planning").mkdir(parents=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRD_")}
    project = Project(folder, environment | {"GRD_STATE_DIR": str(folder / "state")})
    project.notebook("saves.ipynb", SAVES, parameters=PARAMETERS)
    done = project.grd("research", "saves.ipynb")
    assert done.code == 0, done.err
    return project


@pytest.fixture
def saved(finished: Project, tmp_path: Path) -> tuple[Project, Path]:
    """The project, and a copy of the run's checkpoints which a test may spoil."""
    folder = tmp_path / "copied"
    shutil.copytree(finished.only_run() / "checkpoints", folder)
    return finished, folder


def listed(project: Project, *arguments: str | Path, code: int = 0) -> list[dict[str, Any]]:
    answer = project.grd("checkpoints", *arguments, "--json")
    assert answer.code == code, answer.err
    assert answer.json["schema"] == "grd.checkpoints/1"
    assert set(answer.json) == documented("grd.checkpoints/1")
    rows: list[dict[str, Any]] = answer.json["checkpoints"]
    assert all(set(row) == documented("checkpoint") for row in rows)
    return rows


def flip(path: Path, at: int = -2000) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.unlink()  # the newest shares its bytes with checkpoint_latest.pt
    path.write_bytes(content)


def test_a_run_s_checkpoints_are_listed_newest_first(finished: Project) -> None:
    rows = listed(finished, "last")
    assert [(row["epoch"], row["step"]) for row in rows] == [
        (3, 7),
        (3, None),
        (2, None),
        (1, None),
        (0, None),
    ]
    assert [row["used_next"] for row in rows] == [True] + [False] * 4
    assert [row["verdict"] for row in rows] == ["good"] + ["unverified"] * 4
    assert [row["loss"] for row in rows] == [None, 0.25, 1 / 3, 0.5, 1.0]
    assert all(row["lineage"] == 1 and row["run_id"] == finished.record()["run_id"] for row in rows)
    assert all(Path(row["path"]).stat().st_size == row["size"] for row in rows)
    assert {row["verdict"] for row in listed(finished, "last", "--verify")} == {"good"}
    assert [item.epoch for item in Run(finished.only_run()).checkpoints(verify=True)] == [3, 3, 2, 1, 0]
    text = finished.grd("checkpoints", "last").out
    assert text.splitlines()[0].split() == ["EPOCH", "STEP", "LOSS", "SIZE", "AGE", "LINEAGE", "VERDICT"]
    assert text.count("<- resume") == 1 and "<- resume" in text.splitlines()[1]


def test_damage_is_named_and_the_one_that_a_resume_uses_is_marked(saved: tuple[Project, Path]) -> None:
    project, folder = saved
    (folder / "checkpoint_latest.pt").unlink()
    flip(folder / "checkpoint_epoch_4_step_7.pt")
    older = folder / "checkpoint_epoch_1.pt"
    older.write_bytes(older.read_bytes()[:-1])
    flip(folder / "checkpoint_epoch_0.pt")
    plain = listed(project, folder)
    assert [row["verdict"] for row in plain] == ["damaged", "good", "unverified", "damaged", "unverified"]
    assert [row["used_next"] for row in plain] == [False, True, False, False, False]
    assert "bytes instead of" in plain[3]["reason"]
    every = listed(project, folder, "--verify", code=1)
    assert [row["verdict"] for row in every] == ["damaged", "good", "good", "damaged", "damaged"]
    text = project.grd("checkpoints", folder, "--verify")
    assert text.code == 1 and text.out.count("damaged: ") == 3


def test_a_good_latest_is_listed_where_the_version_of_its_name_is_damaged(
    saved: tuple[Project, Path],
) -> None:
    project, folder = saved
    flip(folder / "checkpoint_epoch_4_step_7.pt")
    first, second, *_ = listed(project, folder)
    assert (Path(first["path"]).name, first["used_next"]) == ("checkpoint_latest.pt", True)
    assert (first["epoch"], first["step"], first["verdict"]) == (3, 7, "good")
    assert (second["verdict"], second["used_next"]) == ("damaged", False)


def test_without_a_good_one_it_says_that_a_resume_begins_anew(saved: tuple[Project, Path]) -> None:
    project, folder = saved
    for path in folder.glob("*.pt"):
        path.write_bytes(b"")
    shown = project.grd("checkpoints", folder)
    assert shown.code == 0 and "would begin anew" in shown.out


@pytest.mark.faults
def test_pruning_leaves_two_good_ones_and_says_before_what_it_would_do(project: Project) -> None:
    project.notebook("saves.ipynb", SAVES, parameters=PARAMETERS)
    assert project.grd("research", "saves.ipynb").code == 0
    folder = project.only_run() / "checkpoints"
    flip(folder / "checkpoint_epoch_3.pt")
    before = sorted(path.name for path in folder.iterdir())
    nothing = project.grd("checkpoints", "last", "--prune")
    assert nothing.code == 0 and "nothing to delete" in nothing.out
    dry = project.grd("checkpoints", "last", "--prune", "--keep", "1", "--dry-run")
    assert dry.out.count("would delete") == 2 and sorted(path.name for path in folder.iterdir()) == before
    done = project.grd("checkpoints", "last", "--prune", "--keep", "1", "--json")
    deleted = [Path(path).name for path in done.json["pruned"]]
    assert sorted(deleted) == ["checkpoint_epoch_0.pt", "checkpoint_epoch_1.pt"]
    left = [
        (row["epoch"], row["step"], row["verdict"]) for row in listed(project, "last", "--verify", code=1)
    ]
    assert left == [(3, 7, "good"), (3, None, "damaged"), (2, None, "good")]


def test_what_cannot_be_done_is_refused_in_one_line(project: Project, tmp_path: Path) -> None:
    project.notebook("ticks.ipynb", TICKS)
    started = project.grd("research", "ticks.ipynb", "--detach", "--json")
    run = started.json["run_id"]
    project.wait_for_event("cell", project.runs_dir / run, status="running")
    assert "no checkpoints in" in project.grd("checkpoints", run).out
    refusals = [
        (("last", "--prune"), 69, f"first: grd stop {run}"),
        (("last", "--keep", "1G"), 2, "belong to --prune"),
        (("last", "--prune", "--keep", "much"), 2, "is no size"),
        ((str(tmp_path), "--prune"), 2, "needs a RUN"),
        (("nothing-of-this-name",), 66, "see: grd list"),
    ]
    for arguments, code, words in refusals:
        refused = project.grd("checkpoints", *arguments)
        assert (refused.code, refused.out) == (code, ""), refused
        assert words in refused.err and refused.err.count("\n") == 1
    project.grd("stop", run, "--now")


LOOP = """from grd.experiment import training
for epoch in training.epochs(3, state={{"n": {0}}}, checkpoint_dir=checkpoint_dir, resume=resume, every=1):
    epoch.log(loss=1.0)
"""


def test_every_loop_of_a_run_is_listed_verified_and_pruned(project: Project) -> None:
    project.notebook("two.ipynb", LOOP.format(1), LOOP.format(2), parameters=PARAMETERS)
    assert project.grd("research", "two.ipynb").code == 0
    folder = project.only_run() / "checkpoints"
    rows = listed(project, "last", "--verify")
    assert [(row["loop"], row["epoch"]) for row in rows] == [(1, 2), (1, 1), (1, 0), (2, 2), (2, 1), (2, 0)]
    assert [row["used_next"] for row in rows] == [True, False, False] * 2
    shown = project.grd("checkpoints", "last").out
    assert "training loop 1\n" in shown and "training loop 2\n" in shown and shown.count("<- resume") == 2
    dry = project.grd("checkpoints", "last", "--prune", "--keep", "1", "--dry-run").out
    assert (
        "would delete checkpoint_epoch_0.pt\n" in dry and "would delete loop-2/checkpoint_epoch_0.pt" in dry
    )
    for path in (folder / "loop-2").glob("*.pt"):
        flip(path)
    rows = listed(project, "last", "--verify", code=1)
    assert {row["verdict"] for row in rows if row["loop"] == 2} == {"damaged"}
    assert {row["verdict"] for row in rows if row["loop"] == 1} == {"good"}
    assert project.grd("checkpoints", "last").out.count("would begin anew") == 1
    assert project.grd("checkpoints", "last", "--prune", "--keep", "1").code == 0
    assert sorted(path.name for path in folder.glob("checkpoint_epoch_*")) == [
        "checkpoint_epoch_1.pt",
        "checkpoint_epoch_2.pt",
    ]


def test_a_record_damaged_by_hand_is_named_in_one_line(project: Project) -> None:
    project.notebook("ticks.ipynb", "1", parameters=PARAMETERS)
    assert project.grd("research", "ticks.ipynb").code == 0
    run = project.only_run()
    record = json.loads((run / "run.json").read_text())
    broken: list[tuple[Any, str]] = [
        ([], "holds a list"),
        ({**record, "checkpoint_dir": 5}, "checkpoint_dir is a int"),
        ({**record, "checkpointing": []}, "checkpointing is a list"),
        ({name: record[name] for name in record if name != "checkpointing"}, "add --keep SIZE"),
    ]
    for content, words in broken:
        (run / "run.json").write_text(json.dumps(content))
        refused = project.grd("checkpoints", run.name, "--prune")
        assert refused.code == 78 and words in refused.err, refused.err
        assert refused.err.count("\n") == 1 and "Traceback" not in project.grd("status").err
    assert project.grd("checkpoints", run.name, "--prune", "--keep", "1G").code == 0
    empty = project.grd("checkpoints", "")
    assert (empty.code, empty.out) == (2, "") and "RUN is empty" in empty.err
