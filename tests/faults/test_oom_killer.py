"""The real OOM killer, in a memory cgroup of the test's own: who died of what is told as it was."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import nbformat
import pytest
from cgroups import MemoryCgroup, require
from conftest import Project

pytestmark = pytest.mark.faults

PARAMETERS = "timeout = None\ncheckpoint_dir = ''\nresume = False"
LIMIT_MIB = 500
EAT = "hoard = []\nwhile True:\n    hoard.append(bytearray(b'x') * 2**23)"
DIE = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
TRAINING = """
from grd.experiment import training
seen = {"n": 0}
for epoch in training.epochs(6, state=seen, checkpoint_dir=checkpoint_dir, resume=resume, every=1):
    seen["n"] += 1
    print("epoch", int(epoch), flush=True)
    hoard = []
    while epoch == 3 and not resume:
        hoard.append(bytearray(b"x") * 2**23)
"""
CHILD_FIRST = """
import os, signal, subprocess, sys, time
eat = "hoard = []\\nwhile True: hoard.append(bytearray(b'x') * 2**23)"
print("child", subprocess.run([sys.executable, "-c", eat]).returncode, flush=True)
time.sleep(5)
os.kill(os.getpid(), signal.SIGKILL)
"""
WORKER = """
from torch.utils.data import DataLoader, Dataset

class Hungry(Dataset):
    def __len__(self): return 4
    def __getitem__(self, index):
        hoard = []
        while True:
            hoard.append(bytearray(b"x") * 2**23)

for batch in DataLoader(Hungry(), num_workers=1):
    pass
"""


@pytest.fixture
def cgroup() -> Iterator[MemoryCgroup]:
    made = require(MemoryCgroup(LIMIT_MIB))
    yield made
    made.remove()


def research(
    project: Project, cgroup: MemoryCgroup, *cells: str, limit: str = "5m"
) -> tuple[int, dict[str, Any]]:
    """Exit code and record of a run whose processes are all in the cgroup."""
    project.notebook("run.ipynb", "print('so far', flush=True)", *cells, "never = 1", parameters=PARAMETERS)
    process = cgroup.start(project, "-m", "grd", "research", "run.ipynb", "--timeout", limit, "--json")
    ended = project.finish(process)
    assert "Traceback" not in ended.err, ended.err
    return ended.code, ended.json


def test_a_kernel_that_the_oom_killer_ends_was_out_of_memory_and_resumes(
    project: Project, cgroup: MemoryCgroup
) -> None:
    code, record = research(project, cgroup, TRAINING)
    assert (code, record["state"], record["cause"]) == (75, "interrupted", "out_of_memory"), record["detail"]
    assert record["attempts"][-1]["oom"] == "confirmed"
    assert f"{LIMIT_MIB} MiB" in record["detail"] and "peak" in record["detail"], record["detail"]
    assert str(cgroup.folder) in record["detail"]
    assert record["resumable"] and record["checkpoint"]["epoch"] == 2
    assert record["runner"]["pid"], "the runner has written the end itself"
    logs = project.grd("logs", "last").out
    assert "so far" in logs and "epoch 3" in logs
    shown = project.grd("status", "last")
    assert "out_of_memory" in shown.out and "out of memory in cell" in shown.out
    notebook = nbformat.read(project.only_run() / "output.ipynb", as_version=4)
    statuses = [cell.metadata.papermill.status for cell in notebook.cells if cell.cell_type == "code"]
    assert statuses[-2:] == ["interrupted", "pending"] or statuses[-2:] == ["failed", "pending"], statuses
    assert project.processes() == []
    resumed = project.grd("resume", "last", "--timeout", "5m", "--json")
    assert (resumed.code, resumed.json["state"]) == (0, "completed"), resumed.err
    assert [e["epoch"] for e in project.events() if e["kind"] == "resume"] == [2]


def test_with_a_stranger_in_the_cgroup_it_is_only_suspected(project: Project, cgroup: MemoryCgroup) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as stranger:
        try:
            cgroup.enter(stranger.pid)
            code, record = research(project, cgroup, EAT)
        finally:
            stranger.kill()
    assert (code, record["state"], record["cause"]) == (75, "interrupted", "kernel_died")
    assert record["attempts"][-1]["oom"] == "suspected"
    assert "other processes share" in record["detail"] and f"{LIMIT_MIB} MiB" in record["detail"]


def test_kill_9_by_somebody_is_not_called_out_of_memory(project: Project, cgroup: MemoryCgroup) -> None:
    code, record = research(project, cgroup, DIE)
    assert (code, record["cause"], record["attempts"][-1]["oom"]) == (75, "kernel_died", None)
    assert "SIGKILL" in record["detail"] and "not by the system's OOM killer" in record["detail"]


def test_a_child_that_the_oom_killer_ended_before_is_no_evidence(
    project: Project, cgroup: MemoryCgroup
) -> None:
    code, record = research(project, cgroup, CHILD_FIRST)
    assert f"child {-signal.SIGKILL}" in project.grd("logs", "last").out
    assert (code, record["cause"], record["attempts"][-1]["oom"]) == (75, "kernel_died", None), record[
        "detail"
    ]


@pytest.mark.usefixtures("torch_in_kernels")
def test_a_worker_that_the_oom_killer_ends_is_the_error_that_torch_raises(project: Project) -> None:
    pytest.importorskip("torch")
    cgroup = require(MemoryCgroup(2 * LIMIT_MIB))
    try:
        code, record = research(project, cgroup, WORKER)
    finally:
        cgroup.remove()
    assert (code, record["state"], record["cause"]) == (1, "failed", "notebook_error"), record["detail"]
    assert "DataLoader worker" in record["detail"]


def test_out_of_memory_while_stopping_is_told_with_the_stop(project: Project, cgroup: MemoryCgroup) -> None:
    finally_eat = "import time\ntry:\n    time.sleep(600)\nfinally:\n" + "".join(
        f"    {line}\n" for line in EAT.splitlines()
    )
    code, record = research(project, cgroup, finally_eat, limit="10s")
    assert (code, record["state"], record["cause"]) == (75, "interrupted", "deadline")
    assert "while stopping, the kernel died" in record["detail"]
    assert "OOM killer ended the kernel" in record["detail"], record["detail"]


def test_papermills_engine_tells_it_in_the_notebook(project: Project, cgroup: MemoryCgroup) -> None:
    project.notebook("in.ipynb", "print('so far')", EAT, "never = 1")
    process = cgroup.start(project, "-m", "papermill", "--engine", "grd", "in.ipynb", "out.ipynb")
    ended = project.finish(process)
    assert ended.code == 138, ended.err
    told = nbformat.read(project.path / "out.ipynb", as_version=4).metadata["grd"]
    assert (told["state"], told["cause"]) == ("interrupted", "out_of_memory")
    assert f"{LIMIT_MIB} MiB" in told["detail"]


@pytest.mark.parametrize(
    "cell",
    [
        "raise MemoryError",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))\nhoard = bytearray(2**40)",
    ],
    ids=["raised", "RLIMIT_AS"],
)
def test_a_memory_error_is_the_notebooks_own(project: Project, cell: str) -> None:
    project.notebook("run.ipynb", cell)
    ended = project.grd("research", "run.ipynb", "--json")
    assert (ended.code, ended.json["cause"]) == (1, "notebook_error")
    assert "MemoryError" in ended.json["detail"]
    assert (project.only_run() / "output.ipynb").exists()
