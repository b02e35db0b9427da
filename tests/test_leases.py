"""Leases of GPUs: no two runs use one at the same time, and no end of a process leaves one taken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_machine
import pytest
from conftest import LIMIT_SECONDS, Project, wait_until
from gpu_machine import replay, uuid

import grd
from grd.errors import ConfigurationError, ResourceUnavailable, UsageError
from grd.execution.device_parameters import device_parameters
from grd.hardware import leases
from grd.hardware.leases import Lease, Wanted
from grd.settings import Settings, load_settings

VISIBLE = "CUDA_VISIBLE_DEVICES"


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No choice and no lease of before."""
    for name in (VISIBLE, "GRD_GPU_MOCK", "GRD_GPUS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GRD_STATE_DIR", str(tmp_path / "state"))


def take(count: int | None = 1, pool: str = "training", **settings: Any) -> Lease | None:
    """A lease, as a run takes it."""
    return leases.take(Wanted(count, pool), Settings(**settings), {"run_id": "test"})


def taken(count: int | None = 1, pool: str = "training", **settings: Any) -> list[str]:
    """The UUIDs of a lease that must be had."""
    lease = take(count, pool, **settings)
    assert lease is not None
    return lease.uuids


# --- choosing ------------------------------------------------------------------------------------------


def test_the_least_loaded_comes_first_by_leases_then_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    replay(monkeypatch, "9000", "20", "700")
    assert [taken(gpu_slots=2) for _ in range(5)] == [[uuid(n)] for n in (1, 2, 0, 1, 2)]
    assert grd.gpu_loads() == {0: 1, 1: 2, 2: 2}
    assert grd.gpu_loads([0]) == {0: 1}


def test_what_is_held_is_given_to_nobody_else_until_it_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    replay(monkeypatch, "5", "5")
    first = take()
    assert first is not None
    assert taken() == [uuid(1)]
    assert take() is None
    first.close()
    first.close()
    assert taken() == [uuid(0)]


def test_several_are_leased_together_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    replay(monkeypatch, "5", "5", "5")
    one = take()
    assert one is not None
    assert take(3) is None
    assert [holder["uuid"] for holder in leases.holders()] == one.uuids
    assert taken(2) == [uuid(1), uuid(2)]


def test_slots_let_runs_share(monkeypatch: pytest.MonkeyPatch) -> None:
    replay(monkeypatch, "5")
    assert [taken(gpu_slots=2) for _ in range(2)] == [[uuid(0)]] * 2
    assert take(gpu_slots=2) is None


def test_pools_are_the_devices_that_the_settings_name(monkeypatch: pytest.MonkeyPatch) -> None:
    replay(monkeypatch, "5", "5", "5")
    pools = {"training_gpus": ("0", uuid(1)), "inference_gpus": ("2",)}
    assert taken(pool="inference", **pools) == [uuid(2)]
    assert take(pool="inference", **pools) is None
    assert taken(2, **pools) == [uuid(0), uuid(1)]
    with pytest.raises(ResourceUnavailable, match="--gpus 3: the pool 'training' has 2 to give"):
        take(3, **pools)


@pytest.mark.parametrize("entry", ["7", "GPU-none"])
def test_a_pool_must_name_devices_that_exist(monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    replay(monkeypatch, "5")
    with pytest.raises(ConfigurationError, match=f"training_gpus names GPU {entry}, and this machine has 1"):
        take(training_gpus=("0", entry))


def test_pools_are_read_from_lists_and_text(tmp_path: Path) -> None:
    (tmp_path / "grd.toml").write_text('training_gpus = [0, 1]\ninference_gpus = "GPU-8f6b,3"\n')
    settings, _ = load_settings(tmp_path, environment={}, user_file=tmp_path / "none")
    assert (settings.training_gpus, settings.inference_gpus) == (("0", "1"), ("GPU-8f6b", "3"))
    for name, wrong in (("training_gpus", "first"), ("training_gpus", "1,1"), ("gpu_slots", "0")):
        with pytest.raises(ConfigurationError, match=name):
            load_settings(tmp_path, {name: wrong}, environment={}, user_file=tmp_path / "none")


def test_instances_of_a_split_card_are_leased_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    replay(monkeypatch, "split")
    found = taken() + taken()
    assert len(set(found)) == 2 and all(name.startswith("MIG-") for name in found)
    with pytest.raises(ResourceUnavailable, match="given one at a time"):
        take(2)


# --- who gets none ---------------------------------------------------------------------------------------


def test_a_machine_without_gpus_is_not_even_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grd.hardware.leases.DEVICE_FILES", ("/nowhere",))
    monkeypatch.setattr("grd.hardware.leases.GPUMonitor", None)  # asking would fail
    lease = take(None)
    assert lease is not None and lease.uuids == []
    leases.check(Wanted(), Settings())
    assert not leases.folder().exists()


def test_who_asks_for_more_than_there_is_hears_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    replay(monkeypatch, "5")
    with pytest.raises(ResourceUnavailable, match="--gpus 2: this machine has 1 to give"):
        leases.check(Wanted(2), Settings())
    replay(monkeypatch)
    with pytest.raises(ResourceUnavailable, match="there is no GPU to give to the run"):
        leases.check(Wanted(1), Settings())


def test_invented_gpus_are_given_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    replay(monkeypatch, "5")
    monkeypatch.setenv("GRD_GPU_MOCK", "1")
    assert taken(None) == []
    for ask in (lambda: take(1), lambda: leases.check(Wanted(1), Settings()), grd.allocate_gpu):
        with pytest.raises(ResourceUnavailable, match="invented"):
            ask()


def test_who_chose_by_cuda_visible_devices_needs_no_lease_and_gets_one_of_those(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replay(monkeypatch, "5", "5")
    monkeypatch.setenv(VISIBLE, "1")
    assert taken(None) == []
    assert taken(1) == [uuid(1)]
    assert take(1) is None


def test_a_run_within_a_run_does_not_wait_for_its_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    replay(monkeypatch, "5", "5", "5")
    monkeypatch.setenv("GRD_GPUS", f"0:{uuid(0)},2:{uuid(2)}")
    leases.check(Wanted(1), Settings())
    monkeypatch.setenv(VISIBLE, f"{uuid(0)},{uuid(2)}")
    with pytest.raises(ResourceUnavailable, match="would wait for its own end"):
        leases.check(Wanted(1), Settings())
    assert taken(None) == []
    assert grd.allocate_gpu() == 0
    assert leases.holders() == []


def test_none_is_leased_where_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    replay(monkeypatch, "5")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRD_STATE_DIR", str(tmp_path / "file"))
    with pytest.raises(ResourceUnavailable, match="no GPU can be leased"):
        take(1)


@pytest.mark.parametrize("wrong", ["two", -1, 1.5, True])
def test_a_number_of_gpus_is_a_number(wrong: Any) -> None:
    with pytest.raises(UsageError, match="--gpus"):
        Wanted.read(wrong, None)


# --- processes -------------------------------------------------------------------------------------------

ALLOCATE = """
import json, os, sys, grd
try:
    gpu = grd.allocate_gpu(*sys.argv[1:])
    print(json.dumps([gpu, os.environ["CUDA_VISIBLE_DEVICES"]]), flush=True)
except grd.GrdError as error:
    print(json.dumps([type(error).__name__, str(error)]), flush=True)
sys.stdin.read()
"""


def start(folder: Path, *used: str) -> subprocess.Popen[str]:
    """A program that allocates a GPU and keeps it until its stdin is closed."""
    return subprocess.Popen(
        [sys.executable, "-c", ALLOCATE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, **gpu_machine.environment(folder, *used)},
    )


def answer(process: subprocess.Popen[str]) -> list[Any]:
    """What it was given."""
    assert process.stdout is not None
    return list(json.loads(process.stdout.readline()))


def test_processes_that_ask_at_once_get_different_gpus_and_a_killed_one_frees_its_own(tmp_path: Path) -> None:
    used = ("5", "5", "5")
    asking = [start(tmp_path, *used) for _ in range(4)]
    try:
        answers = [answer(process) for process in asking]
        given = sorted(each for each in answers if isinstance(each[0], int))
        assert given == [[n, uuid(n)] for n in range(3)]
        (refused,) = [each for each in answers if each[0] == "ResourceUnavailable"]
        assert "GPU 0 is leased by process" in refused[1]

        victim = answers.index([1, uuid(1)])
        asking[victim].send_signal(signal.SIGKILL)
        asking[victim].wait(LIMIT_SECONDS)
        asking.append(start(tmp_path, *used))
        assert answer(asking[-1]) == [1, uuid(1)]
    finally:
        for process in asking:
            process.kill()
            process.communicate(timeout=LIMIT_SECONDS)
    assert leases.holders() == []


def test_a_process_may_hold_several_and_give_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    replay(monkeypatch, "5", "5", "5")
    monkeypatch.setenv(VISIBLE, "0,2")
    assert (grd.allocate_gpu(), grd.allocate_gpu("inference")) == (0, 2)
    assert os.environ[VISIBLE] == f"{uuid(0)},{uuid(2)}"
    with pytest.raises(ResourceUnavailable, match="no GPU is free"):
        grd.allocate_gpu()
    grd.release_gpu(0)
    assert os.environ[VISIBLE] == uuid(2)
    grd.release_gpu(2)
    assert os.environ[VISIBLE] == "0,2"
    with pytest.raises(UsageError, match="holds no lease of GPU 2"):
        grd.release_gpu(2)
    with pytest.raises(UsageError, match="rendering"):
        grd.allocate_gpu("rendering")


# --- what notebooks are told -------------------------------------------------------------------------------

OPEN = dict.fromkeys(
    ("gpu_ids", "devices", "num_gpus", "device", "strategy", "batch_size_per_gpu", "base_batch_size")
)


def test_a_notebook_is_told_what_it_declares() -> None:
    assert device_parameters({**OPEN, "global_batch": None}, {}, n_gpus=2) == {
        "gpu_ids": [0, 1],
        "devices": [0, 1],
        "num_gpus": 2,
        "device": "cuda",
        "strategy": "ddp",
        "batch_size_per_gpu": 16,
        "base_batch_size": 16,
        "global_batch": 32,
    }
    assert device_parameters({"global_batch": 1}, {}, n_gpus=3) == {"global_batch": 48}


def test_without_a_gpu_the_lists_are_empty_and_the_batch_is_of_one_device() -> None:
    told = device_parameters({**OPEN, "global_batch": None}, {}, n_gpus=0)
    assert (told["gpu_ids"], told["devices"], told["num_gpus"]) == ([], [], 0)
    assert (told["device"], told["strategy"], told["global_batch"]) == ("cpu", None, 16)


@pytest.mark.parametrize(
    ("declared", "given", "per_gpu"),
    [
        ({"batch_size_per_gpu": 8, "base_batch_size": 4}, {}, 8),
        ({"batch_size_per_gpu": None, "base_batch_size": 4}, {}, 4),
        ({"batch_size_per_gpu": 8, "base_batch_size": 4}, {"base_batch_size": 2}, 2),
        ({"batch_size_per_gpu": 8}, {"batch_size_per_gpu": 3}, 3),
        ({"batch_size_per_gpu": ...}, {}, 64),
        ({}, {}, 64),
    ],
)
def test_one_rule_gives_the_batch_sizes(
    declared: dict[str, Any], given: dict[str, Any], per_gpu: int
) -> None:
    told = device_parameters({**declared, "global_batch": None}, given, n_gpus=2, batch_size=64)
    assert told["global_batch"] == 2 * per_gpu
    if "batch_size_per_gpu" in declared and "batch_size_per_gpu" not in given:
        assert told["batch_size_per_gpu"] == per_gpu


@pytest.mark.parametrize(("n_gpus", "per_gpu"), [(0, 32), (1, 32), (2, 8)])
def test_the_base_size_is_that_of_one_device_and_both_are_told(n_gpus: int, per_gpu: int) -> None:
    names = dict.fromkeys(("batch_size_per_gpu", "base_batch_size", "global_batch"))
    told = device_parameters(names, {}, n_gpus=n_gpus, batch_size=8, base_batch_size=32)
    assert told == {
        "batch_size_per_gpu": per_gpu,
        "base_batch_size": 32,
        "global_batch": per_gpu * max(1, n_gpus),
    }


def test_what_somebody_wrote_stays() -> None:
    declared = {**OPEN, "device": "mps", "strategy": "auto", "devices": 1}
    told = device_parameters(declared, {"gpu_ids": [3], "global_batch": 5}, n_gpus=2)
    assert not {"device", "strategy", "devices", "gpu_ids", "global_batch"} & told.keys()


def test_deepspeed_gets_its_own_keys() -> None:
    told = device_parameters({"deepspeed_config": None, "batch_size_per_gpu": 4}, {}, n_gpus=2)
    config = told["deepspeed_config"]
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (8, 4)
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["offload_param"] == {"device": "none"}


# --- runs ---------------------------------------------------------------------------------------------------

DECLARES = "gpu_ids = None\nstrategy = None\nbatch_size_per_gpu = 4\nglobal_batch = None"
TELL = f"import os; print(gpu_ids, strategy, global_batch, os.environ.get({VISIBLE!r}), flush=True)"
UNTIL = "import pathlib, time\nwhile not pathlib.Path('go').exists(): time.sleep(0.05)"


@pytest.fixture
def two_gpus(project: Project, tmp_path: Path) -> Project:
    """A project on a machine with two GPUs."""
    project.environment |= gpu_machine.environment(tmp_path, "5", "5")
    for name in (VISIBLE, "GRD_GPU_SLOTS"):
        project.environment.pop(name, None)
    project.notebook("train.ipynb", TELL, UNTIL, parameters=DECLARES)
    return project


def detach(project: Project, *arguments: str) -> str:
    """Start a run; its id."""
    started = project.grd("research", "train.ipynb", "--detach", "--json", *arguments)
    assert started.code == 0, started.err
    return str(started.json["run_id"])


def state_of(project: Project, run: str) -> tuple[str, str]:
    """state and detail, as told."""
    shown = project.grd("status", run, "--json").json
    return shown["state"], shown["detail"] or ""


def test_a_pool_that_names_no_gpu_is_refused_also_where_nobody_asked_for_one(two_gpus: Project) -> None:
    two_gpus.environment["GRD_TRAINING_GPUS"] = "5"
    for command in (("research", "train.ipynb"), ("sweep", "train.ipynb", "-g", "batch_size_per_gpu", "1,2")):
        done = two_gpus.grd(*command)
        assert done.code == 78 and "training_gpus" in done.err.lower(), done.err
    assert two_gpus.run_folders() == []


@pytest.mark.faults
def test_runs_wait_for_each_others_gpus_and_are_told_which_they_have(two_gpus: Project) -> None:
    first = detach(two_gpus, "--gpus", "2")
    two_gpus.wait_for_output(f"[0, 1] ddp 8 {uuid(0)},{uuid(1)}")

    unasked = two_gpus.grd("research", "train.ipynb")
    assert unasked.code == 69
    assert f"GPU 0 is leased by {first}" in unasked.err
    assert f"grd wait {first}" in unasked.err and "--gpus 0" in unasked.err
    assert two_gpus.grd("research", "train.ipynb", "--gpus", "3").code == 69
    assert [path.name for path in two_gpus.run_folders()] == [first]

    second = detach(two_gpus, "--gpus", "1")
    wait_until(lambda: "waiting for a GPU" in state_of(two_gpus, second)[1], "it says what it waits for")
    both = f"GPU 0 is leased by {first}; GPU 1 is leased by {first}"
    assert state_of(two_gpus, second) == ("queued", f"waiting for a GPU: {both}")
    shown = two_gpus.grd("gpus", "--json").json
    assert [(lease["gpu"], lease["run_id"]) for lease in shown["leases"]] == [(0, first), (1, first)]
    assert f"leased      GPU 0 ({uuid(0)})" in two_gpus.grd("status", first).out
    assert first in two_gpus.grd("gpus").out

    (two_gpus.path / "go").touch()
    assert two_gpus.grd("wait", first, second).code == 0
    record = two_gpus.record(two_gpus.runs_dir / second)
    assert record["gpus"] == {"count": 1, "pool": "training"}
    assert record["attempts"][0]["gpus"] == [{"gpu": 0, "uuid": uuid(0)}]
    assert record["detail"] is None
    assert f"[0] None 4 {uuid(0)}" in two_gpus.grd("logs", second).out
    assert two_gpus.grd("gpus", "--json").json["leases"] == []


def test_a_machine_without_gpus_runs_as_ever_and_refuses_those_who_want_one(project: Project) -> None:
    project.environment.pop(VISIBLE, None)
    project.notebook("train.ipynb", TELL, parameters=DECLARES)
    refused = project.grd("research", "train.ipynb", "--gpus", "1")
    assert (refused.code, project.run_folders()) == (69, [])
    assert "there is no GPU" in refused.err and "grd gpus" in refused.err
    mocked = project.grd("research", "train.ipynb", "--gpus", "1", env={"GRD_GPU_MOCK": "1"})
    assert mocked.code == 69 and "invented" in mocked.err

    assert project.grd("research", "train.ipynb").code == 0
    assert "[] None 4 None" in project.grd("logs", "last").out
    assert project.record()["attempts"][0]["gpus"] is None
    assert not Path(project.environment["GRD_STATE_DIR"], "gpus").exists()


@pytest.mark.faults
def test_a_queued_run_can_be_stopped_and_resumed_and_its_waiting_costs_no_budget(two_gpus: Project) -> None:
    first = detach(two_gpus, "--gpus", "2")
    two_gpus.wait_for_output("[0, 1] ddp")
    second = detach(two_gpus, "--gpus", "1", "--timeout", "2s", "--grace", "20s")
    wait_until(lambda: "waiting" in state_of(two_gpus, second)[1], "it waits")
    began = two_gpus.record(two_gpus.runs_dir / second)["created_at"]
    wait_until(lambda: _seconds_since(began) > 4, "longer than it may run")
    assert state_of(two_gpus, second)[0] == "queued"

    assert two_gpus.grd("stop", second).code == 0
    assert two_gpus.grd("wait", second).code == 75
    ended = two_gpus.record(two_gpus.runs_dir / second)
    assert (ended["state"], ended["cause"]) == ("interrupted", "stopped")
    assert ended["budget"]["used_seconds"] < 2

    (two_gpus.path / "go").touch()
    assert two_gpus.grd("wait", first).code == 0
    assert two_gpus.grd("resume", second, "--timeout", "5m").code == 0
    attempts = two_gpus.record(two_gpus.runs_dir / second)["attempts"]
    assert [attempt["gpus"] for attempt in attempts] == [None, [{"gpu": 0, "uuid": uuid(0)}]]


def _seconds_since(moment: str) -> float:
    from datetime import UTC, datetime

    return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()


@pytest.mark.faults
def test_a_killed_runners_gpu_is_free_only_when_its_kernel_has_ended(
    two_gpus: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRD_STATE_DIR", two_gpus.environment["GRD_STATE_DIR"])
    two_gpus.notebook(
        "train.ipynb",
        "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: print('saving', flush=True))",
        "print('begun', flush=True)\nimport pathlib\nwhile not pathlib.Path('go').exists(): time.sleep(0.05)",
    )
    run = detach(two_gpus, "--gpus", "2", "--grace", "60s")
    two_gpus.wait_for_output("begun")
    record = two_gpus.record()
    kernel = record["kernel_pid"]
    os.kill(record["runner"]["pid"], signal.SIGKILL)
    wait_until(lambda: not _lives(record["runner"]["pid"]), "the runner is gone")
    assert _lives(kernel)
    assert [holder["run_id"] for holder in leases.holders()] == [run, run]

    os.kill(kernel, signal.SIGKILL)
    wait_until(lambda: leases.holders() == [], "the leases end with the kernel")
    assert two_gpus.grd("status", run, "--json").json["cause"] == "runner_lost"


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
