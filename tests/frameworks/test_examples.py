"""The example notebooks: interrupted and resumed, each ends with the weights of one that was left alone."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import Project, wait_until

from grd.files import shipped_file

pytestmark = [pytest.mark.frameworks, pytest.mark.usefixtures("torch_in_kernels")]

NEEDS = {
    "train_lightning.ipynb": "pytorch_lightning",
    "train_huggingface.ipynb": "transformers",
    "train_sklearn.ipynb": "sklearn",
}
EPOCHS = ("-p", "epochs", "4")


def weights(project: Project) -> str:
    found = re.findall(r"weights sha256 ([0-9a-f]{64})", project.grd("logs", "last").out)
    assert len(found) == 1
    return str(found[0])


@pytest.mark.parametrize("how", ["SIGTERM", "kill -9 of the kernel"])
@pytest.mark.parametrize("name", NEEDS)
def test_an_interrupted_and_resumed_example_equals_an_uninterrupted_one(
    project: Project, name: str, how: str
) -> None:
    pytest.importorskip(NEEDS[name])
    (project.path / name).write_bytes(shipped_file(f"notebooks/{name}").read_bytes())
    whole = project.grd("research", name, *EPOCHS)
    assert whole.code == 0, whole.err
    expected = weights(project)

    other = project.path / "interrupted"
    started = project.start(
        "research", name, *EPOCHS, "-p", "seconds_per_epoch", "3", "--runs-dir", str(other)
    )
    run = wait_until(lambda: [path for path in other.glob("2*") if path.is_dir()], "the run's folder")[0]
    project.wait_for_event("metrics", run, epoch=1)
    record = project.record(run)
    if how == "SIGTERM":
        os.kill(record["runner"]["pid"], signal.SIGTERM)
    else:
        os.kill(record["kernel_pid"], signal.SIGKILL)
    ended = project.finish(started)
    assert (ended.code, project.record(run)["state"]) == (75, "interrupted"), ended.err
    resumed = project.grd("resume", run.name, "-p", "seconds_per_epoch", "0", "--runs-dir", str(other))
    assert resumed.code == 0, resumed.err
    assert [e for e in project.events(run) if e["kind"] == "resume" and e["epoch"] >= 0]
    found = re.findall(
        r"weights sha256 ([0-9a-f]{64})", project.grd("logs", run.name, "--runs-dir", str(other)).out
    )
    assert found == [expected]
