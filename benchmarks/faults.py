"""What is left after a fault, of papermill with its own engine and of grd, side by side.

    python -m benchmarks faults

Not a measurement of time: each row does the same to the same notebook under both and tells what was found.
The disk-full row mounts a small tmpfs, for which it needs root.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import psutil

from grd.runs import notebook_journal

SETTLING_SECONDS = 8.0
KILLS_WHILE_SAVING = int(os.environ.get("BENCH_KILLS", "20"))

CHILDREN = """
import os, subprocess, sys
command = [sys.executable, '-c', 'import time; time.sleep(300)']
pids = [subprocess.Popen(command).pid, subprocess.Popen(command, start_new_session=True).pid]
with open('children', 'w') as file:
    file.write(' '.join(map(str, pids)))
"""
TICKING = """
import time
for tick in range(1, 3000):
    print('tick', tick, flush=True)
    open('ticks', 'w').write(str(tick))
    time.sleep(0.05)
"""
CLEANING_UP = """
import time
open('ticks', 'w').write('40')
try:
    time.sleep(300)
finally:
    time.sleep(8)
    open('cleaned', 'w').close()
"""
MUCH = """
import time
for block in range(400):
    print('x' * 100_000, flush=True)
    open('ticks', 'w').write(str(block + 1))
    time.sleep(0.02)
"""


@dataclass
class Tool:
    """How one of the two is started on ``in.ipynb``, and what it leaves of it."""

    name: str
    command: Callable[[float | None], list[str]]
    notebook: Callable[[Path], str]
    supervisor: Callable[[Path, subprocess.Popen[bytes]], int]
    """The process whose death is the fault: it reads the kernel and saves."""


def _run_record(folder: Path) -> dict[str, Any]:
    (record,) = (folder / "experiments").glob("2*/run.json")
    loaded: dict[str, Any] = json.loads(record.read_text())
    return loaded


def _grd_notebook(folder: Path) -> str:
    """As whoever looks next finds it: recovered, and with its journal where that could not be put into it."""
    subprocess.run([sys.executable, "-m", "grd", "status", "last"], cwd=folder, capture_output=True)
    (attempt,) = (folder / "experiments").glob("2*/attempts/1")
    rebuilt = notebook_journal.rebuild(attempt / "output.ipynb", attempt / "journal.jsonl")
    return json.dumps(notebook_journal.mark_lost(rebuilt))


PAPERMILL = Tool(
    "papermill",
    lambda limit: [
        sys.executable, "-m", "papermill", "--no-progress-bar", "in.ipynb", "out/out.ipynb",
        *(["--execution-timeout", f"{limit:.0f}"] if limit else []),
    ],
    lambda folder: (folder / "out" / "out.ipynb").read_text(),
    lambda folder, process: process.pid,
)  # fmt: skip
GRD = Tool(
    "grd",
    lambda limit: [sys.executable, "-m", "grd", "research", "in.ipynb", "--timeout", f"{limit or 600:.0f}"],
    _grd_notebook,
    lambda folder, process: int(_run_record(folder)["runner"]["pid"]),
)


@dataclass
class Found:
    """What was left."""

    exit_code: int | None = None
    seconds: float = 0.0
    notebook: str = ""
    statuses: list[str] = field(default_factory=list)
    kept: str = ""
    children_alive: int = 0
    cleaned: bool | None = None

    def row(self) -> str:
        """A line of the table."""
        cleaned = "" if self.cleaned is None else (", cleanup ran" if self.cleaned else ", cleanup was CUT")
        cells = "/".join(self.statuses) or "-"
        return (
            f"exit {self.exit_code}, {self.seconds:.1f} s | {self.notebook} | {cells} | {self.kept} | "
            f"{self.children_alive} children alive{cleaned}"
        )


def _write(folder: Path, *cells: str) -> None:
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in (*cells, "print('never')")]
    nbformat.write(notebook, folder / "in.ipynb")


def _wait(condition: Callable[[], Any], limit: float = 60.0) -> Any:
    give_up = time.monotonic() + limit
    while not (value := condition()):
        if time.monotonic() > give_up:
            raise TimeoutError("the moment did not come")
        time.sleep(0.02)
    return value


def _ticks(folder: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int((folder / "ticks").read_text())
    return 0


def _kernels(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "ipykernel_launcher" in process.cmdline() and process.cwd() == str(folder):
                found.append(process)
    return found


def _look(tool: Tool, folder: Path, found: Found) -> None:
    """Read what is there, as whoever comes next would."""
    ticks = _ticks(folder)
    try:
        notebook = nbformat.reads(tool.notebook(folder), as_version=4)
        nbformat.validate(notebook)
    except (OSError, ValueError) as error:
        found.notebook = "NO notebook" if isinstance(error, FileNotFoundError) else "INVALID notebook"
    except Exception as error:  # nbformat raises many kinds for half a file
        found.notebook = f"INVALID notebook ({type(error).__name__})"
    else:
        found.notebook = "valid notebook"
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        found.statuses = [str(cell.metadata.get("papermill", {}).get("status")) for cell in cells]
        printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
        kept = printed.count("tick") or printed.count("x") // 100_000
        found.kept = f"{kept} of {ticks} outputs"
    with contextlib.suppress(OSError):
        pids = [int(pid) for pid in (folder / "children").read_text().split()]
        alive = [pid for pid in pids if psutil.pid_exists(pid)]
        found.children_alive = len(alive)
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
    for kernel in _kernels(folder):
        kernel.kill()


def _end(process: subprocess.Popen[bytes], began: float, found: Found) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        found.exit_code = process.wait(60)
    found.seconds = time.monotonic() - began


def strike(tool: Tool, cell: str, fault: Callable[[Tool, Path, subprocess.Popen[bytes]], None]) -> Found:
    """Run ``cell`` under ``tool``, let ``fault`` happen after 40 ticks, and look."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        (folder / "out").mkdir()
        _write(folder, CHILDREN, cell)
        # papermill's limit is each cell's, grd's the whole notebook's with the kernel's start
        limit = None if fault is not reach_the_limit else 4.0 if tool is PAPERMILL else 15.0
        process = subprocess.Popen(
            tool.command(limit), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        found = Found()
        _wait(lambda: _ticks(folder) >= 40 or process.poll() is not None)
        if process.poll() is not None:
            raise TimeoutError(f"it ended before, with exit code {process.returncode}")
        began = time.monotonic()
        fault(tool, folder, process)
        _end(process, began, found)
        time.sleep(SETTLING_SECONDS)
        if cell == CLEANING_UP:
            found.cleaned = (folder / "cleaned").exists()
        _look(tool, folder, found)
        return found


def kill_the_kernel(tool: Tool, folder: Path, process: subprocess.Popen[bytes]) -> None:
    """kill -9."""
    for kernel in _kernels(folder):
        kernel.kill()


def terminate(tool: Tool, folder: Path, process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to what was typed."""
    process.terminate()


def kill_the_supervisor(tool: Tool, folder: Path, process: subprocess.Popen[bytes]) -> None:
    """kill -9 to who reads the kernel and saves."""
    os.kill(tool.supervisor(folder, process), signal.SIGKILL)


def reach_the_limit(tool: Tool, folder: Path, process: subprocess.Popen[bytes]) -> None:
    """The time limit does it."""


def kill_while_saving(tool: Tool, seed: int) -> Found:
    """kill -9 at a random moment while a notebook of some MB is being saved again and again."""
    found = Found()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        (folder / "out").mkdir()
        _write(folder, "print('x' * 5_000_000)", *["1"] * 200)
        process = subprocess.Popen(
            tool.command(None), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

        def saved() -> int:
            with contextlib.suppress(OSError, ValueError):
                path = folder / "out" / "out.ipynb"
                if tool is GRD:
                    (path,) = (folder / "experiments").glob("2*/attempts/1/output.ipynb")
                return path.stat().st_size
            return 0

        _wait(lambda: saved() > 4_000_000 or process.poll() is not None)
        time.sleep(random.Random(seed).uniform(0.0, 0.6))
        with contextlib.suppress(ProcessLookupError):
            os.kill(tool.supervisor(folder, process), signal.SIGKILL)
        process.wait(60)
        time.sleep(1.5)
        _look(tool, folder, found)
    return found


def fill_the_disk(tool: Tool) -> Found:
    """40 MB of output on a disk of 8 MB."""
    found = Found()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        small = folder / ("experiments" if tool is GRD else "out")
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], check=True)
        try:
            _write(folder, CHILDREN, MUCH)
            process = subprocess.Popen(
                tool.command(None), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            _end(process, time.monotonic(), found)
            time.sleep(2)
            _look(tool, folder, found)
        finally:
            subprocess.run(["umount", "-l", str(small)], check=False)
    return found


ROWS: dict[str, Callable[[Tool], Found]] = {
    "kill -9 of the kernel": lambda tool: strike(tool, TICKING, kill_the_kernel),
    "SIGTERM": lambda tool: strike(tool, TICKING, terminate),
    "SIGTERM, cleanup of 8 s": lambda tool: strike(tool, CLEANING_UP, terminate),
    "kill -9": lambda tool: strike(tool, TICKING, kill_the_supervisor),
    "time limit, cleanup of 8 s": lambda tool: strike(tool, CLEANING_UP, reach_the_limit),
    "disk full": fill_the_disk,
}


def main() -> None:
    """Print the table."""
    for row, cause in ROWS.items():
        for tool in (PAPERMILL, GRD):
            try:
                told = cause(tool).row()
            except (OSError, subprocess.CalledProcessError, TimeoutError) as error:
                told = f"could not be had: {error}"
            print(f"{row:<28} {tool.name:<10} {told}", flush=True)
    for tool in (PAPERMILL, GRD):
        found = [kill_while_saving(tool, seed).notebook for seed in range(KILLS_WHILE_SAVING)]
        bad = sum(not notebook.startswith("valid") for notebook in found)
        print(
            f"kill -9 while saving 5 MB, {len(found)} times  {tool.name:<10} {bad} notebooks lost", flush=True
        )
