"""Fault tests again and again beside busy loops, until each has passed often enough.

    python -m tests.faults.repeat --times 20 -k 'fault_table and silent'

A flaky test is a bug, in the test or in grd. What has passed is remembered in ``build/fault-repeats.jsonl``,
so that the work can be done in several sittings; a new commit begins anew unless ``--since COMMIT`` says from
where on results count. Exit code 1 once a test has failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOG = ROOT / "build" / "fault-repeats.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=20, help="passes wanted of each test")
    parser.add_argument("-k", dest="expression", default="", help="which tests, as pytest's -k")
    parser.add_argument("--busy", type=int, default=2, help="busy loops beside them")
    parser.add_argument("--workers", type=int, default=3, help="tests at once")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no further round after so long"
    )
    parser.add_argument("--since", default="HEAD", help="results of this commit and later ones count")
    options = parser.parse_args()
    counted = commits(options.since)
    give_up = time.monotonic() + options.minutes * 60
    loops = [multiprocessing.Process(target=spin, daemon=True) for _ in range(options.busy)]
    for loop in loops:
        loop.start()
    failed = False
    try:
        wanted = collect(options.expression)
        while time.monotonic() < give_up:
            passes, runs = results(counted)
            missing = [name for name in wanted if passes[name] < options.times]
            fewest = min((passes[name] for name in wanted), default=0)
            print(f"{len(wanted)} tests, fewest passes {fewest}, {len(missing)} still to run", flush=True)
            if not missing:
                break
            # those that were run least, whether they passed: one that fails must not keep the others waiting
            least = min(runs[name] for name in missing)
            failed |= one_round([name for name in missing if runs[name] == least], options.workers)
    finally:
        for loop in loops:
            loop.kill()
    return 1 if failed else 0


def spin() -> None:
    """A busy loop."""
    while True:
        pass


def collect(expression: str) -> list[str]:
    """The ids of the fault tests."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-m",
        "faults",
        "-k",
        expression,
        "tests",
    ]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if "::" in line]


def commits(since: str) -> set[str]:
    """HEAD and its ancestors down to ``since``."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    return {*git("rev-list", f"{since}..HEAD").split(), git("rev-parse", since).strip()}


def results(counted: set[str]) -> tuple[Counter[str], Counter[str]]:
    """How often each test has passed, and was run, on commits that count."""
    passes: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    if LOG.exists():
        for line in LOG.read_text().splitlines():
            result = json.loads(line)
            if result["commit"] in counted:
                runs[result["test"]] += 1
                passes[result["test"]] += result["outcome"] == "passed"
    return passes, runs


def one_round(names: list[str], workers: int) -> bool:
    """Run each once; whether one failed."""
    LOG.parent.mkdir(exist_ok=True)
    listed = LOG.with_suffix(".names")
    listed.write_text("\n".join(names))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        str(workers),
        "--dist",
        "load",
        "-p",
        "tests.faults.repeat",
    ]
    done = subprocess.run([*command, f"@{listed}"], cwd=ROOT)
    return done.returncode != 0


def pytest_runtest_logreport(report) -> None:  # type: ignore[no-untyped-def]
    """As a pytest plugin: note each result at once."""
    if hasattr(report, "node") and (
        report.when == "call" or report.failed
    ):  # in the process that leads the workers
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
        with LOG.open("a") as log:
            result = {
                "test": report.nodeid,
                "outcome": report.outcome,
                "commit": head,
                "seconds": report.duration,
            }
            log.write(json.dumps(result) + "\n")
        if report.failed:
            print(f"\nFAILED {report.nodeid}\n{report.longreprtext[-4000:]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
