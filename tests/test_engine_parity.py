"""``--engine grd`` beside papermill's own engine: what papermill's users rely on stays as it was."""

from __future__ import annotations

import asyncio
import copy
import io
import json
import pickle
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
import pytest
from conftest import LIMIT_SECONDS, wait_until
from jupyter_client.manager import KernelManager
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

ENGINES = ("nbclient", "grd")


def notebook(
    *cells: str, kernel: str = "python3", language: str = "python", tags: dict[int, str] | None = None
) -> Any:
    made = nbformat.v4.new_notebook()
    made.metadata["kernelspec"] = {"name": kernel, "language": language, "display_name": kernel}
    for index, source in enumerate(cells):
        new = nbformat.v4.new_markdown_cell if source.startswith("#md") else nbformat.v4.new_code_cell
        cell = new(source, id=f"cell-{index}")
        if tags and index in tags:
            cell.metadata["tags"] = [tags[index]]
        made.cells.append(cell)
    return made


def comparable(document: Any) -> Any:
    """A notebook without what differs from run to run: times, addresses, generated ids, grd's own notes, and
    how many messages a stream came in."""
    plain = json.loads(nbformat.writes(nbformat.from_dict(document)))
    plain["metadata"].pop("grd", None)
    for cell in plain["cells"]:
        joined: list[Any] = []
        for output in cell.get("outputs", []):
            if joined and output.get("name") is not None and joined[-1].get("name") == output["name"]:
                joined[-1]["text"] += output["text"]
            else:
                joined.append(output)
        cell["outputs"] = joined
    text = json.dumps(plain, indent=1, sort_keys=True)
    text = re.sub(r'"((?:start|end)_time|duration|iopub\.[\w.]+|shell\.\w+)": [^,\n]+', r'"\1": 0', text)
    text = re.sub(r"ipykernel_\d+(/\d+)?|0x[0-9a-f]+|\b[0-9a-f]{32}\b", "?", text)
    text = re.sub(r'"id": "[0-9a-f][-0-9a-f]{7,}"', '"id": "?"', text)
    return json.loads(re.sub("|".join(f"by-{engine}" for engine in ENGINES), "by", text))


@dataclass
class Ended:
    """How one execution ended, as its caller sees it."""

    returned: Any
    saved: Any
    error: BaseException | None

    @property
    def statuses(self) -> list[str]:
        """papermill's word for each code cell of the saved notebook, without the markers of an error."""
        cells = [cell for cell in self.saved["cells"] if cell["cell_type"] == "code"]
        return [cell["metadata"]["papermill"]["status"] for cell in cells]

    def described(self) -> Any:
        """The error: its type, its text and its fields."""
        if self.error is None:
            return None
        fields = re.sub(r"ipykernel_\d+(/\d+)?", "?", f"{self.error}{vars(self.error)}")
        return type(self.error), fields


def execute(engine: str, folder: Path, source: Any, **options: Any) -> Ended:
    """papermill's Python interface with ``engine``; ``open`` buffers and such are made by the caller."""
    output = folder / f"by-{engine}.ipynb"
    returned, error = None, None
    try:
        returned = papermill.execute_notebook(
            copy.deepcopy(source), output, engine_name=engine, progress_bar=False, **options
        )
    except Exception as raised:
        error = raised
    return Ended(returned, json.loads(output.read_text()) if output.exists() else None, error)


def both(folder: Path, source: Any, **options: Any) -> tuple[Ended, Ended]:
    """The same execution with papermill's own engine and with grd."""
    theirs, ours = (execute(engine, folder, source, **options) for engine in ENGINES)
    return theirs, ours


def command(folder: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "papermill", *arguments],
        cwd=folder,
        stdin=options.pop("stdin", subprocess.DEVNULL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def kernelspec(folder: Path, name: str, *argv: str, language: str = "python") -> dict[str, str]:
    """Write a kernelspec; returns the environment in which it is found."""
    place = folder / "jupyter" / "kernels" / name
    place.mkdir(parents=True)
    spec = {"argv": list(argv), "display_name": name, "language": language}
    (place / "kernel.json").write_text(json.dumps(spec))
    return {"JUPYTER_PATH": str(folder / "jupyter")}


# --- the document and the options ----------------------------------------------------------------------


def test_outputs_magics_parameters_and_report_mode_give_the_same_document(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    source = notebook(
        "x = 0",
        "#md some text",
        "import os, sys\nprint(os.path.basename(os.getcwd()), x)",
        "print('to stderr', file=sys.stderr)",
        "from IPython.display import HTML, clear_output, display\n"
        "shown = display('first', display_id='shown')\ndisplay(HTML('<b>bold</b>'))",
        "shown.update('second')\ndisplay('gone')\nclear_output(wait=True)\nprint('stays')",
        "%%bash\necho from bash",
        "%%capture kept\nprint('kept')",
        "print(kept)\n!echo from a shell",
        "import asyncio\nawait asyncio.sleep(0)\n'awaited'",
        "print('this cell is skipped')",
        "import warnings; warnings.warn('careful')",
        tags={0: "parameters", 10: "skip-execution"},
    )
    ends, streams = [], []
    for engine in ENGINES:
        out, err = io.StringIO(), io.StringIO()
        ended = execute(
            engine,
            tmp_path,
            source,
            parameters={"x": 5},
            cwd=tmp_path / "work",
            report_mode=True,
            stdout_file=out,
            stderr_file=err,
        )
        assert ended.error is None
        ends.append(ended)
        streams.append((out.getvalue(), re.sub(r"ipykernel_\d+/\d+", "?", err.getvalue())))
    theirs, ours = ends
    assert comparable(ours.saved) == comparable(theirs.saved)
    assert comparable(ours.returned) == comparable(theirs.returned)
    assert streams[0] == streams[1]
    assert "work 5\n" in streams[1][0] and "to stderr\n" in streams[1][1]
    code = [cell for cell in ours.saved["cells"] if cell["cell_type"] == "code"]
    assert all(cell["metadata"]["jupyter"]["source_hidden"] for cell in code)
    assert "this cell is skipped" not in json.dumps([cell["outputs"] for cell in code])


@pytest.mark.faults
def test_widget_state_is_stored_with_what_output_widgets_captured(tmp_path: Path) -> None:
    source = notebook(
        "import ipywidgets as widgets\nslider = widgets.IntSlider(3)\nslider",
        "slider.value = 7\nbox = widgets.Output()\nbox",
        "with box:\n    print('captured')",
    )
    stored = []
    for engine in ENGINES:
        ended = execute(engine, tmp_path, source, execution_timeout=60)
        if engine == "nbclient" and "Timeout" in repr(ended.error):
            # its client may overlook the reply of a cell that writes into an Output widget (TwoWayChannel)
            ended = execute(engine, tmp_path, source, execution_timeout=60)
        assert ended.error is None
        [(kind, state)] = ended.saved["metadata"]["widgets"].items()
        models = [(model["model_name"], model["state"]) for model in state["state"].values()]
        told = [(name, values.get("value"), values.get("outputs")) for name, values in models]
        stored.append((kind, sorted(told, key=repr)))
    assert stored[0] == stored[1]
    assert "captured" in repr(stored[1]) and ("IntSliderModel", 7, None) in stored[1][1]


def test_a_kernel_that_speaks_no_python_gives_the_same_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = (sys.executable, "-m", "bash_kernel", "-f", "{connection_file}")
    monkeypatch.setenv("JUPYTER_PATH", kernelspec(tmp_path, "bash", *argv, language="bash")["JUPYTER_PATH"])
    source = notebook("echo count is $count", kernel="bash", language="bash")
    theirs, ours = both(tmp_path, source, parameters={"count": 3})
    assert ours.error is None and "count is 3" in json.dumps(ours.saved)
    assert comparable(ours.saved) == comparable(theirs.saved)


def test_a_notebook_object_without_output_runs_inside_a_live_event_loop(tmp_path: Path) -> None:
    source = notebook("import asyncio\nawait asyncio.sleep(0.1)\nprint('done')")

    async def inside(engine: str) -> Any:
        return papermill.execute_notebook(copy.deepcopy(source), None, engine_name=engine, progress_bar=False)

    theirs, ours = (asyncio.run(inside(engine)) for engine in ENGINES)
    assert comparable(ours) == comparable(theirs)
    assert ours.cells[0].outputs[0].text == "done\n"
    assert list(tmp_path.iterdir()) == []


def test_prepare_only_starts_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = kernelspec(tmp_path, "told", "touch", str(tmp_path / "started"))
    monkeypatch.setenv("JUPYTER_PATH", environment["JUPYTER_PATH"])
    theirs, ours = both(tmp_path, notebook("x", kernel="told"), parameters={"x": 1}, prepare_only=True)
    assert comparable(ours.saved) == comparable(theirs.saved)
    assert not (tmp_path / "started").exists()


def test_a_kernel_that_the_caller_started_is_used_and_left_running() -> None:
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel()
    try:
        source = notebook("import os; print(os.getpid())")
        ran = papermill.execute_notebook(source, None, engine_name="grd", progress_bar=False, km=manager)
        assert int(ran.cells[0].outputs[0].text) == manager.provisioner.process.pid
        assert manager.is_alive()
    finally:
        manager.shutdown_kernel(now=True)


def test_what_an_earlier_execution_left_in_the_document_is_not_said_of_this_one(tmp_path: Path) -> None:
    source = notebook(
        f"import json; print(json.load(open({str(tmp_path / 'by-grd.ipynb')!r}))['metadata']['grd'])"
    )
    source.metadata["grd"] = {"state": "completed", "complete": True, "cause": None, "timeout": "10m"}
    ended = execute("grd", tmp_path, source)
    [output] = ended.returned.cells[0].outputs
    assert "'complete': False" in output.text and "'timeout': '10m'" in output.text
    assert "'state'" not in output.text


# --- errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell",
    ["1 / 0", "import sys; sys.exit(0)", "import sys; sys.exit('bad')", "raise SystemExit(1)"],
)
def test_a_cell_that_raises_or_exits_gives_the_same_exception_and_document(tmp_path: Path, cell: str) -> None:
    theirs, ours = both(tmp_path, notebook("print('before')", cell, "print('after')"))
    assert ours.described() == theirs.described()
    assert comparable(ours.saved) == comparable(theirs.saved)
    assert ours.statuses == ["completed", "failed", "pending"]


def test_an_expected_exception_lets_the_later_cells_run(tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, notebook("1 / 0", "print('after')", tags={0: "raises-exception"}))
    assert ours.described() == theirs.described()
    assert comparable(ours.saved) == comparable(theirs.saved)
    assert ours.statuses == ["completed", "completed"]


def test_a_keyboard_interrupt_that_nobody_asked_for_is_papermills_execution_error(tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, notebook("raise KeyboardInterrupt", "print('after')"))
    assert isinstance(ours.error, PapermillExecutionError)
    assert ours.described() == theirs.described()
    assert ours.statuses == ["interrupted", "pending"]


@pytest.mark.faults
def test_the_time_limit_of_a_cell_raises_papermills_error_and_saves_its_output(tmp_path: Path) -> None:
    slow = notebook("print('so far', flush=True)\nimport time; time.sleep(60)", "print('after')")
    theirs, ours = both(tmp_path, slow, execution_timeout=3)
    assert isinstance(ours.error, CellTimeoutError)
    assert ours.described() == theirs.described()
    assert "so far" in json.dumps(ours.saved["cells"][0]["outputs"])
    assert ours.statuses == ["failed", "pending"]  # papermill: completed, completed
    assert ours.saved["metadata"]["grd"]["cause"] == "notebook_error"


def test_a_cell_interrupted_for_its_time_limit_is_no_interruption_of_the_notebook(tmp_path: Path) -> None:
    slow = notebook("import time; time.sleep(60)", "print('after')")
    theirs, ours = both(tmp_path, slow, execution_timeout=2, interrupt_on_timeout=True)
    assert ours.described() == theirs.described()
    assert comparable(ours.saved) == comparable(theirs.saved)
    assert ours.saved["metadata"]["grd"]["state"] == "failed"
    assert "longer than 2 s" in ours.saved["metadata"]["grd"]["detail"]


def test_a_dead_kernel_raises_papermills_error(tmp_path: Path) -> None:
    dying = notebook("print('so far')", "import os; os._exit(3)", "print('after')")
    theirs, ours = both(tmp_path, dying)
    assert isinstance(ours.error, DeadKernelError)
    assert ours.described() == theirs.described()
    assert ours.statuses == ["completed", "failed", "pending"]  # papermill: all completed
    assert ours.saved["metadata"]["grd"]["detail"] == "the kernel died in cell 1: exit code 3"
    assert (
        ours.saved["cells"][0]["metadata"]["execution"].keys()
        == theirs.saved["cells"][0]["metadata"]["execution"].keys()
    )


def test_a_kernel_that_exits_once_the_last_cell_ran_has_done_its_work(tmp_path: Path) -> None:
    exiting = (
        "import os\n"
        "handlers = get_ipython().kernel.shell_handlers\n"
        "handlers['kernel_info_request'] = lambda *request: os._exit(0)\n"
        "print('done')"
    )
    ended = execute("grd", tmp_path, notebook(exiting))
    assert ended.error is None
    assert ended.statuses == ["completed"] and ended.saved["metadata"]["grd"]["state"] == "completed"


def test_a_kernel_that_hangs_at_its_start_ends_at_the_start_timeout_and_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = (sys.executable, "-c", "import time; time.sleep(600)", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PATH", kernelspec(tmp_path, "hanging", *hanging)["JUPYTER_PATH"])
    theirs, ours = both(tmp_path, notebook("1", kernel="hanging"), start_timeout=2)
    assert type(theirs.error) is RuntimeError and isinstance(ours.error, RuntimeError)
    assert str(ours.error).startswith("Kernel didn't respond in 2")
    assert ours.statuses == ["pending"]  # papermill: completed
    left = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-1:] == [str(tmp_path)]]
    assert left == []


def test_a_kernel_that_is_not_installed_is_the_same_error(tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, notebook("1", kernel="no-such-kernel"))
    assert type(ours.error) is type(theirs.error) and str(ours.error) == str(theirs.error)


def test_the_exception_of_an_interruption_survives_a_process_pool(tmp_path: Path) -> None:
    ended = execute("grd", tmp_path, notebook("import time; time.sleep(60)"), grd_timeout=2)
    copied = pickle.loads(pickle.dumps(ended.error))
    assert str(copied) == str(ended.error) and copied.outcome == ended.error.outcome  # type: ignore[union-attr]
    assert copied.outcome.cause == "deadline"


# --- the command line ----------------------------------------------------------------------------------


def test_log_output_and_stream_files_are_the_same_on_the_command_line(tmp_path: Path) -> None:
    source = notebook("import sys\nprint('out')\nprint('err', file=sys.stderr)", "6 * 7", "1 / 0")
    nbformat.write(source, tmp_path / "in.ipynb")
    seen = []
    processes = {
        engine: command(
            tmp_path,
            *("in.ipynb", f"by-{engine}.ipynb", "--engine", engine, "--log-output"),
            *("--stdout-file", f"{engine}.out", "--stderr-file", f"{engine}.err"),
            *("--request-save-on-cell-execute", "--autosave-cell-every", "1"),
        )
        for engine in ENGINES
    }
    for engine, process in processes.items():
        _, said = process.communicate(timeout=LIMIT_SECONDS)
        log = said.split("Traceback")[0].replace(f"by-{engine}", "by")
        lines = [line for line in log.splitlines() if "IPKernelApp" not in line]
        files = [(tmp_path / f"{engine}.{name}").read_text() for name in ("out", "err")]
        seen.append((process.returncode, lines, files))
    assert seen[1] == seen[0]
    code, lines, files = seen[1]
    assert code == 1 and files == ["out\n", "err\n"]
    assert {"out", "err", "42"} <= set(lines)
    assert any(line.startswith("Executing Cell 2") for line in lines)


def test_a_notebook_goes_through_pipes_and_a_bar_goes_to_stderr(tmp_path: Path) -> None:
    text = nbformat.writes(notebook("print('hello')"))
    piped = command(tmp_path, "-", "-", "--engine", "grd", stdin=subprocess.PIPE)
    out, _ = piped.communicate(text, timeout=LIMIT_SECONDS)
    assert piped.returncode == 0
    assert nbformat.reads(out, as_version=4).cells[0].outputs[0].text == "hello\n"
    filed = command(tmp_path, "-", "out.ipynb", "--engine", "grd", "--progress-bar", stdin=subprocess.PIPE)
    out, err = filed.communicate(text, timeout=LIMIT_SECONDS)
    assert filed.returncode == 0 and out == ""
    assert "Executing: 100%" in err
    assert nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[0].outputs[0].text == "hello\n"


@pytest.mark.parametrize("output", ["-", "out.ipynb"])
def test_a_notebook_that_is_saved_only_at_the_end_is_saved_when_sigterm_ends_it(
    tmp_path: Path, output: str
) -> None:
    source = notebook("print('so far', flush=True)\nopen('began', 'w')\nimport time; time.sleep(600)", "1")
    nbformat.write(source, tmp_path / "in.ipynb")
    process = command(
        tmp_path,
        *("in.ipynb", output, "--engine", "grd", "--no-progress-bar", "--no-request-save-on-cell-execute"),
    )
    wait_until((tmp_path / "began").exists, "the cell's start")
    assert not (tmp_path / "out.ipynb").exists()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 1, err
    saved = json.loads(out if output == "-" else (tmp_path / "out.ipynb").read_text())
    assert "so far" in json.dumps(saved["cells"][0]["outputs"])
    assert saved["metadata"]["grd"]["cause"] == "sigterm"


def test_an_output_that_is_a_folder_is_refused_before_any_kernel(tmp_path: Path) -> None:
    (tmp_path / "by-nbclient.ipynb").mkdir()
    (tmp_path / "by-grd.ipynb").mkdir()
    source = notebook(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for engine in ENGINES:
        with pytest.raises(IsADirectoryError):
            papermill.execute_notebook(
                source, tmp_path / f"by-{engine}.ipynb", engine_name=engine, progress_bar=False
            )
    assert not (tmp_path / "ran").exists()
