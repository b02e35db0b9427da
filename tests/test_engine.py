"""``papermill --engine grd`` for people who know nothing else of grd."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
from conftest import LIMIT_SECONDS, has_ended, wait_until, write_notebook

SLOW = "import time\nfor i in range(3000):\n    print('tick', i, flush=True)\n    time.sleep(0.05)"


def papermill(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "papermill", "--engine", "grd", "--no-progress-bar", *arguments],
        cwd=folder,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=LIMIT_SECONDS)
    return process.returncode, out + err


def statuses(path: Path) -> list[str | None]:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [
        cell.metadata.get("papermill", {}).get("status")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def text(path: Path) -> str:
    return "".join(
        output.get("text", "")
        for cell in nbformat.read(path, as_version=4).cells
        for output in cell.get("outputs", [])
    )


def test_a_plain_notebook_runs_with_parameters_and_looks_as_papermills_own(tmp_path: Path) -> None:
    write_notebook(tmp_path / "in.ipynb", "print('x is', x)", "x + 1", parameters="x = 0")
    code, said = finish(papermill(tmp_path, "in.ipynb", "out.ipynb", "-p", "x", "1"))
    assert code == 0, said
    notebook = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert notebook.metadata.papermill.parameters == {"x": 1}
    assert notebook.metadata.papermill.exception is None
    assert notebook.metadata.language_info.name == "python"
    assert text(tmp_path / "out.ipynb") == "x is 1\n"
    assert notebook.cells[-1].outputs[0].data["text/plain"] == "2"
    assert set(statuses(tmp_path / "out.ipynb")) == {"completed"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.ipynb", "out.ipynb"]


def test_a_cell_error_ends_as_with_papermill_and_later_cells_stay_pending(tmp_path: Path) -> None:
    write_notebook(tmp_path / "in.ipynb", "print('before')", "1 / 0", "print('after')")
    code, said = finish(papermill(tmp_path, "in.ipynb", "out.ipynb"))
    assert code == 1
    assert "ZeroDivisionError" in said
    assert [s for s in statuses(tmp_path / "out.ipynb") if s] == ["completed", "failed", "pending"]


def test_sigterm_saves_the_output_of_the_running_cell_and_leaves_no_kernel(tmp_path: Path) -> None:
    write_notebook(tmp_path / "in.ipynb", SLOW, "print('never')")
    process = papermill(tmp_path, "in.ipynb", "out.ipynb")
    journal = tmp_path / ".out.ipynb.grd-journal.jsonl"
    wait_until(lambda: journal.exists() and "tick 3" in journal.read_text(), "output in the journal")
    kernels = psutil.Process(process.pid).children(recursive=True)
    assert kernels
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 1
    assert "interrupted (sigterm)" in said
    assert "tick 3" in text(tmp_path / "out.ipynb")
    assert statuses(tmp_path / "out.ipynb") == ["interrupted", "pending"]
    wait_until(lambda: all(has_ended(k) for k in kernels), "the kernel's end")
    assert not journal.exists()


def test_the_deadline_is_the_whole_notebooks_not_each_cells(tmp_path: Path) -> None:
    write_notebook(tmp_path / "in.ipynb", *["import time; time.sleep(2)"] * 60)
    code, said = finish(papermill(tmp_path, "in.ipynb", "out.ipynb", env={"GRD_TIMEOUT": "15s"}))
    assert code == 1
    assert "interrupted (deadline)" in said
    found = statuses(tmp_path / "out.ipynb")
    assert found.count("pending") >= 50
    assert "completed" in found


@pytest.mark.faults
def test_a_cell_that_swallows_the_interrupt_is_killed_when_the_grace_is_over(tmp_path: Path) -> None:
    stubborn = "import time\nwhile True:\n  try:\n    time.sleep(1)\n  except KeyboardInterrupt:\n    pass"
    write_notebook(tmp_path / "in.ipynb", stubborn, "print('never')")
    environment = {"GRD_TIMEOUT": "10s", "GRD_GRACE": "3s"}  # time for the kernel to start on a busy machine
    code, said = finish(papermill(tmp_path, "in.ipynb", "out.ipynb", env=environment))
    assert code == 1
    assert "grace period ran out" in said
    assert statuses(tmp_path / "out.ipynb") == ["interrupted", "pending"]


def test_a_dead_kernel_keeps_papermills_exit_code_and_is_not_called_completed(tmp_path: Path) -> None:
    write_notebook(
        tmp_path / "in.ipynb", "print('so far')", "import os; os.kill(os.getpid(), 9)", "print('never')"
    )
    code, _ = finish(papermill(tmp_path, "in.ipynb", "out.ipynb"))
    assert code == 138
    assert statuses(tmp_path / "out.ipynb") == ["completed", "failed", "pending"]
    assert nbformat.read(tmp_path / "out.ipynb", as_version=4).metadata.papermill.exception is True
    assert "so far" in text(tmp_path / "out.ipynb")


def test_children_of_a_killed_kernel_die_with_it_whatever_their_session(tmp_path: Path) -> None:
    cell = (
        "import subprocess, sys, os\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "pids = [subprocess.Popen(sleep).pid, subprocess.Popen(sleep, start_new_session=True).pid]\n"
        "open('pids', 'w').write(repr(pids))\n"
        "os.kill(os.getpid(), 9)"
    )
    write_notebook(tmp_path / "in.ipynb", cell)
    code, _ = finish(papermill(tmp_path, "in.ipynb", "out.ipynb"))
    assert code == 138
    pids = json.loads((tmp_path / "pids").read_text())
    assert len(pids) == 2
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), "the children's end", 10)


def test_displays_that_are_updated_or_cleared_are_saved_as_they_ended(tmp_path: Path) -> None:
    cell = (
        "from IPython.display import display, clear_output\n"
        "shown = display('first', display_id=True)\nshown.update('second')\n"
        "display('gone')\nclear_output(wait=True)\ndisplay('stays')"
    )
    write_notebook(
        tmp_path / "in.ipynb", cell, "later = display('a', display_id='x')", "display('b', display_id='x')"
    )
    code, said = finish(papermill(tmp_path, "in.ipynb", "out.ipynb"))
    assert code == 0, said
    cells = [c for c in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells if c.cell_type == "code"]
    assert [o.data["text/plain"] for o in cells[0].outputs] == ["'stays'"]


def test_a_link_is_written_through_and_stays_a_link(tmp_path: Path) -> None:
    write_notebook(tmp_path / "in.ipynb", "print('hello')")
    (tmp_path / "real").mkdir()
    (tmp_path / "out.ipynb").symlink_to("real/target.ipynb")
    (tmp_path / "real" / "target.ipynb").write_text("{}")
    code, said = finish(papermill(tmp_path, "in.ipynb", "out.ipynb"))
    assert code == 0, said
    assert (tmp_path / "out.ipynb").is_symlink()
    assert text(tmp_path / "real" / "target.ipynb") == "hello\n"


def test_a_missing_output_folder_is_papermills_error_before_any_kernel(tmp_path: Path) -> None:
    write_notebook(tmp_path / "in.ipynb", "open('ran', 'w')")
    code, said = finish(papermill(tmp_path, "in.ipynb", "nowhere/out.ipynb"))
    assert code == 1
    assert "FileNotFoundError" in said
    assert not (tmp_path / "ran").exists()


def test_output_to_stdout_and_working_folder_are_papermills(tmp_path: Path) -> None:
    write_notebook(tmp_path / "in.ipynb", "import os; print(os.getcwd())")
    (tmp_path / "work").mkdir()
    process = papermill(tmp_path, "--cwd", "work", "in.ipynb", "-")
    out, err = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, err
    shown = nbformat.reads(out, as_version=4)
    assert shown.cells[-1].outputs[0].text.strip() == str(tmp_path / "work")


@pytest.mark.faults
def test_the_engine_works_through_papermills_python_interface_and_in_a_thread(tmp_path: Path) -> None:
    write_notebook(tmp_path / "in.ipynb", "import time; time.sleep(60)", "print('never')")
    script = (
        "import threading, papermill\n"
        "from grd.execution.attempt import NotebookInterrupted\n"
        "seen = []\n"
        "def run():\n"
        "    try:\n"
        "        papermill.execute_notebook('in.ipynb', 'out.ipynb', engine_name='grd', grd_timeout=12,\n"
        "                                   grd_grace='4s', progress_bar=False)\n"
        "    except NotebookInterrupted as stop:\n"
        "        seen.append(stop.outcome.cause)\n"
        "thread = threading.Thread(target=run)\n"
        "thread.start(); thread.join()\n"
        "assert seen == ['deadline'], seen\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert statuses(tmp_path / "out.ipynb") == ["interrupted", "pending"]


@pytest.mark.parametrize("engine", ["grd", None])
def test_other_peoples_papermill_is_left_alone(tmp_path: Path, engine: str | None) -> None:
    write_notebook(tmp_path / "in.ipynb", "1")
    script = (
        "import papermill\nfrom papermill.iorw import papermill_io\n"
        f"papermill.execute_notebook('in.ipynb', 'out.ipynb', engine_name={engine!r}, progress_bar=False)\n"
        "print(type(dict(papermill_io._handlers)['local']).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("AtomicLocalHandler" if engine else "LocalHandler")
