"""Run ids need no counter, and nothing can make two runs share one."""

from __future__ import annotations

import os
import secrets
import threading
from collections import Counter
from pathlib import Path

import pytest
from conftest import LIMIT_SECONDS, Project, wait_until

import grd
from grd.errors import ResourceUnavailable
from grd.steps.estimator import estimate_notebook


@pytest.mark.faults
def test_runs_that_are_started_at_once_have_ids_and_folders_of_their_own(project: Project) -> None:
    project.notebook("plain.ipynb", "print('it runs')")
    processes = [project.start("research", "plain.ipynb", "--detach", "--json") for _ in range(8)]
    started = [project.finish(process) for process in processes]
    assert [done.code for done in started] == [0] * 8, [done.err for done in started]
    ids = [done.json["run_id"] for done in started]
    folders = [Path(done.json["folder"]) for done in started]
    assert len(set(ids)) == len(set(folders)) == 8
    # Most of them in the same second: the clock alone does not tell them apart.
    assert max(Counter(run_id[:15] for run_id in ids).values()) >= 2
    assert sorted(folder.name for folder in folders) == sorted(ids)
    for folder in folders:
        wait_until(lambda f=folder: project.record(f)["state"] == "completed", f"the end of {folder.name}")
        assert project.record(folder)["run_id"] == folder.name
    assert [path.name for path in project.run_folders()] == sorted(ids)


@pytest.mark.faults
def test_starts_that_draw_the_same_id_get_different_ones(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.notebook("plain.ipynb", "1")
    monkeypatch.chdir(project.path)
    drawn, together, mine = threading.Lock(), threading.Barrier(4), threading.local()
    draws = {"next": 0}

    def few_numbers(count: int | None = None) -> str:
        """The same number for everybody, a good while long."""
        if not hasattr(mine, "waited"):
            mine.waited = True
            together.wait(LIMIT_SECONDS)
        with drawn:
            draws["next"] += 1
            return f"{draws['next'] // 64:04x}"

    monkeypatch.setattr(secrets, "token_hex", few_numbers)
    found: list[str] = []
    errors: list[Exception] = []

    def start() -> None:
        try:
            found.append(grd.research("plain.ipynb", wait=False).id)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_SECONDS)
    assert errors == []
    assert len(set(found)) == 4
    assert draws["next"] > 4, "nobody drew what another had"
    for run_id in found:
        grd.status(run_id).wait(LIMIT_SECONDS)
        assert grd.status(run_id).state == "completed"
    assert [path.name for path in project.run_folders()] == sorted(found)


def test_a_runs_folder_that_is_a_file_is_a_usage_error(project: Project) -> None:
    project.notebook("plain.ipynb", "1")
    (project.path / "taken").write_text("a file")
    done = project.grd("research", "plain.ipynb", "--runs-dir", "taken")
    assert done.code == 2
    assert "no run folder can be made" in done.err


def test_what_cannot_be_looked_at_among_the_runs_is_no_run(project: Project) -> None:
    project.notebook("plain.ipynb", "1")
    assert project.grd("research", "plain.ipynb").code == 0
    for place in (project.runs_dir, project.runs_dir / "batches"):
        place.mkdir(exist_ok=True)
        (place / "loop").symlink_to("loop")
    for command in (
        ("status", "last"), ("list",), ("estimate", "plain.ipynb"), ("gc", "--dry-run"), ("batch", "list"),
    ):  # fmt: skip
        done = project.grd(*command)
        assert done.code == 0, done.err
    missing = project.grd("status", "x" * 300)
    assert (missing.code, len(missing.err.splitlines())) == (66, 1)


def test_a_folder_of_runs_that_cannot_be_read_is_named(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.notebook("plain.ipynb", "1")
    monkeypatch.chdir(project.path)
    project.runs_dir.mkdir()

    def refuse(place: object = ".") -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    for look in (lambda: grd.status("last"), grd.list_runs):
        with pytest.raises(ResourceUnavailable, match="cannot be read: Permission denied"):
            look()
    assert estimate_notebook("plain.ipynb").estimate.seconds is None
