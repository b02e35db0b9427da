"""What looking costs, as whole processes: 200,000 events, 2,000 ended runs, --detach.

    python -m benchmarks looking

The runs are written, not run: what is measured reads them as it would read any other.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat

from grd import contract
from grd.files import take_lock
from grd.runs import store
from grd.runs.events import Digest
from grd.runs.folder import RunFolder, run_folders
from grd.runs.model import Attempt, RunRecord, now_iso
from grd.runs.processes import identity

EVENTS = 200_000
RUNS = 2_000
ROUNDS = 5


def write_run(runs_dir: Path, number: int, state: str) -> RunFolder:
    """One run with its record."""
    folder = RunFolder(runs_dir / f"20261123-{number:06d}-bench-{number % 65536:04x}")
    folder.attempt(1).path.mkdir(parents=True)
    record = RunRecord(
        run_id=folder.run_id,
        name="bench",
        state=state,
        runner=identity(),
        notebook="bench.ipynb",
        notebook_sha256="0" * 64,
        working_dir=str(runs_dir),
        checkpoint_dir=str(folder.checkpoints),
        created_at=now_iso(),
        started_at=now_iso(),
        ended_at=now_iso() if state in contract.ENDED_STATES else None,
        timeout=3600.0,
        metrics={"loss": 0.1, "accuracy": 0.9},
        folder=str(folder.path),
        attempts=[Attempt(number=1, lineage=1, resume=False, state=state, started_at=now_iso())],
    )
    store.save(folder, record, durable=False)
    return folder


def write_events(folder: RunFolder, count: int) -> None:
    """A long training: mostly progress, some metrics and checkpoints."""
    begin = time.time() - count / 4
    with open(folder.events, "w") as stream:
        for i in range(count):
            head = {"v": 1, "t": begin + i / 4, "pid": 1, "attempt": 1}
            if i == 0:
                event = {"kind": contract.EVENT_STATE, "state": contract.RUNNING, "resume": False}
            elif i % 200 == 0:
                event = {
                    "kind": contract.EVENT_METRICS,
                    "values": {"loss": 1 / i},
                    "epoch": i // 200,
                    "step": None,
                }
            elif i % 200 == 1:
                event = {"kind": contract.EVENT_CHECKPOINT, "epoch": i // 200, "step": None, "path": "x.pt"}
            else:
                event = {
                    "kind": contract.EVENT_PROGRESS,
                    "name": "epochs",
                    "n": i / 200,
                    "total": count // 200,
                }
            stream.write(json.dumps({**head, **event}, separators=(",", ":")) + "\n")


def seconds(project: Path, *arguments: str) -> list[float]:
    """Wall times of ``grd ARGUMENTS``; each time a process of its own."""
    found = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "grd", *arguments], cwd=project, capture_output=True)
        assert done.returncode in (0, 124), done.stderr
        found.append(time.perf_counter() - began)
    return found


def show(what: str, times: list[float], beside: list[float]) -> None:
    """One line of the table; the ratio is to `grd --version`, which does nothing."""
    ratio = statistics.median(times) / statistics.median(beside)
    spread = f"{min(times):.2f} to {max(times):.2f}"
    print(f"{what:<44} median {statistics.median(times):.2f} s ({spread}), {ratio:.1f} x grd --version")


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        project = Path(name)
        (project / ".planning").mkdir()
        nothing = seconds(project, "--version")
        show("grd --version", nothing, nothing)

        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])
        notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "python3"}
        nbformat.write(notebook, project / "one.ipynb")
        few = ("--runs-dir", "few")
        show(
            "grd research --detach --json",
            seconds(project, "research", "one.ipynb", "--detach", "--json", *few),
            nothing,
        )
        seconds(project, "wait", *(folder.run_id for folder in run_folders(project / "few")), *few)

        long = write_run(project / "long", 1, contract.RUNNING)
        write_events(long, EVENTS)
        lock = take_lock(long.lock)
        place = ("--runs-dir", "long")
        commands = (("status", "last", "--json"), ("status",), ("wait", "last", "--timeout", "0.001", "-q"))
        for digest in ("all read", "with the runner's digest"):
            for arguments in commands:
                times = seconds(project, *arguments, *place)
                show(f"grd {' '.join(arguments)}, {EVENTS:,} events, {digest}", times, nothing)
            Digest(long).keep_up()
        if lock is not None:
            os.close(lock)

        for number in range(RUNS):
            write_run(project / "many", number, contract.COMPLETED)
        for arguments in (("status",), ("list",), ("status", "last")):
            show(
                f"grd {' '.join(arguments)}, {RUNS:,} runs",
                seconds(project, *arguments, "--runs-dir", "many"),
                nothing,
            )


if __name__ == "__main__":
    main()
