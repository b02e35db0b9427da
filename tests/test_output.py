"""What a notebook prints: all of it is kept up to a limit that is said, however fast it comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Project


def outputs_of(project: Project, run_id: str) -> list[list[dict[str, Any]]]:
    """The outputs of each code cell of the run's notebook."""
    notebook = json.loads((project.path / "experiments" / run_id / "output.ipynb").read_text())
    return [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text_of(outputs: list[dict[str, Any]], name: str = "stdout") -> str:
    """The text of one stream."""
    return "".join(
        "".join(output["text"])
        for output in outputs
        if output["output_type"] == "stream" and output["name"] == name
    )


def run(project: Project, *cells: str, more: tuple[str, ...] = ()) -> list[list[dict[str, Any]]]:
    """Run a notebook of ``cells``; the outputs of its cells."""
    project.notebook("printing.ipynb", *cells)
    ended = project.grd("research", "printing.ipynb", "--json", *more)
    assert ended.code == 0, ended.err
    return outputs_of(project, json.loads(ended.out)["run_id"])


STOP_THE_READER = (
    "import os, signal, threading, psutil\n"
    "reader = psutil.Process()\n"
    "while 'grd.execution.runner' not in reader.cmdline(): reader = reader.parent()\n"
    "reader.suspend()\n"
    "threading.Timer(2.0, reader.resume).start()\n"
)
STOP_THE_READER_UNTIL_THE_CELL_IS_OVER = STOP_THE_READER.replace(
    "threading.Timer(2.0, reader.resume).start()",
    "resume = lambda result: threading.Timer(3.0, reader.resume).start()\n"
    "get_ipython().events.register('post_run_cell', resume)",
)
PRINT_MUCH = "for number in range(20_000): print(number, flush=True)"


@pytest.mark.faults
def test_output_that_comes_faster_than_it_is_read_is_all_kept(project: Project) -> None:
    # ZeroMQ begins to drop when 1,000 messages wait
    fast, after = run(project, STOP_THE_READER + PRINT_MUCH, "print('after')")
    assert text_of(fast).splitlines() == [str(number) for number in range(20_000)]
    assert text_of(after) == "after\n"


@pytest.mark.faults
def test_output_that_comes_long_after_the_cells_reply_takes_none_from_the_next_cell(project: Project) -> None:
    held_back = (
        "import time\n"
        "kernel = get_ipython().kernel\n"
        "send = kernel.session.send\n"
        "def hold_back(stream, message, *rest, **more):\n"
        "    if message == 'execute_reply':\n"
        "        kernel.session.send = send\n"
        "        kernel.iopub_thread.schedule(lambda: time.sleep(7))\n"
        "    return send(stream, message, *rest, **more)\n"
        "kernel.session.send = hold_back\n"
        "print('late')"
    )
    late, after = run(project, held_back, "print('after')")
    assert text_of(late) == "late\n"
    assert text_of(after) == "after\n"


@pytest.mark.faults
def test_a_kernel_that_drops_output_does_not_hang_the_run_and_the_loss_is_told(project: Project) -> None:
    project.notebook(
        "printing.ipynb",
        "import time, zmq\n"
        "thread = get_ipython().kernel.iopub_socket.io_thread\n"
        "thread.schedule(lambda: thread.socket.setsockopt(zmq.XPUB_NODROP, 0))\n"
        "print('dropping', flush=True)",
        STOP_THE_READER_UNTIL_THE_CELL_IS_OVER + PRINT_MUCH,
        "print('after')",
    )
    ended = project.grd("research", "printing.ipynb", "--json")
    assert ended.code == 0, ended.err
    record = json.loads(ended.out)
    _, fast, after = outputs_of(project, record["run_id"])
    assert len(text_of(fast).splitlines()) < 20_000, "nothing was dropped: the test shows nothing"
    assert any("dropped" in warning for warning in record["warnings"])
    assert text_of(after) == "after\n"


@pytest.mark.faults
def test_pieces_of_a_stream_become_few_outputs(project: Project) -> None:
    (outputs,) = run(project, "for number in range(5_000): print(number, flush=True)")
    assert text_of(outputs).splitlines() == [str(number) for number in range(5_000)]
    assert len(outputs) < 10


def test_streams_that_alternate_keep_their_order(project: Project) -> None:
    (outputs,) = run(
        project,
        "import sys\nfor number in range(3):\n"
        "    print(number, flush=True); print(-number, file=sys.stderr, flush=True)",
    )
    assert [output["name"] for output in outputs] == ["stdout", "stderr"] * 3


def test_more_output_than_the_limit_keeps_head_and_tail_and_says_so(project: Project) -> None:
    long, rich, last = run(
        project,
        "for number in range(40_000): print(number, 'x' * 50, flush=number % 100 == 0)",
        "from IPython.display import HTML, display\n"
        "for number in range(500): display(HTML('<b>' + 'y' * 1000))",
        "print('the end')",
        more=("--max-output", "1MB"),
    )
    assert text_of(long).startswith("0 xxx")
    assert "left out here" in text_of(long, "stderr") and "--max-output" in text_of(long, "stderr")
    assert text_of(last) == "the end\n"
    size = sum(len(json.dumps(outputs)) for outputs in (long, rich, last))
    assert 500_000 < size < 1_200_000
    assert all("".join(output.get("text", "-")) for output in (*long, *rich)), "no empty places remain"


def test_the_limit_is_told_as_a_warning_of_the_run(project: Project) -> None:
    project.notebook("printing.ipynb", "print('x' * 3_000_000)")
    ended = project.grd("research", "printing.ipynb", "--json", env={"GRD_MAX_OUTPUT": "1MB"})
    record = json.loads(ended.out)
    assert record["max_output"] == 1_000_000
    assert any("--max-output" in warning for warning in record["warnings"])


def test_a_limit_that_is_no_size_is_an_error_before_anything_starts(project: Project) -> None:
    project.notebook("printing.ipynb", "print('x')")
    ended = project.grd("research", "printing.ipynb", "--max-output", "many")
    assert ended.code == 2, ended.err
    assert "many" in ended.err and "Traceback" not in ended.err
    setting = project.grd("research", "printing.ipynb", env={"GRD_MAX_OUTPUT": "many"})
    assert setting.code == 78 and "GRD_MAX_OUTPUT" in setting.err
    assert not (project.path / "experiments").exists()


def test_an_update_of_a_display_finds_its_place_after_earlier_output_was_left_out(project: Project) -> None:
    _, shown = run(
        project,
        "for number in range(30): print('x' * 60_000, flush=True)",
        "from IPython.display import display\n"
        "handle = display('before', display_id=True)\nhandle.update('later')",
        more=("--max-output", "1MB"),
    )
    assert shown[0]["data"]["text/plain"] in ("'later'", ["'later'"])
    assert len(shown) == 1


def test_the_journal_of_endless_output_does_not_grow_without_end(project: Project, tmp_path: Path) -> None:
    project.notebook(
        "printing.ipynb",
        "for number in range(1_500): print('x' * 60_000, flush=True)\nimport os\nos.kill(os.getpid(), 9)",
    )
    ended = project.grd("research", "printing.ipynb", "--json", "--max-output", "2MB")
    assert ended.code == 75, ended.err
    folder = project.path / "experiments" / json.loads(ended.out)["run_id"]
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 10_000_000


def test_a_stream_that_a_snapshot_cut_in_two_is_whole_when_the_runner_is_killed(project: Project) -> None:
    project.notebook(
        "printing.ipynb",
        "import os, signal, time, psutil\n"
        "for number in range(300): print(number, 'x' * 500, flush=True)\n"
        "time.sleep(2)\n"
        "for number in range(300, 320): print(number, flush=True)\n"
        "time.sleep(2)\n"
        "runner = psutil.Process()\n"
        "while 'grd.execution.runner' not in runner.cmdline(): runner = runner.parent()\n"
        "runner.kill()\n"
        "time.sleep(600)",
    )
    assert project.grd("research", "printing.ipynb", "--grace", "1s").code == 75
    (outputs,) = outputs_of(project, project.only_run().name)
    assert [line.split()[0] for line in text_of(outputs).splitlines()] == [str(n) for n in range(320)]
