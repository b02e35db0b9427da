"""``--engine grd`` with an output that is no local file: written at its start and its end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from conftest import LIMIT_SECONDS, wait_until, write_notebook
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError
from papermill.iorw import LocalHandler, papermill_io

from grd.execution.unfinished import journal_beside
from grd.runs.notebook_journal import rebuild

SLEEP = "import time\nfor i in range({seconds}):\n    print('tick', i, flush=True)\n    time.sleep(1)"


class Store:
    """A store for notebooks, as papermill knows them: whole texts by path. Remembers every write."""

    def __init__(self, refuses: int | None = None) -> None:
        self.written: list[Any] = []
        self._refuses = refuses

    def write(self, text: str, path: str) -> None:
        if len(self.written) == self._refuses:
            raise PermissionError(f"{path}: access denied")
        self.written.append(json.loads(text))

    def read(self, path: str) -> str:
        return json.dumps(self.written[-1])

    def listdir(self, path: str) -> list[str]:
        return [path]

    def pretty_path(self, path: str) -> str:
        return path

    def statuses(self) -> list[list[str]]:
        """papermill's word for each code cell, in every version that was written."""
        return [
            [c["metadata"]["papermill"]["status"] for c in version["cells"] if c["cell_type"] == "code"]
            for version in self.written
        ]


@pytest.fixture(autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which grd keeps what no store has taken yet."""
    folder = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("GRD_STATE_DIR", str(folder))
    return folder / "remote"


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[Any]]:
    """papermill's handlers, put back after the test."""
    before = list(papermill_io._handlers)
    yield papermill_io._handlers
    papermill_io._handlers[:] = before


def store(**options: Any) -> Store:
    made = Store(**options)
    papermill_io.register("mem://", made)
    return made


def notebook(*cells: str) -> Any:
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "python3"}
    return made


def run(*cells: str, output: str = "mem://notebooks/out.ipynb", **options: Any) -> Any:
    return papermill.execute_notebook(
        notebook(*cells), output, engine_name="grd", progress_bar=False, **options
    )


def test_a_remote_notebook_is_written_once_at_the_start_and_once_at_the_end(state: Path) -> None:
    remote = store()
    run(SLEEP.format(seconds=3), "print('end')", autosave_cell_every=1)
    assert remote.statuses() == [["pending", "pending"], ["completed", "completed"]]
    assert "tick 2" in json.dumps(remote.written[-1])
    assert remote.written[-1]["metadata"]["grd"]["state"] == "completed"
    assert list(state.iterdir()) == []


@pytest.mark.parametrize(
    ("cell", "options", "error", "status"),
    [
        ("1 / 0", {}, PapermillExecutionError, "failed"),
        (SLEEP.format(seconds=60), {"execution_timeout": 2}, CellTimeoutError, "failed"),
        ("import os; os._exit(3)", {}, DeadKernelError, "failed"),
    ],
    ids=["error", "cell-timeout", "dead-kernel"],
)
def test_however_a_remote_notebook_ends_its_last_version_is_written_once(
    cell: str, options: dict[str, Any], error: type[Exception], status: str
) -> None:
    remote = store()
    with pytest.raises(error):
        run("print('so far')", cell, "print('never')", **options)
    assert remote.statuses() == [["pending"] * 3, ["completed", status, "pending"]]
    assert "so far" in json.dumps(remote.written[-1])


def test_sigterm_writes_a_remote_notebook_before_the_process_ends(tmp_path: Path) -> None:
    write_notebook(
        tmp_path / "in.ipynb", "print('so far')", "open('began', 'w')\nimport time; time.sleep(600)"
    )
    script = (
        "import json, papermill\n"
        "from papermill.iorw import papermill_io\n"
        "class Store:\n"
        "    def write(self, text, path): print(json.dumps(json.loads(text)), flush=True)\n"
        "    def pretty_path(self, path): return path\n"
        "papermill_io.register('mem://', Store())\n"
        "papermill.execute_notebook('in.ipynb', 'mem://out.ipynb', engine_name='grd', progress_bar=False)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until((tmp_path / "began").exists, "the cell's start")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 1 and "interrupted (sigterm)" in err
    first, last = (json.loads(line) for line in out.splitlines())
    assert first["cells"][0]["metadata"]["papermill"]["status"] == "pending"
    assert last["cells"][1]["metadata"]["papermill"]["status"] == "interrupted"
    assert "so far" in json.dumps(last["cells"][0]["outputs"])


def test_a_store_that_takes_nothing_is_told_before_any_kernel_starts(tmp_path: Path) -> None:
    store(refuses=0)
    with pytest.raises(PermissionError, match="access denied"):
        run(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "cell", ["print('worked for hours')", "print('worked for hours'); import os; os._exit(3)"]
)
def test_what_a_store_refuses_in_the_end_is_kept_on_this_machine(
    cell: str, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store(refuses=1)
    with pytest.raises((PermissionError, DeadKernelError)):
        run("print('so far')", cell)
    [kept] = state.iterdir()
    assert "so far" in kept.read_text() and nbformat.read(kept, as_version=4).metadata.grd.complete
    assert f"mem://notebooks/out.ipynb could not be written; the notebook is kept in {kept}" in caplog.text


def test_a_process_that_is_killed_leaves_what_a_remote_notebook_put_out(tmp_path: Path, state: Path) -> None:
    write_notebook(tmp_path / "in.ipynb", "print('so far')", "import time; time.sleep(600)")
    script = (
        "import papermill\n"
        "from papermill.iorw import papermill_io\n"
        "class Store:\n"
        "    def write(self, text, path): pass\n"
        "    def pretty_path(self, path): return path\n"
        "papermill_io.register('mem://', Store())\n"
        "papermill.execute_notebook('in.ipynb', 'mem://out.ipynb?key=secret', engine_name='grd')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.DEVNULL)

    def journal() -> str:
        return "".join(path.read_text() for path in state.glob(".*-out.ipynb.grd-journal.jsonl"))

    wait_until(lambda: "so far" in journal(), "the output in the journal")
    process.kill()
    process.wait()
    [copy] = state.glob("*-out.ipynb")
    rebuilt = rebuild(copy, journal_beside(copy))
    assert rebuilt["cells"][0]["outputs"][0]["text"] == "so far\n"
    assert rebuilt["cells"][1]["metadata"]["papermill"]["status"] == "running"


def test_a_web_server_gets_two_puts() -> None:
    put: list[Any] = []

    class Server(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            put.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run("print('sent')", output=f"http://127.0.0.1:{server.server_port}/out.ipynb")
        server.shutdown()
    assert len(put) == 2
    assert put[-1]["cells"][0]["outputs"][0]["text"] == ["sent\n"]


def test_a_handler_that_somebody_put_in_place_of_local_files_stays_in_use(
    tmp_path: Path, handlers: list[Any]
) -> None:
    class Encrypting(LocalHandler):
        def write(self, text: str, path: str) -> None:
            super().write(text[::-1], path)

    handlers[:] = [(s, Encrypting() if s == "local" else h) for s, h in handlers]
    run("print('secret')", output=str(tmp_path / "out.ipynb"))
    written = (tmp_path / "out.ipynb").read_text()
    assert "secret" in json.dumps(json.loads(written[::-1]))
    assert [path.name for path in tmp_path.iterdir()] == ["out.ipynb"]
