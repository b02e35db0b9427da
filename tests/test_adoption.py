"""README's diffs: five changed lines at most, and a notebook of a stranger is interrupted and resumed."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from conftest import Project, wait_until

ROOT = Path(__file__).resolve().parents[1]
NEEDS = {
    "pytorch": "torch",
    "lightning": "pytorch_lightning",
    "huggingface": "transformers",
    "sklearn": "sklearn",
}
FRAMEWORKS = ("lightning", "huggingface")
MOST_CHANGED_LINES = 5


def hunks(name: str) -> list[list[str]]:
    """The hunks of README's diff of this notebook, without their headers."""
    blocks = re.findall(r"^```diff\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if block.startswith(f"--- a/{name}.ipynb\n+++ b/{name}.ipynb\n@@"))
    return [part.splitlines()[1:] for part in re.split(r"^@@ ", block, flags=re.MULTILINE)[1:]]


def changed(name: str) -> list[str]:
    """The notebook's cells after README's diff."""
    text = (ROOT / "tests" / "adoption" / f"{name}.py").read_text()
    for hunk in hunks(name):
        old = "".join(f"{line[1:]}\n" for line in hunk if line[0] in " -")
        assert text.count(old) == 1, old
        text = text.replace(old, "".join(f"{line[1:]}\n" for line in hunk if line[0] in " +"))
    return text.split("# %%\n")


@pytest.mark.parametrize("name", NEEDS)
def test_the_diffs_of_the_readme_change_five_lines_at_most(name: str) -> None:
    added, removed = (sum(line[0] == sign for hunk in hunks(name) for line in hunk) for sign in "+-")
    assert removed <= added <= MOST_CHANGED_LINES
    parameters, *cells = changed(name)
    assert 'checkpoint_dir: str = ""' in parameters and "resume: bool = False" in parameters
    compile("".join(cells), name, "exec")


def weights(project: Project, *where: str) -> list[str]:
    return re.findall(r"weights sha256 ([0-9a-f]{64})", project.grd("logs", *where).out)


@pytest.mark.faults
@pytest.mark.usefixtures("torch_in_kernels")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.frameworks if name in FRAMEWORKS else ()) for name in NEEDS],
)
def test_a_notebook_changed_so_ends_after_an_interruption_where_none_would_have(
    project: Project, name: str
) -> None:
    pytest.importorskip(NEEDS[name])
    parameters, *cells = changed(name)
    project.notebook("a.ipynb", *cells, parameters=parameters)
    whole = project.grd("research", "a.ipynb")
    assert whole.code == 0, whole.err
    (expected,) = weights(project, "last")

    other = str(project.path / "interrupted")
    started = project.start("research", "a.ipynb", "-p", "seconds", "0.3", "--runs-dir", other)
    (run,) = wait_until(lambda: list(Path(other).glob("2*-a-*")), "the run's folder")
    project.wait_for_event("progress", run, name="epochs")
    os.kill(project.record(run)["runner"]["pid"], signal.SIGTERM)
    assert project.finish(started).code == 75
    resumed = project.grd("resume", run.name, "-p", "seconds", "0", "--runs-dir", other)
    assert resumed.code == 0, resumed.err
    assert [event for event in project.events(run) if event["kind"] == "resume"]
    assert weights(project, run.name, "--runs-dir", other) == [expected]
