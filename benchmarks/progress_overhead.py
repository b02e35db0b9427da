"""What progress costs a training of 1,000 steps a second: events on against off, tqdm watched against not.

    python benchmarks/progress_overhead.py [SECONDS] [ROUNDS]

Two measurements. The loops with 1 ms of arithmetic a step: medians of CPU time, arms interleaved; on a busy
machine they spread by more than what is looked for. The same loops with empty steps: what a step costs by
itself, in microseconds, which is the sharper number; 10 microseconds are 1 % of a step of 1 ms.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

STEP_SECONDS = 0.001

CHILD = """
import json, os, sys, time
from contextlib import redirect_stderr
arm, steps, step_seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])

def work():
    # A fixed amount of arithmetic, measured once: what is added to it shows in the wall time.
    x = 0
    for i in range(loops):
        x += i * i
    return x

def calibrate():
    best = float("inf")
    for _ in range(30):
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best

if arm.startswith("empty"):
    work = lambda: None
loops = 2000
loops = int(loops * step_seconds / calibrate()) if len(sys.argv) < 5 else int(sys.argv[4])
if arm == "calibrate":
    print(loops)
    raise SystemExit
if "tqdm" in arm:
    from grd.execution import kernel_progress
    kernel_progress.load_ipython_extension(None)
    from tqdm import tqdm
else:
    from grd.experiment import training
begin, cpu = time.perf_counter(), time.process_time()
if "tqdm" in arm:
    with open(os.devnull, "w") as nowhere:
        for _ in tqdm(range(steps), file=nowhere):
            work()
elif arm == "bare":
    for _ in range(steps):
        work()
else:
    for epoch in training.epochs(2):
        for _ in epoch.steps(range(steps // 2)):
            work()
        epoch.log(loss=1.0)
print(json.dumps([time.perf_counter() - begin, time.process_time() - cpu]))
"""

ARMS = ("bare", "epochs off", "epochs on", "tqdm off", "tqdm on")


def run(arm: str, steps: int, *more: str) -> str:
    """The answer of one child process."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GRD_")}
        if arm.endswith(" on"):
            environment["GRD_EVENTS"] = str(Path(folder) / "events.jsonl")
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CHILD, arm, str(steps), str(STEP_SECONDS), *more],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout


def main(seconds: float = 3.0, rounds: int = 5) -> None:
    """Print the table and the two ratios."""
    steps = int(seconds / STEP_SECONDS)
    loops = str(int(statistics.median(int(run("calibrate", steps)) for _ in range(3))))
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(rounds):
        for arm in ARMS if number % 2 == 0 else reversed(ARMS):
            found[arm].append(json.loads(run(arm, steps, loops))[1])
    print(f"{steps} steps of 1 ms")
    for arm, times in found.items():
        spread = f"{min(times):.3f} to {max(times):.3f}"
        print(f"{arm:<12} CPU median {statistics.median(times):.3f} s ({spread})")
    empty = 100_000
    for arm in (arm for arm in ARMS if arm != "bare"):
        each = [json.loads(run(f"empty {arm}", empty, "1"))[1] / empty * 1e6 for _ in range(rounds)]
        print(f"empty {arm:<12} median {statistics.median(each):.2f} us a step")
    for what in ("epochs", "tqdm"):
        on, off = (statistics.median(found[f"{what} {state}"]) for state in ("on", "off"))
        print(f"{what}: events on / off = {on / off:.4f}")


if __name__ == "__main__":
    main(*(kind(text) for kind, text in zip((float, int), sys.argv[1:], strict=False)))
