"""Saves that go on beside the training: the same file, of the state as it was, or one clear error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from grd.errors import CheckpointError, CheckpointFenced, ExperimentInterrupted, UsageError
from grd.experiment import (
    CheckpointHandler,
    background_save,
    checkpoint_file,
    checkpoint_handler,
    training,
)
from grd.experiment.manifest import Entry, read_entries
from grd.experiment.saving_history import expected_lost_seconds, expected_overhead
from grd.experiment.schedule import Every, Schedule
from grd.experiment.snapshot import SnapshotMemory, available_bytes, spare_cores

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures("by_hand")


def handler(folder: Path, **options: Any) -> CheckpointHandler:
    return CheckpointHandler(folder, install_signal_handlers=False, async_save=True, **options)


def run(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


class Gate:
    """Holds every write back until it is opened."""

    def __init__(self, write: Callable[..., Any]) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self._write = write

    def __call__(self, path: Path, prepared: Any) -> Any:
        self.reached.set()
        assert self.opened.wait(60)
        return self._write(path, prepared)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(checkpoint_file.write)
    monkeypatch.setattr(checkpoint_file, "write", gate)
    yield gate
    gate.opened.set()


# --- the same file --------------------------------------------------------------------------------------


def everything() -> dict[str, Any]:
    """State of every kind that a file may hold."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight  # tied
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(8, 4)).sum().backward()
    optimizer.step()
    base = torch.arange(20.0)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "view": base[3:7],
        "other view": base[::2],
        "transposed": torch.rand(3, 5).t(),
        "parameter": nn.Parameter(torch.rand(2)),
        "leaf": torch.rand(2, requires_grad=True),
        "sparse": torch.rand(3, 3).to_sparse(),
        "conjugated": torch.rand(3, dtype=torch.complex64).conj(),
        "half": torch.rand(3).to(torch.bfloat16),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3),
        "array": np.arange(6).reshape(2, 3),
        "numbers": [1, 2.5, None, "text", b"bytes", (1, [2])],
        "ordered": OrderedDict(a=torch.ones(1)),
        "set": {1, 2},
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
    }


def test_a_save_in_the_background_makes_the_very_file_that_a_save_makes(tmp_path: Path) -> None:
    state = everything()
    waited = CheckpointHandler(tmp_path / "a", install_signal_handlers=False).save_checkpoint(0, state=state)
    keeper = handler(tmp_path / "b")
    path = keeper.save_checkpoint(0, state=state)
    assert keeper.flush() == path
    ours, theirs = (torch.load(p, weights_only=True)["state"] for p in (path, waited))
    assert path.stat().st_size == waited.stat().st_size
    assert ours["model"]["0.weight"].data_ptr() == ours["model"]["2.weight"].data_ptr()
    assert ours["model"]._metadata == theirs["model"]._metadata
    for name in ("parameter", "leaf"):
        assert type(ours[name]) is type(theirs[name]) and ours[name].requires_grad
    for name in state:
        torch.testing.assert_close(plain(ours[name]), plain(theirs[name]), rtol=0, atol=0)


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to_dense() if value.is_sparse else value.detach()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items() if plain(item) is not None}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value if isinstance(item, (torch.Tensor, dict, list, tuple))]
    return torch.tensor(value) if isinstance(value, (bool, int, float)) else None


def test_what_the_training_does_meanwhile_is_not_in_the_file(tmp_path: Path, gate: Gate) -> None:
    weights, log, array = torch.zeros(1000), [{"loss": 1.0}], np.zeros(5)
    keeper = handler(tmp_path)
    path = keeper.save_checkpoint(
        0, {"w": weights, "part": weights[10:20]}, state={"log": log, "array": array}
    )
    assert gate.reached.wait(60) and not path.exists()
    weights += 1
    log.append({"loss": 2.0})
    log[0]["loss"] = 3.0
    array += 1
    gate.opened.set()
    keeper.flush()
    loaded = keeper.load_checkpoint()
    assert loaded is not None
    assert not loaded["model_state"]["w"].any() and not loaded["model_state"]["part"].any()
    assert loaded["state"]["log"] == [{"loss": 1.0}] and not loaded["state"]["array"].any()


def test_the_next_save_waits_and_both_are_whole(tmp_path: Path) -> None:
    keeper = handler(tmp_path)
    for epoch in range(20):
        keeper.save_checkpoint(epoch, {"w": torch.full((200_000,), float(epoch))}, loss=1.0)
    keeper.flush()
    for epoch in range(20):
        loaded = keeper.load_checkpoint(epoch=epoch)
        assert loaded is not None and bool((loaded["model_state"]["w"] == epoch).all())


def test_whoever_reads_finds_what_was_just_saved(tmp_path: Path) -> None:
    keeper = handler(tmp_path)
    for epoch in range(5):
        path = keeper.save_checkpoint(epoch, {"w": torch.ones(500_000)})
        assert keeper.get_resumability_hints()["latest_epoch"] == epoch
        assert keeper.find_latest_checkpoint() == path


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from grd.experiment import CheckpointHandler
keeper = CheckpointHandler(sys.argv[1], async_save=True)
state = {"seen": [1, 2], "inner": {"best": 0.5}}
keeper.save_checkpoint(0, state=state)
state["seen"].append(3)
state["inner"]["best"] = 9
keeper.flush()
print(keeper.load_checkpoint()["state"])
"""


def test_it_needs_no_torch(tmp_path: Path) -> None:
    done = run(WITHOUT_TORCH, tmp_path)
    assert done.stdout.strip() == "{'seen': [1, 2], 'inner': {'best': 0.5}}", done.stderr


MEMORY = """
import sys, torch
from pathlib import Path
from grd.experiment import CheckpointHandler

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

state = {str(n): torch.ones(5_000_000) for n in range(8)}  # 160 MB
keeper = CheckpointHandler(sys.argv[1], async_save=True, keep_bytes=1)
keeper.save_checkpoint(0, {"w": torch.ones(1)})
keeper.flush()
before = peak()
for epoch in range(1, 6):
    keeper.save_checkpoint(epoch, state)
    for tensor in state.values():
        tensor += 1
keeper.flush()
print((peak() - before) / 160e6)
"""


@pytest.mark.faults
def test_any_number_of_saves_takes_the_memory_of_one_copy(tmp_path: Path) -> None:
    done = run(MEMORY, tmp_path)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) <= 1.05


def test_memory_that_a_smaller_state_does_not_need_is_given_back() -> None:
    memory = SnapshotMemory()
    kept = [buffer for size in (1000, 10) for buffer in [memory.take({"w": torch.ones(size)}).content["w"]]]
    assert [list(memory._buffers), kept[0].numel()] == [[(40, False)], 1000]
    again = memory.take({"w": torch.zeros(10)}).content["w"]
    assert again.data_ptr() == kept[1].data_ptr()


def test_without_memory_for_a_copy_the_training_waits_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(SnapshotMemory, "_buffer", refuse)
    keeper = handler(tmp_path)
    with pytest.warns(RuntimeWarning, match="no copy to save in the background") as told:
        paths = [keeper.save_checkpoint(epoch, {"w": torch.ones(10)}) for epoch in range(2)]
    assert all(path.exists() for path in paths) and keeper.flush() is None
    assert len(told) == 1


@pytest.mark.parametrize(
    ("megabytes", "spare", "room", "beside"),
    [(40, 1, None, True), (40, 0, None, False), (20, 1, None, False), (40, 1, 79, False), (40, 1, 90, True)],
)
def test_by_default_it_is_done_where_it_gains_time(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    megabytes: int,
    spare: int,
    room: int | None,
    beside: bool,
) -> None:
    monkeypatch.setattr(checkpoint_handler, "available_bytes", lambda: room and room * 1_000_000)
    cores = len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, cores - spare) if spare else cores)
    try:
        keeper = CheckpointHandler(tmp_path, install_signal_handlers=False, async_save="auto")
        keeper.save_checkpoint(0, {"w": torch.ones(megabytes * 250_000)})
        # a machine with a single core has none to spare
        assert keeper.is_saving is (beside and cores > 1)
        keeper.flush()
    finally:
        torch.set_num_threads(before)


def test_spare_cores_are_those_of_the_container(tmp_path: Path) -> None:
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    of_machine = spare_cores(tmp_path)
    (group / "cpu.max").write_text("max 100000\n")
    assert spare_cores(tmp_path) == of_machine
    (group / "cpu.max").write_text("50000 100000\n")
    assert spare_cores(tmp_path) == -torch.get_num_threads()


def test_the_room_for_a_copy_is_that_of_machine_and_container(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 8 kB\nMemAvailable:      4 kB\n")
    assert available_bytes(tmp_path) == 4096
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000\n")
    assert available_bytes(tmp_path) == 4096
    (group / "memory.max").write_text("3000\n")
    assert available_bytes(tmp_path) == 2000


# --- errors -----------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys, warnings, torch
from grd.errors import CheckpointError
from grd.experiment import CheckpointHandler
keeper = CheckpointHandler(sys.argv[1], async_save=True)
small, big = {"w": torch.ones(1000)}, {"w": torch.ones(3_000_000)}
keeper.save_checkpoint(0, small)
keeper.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
keeper.save_checkpoint(1, big)
try:
    keeper.flush()
except CheckpointError as error:
    print(error)
assert keeper.load_checkpoint()["epoch"] == 0
keeper.save_checkpoint(1, big)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    keeper.save_checkpoint(2, small)
print(*(warning.message for warning in told))
keeper.flush()
assert keeper.load_checkpoint()["epoch"] == 2
"""


def test_a_save_that_finds_no_room_leaves_the_version_before_and_is_told(tmp_path: Path) -> None:
    done = run(LIMITED, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.count("could not be saved") for line in done.stdout.splitlines()] == [1, 1]
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_hangs_is_told_and_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    monkeypatch.setattr(background_save, "LIMIT_SECONDS", 0.2)
    keeper = handler(tmp_path)
    path = keeper.save_checkpoint(0, {"w": torch.ones(3)})
    with pytest.raises(CheckpointError, match="the disk hangs"):
        keeper.flush()
    monkeypatch.setattr(background_save, "LIMIT_SECONDS", 60.0)
    gate.opened.set()
    assert keeper.flush() == path, "it came after all"


def test_an_older_attempt_writes_nothing_and_hears_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    fence = tmp_path / "fence"
    fence.write_text("1\n")
    monkeypatch.setenv("GRD_FENCE", str(fence))
    monkeypatch.setenv("GRD_ATTEMPT", "1")
    keeper = handler(tmp_path / "checkpoints")
    keeper.save_checkpoint(0, {"w": torch.ones(3)})
    assert gate.reached.wait(60)
    fence.write_text("2\n")
    gate.opened.set()
    with pytest.raises(CheckpointFenced):
        keeper.flush()
    with pytest.raises(CheckpointFenced):
        keeper.save_checkpoint(1, {"w": torch.ones(3)})
    assert not list((tmp_path / "checkpoints").glob("*.pt"))


def test_state_that_cannot_be_stored_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="thing"):
        handler(tmp_path).save_checkpoint(0, state={"thing": object()})


# --- the end of the process, forks, kills ------------------------------------------------------------------

ENDS = """
import sys, torch
from grd.experiment import CheckpointHandler
keeper = CheckpointHandler(sys.argv[1], async_save=True)
keeper.save_checkpoint(0, {"w": torch.ones(20_000_000)})
"""


@pytest.mark.faults
def test_a_process_that_ends_waits_for_its_save(tmp_path: Path) -> None:
    assert run(ENDS, tmp_path).returncode == 0
    loaded = handler(tmp_path).load_checkpoint()
    assert loaded is not None and loaded["model_state"]["w"].numel() == 20_000_000


FORKS = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of newer Pythons: that threads are not forked
import os, sys, threading, torch
from grd.experiment import CheckpointHandler, checkpoint_file
write, opened, reached = checkpoint_file.write, threading.Event(), threading.Event()
parent = os.getpid()
def gated(path, prepared):
    reached.set()
    assert os.getpid() != parent or opened.wait(60)
    return write(path, prepared)
checkpoint_file.write = gated
keeper = CheckpointHandler(sys.argv[1] + "/parent", async_save=True)
keeper.save_checkpoint(0, {"w": torch.ones(3)})
reached.wait()
pid = os.fork()
if pid == 0:  # while the thread has its turn
    child = CheckpointHandler(sys.argv[1] + "/child", install_signal_handlers=False)
    child.save_checkpoint(0, {"w": torch.ones(3)})
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
opened.set()
print(keeper.flush().name)
"""


def test_a_process_forked_meanwhile_can_save_too(tmp_path: Path) -> None:
    done = run(FORKS, tmp_path)
    assert done.stdout.split() == ["7", "checkpoint_epoch_0.pt"], done.stderr


KILLED = """
import os, random, sys, time, torch
from pathlib import Path
from grd.experiment import CheckpointHandler
torch.set_num_threads(1)  # torch's own threads are not forked, and are waited for
folder = Path(sys.argv[1])
dice = random.Random(4)
good = 0
for trial in range(30):
    inside, outside = os.pipe()
    pid = os.fork()
    if pid == 0:
        keeper = CheckpointHandler(folder, keep_bytes=40_000_000, async_save=True)
        first = keeper.get_resumability_hints()["next_epoch"]
        weights = torch.zeros(500_000)
        os.write(outside, b"x")
        for epoch in range(first, first + 10_000):
            weights.fill_(float(epoch))
            keeper.save_checkpoint(epoch, {"w": weights}, {"lr": 0.1}, 0.5)
            weights.fill_(-1.0)
        os._exit(0)
    os.read(inside, 1)
    os.close(inside), os.close(outside)
    time.sleep(dice.uniform(0.0, 0.06) + (0.3 if trial == 0 else 0))
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    keeper = CheckpointHandler(folder, install_signal_handlers=False)
    loaded = keeper.load_checkpoint()
    good += loaded is not None and bool((loaded["model_state"]["w"] == loaded["epoch"]).all())
    assert not list(folder.glob(".*.tmp")), "swept"
print(good, keeper.get_resumability_hints()["next_epoch"])
"""


@pytest.mark.faults
def test_thirty_of_thirty_kills_in_saves_in_the_background_leave_a_good_checkpoint(tmp_path: Path) -> None:
    done = run(KILLED, tmp_path)
    assert done.returncode == 0, done.stderr
    good, epochs = map(int, done.stdout.split())
    assert (good, epochs > 0) == (30, True)


# --- in a training ------------------------------------------------------------------------------------------


def stopping_training(folder: Path, on_step: Callable[[int], None]) -> None:
    model = nn.Linear(2, 2)
    steps = 0
    for epoch in training.epochs(2, model=model, checkpoint_dir=folder, every="0.001s", async_save=True):
        for _ in epoch.steps(range(1000)):
            steps += 1
            on_step(steps)


@pytest.mark.parametrize("fails", [False, True])
def test_a_stop_waits_for_the_save_in_the_background_and_says_what_became_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    write = checkpoint_file.write
    begun, opened = threading.Event(), threading.Event()

    def gated(path: Path, prepared: Any) -> Any:
        begun.set()
        assert opened.wait(60)
        if fails:
            raise OSError(28, "No space left on device")
        return write(path, prepared)

    monkeypatch.setattr(checkpoint_file, "write", gated)

    def on_step(step: int) -> None:
        time.sleep(0.001)
        if step == 100:
            assert begun.wait(60)
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Timer(0.3, opened.set).start()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ExperimentInterrupted) as stopped:
            stopping_training(tmp_path, on_step)
    assert opened.is_set()
    told = "could not be saved" if fails else "the state is saved"
    assert told in str(stopped.value)
    assert bool(list(tmp_path.glob("checkpoint_*.pt"))) is not fails


def test_a_training_goes_on_when_a_save_in_the_background_fails_and_saves_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, failed = checkpoint_file.write, []

    def failing(path: Path, prepared: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            failed.append(path)
            raise OSError(28, "No space left on device")
        return write(path, prepared)

    monkeypatch.setattr(checkpoint_file, "write", failing)
    with pytest.warns(RuntimeWarning, match="could not be saved: No space left") as told:
        for _ in training.epochs(3, model=nn.Linear(2, 2), checkpoint_dir=tmp_path, every=1, async_save=True):
            pass
    assert len(failed) == 2 and len(told) == 1  # the same thing is told once; the last epoch is waited for
    assert CheckpointHandler(tmp_path).get_resumability_hints()["latest_epoch"] == 2


def test_a_training_that_breaks_off_has_written_what_it_was_saving(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        for epoch in training.epochs(
            3, model=nn.Linear(1000, 1000), checkpoint_dir=tmp_path, every=1, async_save=True
        ):
            if epoch == 1:
                raise ZeroDivisionError
    hints = CheckpointHandler(tmp_path, install_signal_handlers=False).get_resumability_hints()
    assert hints["latest_epoch"] == 0


def test_a_wrong_choice_is_refused() -> None:
    with pytest.raises(UsageError, match="async_save"):
        training.epochs(1, async_save="often")  # type: ignore[arg-type]


# --- when to save, and what is told of it -------------------------------------------------------------------


def schedule() -> Schedule:
    made = Schedule(Every(), now=0.0, max_lost_work=300.0)
    for step in range(1, 11):
        made.step_ended(float(step))  # steps of a second
    return made


def test_a_save_beside_the_training_costs_what_it_stood_still_and_what_its_steps_lost() -> None:
    made = schedule()
    made.background_save_began(10.1, 0.1)
    for step in range(1, 5):
        made.step_ended(10.1 + 1.5 * step)  # half a second longer each
    assert not made.due_after_step(400.0), "the next save would wait for this one"
    made.background_save_ended(6.5, 1_000)
    assert made.interval == pytest.approx((0.1 + 4 * 0.5) / 0.035)
    assert made.expected_overhead == pytest.approx(0.035)


def test_saves_beside_the_training_are_never_closer_than_one_takes() -> None:
    made = schedule()
    made.background_save_began(10.0, 0.0)
    for step in range(1, 51):
        made.step_ended(10.0 + step)
    made.background_save_ended(50.0, 1_000)
    assert made.interval == 50.0


def test_steps_beside_a_save_do_not_count_as_the_pace_of_the_training() -> None:
    made = schedule()
    for _ in range(3):
        made.background_save_began(20.0, 0.0)
        for step in range(1, 100):
            made.step_ended(20.0 + 3.0 * step)
        made.background_save_ended(400.0, 1_000)
    made.save_ended(400.0, 0.001, 1_000)
    assert made._steps and max(made._steps) < 1.1


def test_a_failed_save_beside_the_training_teaches_nothing() -> None:
    made = schedule()
    made.background_save_began(10.0, 0.1)
    made.background_save_ended(0.0, None)
    assert made.interval is None


def entry(work: float, seconds: float, stall: float | None) -> Entry:
    return Entry(
        name="checkpoint_epoch_0.pt", size=1, xxh3_128="", epoch=0, step=None, loss=None, lineage=1,
        attempt=1, run_id=None, process="1-a", format="torch", total_epochs=None, t=0.0, seconds=seconds,
        stall_seconds=stall, work_seconds=work,
    )  # fmt: skip


def test_what_is_saved_beside_the_training_is_at_risk_until_it_is_there() -> None:
    waited, beside = [entry(8.0, 2.0, None)] * 4, [entry(8.0, 4.0, 2.0)] * 4
    assert expected_lost_seconds(waited) == pytest.approx(5.0)
    assert expected_lost_seconds(beside) == pytest.approx(7.0)
    assert expected_overhead(waited) == expected_overhead(beside) == pytest.approx(0.25)


def test_the_manifest_tells_how_long_the_training_stood_still(tmp_path: Path, gate: Gate) -> None:
    keeper = handler(tmp_path)
    keeper.save_checkpoint(0, {"w": torch.ones(1000)})
    assert gate.reached.wait(60)
    threading.Timer(0.5, gate.opened.set).start()
    keeper.flush()
    (first,) = read_entries(tmp_path)
    assert first.seconds is not None and first.stall_seconds is not None
    assert first.seconds >= 0.4 and first.stall_seconds < first.seconds


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_state_on_a_gpu_is_saved_as_it_was_while_the_training_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = torch.rand(20_000_000, device="cuda")
    before = weights.cpu().clone()
    keeper = CheckpointHandler(tmp_path, install_signal_handlers=False, async_save="auto")
    for epoch in range(3):
        keeper.save_checkpoint(epoch, {"w": weights})
        assert keeper.is_saving, "80 MB on a GPU are saved in the background"
        for _ in range(50):
            weights.mul_(-1.0).add_(1e-3)
        keeper.flush()
        loaded = keeper.load_checkpoint(epoch=epoch)
        assert loaded is not None
        assert torch.equal(loaded["model_state"]["w"].cpu(), before)
        before = weights.cpu().clone()


@pytest.mark.gpu
def test_a_training_on_a_gpu_goes_on_bit_by_bit(tmp_path: Path) -> None:
    def train(folder: Path, stop_after: int | None, resume: bool) -> list[float]:
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Linear(64, 3000), nn.Dropout(0.2), nn.Linear(3000, 3000), nn.Linear(3000, 1)
        ).cuda()
        optimizer = torch.optim.AdamW(model.parameters())
        state = {"mean": torch.zeros(1, device="cuda")}
        for epoch in training.epochs(
            6, model=model, optimizer=optimizer, state=state, checkpoint_dir=folder, resume=resume, every=1
        ):
            loss = model(torch.rand(32, 64, device="cuda")).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state["mean"] += loss.detach()
            epoch.log(loss=loss.item())
            if stop_after == int(epoch):
                break
        assert state["mean"].is_cuda
        return [*(record["loss"] for record in training.history), float(state["mean"])]

    torch.backends.cuda.matmul.allow_tf32 = False
    expected = train(tmp_path / "whole", None, False)
    train(tmp_path / "cut", 3, False)
    assert train(tmp_path / "cut", None, True) == expected
