"""Training in several processes from a cell: stopped on all ranks at once, resumed, and nothing stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Project, has_ended, wait_until

from grd.errors import UsageError
from grd.experiment import distributed
from grd.experiment.exchange import exchange_folder

pytest.importorskip("torch")

TRAIN = """
import json, sys, time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from grd.experiment import distributed


def train(checkpoint_dir, resume, epochs, pause):
    with distributed.process_group() as group:
        torch.manual_seed(0)
        net = DistributedDataParallel(torch.nn.Linear(4, 1))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        checkpoints = group.checkpoints(checkpoint_dir, resume=resume)
        saved = checkpoints.load(net.module, optimizer)
        first = 0 if saved is None else saved["epoch"] + 1
        print(f"rank {group.rank} of {group.world_size} begins at {first}", flush=True)
        for epoch in range(first, epochs):
            inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * epoch + group.rank))
            optimizer.zero_grad()
            net(inputs).pow(2).mean().backward()
            optimizer.step()
            time.sleep(pause * (1 + group.rank))
            checkpoints.save(epoch, model=net.module, optimizer=optimizer)
            group.stop_if_asked(f"after epoch {epoch}")
        weights = [round(value, 7) for value in net.module.weight.detach().flatten().tolist()]
        if group.rank == 0:
            Path(checkpoint_dir, "weights.json").write_text(json.dumps(weights))


def fail(rank):
    with distributed.process_group() as group:
        if group.rank == rank:
            raise ValueError(f"rank {rank} has had enough")
        group.barrier()
        time.sleep(600)


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2] == "True", int(sys.argv[3]), float(sys.argv[4]))
"""

NOTEBOOK = """from grd.experiment import distributed
distributed.launch("train_ddp.py", checkpoint_dir, resume, 12, 0.2, nprocs=2)"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_hand: None) -> Path:
    """The current folder, with the script, which is a module too."""
    (tmp_path / "train_ddp.py").write_text(TRAIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def function_of_this_test() -> None:
    """Has a module, but stands for one of the notebook in the test below."""


@pytest.mark.parametrize(
    ("target", "arguments", "options", "message"),
    [
        ("nowhere.py", (), {}, "there is no script nowhere.py"),
        ("train_ddp", (), {}, "no script .* and no function"),
        ("nowhere:train", (), {}, "no script .* and no function"),
        ("train_ddp:train", ({1, 2},), {}, "must be JSON values"),
        (lambda: None, (), {}, "a function of this notebook"),
        ("train_ddp.py", (), {"nprocs": 0}, "from 1 on"),
        ("train_ddp.py", (), {"nprocs": True}, "from 1 on"),
    ],
)
def test_what_workers_could_not_run_is_said_before_any_starts(
    place: Path, target: Any, arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        distributed.launch(target, *arguments, **options)


def test_a_function_of_the_notebook_is_told_from_one_of_a_module(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(function_of_this_test, "__module__", "__main__")
    with pytest.raises(UsageError, match=r"function_of_this_test. is a function of this notebook"):
        distributed.launch(function_of_this_test)


def test_a_group_of_one_needs_no_torchrun(place: Path) -> None:
    with distributed.process_group() as group:
        assert (group.rank, group.world_size, group.device.type) == (0, 1, "cpu")
        assert group.agree("x") == ["x"]
        assert group.stop_requested() is None
        checkpoints = group.checkpoints(place / "checkpoints")
        assert checkpoints.load() is None
        checkpoints.save(3, state={"n": 1})
        again = group.checkpoints(place / "checkpoints", resume=True).load()
        assert again is not None and (again["epoch"], again["state"]) == (3, {"n": 1})


@pytest.mark.faults
def test_a_failing_rank_ends_the_others_and_the_cell(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="a worker failed"):
        distributed.launch("train_ddp:fail", 1, nprocs=2)
    assert "rank 1 has had enough" in capsys.readouterr().out
    wait_until(lambda: not workers(place), "no worker is left")


def workers(place: Path) -> list[psutil.Process]:
    """torchrun and its workers that were started in this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(place) and "torch.distributed.run" in " ".join(process.cmdline()):
                found += [process, *process.children(recursive=True)]
        except psutil.Error:
            continue
    return [process for process in found if not has_ended(process)]


@pytest.fixture
def distributed_project(torch_in_kernels: None, project: Project) -> Project:
    """A project whose notebook trains in two processes."""
    (project.path / "train_ddp.py").write_text(TRAIN)
    project.notebook("ddp.ipynb", NOTEBOOK, parameters="checkpoint_dir = None\nresume = False")
    return project


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_training_in_two_processes_is_stopped_and_resumed_to_the_same_weights(
    distributed_project: Project, place: Path
) -> None:
    project = distributed_project
    following = project.start("research", "ddp.ipynb", "--timeout", "10m", "--grace", "60s")
    project.wait_for_event("checkpoint", epoch=1)
    project.grd("stop", "last")
    stopped = project.finish(following)
    assert stopped.code == 75, stopped.err
    record = project.record()
    assert (record["state"], record["cause"]) == ("interrupted", "stopped")
    assert not record["attempts"][0]["stop"]["killed"]
    wait_until(lambda: not project.processes(), "nothing of it is left")
    reached = record["checkpoint"]["epoch"]
    assert 1 <= reached < 11

    resumed = project.finish(project.start("resume", "last", "--timeout", "10m"), limit=400)
    assert resumed.code == 0, resumed.err
    printed = project.grd("logs", "last").out
    assert sorted(line for line in printed.splitlines() if "begins" in line) == [
        f"rank {rank} of 2 begins at {reached + 1}" for rank in (0, 1)
    ]
    wait_until(lambda: not project.processes(), "nothing of it is left")

    distributed.launch("train_ddp.py", "whole", False, 12, 0.0, nprocs=2)
    whole = json.loads((place / "whole" / "weights.json").read_text())
    assert json.loads(Path(record["checkpoint_dir"], "weights.json").read_text()) == whole


@pytest.mark.faults
def test_a_killed_kernel_takes_the_workers_along(distributed_project: Project) -> None:
    project = distributed_project
    following = project.start("research", "ddp.ipynb", "--timeout", "10m")
    project.wait_for_event("checkpoint", epoch=1)
    assert len(project.processes()) >= 4  # kernel, torchrun, two workers
    exchanged = project.only_run() / "attempts" / "1"
    assert list(exchanged.glob(".distributed-*"))
    os.kill(project.record()["kernel_pid"], signal.SIGKILL)
    assert project.finish(following).code == 75
    wait_until(lambda: not project.processes(), "nothing of it is left")
    assert not list(exchanged.glob(".distributed-*"))


@pytest.mark.faults
def test_a_killed_kernel_and_its_killed_runner_leave_no_folder_of_the_workers(
    distributed_project: Project,
) -> None:
    project = distributed_project
    assert project.grd("research", "ddp.ipynb", "--timeout", "10m", "--detach").code == 0
    project.wait_for_event("checkpoint", epoch=1)
    for pid in (project.record()["runner"]["pid"], project.record()["kernel_pid"]):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not project.processes(), "nothing of it is left")
    assert project.grd("status", "last", "--json").json["cause"] == "runner_lost"
    assert not list((project.only_run() / "attempts" / "1").glob(".distributed-*"))
    assert not _torch_logs(project.path)


def _torch_logs(since: Path) -> list[Path]:
    """What torchrun has left among temporary files since ``since`` was made."""
    began = since.parent.stat().st_ctime
    return [path for path in Path("/tmp").glob("torchelastic_*") if path.stat().st_mtime > began]


def test_what_a_killed_process_has_left_is_removed_by_the_next_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_hand: None
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = subprocess.run(
        [sys.executable, "-c", "import os\nfrom grd.experiment.exchange import exchange_folder as f\n"
         "with f() as folder:\n    print(folder, flush=True)\n    os.kill(os.getpid(), 9)"],
        env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    left = Path(killed.stdout.strip())
    assert (killed.returncode, left.parent, left.is_dir()) == (-9, tmp_path, True), killed.stderr
    with exchange_folder() as folder, exchange_folder() as another:
        assert sorted(tmp_path.iterdir()) == sorted([folder, another])
    assert not list(tmp_path.iterdir())


@pytest.mark.faults
def test_an_interrupted_cell_of_a_kernel_that_lives_on_leaves_no_worker(place: Path) -> None:
    """Two Ctrl-C at a training that looks for no stop: as in a Jupyter of one's own."""
    (place / "busy.py").write_text("import time\nprint('busy', flush=True)\ntime.sleep(600)\n")
    code = "from grd.experiment import distributed\ndistributed.launch('busy.py', nprocs=2)"
    cell = subprocess.Popen(
        [sys.executable, "-c", code], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert cell.stdout is not None
    assert cell.stdout.readline() == "busy\n"
    wait_until(lambda: len(workers(place)) >= 3, "torchrun has its workers")
    cell.send_signal(signal.SIGINT)
    wait_until(lambda: _has_flag(cell), "the first is a request")
    cell.send_signal(signal.SIGINT)
    _, err = cell.communicate(timeout=120)
    assert "KeyboardInterrupt" in err
    assert not workers(place)


def _has_flag(cell: Any) -> bool:
    folders = Path("/tmp").glob("grd-distributed-*/stop")
    return cell.poll() is None and any(path.exists() for path in folders)
