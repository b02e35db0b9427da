"""What saving costs beside papermill: whole processes, the same notebook, the same minutes.

    python -m benchmarks saving
    GRD_BENCH_FULL=1 python -m benchmarks saving      every row 5 times, also papermill's slow ones

Three commands execute each notebook: ``papermill IN OUT`` with its own engine, ``papermill --engine grd IN
OUT``, and ``grd research IN --timeout 9m``, which keeps a record besides. They take turns, so that a machine
that becomes busy is busy for all of them. Every output is read and checked before its time counts.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from benchmarks._watched import Measured, measure

ROUNDS = 5
FULL = bool(os.environ.get("GRD_BENCH_FULL"))
SLOW_ROUNDS = ROUNDS if FULL else 1
"""papermill rewrites the notebook twice a cell: 1,000 cells take it minutes."""

PAPERMILL, ENGINE, RESEARCH = "papermill", "papermill --engine grd", "grd research"
COMMANDS = {
    PAPERMILL: ("papermill", "in.ipynb", "out.ipynb"),
    ENGINE: ("papermill", "--engine", "grd", "in.ipynb", "out.ipynb"),
    RESEARCH: ("grd", "research", "in.ipynb", "--timeout", "9m"),
}
OURS = (ENGINE, RESEARCH)


@dataclass
class Run:
    """One execution: what it cost, and the size of the notebook it left."""

    measured: Measured
    final_bytes: int
    peak_bytes: int


def execute(name: str, cells: list[str], check: Callable[[list[Any]], None], *, memory: bool = False) -> Run:
    """Execute a notebook of ``cells`` by the command called ``name``, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="grd-bench-") as place:
        folder = Path(place)
        (folder / ".planning").mkdir()
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "python3"}
        nbformat.write(notebook, folder / "in.ipynb")
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("GRD_")},
            # one for all executions, as a user has: what is found out once a boot is found out once
            "GRD_STATE_DIR": str(home() / "state"),
            "XDG_CONFIG_HOME": str(home() / "config"),
            "IPYTHONDIR": str(home() / "ipython"),
        }
        measured = measure([sys.executable, "-m", *COMMANDS[name]], folder, environment, memory=memory)
        assert measured.code == 0, measured.said
        found = [folder / "out.ipynb", *folder.glob("experiments/*/output.ipynb")]
        (output,) = (path for path in found if path.exists())
        executed = json.loads(output.read_text())
        assert all(cell["metadata"]["papermill"]["status"] == "completed" for cell in executed["cells"])
        check([cell["outputs"] for cell in executed["cells"]])
        peak = max((peak for who, peak in measured.peak_bytes.items() if _saves(who)), default=0)
        return Run(measured, output.stat().st_size, peak)


@functools.cache
def home() -> Path:
    """Settings and state of the benchmark's own; removed at its end."""
    place = Path(tempfile.mkdtemp(prefix="grd-bench-home-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def _saves(command: str) -> bool:
    """Whether a process with this command line is the one that talks to the kernel and saves."""
    return "-m papermill" in command or "grd.execution.runner" in command


def text_of(outputs: list[dict[str, Any]]) -> str:
    """What a cell printed."""
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def in_turns(
    rounds: dict[str, int], cells: list[str], check: Callable[[list[Any]], None], *, memory: bool = False
) -> dict[str, list[Run]]:
    """Execute by each command, in turns, as often as ``rounds`` says."""
    runs: dict[str, list[Run]] = {name: [] for name in rounds}
    for number in range(max(rounds.values())):
        for name, times in rounds.items():
            if number < times:
                runs[name].append(execute(name, cells, check, memory=memory))
    return runs


def show(name: str, values: list[float], unit: str, ratio: float | None = None, target: str = "") -> None:
    """One line: median, range, how often, and the ratio that counts."""
    middle, low, high = statistics.median(values), min(values), max(values)
    digits = 2 if unit == "s" else 1
    spread = f"({low:.{digits}f} to {high:.{digits}f}, n={len(values)})"
    line = f"  {name:<24} {middle:9.{digits}f} {unit:<3} {spread}"
    print(line + (f"  {ratio:.3f} x {target}" if ratio is not None else ""), flush=True)


def seconds(runs: list[Run]) -> list[float]:
    """Wall times."""
    return [run.measured.seconds for run in runs]


def show_seconds(title: str, runs: dict[str, list[Run]], target: str) -> None:
    """Wall time of each command, and its ratio to papermill's."""
    print(title, flush=True)
    base = statistics.median(seconds(runs[PAPERMILL]))
    for name, done in runs.items():
        ratio = statistics.median(seconds(done)) / base
        show(name, seconds(done), "s", ratio, f"papermill (target {target})" if name in OURS else "")
        show("  processor time", [run.measured.cpu_seconds for run in done], "s")


def printing(count: int) -> tuple[list[str], Callable[[list[Any]], None]]:
    """``count`` trivial cells, and the check that each has printed its number."""

    def check(outputs: list[Any]) -> None:
        assert [text_of(of_cell) for of_cell in outputs] == [f"{number}\n" for number in range(count)]

    return [f"print({number})" for number in range(count)], check


def many_cells() -> None:
    """200, 1,000 and 2,000 trivial cells."""
    runs = in_turns(dict.fromkeys(COMMANDS, ROUNDS), *printing(200))
    show_seconds("200 trivial cells", runs, "0.30")
    rounds = {PAPERMILL: SLOW_ROUNDS, ENGINE: ROUNDS, RESEARCH: ROUNDS}
    runs = in_turns(rounds, *printing(1000))
    show_seconds("1,000 trivial cells", runs, "0.20")
    twice = in_turns(dict.fromkeys(OURS, ROUNDS), *printing(2000))
    print("2,000 trivial cells", flush=True)
    for name in OURS:
        ratio = statistics.median(seconds(twice[name])) / statistics.median(seconds(runs[name]))
        show(name, seconds(twice[name]), "s", ratio, "its own 1,000 (target 2.2)")


def bytes_written() -> None:
    """A cell with 5 MB of output and 200 cells after it: what is written in all."""
    cells, check = printing(200)
    big = "for _ in range(50): print('x' * 99_999)"

    def check_all(outputs: list[Any]) -> None:
        assert len(text_of(outputs[0])) == 5_000_000
        check(outputs[1:])

    rounds = {PAPERMILL: SLOW_ROUNDS, ENGINE: ROUNDS, RESEARCH: ROUNDS}
    runs = in_turns(rounds, [big, *cells], check_all)
    print("200 cells after an output of 5 MB: bytes written in all", flush=True)
    for name, done in runs.items():
        written = [run.measured.written_bytes / 1e6 for run in done]
        ratio = statistics.median(run.measured.written_bytes / run.final_bytes for run in done)
        target = "the final size" + (" (target 5)" if name in OURS else "")
        show(name, written, "MB", ratio, target)
    show_seconds("the same: wall time", runs, "none")


def peak_memory() -> None:
    """50 MB of output in pieces of 1 MB: peak memory of the process that saves."""
    cells = ["for number in range(50): print(f'{number:02}' + 'x' * 999_997, flush=True)"]

    def check(outputs: list[Any]) -> None:
        lines = text_of(outputs[0]).splitlines()
        assert [line[:2] for line in lines] == [f"{number:02}" for number in range(50)]
        assert sum(map(len, lines)) == 50 * 999_999

    runs = in_turns(dict.fromkeys(COMMANDS, ROUNDS), cells, check, memory=True)
    print("50 MB of output in pieces of 1 MB: peak memory of the process that saves", flush=True)
    base = statistics.median(run.peak_bytes for run in runs[PAPERMILL])
    for name, done in runs.items():
        peaks = [run.peak_bytes / 2**20 for run in done]
        ratio = statistics.median(run.peak_bytes for run in done) / base
        show(name, peaks, "MiB", ratio, "papermill" + (" (target 1)" if name in OURS else ""))
    show_seconds("the same: wall time", runs, "none")


def many_lines() -> None:
    """100,000 printed lines."""

    def check(outputs: list[Any]) -> None:
        assert text_of(outputs[0]).splitlines() == [f"line {number}" for number in range(100_000)]

    cells = ["for number in range(100_000): print('line', number)"]
    show_seconds("100,000 printed lines", in_turns(dict.fromkeys(COMMANDS, ROUNDS), cells, check), "1.15")


def many_displays() -> None:
    """20,000 display() calls: none lost, and in order."""
    count = 20_000
    lost: list[int] = []

    def check(outputs: list[Any]) -> None:
        shown = [int("".join(output["data"]["text/plain"])) for output in outputs[0] if "data" in output]
        assert shown == sorted(set(shown)), "not in order, or twice"
        lost.append(count - len(shown))

    cells = [f"for number in range({count}): display(number)"]
    print("20,000 display() calls: how many are lost", flush=True)
    every: dict[str, list[int]] = {name: [] for name in COMMANDS}
    runs: dict[str, list[Run]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name in COMMANDS:
            try:
                runs[name].append(execute(name, cells, check))
                every[name].append(lost[-1])
            except AssertionError as error:
                print(f"  {name}: failed: {str(error).strip()[-300:]}", flush=True)
    for name, counts in every.items():
        print(f"  {name:<24} {counts}" + (" (target 0)" if name in OURS else ""), flush=True)
    if runs[PAPERMILL]:
        show_seconds("the same: wall time", {name: done for name, done in runs.items() if done}, "none")


PARTS = (many_cells, bytes_written, peak_memory, many_lines, many_displays)


def main() -> None:
    """Print the table; GRD_BENCH_PARTS=peak_memory,many_lines chooses rows."""
    chosen = os.environ.get("GRD_BENCH_PARTS", "")
    for part in PARTS:
        if not chosen or part.__name__ in chosen.split(","):
            part()
            print(f"  (load now {os.getloadavg()[0]:.1f})", flush=True)


if __name__ == "__main__":
    main()
