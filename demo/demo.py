"""The main road of grd on real data: explore, train, interrupt, look, resume, compare.

Run by ``make demo``. Works in ``demo-output/``, which it makes anew each time; every command shown can be
typed there by hand. Ends with status 1 and one line as soon as something is not as promised.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grd
from grd.runs.processes import carrying

CHECKOUT = Path(__file__).resolve().parents[1]
PLACE = CHECKOUT / "demo-output"
NOTEBOOK = "notebooks/train_digits.ipynb"
EPOCHS = 12
INTERRUPT_AFTER = EPOCHS / 2 + 0.3
"""In the middle of an epoch on purpose: that is the harder place to go on from."""
TRAINING = ("research", NOTEBOOK, "-p", "epochs", str(EPOCHS), "-p", "seconds_per_epoch", "1.0")
PATIENCE_SECONDS = 240.0

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("GRD_")}


class Broken(Exception):
    """A promise that was not kept."""


def heading(number: int, title: str, *lines: str) -> None:
    """Say what comes next."""
    print(f"\n\033[1m{number}. {title}\033[0m" if sys.stdout.isatty() else f"\n{number}. {title}")
    for line in lines:
        print(f"   {line}")
    print(flush=True)


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start ``grd ARGUMENTS``, its messages on this terminal, its data to be collected."""
    print(f"$ grd {shlex.join(arguments)}", flush=True)
    return subprocess.Popen(
        [sys.executable, "-m", "grd", *arguments],
        cwd=PLACE,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], expected: int) -> str:
    """Wait for a command and show what it printed. Raises Broken if its exit code is another one."""
    out, _ = process.communicate()
    print(out, end="")
    print(f"(exit code {process.returncode})\n", flush=True)
    if process.returncode != expected:
        raise Broken(f"{shlex.join(map(str, process.args))} ended with {process.returncode}, not {expected}")
    return out


def run(*arguments: str, expected: int = 0) -> str:
    """Run ``grd ARGUMENTS`` to its end and return what it printed."""
    return finish(start(*arguments), expected)


def silently(*arguments: str) -> Any:
    """The JSON of a command that only looks."""
    done = subprocess.run(
        [sys.executable, "-m", "grd", *arguments, "--json"],
        cwd=PLACE,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def the_run(known: set[Path], follower: subprocess.Popen[str]) -> Path:
    """The folder of the run that ``follower`` has just started."""
    for _ in patiently(follower, "the run's folder"):
        new = {
            path for path in (PLACE / "experiments").glob("[0-9]*") if (path / "run.json").exists()
        } - known
        if new:
            return new.pop()
    raise Broken("the run ended before it had a folder")


def patiently(follower: subprocess.Popen[str], what: str) -> Iterator[None]:
    """Look again and again while ``follower`` lives. Raises Broken when that takes too long."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    while follower.poll() is None:
        yield
        if time.monotonic() > give_up:
            raise Broken(f"waited {PATIENCE_SECONDS:.0f} s in vain for {what}")
        time.sleep(0.02)


def events(folder: Path) -> list[dict[str, Any]]:
    """What the run has reported so far; a line that is still being written is left out."""
    try:
        text = (folder / "events.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for_the_middle(folder: Path, follower: subprocess.Popen[str]) -> float:
    """Epochs done at the first event from the middle of the training on."""
    for _ in patiently(follower, f"epoch {INTERRUPT_AFTER}"):
        for event in events(folder):
            if event["kind"] == "progress" and event["name"] == "epochs" and event["n"] >= INTERRUPT_AFTER:
                return float(event["n"])
    raise Broken("the training ended before it could be interrupted")


def check(kept: bool, promise: str) -> None:
    """Say that a promise was kept. Raises Broken if it was not."""
    if not kept:
        raise Broken(f"not as promised: {promise}")
    print(f"   ok: {promise}", flush=True)


def check_nothing_left(folder: Path) -> None:
    """No process of the run may be alive two seconds after its end."""
    attempts = json.loads((folder / "run.json").read_text())["attempts"]
    marks = [f"GRD_PROCESS_MARKER={folder.name}/{attempt['number']}" for attempt in attempts]
    give_up = time.monotonic() + 2.0
    while (alive := [pid for mark in marks for pid in carrying(mark)]) and time.monotonic() < give_up:
        time.sleep(0.05)
    check(not alive, f"no process of {folder.name} is left")


def fingerprints(text: str) -> dict[str, str]:
    """The hashes over weights and losses that the notebook printed."""
    found = dict(re.findall(r"^(weights|losses) sha256 ([0-9a-f]{64})$", text, re.M))
    if set(found) != {"weights", "losses"}:
        raise Broken("the notebook did not print its two hashes")
    return found


def prepare() -> None:
    """A small project of its own, as a user would have it."""
    if PLACE.exists():
        for earlier in grd.list_runs(runs_dir=PLACE / "experiments", state="running"):
            print(f"stopping {earlier.id} of an earlier demo")
            earlier.stop(now=True)
            give_up = time.monotonic() + 30.0
            while earlier.state == "running" and time.monotonic() < give_up:
                time.sleep(0.1)
        shutil.rmtree(PLACE)
    (PLACE / "notebooks").mkdir(parents=True)
    shutil.copy(CHECKOUT / NOTEBOOK, PLACE / NOTEBOOK)
    (PLACE / "grd.toml").write_text('# makes this folder a project\nruns_dir = "experiments"\n')


def explore() -> None:
    """Step 1."""
    heading(1, "What is this machine?", "The Explorer profiles it in a kernel and writes the report.")
    run("explore", "--report", "DATA_REPORT.md")
    report = (PLACE / "DATA_REPORT.md").read_text()
    check(report.count("## Hardware Profile") == 1, "DATA_REPORT.md has one hardware section")


def interrupt() -> Path:
    """Steps 2 and 3: a training that is stopped half-way, and what is known of it."""
    heading(
        2,
        f"A training of {EPOCHS} epochs, interrupted half-way",
        "scikit-learn's digits, PyTorch on the CPU; each epoch is stretched to a second, to have time to",
        "interrupt it. Nobody agreed to a time limit, so all attempts together are capped at 10 minutes.",
    )
    follower = start(*TRAINING)
    folder = the_run(set(), follower)
    done = wait_for_the_middle(folder, follower)
    pid = json.loads((folder / "run.json").read_text())["runner"]["pid"]
    print(f"\n$ kill -TERM {pid}     # the runner, after {done:.1f} epochs", flush=True)
    os.kill(pid, signal.SIGTERM)
    finish(follower, 75)

    heading(3, "What is known of it", "The state, the cause, the last checkpoint, and what to type next.")
    run("status")
    state = silently("status", folder.name)
    check((state["state"], state["cause"]) == ("interrupted", "sigterm"), "it is interrupted, by sigterm")
    check(state["resumable"] and state["checkpoint"] is not None, "it can be resumed from a checkpoint")
    check_nothing_left(folder)
    return folder


def resume(folder: Path) -> None:
    """Step 4."""
    heading(4, "Resume", "The next attempt goes on in the middle of the epoch where the first was stopped.")
    stopped_at = max(event["epoch"] for event in events(folder) if event["kind"] == "metrics")
    run("resume", folder.name)
    trained = [e["epoch"] for e in events(folder) if e["kind"] == "metrics" and e["epoch"] is not None]
    state = silently("status", folder.name)
    check(state["state"] == "completed" and state["attempt"] == 2, "it is completed, in two attempts")
    check(stopped_at + 1 < EPOCHS, "the first attempt had not finished")
    check(sorted(set(trained)) == list(range(EPOCHS)), f"all {EPOCHS} epochs are in the record")
    check(len(trained) - len(set(trained)) <= 1, "at most one epoch was trained twice")
    check_nothing_left(folder)


def compare(folder: Path) -> Path:
    """Step 5: the same training once more, left alone."""
    heading(5, "The same training, left alone", "Same seed, no interruption: is the result the same?")
    follower = start(*TRAINING)
    alone = the_run({folder}, follower)
    finish(follower, 0)
    resumed = fingerprints(run("logs", folder.name, "--tail", "3"))
    uninterrupted = fingerprints(run("logs", alone.name, "--tail", "3"))
    check(resumed["weights"] == uninterrupted["weights"], "every bit of the weights is the same")
    check(resumed["losses"] == uninterrupted["losses"], "every loss of every epoch is the same")
    return alone


def where_everything_lies(folder: Path, alone: Path) -> None:
    """Step 6."""
    heading(6, "The result, the report, and where everything lies")
    run("result", folder.name)
    result, other = silently("result", folder.name), silently("result", alone.name)
    accuracy = result["metrics"]["test_accuracy"]
    check(accuracy == other["metrics"]["test_accuracy"], f"test accuracy {accuracy:.4f} in both runs")
    print("\n$ cat DATA_REPORT.md")
    print((PLACE / "DATA_REPORT.md").read_text())
    print(f"In {PLACE.relative_to(CHECKOUT)}/ lie:")
    for path, what in (
        ("DATA_REPORT.md", "the report; its section is replaced by the next grd explore"),
        ("hardware_profile.json", "the same as JSON"),
        (f"{folder.relative_to(PLACE)}/", "the run that was interrupted and resumed"),
        ("    run.json", "its record"),
        ("    events.jsonl", "everything that happened, a line each"),
        ("    output.ipynb", "the newest attempt's notebook, with its outputs"),
        ("    attempts/1/ attempts/2/", "one folder for each attempt"),
        ("    checkpoints/", "what it resumed from"),
        ("    metrics.json", "losses and accuracies by epoch"),
        (f"{alone.relative_to(PLACE)}/", "the run that was left alone"),
    ):
        for name in path.split():
            here = (folder if path.startswith(" ") else PLACE) / name
            if not here.exists():
                raise Broken(f"{here} should be there and is not")
        print(f"  {path:<60} {what}")


def main() -> int:
    """Walk the whole road; 0 if every promise was kept."""
    began = time.monotonic()
    try:
        prepare()
        explore()
        folder = interrupt()
        resume(folder)
        alone = compare(folder)
        where_everything_lies(folder, alone)
    except Broken as broken:
        print(f"demo: {broken}; look in {PLACE}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ndemo: interrupted; what there is lies in {PLACE}", file=sys.stderr)
        return 130
    print(f"\nEverything was as promised, in {time.monotonic() - began:.0f} s.")
    command = Path(sys.executable).with_name("grd")
    print(f"Go on: cd {PLACE.relative_to(CHECKOUT)} && {os.path.relpath(command, PLACE)} list")
    return 0


if __name__ == "__main__":
    sys.exit(main())
