"""The digits notebook, interrupted in every way, ends exactly as one that never was."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Project, wait_until

from grd.files import shipped_file

pytest.importorskip("torch")
pytest.importorskip("sklearn")

pytestmark = pytest.mark.usefixtures("torch_in_kernels")

EPOCHS = 6
PACE = ["-p", "epochs", str(EPOCHS), "-p", "seconds_per_epoch", "1.0"]


def digits(project: Project) -> Path:
    """A copy: the original's folder is not the project's."""
    path = project.path / "train_digits.ipynb"
    if not path.exists():
        path.write_bytes(shipped_file("notebooks/train_digits.ipynb").read_bytes())
    return path


def fingerprint(project: Project, run: str) -> tuple[str, ...]:
    """The hashes of weights and losses that the notebook prints at its end."""
    found = re.findall(r"(?:weights|losses) sha256 ([0-9a-f]{64})", project.grd("logs", run).out)
    assert len(found) == 2
    return tuple(found)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An uninterrupted run: hashes, accuracy and history."""
    folder = tmp_path_factory.mktemp("straight") / "project"
    (folder / ".planning").mkdir(parents=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRD_")}
    project = Project(folder, environment | {"GRD_STATE_DIR": str(folder / "state")})
    finished = project.grd("research", digits(project), "-p", "epochs", str(EPOCHS), "--json")
    assert finished.code == 0, finished.err
    run = finished.json["run_id"]
    result = project.grd("result", run, "--json").json
    return {"hashes": fingerprint(project, run), "metrics": result["metrics"], "history": result["history"]}


def runner(project: Project) -> int:
    return int(project.record()["runner"]["pid"])


def kernel(project: Project) -> int:
    return int(wait_until(lambda: project.record()["kernel_pid"], "the kernel's pid"))


def signal_after_epochs(project: Project, count: int, whom: Callable[[Project], int], signum: int) -> None:
    project.wait_for_event("metrics", epoch=count)
    os.kill(whom(project), signum)


INTERRUPTIONS: dict[str, tuple[list[str], Callable[[Project, int], None], str]] = {
    "SIGTERM to the runner": (
        [],
        lambda p, pid: signal_after_epochs(p, 2, runner, signal.SIGTERM),
        "sigterm",
    ),
    "Ctrl-C": ([], lambda p, pid: signal_after_epochs(p, 1, lambda _: pid, signal.SIGINT), "sigint"),
    "kill -9 of the kernel": (
        [],
        lambda p, pid: signal_after_epochs(p, 3, kernel, signal.SIGKILL),
        "kernel_died",
    ),
    "kill -9 of the runner": (
        [],
        lambda p, pid: signal_after_epochs(p, 2, runner, signal.SIGKILL),
        "runner_lost",
    ),
    "SIGTERM to the kernel": (
        [],
        lambda p, pid: signal_after_epochs(p, 1, kernel, signal.SIGTERM),
        "sigterm",
    ),
    "--timeout": (["--timeout", "7s"], lambda p, pid: None, "deadline"),
}


OFTEN = ("kill -9 of the kernel",)
"""With every change; the others, which differ from them in little, in the fault suite."""


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[] if how in OFTEN else pytest.mark.faults) for how in INTERRUPTIONS]
)
def test_an_interrupted_and_resumed_training_equals_an_uninterrupted_one(
    project: Project, straight: dict[str, Any], how: str
) -> None:
    options, interrupt, cause = INTERRUPTIONS[how]
    process = project.start("research", digits(project), *PACE, *options)
    interrupt(project, process.pid)
    stopped = project.finish(process)
    assert stopped.code == 75, stopped.err
    record = project.grd("status", "last", "--json").json
    assert (record["state"], record["cause"]) == ("interrupted", cause)
    assert project.processes() == []

    resumed = project.grd("resume", "last", "--timeout", "5m", "--json")
    assert resumed.code == 0, resumed.err
    assert fingerprint(project, "last") == straight["hashes"]
    result = project.grd("result", "last", "--json").json
    assert result["metrics"] == straight["metrics"]
    assert result["history"] == straight["history"]
    done = [e["epoch"] for e in project.events() if e["kind"] == "metrics" and e.get("epoch") is not None]
    assert sorted(set(done)) == list(range(EPOCHS))
    assert len(done) <= EPOCHS + 1, f"more than one epoch was repeated: {done}"
    assert project.processes() == []


@pytest.mark.faults
def test_a_typo_in_the_last_cell_is_mended_without_training_again(
    project: Project, straight: dict[str, Any]
) -> None:
    good = json.loads(shipped_file("notebooks/train_digits.ipynb").read_text())
    broken = json.loads(json.dumps(good))
    last = [cell for cell in broken["cells"] if cell["cell_type"] == "code"][-1]
    last["source"] = ["tset_accuracy_of(model)\n", *last["source"]]
    (project.path / "broken.ipynb").write_text(json.dumps(broken))
    failed = project.grd("research", "broken.ipynb", "-p", "epochs", str(EPOCHS))
    assert failed.code == 1
    assert "NameError" in failed.out
    before = len(project.events())
    mended = project.grd("resume", "last", "--notebook", digits(project), "--json")
    assert mended.code == 0, mended.err
    assert fingerprint(project, "last") == straight["hashes"]
    later = project.events()[before:]
    assert not [e for e in later if e["kind"] == "metrics" and e.get("epoch") is not None]
