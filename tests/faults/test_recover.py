"""``papermill --engine grd`` is killed; what it had put out is got back by hand or by the next execution."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from conftest import LIMIT_SECONDS, Finished, Project, wait_until, write_notebook
from test_liveness import NO_FLOCK

pytestmark = pytest.mark.faults

TICKING = """
import itertools, time
for i in itertools.count():
    print('tick', i, time.time(), flush=True)
    time.sleep(0.05)
"""
CELLS = ("print('first')\n6 * 7", TICKING, "print('never')")


def papermill(project: Project, *options: str) -> subprocess.Popen[str]:
    """in.ipynb into out.ipynb, with our engine unless ``options`` say otherwise."""
    command = [sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb", "--no-progress-bar"]
    process = subprocess.Popen(
        [*command, *(options or ("--engine", "grd"))],
        cwd=project.path,
        env=project.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    project.started.append(process)
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=LIMIT_SECONDS)
    return process.returncode, said


def journal(project: Project) -> Path:
    return project.path / ".out.ipynb.grd-journal.jsonl"


def start(project: Project, *cells: str, ticks: int = 100) -> subprocess.Popen[str]:
    write_notebook(project.path / "in.ipynb", *(cells or CELLS))
    process = papermill(project)
    wait_until(
        lambda: journal(project).exists() and journal(project).read_text().count("tick") > ticks,
        "output in the journal",
    )
    return process


def kill_all(process: subprocess.Popen[str]) -> float:
    """SIGKILL to papermill, guardians and kernel; when it was."""
    processes = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    at = time.time()
    for each in reversed(processes):
        each.kill()
    process.wait()
    wait_until(lambda: not any(each.is_running() for each in processes), "their end", 30)
    return at


def recover(project: Project, *options: str) -> Finished:
    return project.grd("recover", "out.ipynb", *options)


def read(path: Path) -> Any:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def statuses(notebook: Any) -> list[str]:
    return [cell.metadata.papermill.status for cell in notebook.cells]


def ticks(notebook: Any) -> list[float]:
    """When the ticks were printed; none is missing in between."""
    text = "".join(output.text for output in notebook.cells[1].outputs)
    found = re.findall(r"tick (\d+) ([\d.]+)\n", text)
    assert [int(number) for number, _ in found] == list(range(len(found)))
    return [float(when) for _, when in found]


def left_beside(project: Project) -> list[str]:
    return sorted(path.name for path in project.path.iterdir() if path.name.startswith(".out"))


def test_every_output_older_than_two_seconds_is_got_back_and_the_cells_are_called_what_they_are(
    project: Project,
) -> None:
    process = start(project)
    killed_at = kill_all(process)
    assert left_beside(project) == [".out.ipynb.grd-journal.jsonl", ".out.ipynb.grd-lock"]
    done = recover(project, "--json")
    assert done.code == 0, done.err
    notebook = read(project.path / "out.ipynb")
    assert statuses(notebook) == ["completed", "interrupted", "pending"]
    assert notebook.metadata.papermill.exception is True
    assert [output.output_type for output in notebook.cells[0].outputs] == ["stream", "execute_result"]
    assert ticks(notebook)[-1] > killed_at - 2.0
    assert (done.json["state"], done.json["cause"]) == ("interrupted", "runner_lost")
    assert done.json["cells"] == {"completed": 1, "interrupted": 1, "pending": 1}
    assert done.json["outputs"] == sum(len(cell.outputs) for cell in notebook.cells)
    assert str(process.pid) in done.json["detail"]
    assert left_beside(project) == []
    before = (project.path / "out.ipynb").read_bytes()
    again = recover(project)
    assert (again.code, "nothing to recover" in again.out) == (0, True)
    assert (project.path / "out.ipynb").read_bytes() == before
    code, said = finish(papermill(project, "-k", "python3", "--prepare-only"))
    assert code == 0, said  # papermill takes a recovered notebook as any other


def test_what_a_notebook_that_is_being_executed_holds_is_not_touched(project: Project) -> None:
    write_notebook(
        project.path / "in.ipynb",
        "import os, time\nprint('tick')\nwhile not os.path.exists('go'): time.sleep(0.1)",
    )
    process = papermill(project)
    wait_until(lambda: journal(project).exists() and "tick" in journal(project).read_text(), "output")
    refused = recover(project)
    assert (refused.code, f"kill -TERM {process.pid}" in refused.err) == (69, True)
    code, said = finish(papermill(project))
    assert (code, f"process {process.pid}" in said) == (1, True), said
    assert journal(project).exists()
    (project.path / "go").touch()
    code, said = finish(process)
    assert code == 0, said
    assert statuses(read(project.path / "out.ipynb")) == ["completed"]
    assert left_beside(project) == []


def test_the_next_execution_keeps_what_the_killed_one_had_put_out(project: Project) -> None:
    process = start(project)
    killed_at = kill_all(process)
    write_notebook(project.path / "in.ipynb", "print('new')")
    code, said = finish(papermill(project))
    assert code == 0, said
    [kept] = project.path.glob("out.interrupted-*.ipynb")
    assert kept.name in said
    old = read(kept)
    assert statuses(old) == ["completed", "interrupted", "pending"]
    assert ticks(old)[-1] > killed_at - 2.0
    new = read(project.path / "out.ipynb")
    assert [output.text for output in new.cells[0].outputs] == ["new\n"]
    assert left_beside(project) == []
    code, said = finish(papermill(project))
    assert (code, list(project.path.glob("out.interrupted-*.ipynb"))) == (0, [kept])


def test_an_execution_that_had_put_out_nothing_leaves_no_second_notebook(project: Project) -> None:
    write_notebook(project.path / "in.ipynb", "import time\nopen('here', 'w').close()\ntime.sleep(600)")
    process = papermill(project)
    wait_until((project.path / "here").exists, "the cell")
    kill_all(process)
    write_notebook(project.path / "in.ipynb", "print('new')")
    assert finish(papermill(project))[0] == 0
    assert not list(project.path.glob("out.interrupted-*"))


def test_a_notebook_that_was_written_by_something_else_since_is_left_as_it_is(project: Project) -> None:
    kill_all(start(project))
    write_notebook(project.path / "in.ipynb", "print('plain')")
    assert finish(papermill(project, "-k", "python3"))[0] == 0
    before = (project.path / "out.ipynb").read_bytes()
    done = recover(project)
    assert (done.code, "something else" in done.out) == (0, True)
    assert (project.path / "out.ipynb").read_bytes() == before
    assert journal(project).exists()


@pytest.mark.parametrize(("changes", "cause"), [({"boot_id": "another"}, "host_lost"), ({}, "runner_lost")])
def test_a_machine_that_was_restarted_is_told_from_a_process_that_was_killed(
    project: Project, changes: dict[str, str], cause: str
) -> None:
    kill_all(start(project, ticks=1))
    lock = project.path / ".out.ipynb.grd-lock"
    lock.write_text(json.dumps({**json.loads(lock.read_text()), **changes}))
    assert recover(project, "--json").json["cause"] == cause


def test_without_flock_the_writers_identity_decides(project: Project, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_FLOCK)
    others = os.environ.get("PYTHONPATH")
    project.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tmp_path / "site"), others]))
    process = start(project, ticks=1)
    assert recover(project).code == 69
    assert finish(papermill(project))[0] == 1
    kill_all(process)
    lock = project.path / ".out.ipynb.grd-lock"
    who = json.loads(lock.read_text())
    lock.write_text(json.dumps({**who, "host": "another-host", "boot_id": "another"}))
    refused = recover(project)
    assert (refused.code, "--force" in refused.err) == (69, True)
    assert recover(project, "--force").code == 0
    assert statuses(read(project.path / "out.ipynb"))[0] == "completed"
    assert left_beside(project) == []


def test_sigterm_leaves_nothing_to_recover(project: Project) -> None:
    process = start(project)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 1
    done = recover(project, "--json")
    assert (done.code, done.json["recovered"], done.json["cells"]) == (0, False, None)


def test_where_there_is_nothing_to_recover_it_says_what_to_do_instead(project: Project) -> None:
    missing = project.grd("recover", "none.ipynb")
    assert (missing.code, missing.err.count("\n")) == (66, 1)
    write_notebook(project.path / "in.ipynb", "print('hello')")
    before = (project.path / "in.ipynb").read_bytes()
    assert project.grd("recover", "in.ipynb").code == 0
    assert (project.path / "in.ipynb").read_bytes() == before
    assert project.grd("research", "in.ipynb").code == 0
    run = project.only_run()
    done = project.grd("recover", run / "output.ipynb")
    assert (done.code, f"grd status {run.name}" in done.out) == (0, True)
    kill_all(start(project))
    (project.path / "out.ipynb").write_text("no notebook")
    broken = recover(project)
    assert (broken.code, str(journal(project)) in broken.err) == (2, True)
    assert journal(project).exists()
    (project.path / "out.ipynb").unlink()
    assert recover(project).code == 66
