"""A disk that fills up and a folder that vanishes: nothing saved before is lost, and the cause is told."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from conftest import Project, cannot_be_had, wait_until

pytestmark = pytest.mark.faults

FILLING = """
import time
for i in range(0 if resume else 400):
    print(i, 'y' * 100_000, flush=True)
    time.sleep(0.02)
"""
PARAMETERS = "timeout = None\ncheckpoint_dir = ''\nresume = False"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode != 0:
        cannot_be_had(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_interrupts_the_run_keeps_its_record_and_every_older_output(
    project: Project, small_disk: Path
) -> None:
    runs = small_disk / "runs"
    project.notebook("fill.ipynb", "print('begin')", FILLING, "print('end')", parameters=PARAMETERS)
    stopped = project.grd("research", "fill.ipynb", "--runs-dir", runs, "--json")
    assert (stopped.code, stopped.json["cause"]) == (75, "disk_full"), stopped.err
    assert json.loads((Path(stopped.json["folder"]) / "run.json").read_text())["state"] == "interrupted"
    nbformat.validate(nbformat.read(Path(stopped.json["folder"]) / "output.ipynb", as_version=4))
    printed = project.grd("logs", "last", "--runs-dir", runs).out
    assert printed.startswith("begin\n0 yyy")
    assert len(printed) > 3_000_000  # the disk holds 8 MB, snapshots and journal together
    assert project.processes() == []
    for attempt in Path(stopped.json["folder"]).glob("attempts/*/journal.jsonl"):
        os.truncate(attempt, 0)  # a person makes space
    resumed = project.grd("resume", "last", "--runs-dir", runs)
    assert resumed.code == 0, resumed.err
    assert project.grd("logs", "last", "--runs-dir", runs).out == "begin\nend\n"


def test_a_disk_that_is_full_from_the_start_is_one_clear_error(project: Project, small_disk: Path) -> None:
    with open(small_disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(b"x" * 4096):
            pass
    project.notebook("fill.ipynb", "print('begin')")
    refused = project.grd("research", "fill.ipynb", "--runs-dir", small_disk / "runs")
    assert (refused.code, "No space left" in refused.err) == (2, True)
    assert "Traceback" not in refused.err


def test_a_run_whose_folder_is_deleted_ends_and_leaves_nothing(project: Project) -> None:
    project.notebook("train.ipynb", "import time\nprint('here', flush=True)\ntime.sleep(600)")
    process = project.start("research", "train.ipynb", "--grace", "5s", "--timeout", "10m")
    project.wait_for_output("here")
    shutil.rmtree(project.only_run())
    gone = project.finish(process)
    assert gone.code == 66, gone.err
    assert "Traceback" not in gone.err
    assert project.run_folders() == []


def fill(folder: Path) -> Path:
    """Take every block that is left; returns the file that holds them."""
    filler = folder / "filler"
    with open(filler, "ab", buffering=0) as stream:
        for size in (65_536, 4_096):
            with contextlib.suppress(OSError):
                while stream.write(b"x" * size) == size:
                    pass
    return filler


WAITING = "import time\nprint('here', flush=True)\ntime.sleep(0 if resume else 600)"


def test_a_resume_that_finds_no_room_is_refused_and_changes_nothing(
    project: Project, small_disk: Path
) -> None:
    runs = small_disk / "runs"
    project.notebook("run.ipynb", WAITING, parameters=PARAMETERS)
    started = project.grd(
        "research", "run.ipynb", "--detach", "--json", "--timeout", "10m", "--runs-dir", runs
    )
    run = Path(started.json["folder"])
    assert project.grd("stop", "last", "--runs-dir", runs).code == 0
    filler = fill(small_disk)
    before = sorted((path, path.stat().st_size) for path in run.rglob("*"))
    refused = project.grd("resume", "last", "--runs-dir", runs)
    assert refused.code == 69
    assert "No space left" in refused.err and f"grd resume {run.name}" in refused.err
    assert "Traceback" not in refused.err
    assert sorted((path, path.stat().st_size) for path in run.rglob("*")) == before
    assert project.grd("status", "last", "--json", "--runs-dir", runs).json["attempt"] == 1
    filler.unlink()
    assert project.grd("resume", "last", "--runs-dir", runs).code == 0


def test_an_end_that_finds_no_room_is_told_at_once_and_stored_later(
    project: Project, small_disk: Path
) -> None:
    runs = small_disk / "runs"
    project.notebook("run.ipynb", WAITING, parameters=PARAMETERS)
    started = project.grd(
        "research", "run.ipynb", "--detach", "--json", "--timeout", "10m", "--runs-dir", runs
    )
    run = Path(started.json["folder"])
    wait_until(lambda: "here" in project.grd("logs", "last", "--runs-dir", runs).out, "the cell")
    processes = [project.record(run)["runner"], *project.record(run)["processes"].values()]
    for who in processes:
        os.kill(who["pid"], signal.SIGKILL)
    (run / "reserve").unlink()
    filler = fill(small_disk)
    shown = project.grd("status", "last", "--json", "--runs-dir", runs).json
    assert (shown["state"], shown["cause"]) == ("interrupted", "runner_lost")
    assert project.record(run)["state"] == "running", "it found room after all"
    assert project.grd("resume", "last", "--runs-dir", runs).code == 69
    filler.unlink()
    assert project.grd("resume", "last", "--runs-dir", runs).code == 0
    assert [a["state"] for a in project.record(run)["attempts"]] == ["interrupted", "completed"]


def test_a_disk_that_fills_up_before_the_first_cell_is_the_cause_that_is_told(
    project: Project, small_disk: Path
) -> None:
    runs = small_disk / "runs"
    project.notebook("run.ipynb", "print('here', flush=True)", parameters=PARAMETERS)
    process = project.start("research", "run.ipynb", "--timeout", "10m", "--runs-dir", runs, "--json")
    reserve = "*/reserve"
    wait_until(lambda: list(runs.glob(reserve)), "the run's folder")
    fill(small_disk)
    stopped = project.finish(process)
    assert "Traceback" not in stopped.err
    assert (stopped.code, stopped.json["cause"]) == (75, "disk_full"), stopped.json
    (small_disk / "filler").unlink()
    assert project.grd("resume", "last", "--runs-dir", runs).code == 0
