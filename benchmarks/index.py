"""What the index of runs gains: a project with 10,000 runs, listed with it, without it, and while it is made.

    python -m benchmarks index

The runs are written, not run. Wall time, and beside it processor time, which other work disturbs less.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.looking import write_run
from grd import contract
from grd.runs.index import RunIndex

RUNS = 10_000
ROUNDS = 7
WRITERS, TRANSACTIONS = 20, 200
STATES = (contract.FAILED, contract.INTERRUPTED, *[contract.COMPLETED] * 98)

WRITER = """
import sys, time
from pathlib import Path
from grd import contract
from grd.runs.index import Row, RunIndex, Stamp

index, failed, longest = RunIndex(Path(sys.argv[1]), wait_seconds=30.0), 0, 0.0
print(flush=True)
sys.stdin.read()
for number in range(int(sys.argv[3])):
    began = time.perf_counter()
    row = Row(Stamp(number, number, number, number), contract.COMPLETED)
    failed += not index.note(Path("/runs"), {f"{sys.argv[2]}-{number}": row, "shared": row})
    longest = max(longest, time.perf_counter() - began)
print(failed, longest)
"""


def measure(what: str, project: Path, *arguments: str, before: Callable[[], object] = lambda: None) -> None:
    """One line: the median, least and most wall seconds of a command, and its processor seconds."""
    walls, cpus = [], []
    for _ in range(ROUNDS):
        before()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "grd", *arguments], cwd=project, capture_output=True)
        walls.append(time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpus.append(after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime)
    print(
        f"{what:<44} median {statistics.median(walls):.3f} s ({min(walls):.3f} to {max(walls):.3f}), "
        f"processor {statistics.median(cpus):.3f} s",
        flush=True,
    )


def writers(path: Path) -> None:
    """Twenty processes that write at once."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(number), str(TRANSACTIONS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(WRITERS)
    ]
    for process in started:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()  # it is ready
    began = time.perf_counter()
    for process in started:
        process.stdin.close()
    answers = [process.stdout.read().split() for process in started]
    for process in started:
        process.wait(60)
    took = time.perf_counter() - began
    errors = sum(int(failed) for failed, _ in answers)
    longest = max(float(seconds) for _, seconds in answers)
    print(
        f"{WRITERS} writers x {TRANSACTIONS} transactions: {took:.1f} s, {errors} errors, "
        f"the longest wait {longest:.2f} s",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        project = Path(name, "project")
        (project / ".planning").mkdir(parents=True)
        os.environ["GRD_STATE_DIR"] = str(Path(name, "state"))
        for number in range(RUNS):
            write_run(project / "experiments", number, STATES[number % len(STATES)])
        index = RunIndex()
        measure("grd --version", project, "--version")
        measure(f"grd list, {RUNS:,} runs, index made meanwhile", project, "list", before=index.delete)
        measure(f"grd list, {RUNS:,} runs", project, "list")
        measure(f"grd list --state failed, {RUNS:,} runs", project, "list", "--state", "failed")
        measure(f"grd status, {RUNS:,} runs", project, "status")
        os.environ["GRD_STATE_DIR"] = os.devnull + "/none"
        measure(f"grd list, {RUNS:,} runs, index cannot be", project, "list")
        writers(Path(name, "writers", "index.sqlite3"))


if __name__ == "__main__":
    main()
