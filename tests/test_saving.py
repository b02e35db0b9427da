"""What saving costs, in counts: bytes and snapshots, not seconds. And that nothing is lost for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from conftest import wait_until, write_notebook

from grd.execution import client, local_files, saving
from grd.execution.output_limit import OutputLimit
from grd.runs.notebook_file import NotebookFile

ENGINE = [sys.executable, "-m", "papermill", "--engine", "grd", "--no-progress-bar", "in.ipynb", "out.ipynb"]


def outputs_of(path: Path) -> list[list[dict[str, Any]]]:
    """The outputs of each code cell."""
    return [cell.outputs for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def bytes_written(command: list[str], folder: Path) -> int:
    """What ``command``, and all that it waited for, passed to write()."""
    process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended and not yet forgotten
    counters = Path(f"/proc/{process.pid}/io").read_text()
    assert process.wait() == 0
    return next(int(line.split()[1]) for line in counters.splitlines() if line.startswith("wchar"))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="this system does not count bytes written")
def test_after_a_large_output_many_cells_write_a_few_times_the_notebooks_size(tmp_path: Path) -> None:
    big = "for _ in range(50): print('x' * 99_999)"
    write_notebook(tmp_path / "in.ipynb", big, *(f"print({number})" for number in range(200)))
    written = bytes_written(ENGINE, tmp_path)
    size = (tmp_path / "out.ipynb").stat().st_size
    assert size > 5_000_000
    assert written <= 5 * size, f"{written / size:.1f} times the final size"
    texts = ["".join(output["text"] for output in outputs) for outputs in outputs_of(tmp_path / "out.ipynb")]
    assert texts[1:] == [f"{number}\n" for number in range(200)]


def test_a_small_notebook_is_written_once_before_its_cells_and_once_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_notebook(tmp_path / "in.ipynb", "print(1)", "print(2)")
    writes: list[Path] = []
    write_file = local_files.write_file

    def counted(path: Path, data: bytes | Iterable[bytes]) -> None:
        writes.append(path)
        write_file(path, data)

    monkeypatch.setattr(local_files, "write_file", counted)
    output = tmp_path / "out.ipynb"
    papermill.execute_notebook(tmp_path / "in.ipynb", output, engine_name="grd", progress_bar=False)
    assert writes == [output, output]
    assert nbformat.read(output, as_version=4).metadata.grd.complete is True


def test_what_papermill_adds_after_the_execution_is_written_too(tmp_path: Path) -> None:
    write_notebook(tmp_path / "in.ipynb", "1 / 0")
    with pytest.raises(papermill.PapermillExecutionError):
        papermill.execute_notebook(
            tmp_path / "in.ipynb", tmp_path / "out.ipynb", engine_name="grd", progress_bar=False
        )
    first, anchor, _ = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    assert "An Exception was encountered" in first.source
    assert "papermill-error-cell" in anchor.source


def test_snapshots_become_rarer_as_the_notebook_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "FLUSH_SECONDS", 0.0)
    cells = 2_000
    notebook = json.loads(
        nbformat.writes(
            nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"{i}") for i in range(cells)])
        )
    )
    sizes: list[int] = []

    def write(path: Path, data: Iterable[bytes]) -> None:
        content = b"".join(data)
        sizes.append(len(content))
        path.write_bytes(content)

    journal = tmp_path / "journal.jsonl"
    saver = saving.NotebookSaver(notebook, tmp_path / "out.ipynb", journal, write=write)
    for number in range(cells):
        output = {"output_type": "stream", "name": "stdout", "text": "x" * 5_000}
        saver.put({"op": "output", "i": number, "output": output})
        if number % 10 == 0:  # a look at whether a snapshot is due
            size = (number + 1) * 5_000
            wait_until(lambda size=size: journal.stat().st_size > size, "the journal")
    saver.close()
    assert json.loads((tmp_path / "out.ipynb").read_text())["cells"][-1]["outputs"]
    assert 4 <= len(sizes) <= 12, sizes  # the first of 0.3 MB, then 64 KB to 10 MB by doubling, the last
    assert sum(sizes) < 4 * sizes[-1]


def test_a_late_answer_does_not_end_the_next_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the kernel is asked whether output is still coming, and answers when the cell is already over
    monkeypatch.setattr(client, "QUIET_SECONDS", 0.001)
    cells = ["for number in range(2_000): print(number, flush=True)", "print('after')"] * 2
    write_notebook(tmp_path / "in.ipynb", *cells)
    papermill.execute_notebook(
        tmp_path / "in.ipynb", tmp_path / "out.ipynb", engine_name="grd", progress_bar=False
    )
    for printed, after in zip(*[iter(outputs_of(tmp_path / "out.ipynb"))] * 2, strict=True):
        text = "".join(output["text"] for output in printed)
        assert text.splitlines() == [str(number) for number in range(2_000)]
        assert [output["text"] for output in after] == ["after\n"]


@pytest.mark.faults  # some 10 s of the kernel's own time
def test_twenty_thousand_displays_are_all_kept_in_order(tmp_path: Path) -> None:
    write_notebook(tmp_path / "in.ipynb", "for number in range(20_000): display(number)")
    subprocess.run(ENGINE, cwd=tmp_path, check=True, capture_output=True)
    (outputs,) = outputs_of(tmp_path / "out.ipynb")
    assert [output["data"]["text/plain"] for output in outputs] == [str(number) for number in range(20_000)]


def test_the_output_limit_holds_with_papermill_too(tmp_path: Path) -> None:
    write_notebook(
        tmp_path / "in.ipynb", "for number in range(40_000): print(number, 'x' * 50)", "print('the end')"
    )
    done = subprocess.run(
        ENGINE, cwd=tmp_path, env={**os.environ, "GRD_MAX_OUTPUT": "1MB"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--max-output" in done.stderr
    long, last = outputs_of(tmp_path / "out.ipynb")
    text = "".join(output["text"] for output in long)
    assert text.startswith("0 xxx") and "left out here" in text and text.rstrip().endswith("x" * 50)
    assert "39999 xxx" in text
    assert 500_000 < len(text) < 1_200_000
    assert last[0]["text"] == "the end\n"


def test_clearing_gives_back_what_the_output_limit_had_counted() -> None:
    limit = OutputLimit(100)
    assert limit.add(0, 0, 40) == []
    for _ in range(50):  # a cell that shows something new in the place of the old
        assert limit.add(1, 0, 45) == []
        limit.cleared(1)
    assert limit.add(1, 0, 20) == limit.add(1, 1, 20) == [] and not limit.left_out
    assert limit.add(1, 2, 20) != []


def notebook_of_everything() -> nbformat.NotebookNode:
    """Each kind of cell, output and value that a notebook may hold."""
    values = {"b": [], "c": {}, "d": [1, 2.5, None, True, {"e": 'é\u2028\x7f\n\t"\\'}]}
    notebook = nbformat.v4.new_notebook(metadata={"signature": "s", "a": values, "z": [[1, 2], []]})
    picture = {"image/png": "abc\n", "text/html": "a\nb", "image/svg+xml": "a\nb", "text/plain": "a\r\nb\n"}
    notebook.cells.append(nbformat.v4.new_markdown_cell("a\nb", attachments={"x.png": picture}))
    code = nbformat.v4.new_code_cell(
        '  "outputs": []\n   "outputs": []\n', metadata={"trusted": True, "tags": []}
    )
    code.outputs = [
        nbformat.v4.new_output("stream", text="a\nb\r\nc"),
        nbformat.v4.new_output("display_data", data={**picture, "application/json": {"a": "b\nc"}}),
        nbformat.v4.new_output("execute_result", data={"application/vnd.x+json": {"z": [1]}}),
        nbformat.v4.new_output("error", ename="a", evalue="b", traceback=["x\ny"]),
    ]
    notebook.cells += [code, nbformat.v4.new_code_cell(""), nbformat.v4.new_raw_cell("r")]
    return notebook


@pytest.mark.parametrize(
    "notebook", [notebook_of_everything(), nbformat.v4.new_notebook()], ids=["all", "none"]
)
def test_a_notebooks_file_is_byte_for_byte_nbformats(notebook: nbformat.NotebookNode) -> None:
    assert b"".join(NotebookFile(notebook)).decode() == nbformat.writes(notebook) + "\n"


def test_a_large_notebook_is_never_whole_in_memory_while_it_is_written() -> None:
    code = nbformat.v4.new_code_cell("")
    code.outputs = [nbformat.v4.new_output("stream", text="x" * 1_000_000) for _ in range(30)]
    file = NotebookFile(nbformat.v4.new_notebook(cells=[code]))
    pieces = [len(piece) for piece in file]
    assert sum(pieces) == file.size > 30_000_000
    assert max(pieces) < 2_000_000
