"""Shared fixtures: a project of its own for each test, notebooks made on the spot, grd as a process."""

from __future__ import annotations

import compileall
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import nbformat
import psutil
import pytest

import grd
from grd.files import read_json_lines

LIMIT_SECONDS = 120.0
"""Generous: CI has two busy cores. Waiting ends on the event, not on the clock."""


def wait_until(
    condition: Callable[[], Any], what: str, limit: float = LIMIT_SECONDS, *, pause: float = 0.05
) -> Any:
    """The first true value of ``condition``, looked at every ``pause`` seconds; fails after ``limit``."""
    give_up = time.monotonic() + limit
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > give_up:
            pytest.fail(f"waited {limit:.0f} s in vain: {what}")
        time.sleep(pause)


def has_ended(process: psutil.Process) -> bool:
    """Whether it is gone, or a zombie that nobody has waited for."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # between the two looks
        return True


def cannot_be_had(what: str) -> NoReturn:
    """Skip a test whose fault this machine cannot have; a failure where GRD_REQUIRE_FAULTS=1 demands it."""
    if os.environ.get("GRD_REQUIRE_FAULTS") == "1":
        pytest.fail(f"GRD_REQUIRE_FAULTS=1, but {what}")
    pytest.skip(what)


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run of grd around the test: what a run tells a notebook by its environment is not there."""
    for name in list(os.environ):
        if name.startswith("GRD_"):
            monkeypatch.delenv(name)


def write_notebook(
    path: Path,
    *cells: str,
    parameters: str | None = None,
    kernel: str | None = "python3",
    language: str = "python",
    tags: dict[int, list[str]] | None = None,
) -> Path:
    """A notebook of code cells; ``parameters`` becomes the tagged first one."""
    notebook = nbformat.v4.new_notebook()
    if kernel is not None:
        notebook.metadata["kernelspec"] = {"name": kernel, "language": language, "display_name": kernel}
    if parameters is not None:
        cell = nbformat.v4.new_code_cell(parameters)
        cell.metadata["tags"] = ["parameters"]
        notebook.cells.append(cell)
    for index, source in enumerate(cells):
        cell = nbformat.v4.new_code_cell(source)
        if tags and index in tags:
            cell.metadata["tags"] = tags[index]
        notebook.cells.append(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


@dataclass
class Finished:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as JSON."""
        return json.loads(self.out)


@dataclass
class Project:
    """A folder in which grd is used as its users do: by typing commands."""

    path: Path
    environment: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def notebook(self, name: str, *cells: str, **options: Any) -> Path:
        """Write a notebook into the project."""
        return write_notebook(self.path / name, *cells, **options)

    def start(
        self, *arguments: str | Path, env: dict[str, str] | None = None, cgroup: Path | None = None
    ) -> subprocess.Popen[str]:
        """Start ``grd ARGUMENTS`` in a session of its own, and in ``cgroup``."""
        command = [sys.executable, "-m", "grd", *map(str, arguments)]
        if cgroup is not None:
            # The shell enters before grd exists, so that no process of the run is ever outside.
            command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(cgroup / "cgroup.procs"), *command]
        process = subprocess.Popen(
            command,
            cwd=self.path,
            env={**self.environment, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def finish(self, process: subprocess.Popen[str], limit: float = LIMIT_SECONDS) -> Finished:
        """Wait for a command that was started."""
        out, err = process.communicate(timeout=limit)
        return Finished(process.returncode, out, err)

    def grd(self, *arguments: str | Path, env: dict[str, str] | None = None) -> Finished:
        """Run ``grd ARGUMENTS`` to its end."""
        return self.finish(self.start(*arguments, env=env))

    @property
    def runs_dir(self) -> Path:
        """Where the runs lie."""
        return self.path / "experiments"

    def run_folders(self) -> list[Path]:
        """All run folders, oldest first; staging folders would be a bug and are listed too."""
        if not self.runs_dir.is_dir():
            return []
        return sorted(
            path
            for path in self.runs_dir.iterdir()
            if path.is_dir() and path.name not in (".keys", "batches")
        )

    def only_run(self) -> Path:
        """The folder of the only run."""
        folders: list[Path] = wait_until(
            lambda: [path for path in self.run_folders() if not path.name.startswith(".")], "a run folder"
        )
        assert len(folders) == 1, folders
        return folders[0]

    def record(self, run: Path | None = None) -> dict[str, Any]:
        """run.json as it is on disk."""
        return json.loads(((run or self.only_run()) / "run.json").read_text())

    def events(self, run: Path | None = None) -> list[dict[str, Any]]:
        """All events of a run so far."""
        path = (run or self.only_run()) / "events.jsonl"
        if not path.exists():
            return []
        return [event for _, event in read_json_lines(path)]

    def wait_for_event(self, kind: str, run: Path | None = None, **values: Any) -> dict[str, Any]:
        """The first event of ``kind`` whose fields have ``values``."""

        def found() -> dict[str, Any] | None:
            for event in self.events(run):
                if event["kind"] == kind and all(event.get(name) == value for name, value in values.items()):
                    return event
            return None

        return wait_until(found, f"event {kind} {values}")

    def wait_for_output(self, text: str) -> None:
        """Wait until a cell of the only run has printed ``text`` (as the journal has it)."""

        def seen() -> bool:
            return any(
                text in path.read_text(errors="replace")
                for path in self.only_run().glob("attempts/*/journal.jsonl")
            )

        wait_until(seen, f"output {text!r}")

    def processes(self) -> list[psutil.Process]:
        """Living processes that carry the mark of a run of this project."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                marker = process.environ().get("GRD_PROCESS_MARKER", "")
                if (
                    marker
                    and (self.runs_dir / marker.split("/")[0]).exists()
                    and process.status() != "zombie"
                ):
                    found.append(process)
        return found


def pytest_configure(config: pytest.Config) -> None:
    """With grd's bytecode in place, as where it is installed: under PYTHONDONTWRITEBYTECODE each of the
    thousands of processes that the tests start would compile all that it imports."""
    if not hasattr(config, "workerinput"):
        compileall.compile_dir(str(Path(grd.__file__).parent), quiet=1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``GRD_FAULT_SHARE=k/n`` only each n-th fault test of a file: of the table every fault, at other
    moments."""
    number, _, shares = os.environ.get("GRD_FAULT_SHARE", "0/1").partition("/")
    seen: Counter[Path] = Counter()
    left_out = []
    for item in items:
        if item.get_closest_marker("faults"):
            if seen[item.path] % int(shares) != int(number):
                left_out.append(item)
            seen[item.path] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """As in a terminal: a shell starts background jobs with SIGINT ignored, and nohup ignores SIGHUP."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


NO_TORCH = "import sys\nsys.modules['torch'] = None\n"


@pytest.fixture
def torch_in_kernels() -> None:
    """The project's kernels may import torch; without this they are as where it is not installed, and start
    3 s of processor time sooner, for `grd.experiment` imports it where it is."""


@pytest.fixture
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Project]:
    """A project folder with settings and state of its own; nothing of it may survive the test."""
    folder = tmp_path / "project"
    (folder / ".planning").mkdir(parents=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRD_")}
    environment |= {
        "GRD_STATE_DIR": str(tmp_path / "state"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "GRD_GPU_SLOTS": "64",  # on a machine with a GPU no run of a test has to wait for another's
    }
    if "torch_in_kernels" not in request.fixturenames:
        startup = tmp_path / "ipython" / "profile_default" / "startup"
        startup.mkdir(parents=True)
        (startup / "00-no-torch.py").write_text(NO_TORCH)
    # Nobody sits at these tests; what that means for long runs is tested where it is asked for.
    (tmp_path / "config" / "grd").mkdir(parents=True)
    (tmp_path / "config" / "grd" / "config.toml").write_text("[approval]\nallow_noninteractive = true\n")
    made = Project(folder, environment)
    yield made
    for process in made.started:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "grd.execution.runner" in process.cmdline() and str(tmp_path) in " ".join(process.cmdline()):
                process.kill()
    for process in made.processes():
        with contextlib.suppress(psutil.Error):
            process.kill()
