"""Notebooks a minute in a batch, beside `xargs -P N papermill`, and the memory of the coordinator.

    python -m benchmarks batch                       # 12 trivial notebooks, twice in turns
    GRD_BENCH_FULL=1 python -m benchmarks batch      # 60, three times; then 1,000 in one batch for the memory

Both arms run the same notebook with the same parameters, as many at once as there are usable cores. The
ratio is grd's notebooks a minute to papermill's; its target is 0.95.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat

from grd.hardware.limits import current_limits

TARGET = 0.95
SAMPLE_SECONDS = 0.5


def write_notebook(path: Path) -> None:
    """A parameter and two trivial cells."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "python3"}
    cell = nbformat.v4.new_code_cell("seed = 0")
    cell.metadata["tags"] = ["parameters"]
    notebook.cells = [cell, nbformat.v4.new_code_cell("x = seed * 2"), nbformat.v4.new_code_cell("print(x)")]
    nbformat.write(notebook, path)


def with_papermill(folder: Path, count: int, at_once: int) -> float:
    """Seconds for ``count`` notebooks."""
    numbers = "".join(f"{number}\n" for number in range(1, count + 1))
    papermill = shutil.which("papermill", path=str(Path(sys.executable).parent)) or "papermill"
    began = time.perf_counter()
    subprocess.run(
        ["xargs", "-P", str(at_once), "-I{}", papermill, "one.ipynb", "out-{}.ipynb", "-p", "seed", "{}"],
        cwd=folder,
        input=numbers,
        text=True,
        capture_output=True,
        check=True,
    )
    return time.perf_counter() - began


def with_grd(folder: Path, count: int, at_once: int) -> tuple[float, list[tuple[int, int]]]:
    """Seconds for ``count`` notebooks, and (runs ended, bytes of the coordinator) as it went on."""
    runs_dir = folder / f"runs-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "grd", "sweep", "one.ipynb", "-g", "seed", f"1..{count}"]
    command += ["--jobs", str(at_once), "--runs-dir", str(runs_dir), "-q", "--json"]
    samples: list[tuple[int, int]] = []
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(runs_dir, samples, over), daemon=True)
    watcher.start()
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    over.set()
    watcher.join()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"] == {"completed": count}
    shutil.rmtree(runs_dir)
    return seconds, samples


def _watch(runs_dir: Path, samples: list[tuple[int, int]], over: threading.Event) -> None:
    while not over.wait(SAMPLE_SECONDS):
        try:
            record = json.loads(next(runs_dir.glob("batches/*/batch.json")).read_text())
            status = Path(f"/proc/{record['coordinator']['pid']}/status").read_text()
            rss = next(line for line in status.splitlines() if line.startswith("VmRSS"))
            events = next(runs_dir.glob("batches/*/events.jsonl")).read_text()
        except (OSError, StopIteration, TypeError, ValueError):
            continue
        samples.append((events.count('"step":"ended"'), int(rss.split()[1]) * 1024))


def memory_line(samples: list[tuple[int, int]], count: int) -> str:
    """The coordinator's memory over the batch: medians of its quarters, the first one left out."""
    quarters = [
        [rss for ended, rss in samples if quarter * count / 4 <= ended < (quarter + 1) * count / 4]
        for quarter in range(4)
    ]
    told = [f"{statistics.median(each) / 1e6:.1f}" for each in quarters if each]
    return f"coordinator, median memory by quarters of {count} runs: {', '.join(told)} MB"


def main() -> None:
    """Print the table."""
    full = os.environ.get("GRD_BENCH_FULL") == "1"
    count, rounds = (60, 3) if full else (12, 2)
    at_once = current_limits().usable_cores(os.cpu_count())[0] or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / ".planning").mkdir()
        write_notebook(folder / "one.ipynb")
        theirs, ours = [], []
        samples: list[tuple[int, int]] = []
        for _ in range(rounds):
            theirs.append(count / with_papermill(folder, count, at_once) * 60)
            seconds, samples = with_grd(folder, count, at_once)
            ours.append(count / seconds * 60)
        for what, rates in ((f"xargs -P {at_once} papermill", theirs), (f"grd sweep --jobs {at_once}", ours)):
            spread = f"{min(rates):.1f} to {max(rates):.1f}"
            print(f"{what:<28} median {statistics.median(rates):.1f} notebooks a minute ({spread})")
        ratio = statistics.median(ours) / statistics.median(theirs)
        print(f"ratio {ratio:.2f}, target {TARGET}: {'met' if ratio >= TARGET else 'MISSED'}")
        print(memory_line(samples, count))
        if full:
            seconds, samples = with_grd(folder, 1000, at_once)
            print(f"1,000 runs: {1000 / seconds * 60:.1f} notebooks a minute")
            print(memory_line(samples, 1000))


if __name__ == "__main__":
    main()
