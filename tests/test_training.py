"""training.epochs: a killed and resumed training ends bit by bit where an uninterrupted one does."""

from __future__ import annotations

import collections
import enum
import functools
import hashlib
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from grd.errors import CheckpointRefused, ExperimentInterrupted, ResumeError, UsageError
from grd.experiment import CheckpointHandler, training
from grd.experiment.schedule import Every, Schedule, seed_interval

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.usefixtures("by_hand")


class Killed(BaseException):
    """What stands for kill -9 inside one process: nothing of the loop's own runs any more."""


class Noisy(Dataset):  # type: ignore[type-arg]
    """Samples with random augmentation from all three generators."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.full((6,), index / 40)
        x = x + random.random() + torch.tensor(np.random.rand(6), dtype=torch.float32) + torch.randn(6)
        return x, torch.tensor(float(index % 3))


def noisy_collate(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.stack([sample[0] for sample in samples])
    return x * (1 + 0.1 * torch.rand(())), torch.stack([sample[1] for sample in samples])


class Average(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.average = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda a, b, n: 0.9 * a + 0.1 * b)


def train(
    folder: Path,
    *,
    resume: bool = False,
    epochs: int = 3,
    workers: int = 0,
    kill_at: int | None = None,
    every: str | int = "auto",
    loader: Any = None,
    async_save: bool = False,
) -> dict[str, Any]:
    """One whole training with every kind of state; ``kill_at`` counts steps of this process."""
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=200)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=7)
    ema = torch.optim.swa_utils.AveragedModel(
        model, avg_fn=lambda averaged, current, _: 0.9 * averaged + 0.1 * current
    )
    state = {"best": float("inf"), "noise": np.random.default_rng(3), "drawn": []}
    data = loader or DataLoader(
        Noisy(), batch_size=8, shuffle=True, num_workers=workers, collate_fn=noisy_collate
    )
    trace = []
    steps = 0
    for epoch in training.epochs(
        epochs, model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, ema=ema, state=state,
        checkpoint_dir=folder, resume=resume, every=every, seed=11, async_save=async_save,
    ):  # fmt: skip
        model.train()
        for x, y in epoch.steps(data):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x).squeeze(1), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            ema.update_parameters(model)
            epoch.mean("loss", loss.item(), len(y))
            if "sum" not in epoch.state:
                epoch.log(first=loss.item())
            epoch.state["sum"] = epoch.state.get("sum", 0.0) + random.random() + float(np.random.rand())
            trace.append((int(epoch), loss.item()))
            steps += 1
            if steps == kill_at:
                raise Killed
        state["best"] = min(state["best"], epoch.mean("loss"))
        state["drawn"].append(float(state["noise"].random()))
        epoch.log(loss=epoch.mean("loss"), extra=epoch.state["sum"])
    digest = hashlib.sha256()
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "ema": ema}
    result: dict[str, Any] = {"trace": trace}
    for name, part in parts.items():
        result[name] = hashlib.sha256(repr_of(part.state_dict())).hexdigest()
        digest.update(result[name].encode())
    result["state"] = (state["best"], state["drawn"], state["noise"].random())
    result["history"] = [dict(record) for record in training.history]
    result["rng"] = (random.random(), float(np.random.rand()), torch.rand(3).tolist())
    return result


def repr_of(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        return repr((str(value.dtype), tuple(value.shape))).encode() + value.detach().numpy().tobytes()
    if isinstance(value, dict):
        return b"".join(repr(key).encode() + repr_of(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return b"".join(map(repr_of, value))
    return repr(value).encode()


def same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in expected:
        if name != "trace":
            assert result[name] == expected[name], name
    assert result["trace"] == expected["trace"][-len(result["trace"]) :] or not result["trace"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("whole"))


def stop_by_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = folder / "stop.json"
    monkeypatch.setenv("GRD_STOP_FILE", str(path))
    return path


# --- equal to an uninterrupted run -----------------------------------------------------------------------


def test_saving_does_not_change_a_training(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    same(train(tmp_path, every="0.0000001s"), uninterrupted)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kills=st.lists(st.integers(1, 14), min_size=1, max_size=3),
    every=st.sampled_from(["auto", 2, "0.0000001s"]),
    async_save=st.booleans(),
)
def test_kills_at_any_steps_then_a_resume_end_where_no_kill_would_have(
    tmp_path_factory: pytest.TempPathFactory,
    uninterrupted: dict[str, Any],
    kills: list[int],
    every: str | int,
    async_save: bool,
) -> None:
    folder = tmp_path_factory.mktemp("killed")
    resume = False
    for kill_at in kills:
        try:
            train(folder, resume=resume, kill_at=kill_at, every=every, async_save=async_save)
        except Killed:
            resume = True
            continue
        break
    same(train(folder, resume=True, every=every), uninterrupted)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 2)])
def test_workers_may_change_between_the_attempts(
    tmp_path: Path, uninterrupted: dict[str, Any], before: int, after: int
) -> None:
    with pytest.raises(Killed):
        train(tmp_path, workers=before, kill_at=8, every="0.0000001s")
    assert list(tmp_path.glob("checkpoint_epoch_1_step_*.pt"))
    result = train(tmp_path, workers=after, resume=True)
    same(result, uninterrupted)
    assert len(result["trace"]) == 15 - 7


LEFT_OUT = [
    "model_state", "optimizer_state", "scheduler_state", "scaler_state", "ema_state", "state", "history",
    "rng python", "rng numpy", "rng torch", "position", "epoch's record", "epoch's state", "epoch's means",
]  # fmt: skip


@pytest.fixture(scope="module")
def killed_inside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a training that died in its eighth step, the third of its second epoch."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(Killed):
        train(folder, kill_at=8, every="0.0000001s")
    return folder


def without(saved: dict[str, Any], what: str) -> dict[str, Any]:
    """A loaded checkpoint that has forgotten ``what``; that of the interrupted epoch's beginning has not."""
    inside = saved["training"]["inside"]
    if inside is None:
        return saved
    kind, _, name = what.partition(" ")
    if kind == "rng":
        for generators in (saved["rng"], inside["rng"], *(found["rng"] for found in inside["outside"])):
            del generators[name]
    elif what == "position":
        inside.update(call_steps=0, step=0, loader=None)
    elif kind == "epoch's":
        inside[name] = {"epoch": inside["record"]["epoch"]} if name == "record" else {}
    elif what == "history":
        saved["history"] = []
    else:
        del saved[what]
    return saved


@pytest.mark.filterwarnings("ignore:grd. the checkpoint has no")
@pytest.mark.parametrize("what", [None, *LEFT_OUT])
def test_every_part_of_a_checkpoint_is_needed_for_the_same_end(
    killed_inside: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: dict[str, Any],
    what: str | None,
) -> None:
    load = CheckpointHandler.load_checkpoint
    if what is not None:
        monkeypatch.setattr(
            CheckpointHandler, "load_checkpoint", lambda *a, **o: without(load(*a, **o), what)
        )
    shutil.copytree(killed_inside, tmp_path / "copied")
    resumed = train(tmp_path / "copied", resume=True)
    if what is None:
        same(resumed, uninterrupted)
    else:
        with pytest.raises(AssertionError):
            same(resumed, uninterrupted)


SCRIPT = textwrap.dedent(
    """
    import json, os, signal, sys, time
    sys.path.insert(0, {tests!r})
    import test_training as t
    folder, mode, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
    plain_log = t.training.Epoch.mean
    seen = 0
    def mean(self, name, value=None, n=1):
        global seen
        if value is not None:
            seen += 1
            if seen == at:
                os.kill(os.getpid(), getattr(signal, mode))
        return plain_log(self, name, value, n)
    t.training.Epoch.mean = mean
    resume, beside = bool(int(sys.argv[4])), bool(int(sys.argv[5]))
    result = t.train(t.Path(folder), resume=resume, every="0.0000001s", async_save=beside)
    print(json.dumps(result))
    """
)


def in_process(
    folder: Path, mode: str, at: int, resume: bool, async_save: bool
) -> subprocess.CompletedProcess[str]:
    arguments = map(str, (folder, mode, at, int(resume), int(async_save)))
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(tests=str(ROOT / "tests")), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("async_save", [False, True], ids=["waited for", "in the background"])
@pytest.mark.parametrize("mode", ["SIGKILL", "SIGTERM"])
def test_a_process_ended_by_a_real_signal_resumes_bit_by_bit(
    tmp_path: Path, uninterrupted: dict[str, Any], mode: str, async_save: bool
) -> None:
    first = in_process(tmp_path, mode, 9, False, async_save)
    if mode == "SIGKILL":
        assert first.returncode == -signal.SIGKILL
    else:
        assert first.returncode == 1 and "ExperimentInterrupted" in first.stderr
    second = in_process(tmp_path, "SIGKILL", -1, True, async_save)
    assert second.returncode == 0, second.stderr
    result, expected = json.loads(second.stdout), json.loads(json.dumps(uninterrupted))
    repeated = 1 if mode == "SIGKILL" else 0  # the step it died in
    if mode == "SIGKILL" and async_save:
        assert len(result["trace"]) >= 15 - 9 + repeated  # and those whose save was under way
    else:
        assert len(result["trace"]) == 15 - 9 + repeated
    same(result, expected)


def test_a_stop_between_steps_saves_there_and_no_step_is_repeated(
    tmp_path: Path, uninterrupted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = stop_by_file(tmp_path, monkeypatch)
    loader = DataLoader(Noisy(), batch_size=8, shuffle=True, collate_fn=noisy_collate)
    original, seen = loader.collate_fn, 0

    def collate(samples: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == 7:
            stop.write_text('{"reason": "deadline"}')
        return original(samples)

    loader.collate_fn = collate
    with pytest.raises(ExperimentInterrupted) as caught:
        monkeypatch.setattr("grd.experiment.interruption.STOP_FILE_PERIOD_SECONDS", 0.0)
        train(tmp_path / "c", loader=loader)
    assert caught.value.reason == "deadline"
    assert (tmp_path / "c" / "checkpoint_epoch_1_step_2.pt").exists()
    monkeypatch.delenv("GRD_STOP_FILE")
    result = train(tmp_path / "c", resume=True)
    assert len(result["trace"]) == 15 - 7
    same(result, uninterrupted)


def test_a_finished_training_is_restored_and_not_trained_again(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    train(tmp_path, every=100)
    result = train(tmp_path, resume=True)
    assert result["trace"] == []
    same(result, uninterrupted)


def test_more_epochs_can_be_asked_for_later(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", epochs=4)
    train(tmp_path / "parts", epochs=2)
    same(train(tmp_path / "parts", epochs=4, resume=True), whole)


def test_by_hand_orders_drawn_in_the_loop_are_replayed(tmp_path: Path) -> None:
    def once(folder: Path, resume: bool, kill_at: int) -> list[Any]:
        torch.manual_seed(1)
        seen = []
        for epoch in training.epochs(2, checkpoint_dir=folder, resume=resume, every="0.0000001s"):
            order = torch.randperm(12)
            for batch in epoch.steps(order.split(3)):
                seen.append((int(epoch), batch.tolist(), torch.rand(1).item()))
                if len(seen) == kill_at:
                    raise Killed
        return seen

    whole = once(tmp_path / "whole", False, -1)
    with pytest.raises(Killed):
        once(tmp_path / "parts", False, 7)
    assert once(tmp_path / "parts", True, -1) == whole[6:]


def test_an_estimator_that_learns_in_parts_is_the_notebooks_own_again(tmp_path: Path) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    rows = np.random.default_rng(1).normal(size=(60, 4))
    classes = (rows.sum(axis=1) > 0).astype(int)

    def once(folder: Path, resume: bool, kill_at: int) -> Any:
        np.random.seed(4)
        model = linear.SGDClassifier(random_state=0)
        steps = 0
        for epoch in training.epochs(
            3, model=model, checkpoint_dir=folder, resume=resume, every="0.0000001s", allow_pickle=True
        ):
            for part in epoch.steps(np.array_split(np.random.permutation(60), 4)):
                model.partial_fit(rows[part], classes[part], classes=[0, 1])
                steps += 1
                if steps == kill_at:
                    raise Killed
        return model.coef_.tobytes(), model.intercept_.tobytes(), model.t_

    whole = once(tmp_path / "whole", False, -1)
    for kill_at in (2, 4, 5, 11):
        with pytest.raises(Killed):
            once(tmp_path / str(kill_at), False, kill_at)
        assert once(tmp_path / str(kill_at), True, -1) == whole


# --- the loop itself ------------------------------------------------------------------------------------


def test_an_epoch_is_an_int_everywhere() -> None:
    for epoch in training.epochs(2):
        assert epoch.index == int(epoch) == epoch
        assert [10, 20][epoch] in (10, 20)
        assert f"{epoch}" == str(int(epoch)) and f"{epoch:03d}".startswith("00")
        assert epoch < 5 and epoch % 2 == int(epoch) and json.dumps({"epoch": epoch})


def test_the_history_holds_the_epochs_before_the_resume(tmp_path: Path) -> None:
    for epoch in training.epochs(2, checkpoint_dir=tmp_path):
        epoch.log(loss=torch.tensor(1.0 / (epoch + 1)))
    first = training.history
    for epoch in training.epochs(3, checkpoint_dir=tmp_path, resume=True):
        epoch.log(loss=9)
    assert training.history == [{"epoch": 0, "loss": 1.0}, {"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 9}]
    assert len(first) == 2


def test_the_state_dictionary_is_updated_in_place(tmp_path: Path) -> None:
    state = {"best": 3}
    for _ in training.epochs(1, state=state, checkpoint_dir=tmp_path):
        state["best"], state["new"] = 1, [1, 2]
    again = {"best": 7}
    list(training.epochs(1, state=again, checkpoint_dir=tmp_path, resume=True))
    assert again == {"best": 1, "new": [1, 2]}
    assert training.state is again


class Counting:
    """What a stranger's model may be: its numbers in an attribute, and no ``state_dict()``."""

    def __init__(self) -> None:
        self.w = np.zeros(2)


def add_one(part: Any) -> None:
    with torch.no_grad():
        if isinstance(part, Counting):
            part.w = part.w + 1
        elif isinstance(part, (torch.Tensor, np.ndarray)):
            part += 1
        else:
            for inner in part.values() if isinstance(part, dict) else part:
                add_one(inner)


PARTS_WITHOUT_STATE_DICT = {
    "an object": Counting,
    "a tensor": lambda: torch.zeros(2),
    "an array": lambda: np.zeros(2),
    "tensors in a list": lambda: [torch.zeros(2), torch.zeros(1)],
    "tensors in a tuple": lambda: (torch.zeros(2), torch.zeros(1)),
    "tensors in a dictionary": lambda: {"a": {"w": torch.zeros(2)}},
}


@pytest.mark.parametrize("name", ["model", "ema"])
@pytest.mark.parametrize("kind", PARTS_WITHOUT_STATE_DICT)
def test_a_part_without_state_dict_is_the_notebooks_own_again(tmp_path: Path, kind: str, name: str) -> None:
    part = PARTS_WITHOUT_STATE_DICT[kind]()
    for _ in training.epochs(3, checkpoint_dir=tmp_path, allow_pickle=True, **{name: part}):
        add_one(part)
    again = PARTS_WITHOUT_STATE_DICT[kind]()
    for _ in training.epochs(3, checkpoint_dir=tmp_path, resume=True, allow_pickle=True, **{name: again}):
        raise AssertionError
    assert repr(again.w if kind == "an object" else again) == repr(part.w if kind == "an object" else part)


@pytest.mark.parametrize("part", [3, "text", (1, torch.zeros(1)), frozenset({1})], ids=repr)
def test_a_part_that_could_not_be_put_back_is_refused_before_anything_starts(
    tmp_path: Path, part: Any
) -> None:
    with pytest.raises(UsageError, match=r"epochs\(ema=\.\.\.\)"):
        training.epochs(3, ema=part, checkpoint_dir=tmp_path)


def test_a_tensor_of_another_shape_is_an_error_that_names_the_part(tmp_path: Path) -> None:
    list(training.epochs(1, model=torch.zeros(2), checkpoint_dir=tmp_path))
    with pytest.raises(ResumeError, match=r"does not fit model .*shape \(3,\)"):
        list(training.epochs(2, model=torch.zeros(3), checkpoint_dir=tmp_path, resume=True))


@pytest.mark.parametrize(("saved", "other"), [("SGD", "Adam"), ("AdamW", "SGD"), ("Adagrad", "RMSprop")])
def test_an_optimizer_of_another_kind_is_an_error_before_it_steps(
    tmp_path: Path, saved: str, other: str
) -> None:
    def train(kind: str, epochs: int, resume: bool) -> None:
        model = nn.Linear(2, 1)
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1)
        for _ in training.epochs(
            epochs, model=model, optimizer=optimizer, checkpoint_dir=tmp_path, resume=resume
        ):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()

    train(saved, 1, False)
    with pytest.raises(ResumeError, match=rf"does not fit optimizer \({other}\): it is of another kind"):
        train(other, 2, True)
    train(saved, 2, True)


@pytest.mark.parametrize("place", ["model", "state"])
def test_raw_parameters_stay_those_that_the_optimizer_knows(tmp_path: Path, place: str) -> None:
    x = torch.arange(8.0).reshape(4, 2) / 8

    def end(folder: Path, epochs: int, resume: bool) -> list[float]:
        w = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
        parts: Any = {place: {"w": w}}
        for _ in training.epochs(epochs, optimizer=optimizer, checkpoint_dir=folder, resume=resume, **parts):
            optimizer.zero_grad()
            ((x @ w - 1) ** 2).mean().backward()
            optimizer.step()
        return w.tolist()

    whole = end(tmp_path / "whole", 4, False)
    end(tmp_path / "parts", 2, False)
    assert end(tmp_path / "parts", 4, True) == whole


def test_models_inside_lists_and_dictionaries_of_the_state_come_back(tmp_path: Path) -> None:
    def members() -> dict[str, Any]:
        return {"members": [{"net": nn.Linear(2, 1), "name": "a"}], "pair": ({"net": nn.Linear(1, 1)}, 0)}

    state = members()
    for _ in training.epochs(2, state=state, checkpoint_dir=tmp_path):
        add_one([*state["members"][0]["net"].parameters(), *state["pair"][0]["net"].parameters()])
        state["members"][0]["name"] += "b"
    again = members()
    nets = again["members"][0]["net"], again["pair"][0]["net"]
    list(training.epochs(2, state=again, checkpoint_dir=tmp_path, resume=True))
    assert (again["members"][0]["net"], again["pair"][0]["net"]) == nets
    assert again["members"][0]["name"] == "abb"
    for net, trained in zip(nets, (state["members"][0]["net"], state["pair"][0]["net"]), strict=True):
        assert repr_of(net.state_dict()) == repr_of(trained.state_dict())


def test_an_object_that_no_resume_could_fill_is_refused_at_save(tmp_path: Path) -> None:
    state: dict[str, Any] = {"best": None}
    with pytest.raises(CheckpointRefused, match=r"state\.best "):
        for _ in training.epochs(2, state=state, checkpoint_dir=tmp_path):
            state["best"] = nn.Linear(1, 1)


class Phase(enum.IntEnum):
    WARM = 1


@pytest.mark.parametrize("async_save", [False, True])
def test_the_state_comes_back_with_its_types_and_without_what_was_removed(
    tmp_path: Path, async_save: bool
) -> None:
    def fresh() -> dict[str, Any]:
        return {
            "todo": {"a": 1, "b": 2}, "scratch": 1, "seen": [], "half": np.float32(0), "raw": bytearray(b"x"),
            "own": collections.defaultdict(lambda: 7), "classes": {}, "names": {"x"},
        }  # fmt: skip

    state = fresh()
    for epoch in training.epochs(2, state=state, checkpoint_dir=tmp_path, async_save=async_save):
        state["todo"].pop("ab"[epoch])
        state.pop("scratch", None)
        state["seen"].append(epoch)
        state["half"] += np.float32(0.1)
        state["raw"].append(98)
        state["own"][int(epoch)] += 1
        state["classes"].setdefault("new", collections.defaultdict(int))[int(epoch)] += 1
        state["names"].add(str(int(epoch)))
    again = fresh()
    seen, own = again["seen"], again["own"]
    list(training.epochs(2, state=again, checkpoint_dir=tmp_path, resume=True))
    assert again == state and again["seen"] is seen and again["own"] is own
    assert {key: type(value) for key, value in again.items()} == {k: type(v) for k, v in state.items()}
    assert own["never seen"] == 7 and again["classes"]["new"]["never seen"] == 0
    list(training.epochs(3, state=again, checkpoint_dir=tmp_path, resume=True))
    once_more = {**fresh(), "added": 1}
    list(training.epochs(3, state=once_more, checkpoint_dir=tmp_path, resume=True))
    assert "scratch" not in once_more and once_more["added"] == 1, "a changed notebook's own key stays"


@pytest.mark.parametrize("async_save", [False, True])
def test_two_places_that_held_one_thing_are_what_they_were(tmp_path: Path, async_save: bool) -> None:
    def shared_state(model: nn.Linear) -> dict[str, Any]:
        start, scores = torch.zeros(1), {"a": np.zeros(1)}
        tensors = {"weights": model.weight.data, "bias": model.bias.data, "best": start, "last": start}
        return {**tensors, "once": scores, "twice": scores, "apart": scores}

    model, again = nn.Linear(1, 1), nn.Linear(1, 1)
    state, back = shared_state(model), shared_state(again)
    for _ in training.epochs(1, model=model, state=state, checkpoint_dir=tmp_path, async_save=async_save):
        state["bias"] = torch.full((1,), 5.0)
        state["best"] = torch.full((1,), 3.0)
        state["apart"] = {"a": np.ones(1)}
    trained = repr_of(model.state_dict())
    list(training.epochs(1, model=again, state=back, checkpoint_dir=tmp_path, resume=True))
    assert repr_of(again.state_dict()) == trained and repr_of(back["weights"]) == repr_of(state["weights"])
    assert (back["bias"].item(), back["best"].item(), back["last"].item()) == (5.0, 3.0, 0.0)
    assert back["once"] is back["twice"] and back["apart"]["a"] == 1 and back["once"]["a"] == 0


def test_an_early_end_stays_the_end_after_a_resume(tmp_path: Path) -> None:
    for epoch in training.epochs(10, checkpoint_dir=tmp_path):
        if epoch == 3:
            epoch.stop_early()
    assert [record["epoch"] for record in training.history] == [0, 1, 2, 3]
    assert list(training.epochs(10, checkpoint_dir=tmp_path, resume=True)) == []
    assert len(training.history) == 4


def test_a_second_start_from_scratch_wins_over_the_first(tmp_path: Path) -> None:
    list(training.epochs(9, checkpoint_dir=tmp_path, every=1))
    for epoch in training.epochs(9, checkpoint_dir=tmp_path, every=1):
        if epoch == 3:
            break
    assert next(iter(training.epochs(9, checkpoint_dir=tmp_path, resume=True))) == 3


def test_two_loops_of_one_run_do_not_share_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys\nfrom grd.experiment import training\n"
        "a, b = {}, {}\n"
        f"where = {str(tmp_path)!r}\n"
        "first = [int(e) for e in training.epochs(3, state=a, checkpoint_dir=where, resume=R)]\n"
        "second = [int(e) for e in training.epochs(2, state=b, checkpoint_dir=where, resume=R)]\n"
        "print(first, second)"
    )
    for resume, expected in ((False, "[0, 1, 2] [0, 1]"), (True, "[] []")):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "GRD_RUN_ID": "r", "GRD_ATTEMPT": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code.replace("=R", f"={resume}")], env=env, capture_output=True, text=True
        )
        assert done.stdout.strip() == expected, done.stderr


def test_a_stop_asked_for_before_the_first_epoch_is_honoured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_by_file(tmp_path, monkeypatch).write_text("{}")
    with pytest.raises(ExperimentInterrupted) as caught:
        for _ in training.epochs(3, checkpoint_dir=tmp_path / "c"):
            raise AssertionError("no epoch may start")
    assert caught.value.reason == "stopped"


def test_a_stop_in_the_last_epoch_still_keeps_later_cells_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = stop_by_file(tmp_path, monkeypatch)
    monkeypatch.setattr("grd.experiment.interruption.STOP_FILE_PERIOD_SECONDS", 0.0)
    with pytest.raises(ExperimentInterrupted):
        for _ in training.epochs(1, checkpoint_dir=tmp_path / "c"):
            stop.write_text("{}")
    assert (tmp_path / "c" / "checkpoint_epoch_0.pt").exists()


def test_state_that_cannot_be_stored_is_told_before_the_first_epoch(tmp_path: Path) -> None:
    with pytest.raises(CheckpointRefused, match=r"state\.bad"):
        for _ in training.epochs(3, state={"bad": print}, checkpoint_dir=tmp_path):
            raise AssertionError("no epoch may start")


def test_a_checkpoint_of_another_model_is_an_error_and_not_a_silent_start(tmp_path: Path) -> None:
    list(training.epochs(1, model=nn.Linear(2, 2), checkpoint_dir=tmp_path))
    with pytest.raises(ResumeError, match="model"):
        next(training.epochs(2, model=nn.Linear(3, 2), checkpoint_dir=tmp_path, resume=True))


def test_a_save_that_fails_is_told_and_the_training_goes_on(tmp_path: Path) -> None:
    code = (
        "import resource, torch, warnings\nfrom grd.experiment import training\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))\n"
        "warnings.simplefilter('always')\n"
        "model = torch.nn.Linear(300, 300)\n"
        f"print(len(list(training.epochs(3, model=model, checkpoint_dir={str(tmp_path)!r}))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "3", done.stderr
    assert done.stderr.count("could not be saved") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        (-1, {}),
        (1.5, {}),
        (True, {}),
        (1, {"every": 0}),
        (1, {"every": "soon"}),
        (1, {"state": 3}),
        (1, {"resume": "False"}),
        (1, {"seed": "abc"}),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(arguments: tuple[Any, dict[str, Any]]) -> None:
    with pytest.raises(UsageError):
        training.epochs(arguments[0], **arguments[1])


def test_verify_resume_compares_and_leaves_the_generators_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert training.verify_resume(lambda: torch.rand(1) * 0 + 0.5, {"loss": 0.5}) == 0.5
    assert torch.equal(torch.rand(1), expected)
    with pytest.raises(ResumeError):
        training.verify_resume(lambda: 0.6, {"loss": 0.5})
    assert math.isnan(training.verify_resume(lambda: math.nan, {"loss": math.nan}))
    for pair in ((math.nan, 0.5), (0.5, math.nan)):
        with pytest.raises(ResumeError):
            training.verify_resume(lambda value=pair[0]: value, {"loss": pair[1]})


def test_the_history_keeps_infinities_apart_from_nan(tmp_path: Path) -> None:
    for epoch in training.epochs(1, checkpoint_dir=tmp_path):
        epoch.log(up=math.inf, down=-math.inf, none=math.nan)
    list(training.epochs(1, checkpoint_dir=tmp_path, resume=True))
    assert repr(training.history) == "[{'epoch': 0, 'up': inf, 'down': -inf, 'none': nan}]"


# --- loaders ----------------------------------------------------------------------------------------------


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[int]:
        return iter(range(12))


class StatefulStream(Stream):
    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        while self.at < 12:
            self.at += 1
            yield self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Backwards(torch.utils.data.Sampler):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[list[int]]:
        return iter([[3, 2], [1, 0]])

    def __len__(self) -> int:
        return 2


def seen_by(loader: Any, folder: Path, kill_at: int = -1, resume: bool = False) -> list[Any]:
    seen: list[Any] = []
    for epoch in training.epochs(1, checkpoint_dir=folder, resume=resume, every="0.0000001s"):
        for batch in epoch.steps(loader):
            seen.append(batch.tolist())
            if len(seen) == kill_at:
                raise Killed
    return seen


def test_a_stream_without_a_position_starts_its_epoch_again_and_says_so(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="IterableDataset"), pytest.raises(Killed):
        seen_by(DataLoader(Stream(), batch_size=3), tmp_path, kill_at=3)
    assert not list(tmp_path.glob("checkpoint_epoch_*_step_*"))
    with pytest.warns(RuntimeWarning):
        assert len(seen_by(DataLoader(Stream(), batch_size=3), tmp_path, resume=True)) == 4


def test_a_stream_with_a_position_goes_on_from_it(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        seen_by(DataLoader(StatefulStream(), batch_size=3), tmp_path, kill_at=3)
    rest = seen_by(DataLoader(StatefulStream(), batch_size=3), tmp_path, resume=True)
    assert rest == [[6, 7, 8], [9, 10, 11]]


def test_a_batch_sampler_of_ones_own_is_refused_with_its_name_and_its_order_is_kept(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="Backwards"):
        seen = seen_by(DataLoader(range(4), batch_sampler=Backwards()), tmp_path)  # type: ignore[arg-type]
    assert seen == [[3, 2], [1, 0]]


def test_every_sample_of_an_epoch_comes_once_in_an_order_of_its_own_each_epoch() -> None:
    loader = DataLoader(range(20), batch_size=6, shuffle=True)  # type: ignore[arg-type]
    orders = []
    for epoch in training.epochs(3, seed=1):
        batches = [batch.tolist() for batch in epoch.steps(loader)]
        assert [len(batch) for batch in batches] == [6, 6, 6, 2]
        orders.append([index for batch in batches for index in batch])
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("options", [{"batch_size": None}, {"batch_size": 7, "drop_last": True}])
def test_the_rebuilt_loader_keeps_the_form_of_the_batches(options: dict[str, Any]) -> None:
    loader = DataLoader(range(20), **options)  # type: ignore[arg-type]
    for epoch in training.epochs(1):
        assert [str(b) for b in epoch.steps(loader)] == [str(b) for b in loader]


def test_loading_draws_nothing_from_the_notebooks_own_generators() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    for epoch in training.epochs(1):
        list(epoch.steps(DataLoader(Noisy(), batch_size=8, shuffle=True)))
    assert torch.equal(torch.rand(1), expected)


def test_two_loops_over_batches_in_one_epoch_resume_in_the_second(tmp_path: Path) -> None:
    def once(folder: Path, resume: bool, kill_at: int) -> list[Any]:
        seen: list[Any] = []
        for epoch in training.epochs(1, checkpoint_dir=folder, resume=resume, every="0.0000001s"):
            for name in ("train", "valid"):
                for batch in epoch.steps([1, 2, 3]):
                    seen.append((name, batch))
                    if len(seen) == kill_at:
                        raise Killed
        return seen

    with pytest.raises(Killed):
        once(tmp_path, False, 5)
    assert once(tmp_path, True, -1) == [("valid", 2), ("valid", 3)]


# --- stages -----------------------------------------------------------------------------------------------


def test_a_stage_is_computed_once_and_taken_from_its_file_on_a_resume(tmp_path: Path) -> None:
    calls = []

    def prepare() -> Any:
        calls.append(1)
        return np.random.rand(3), {"t": torch.rand(2)}, random.random()

    results = []
    for resume in (False, True, False):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        with training.stage("features", checkpoint_dir=tmp_path, resume=resume) as stage:
            results.append(stage.cached(prepare))
        assert stage.reused is resume
        results.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert len(calls) == 2
    assert pickle.dumps(results[0][0]) == pickle.dumps(results[2][0])
    assert torch.equal(results[0][1]["t"], results[2][1]["t"])
    assert results[1] == results[3] == results[5]


def test_a_stage_is_computed_again_when_what_it_depends_on_has_changed(tmp_path: Path) -> None:
    calls = []
    for depends_on in (1, 1, 2):
        with training.stage("s", checkpoint_dir=tmp_path, resume=True, depends_on=depends_on) as stage:
            stage.cached(lambda: calls.append(1))
    assert len(calls) == 2


def test_a_stage_is_computed_again_when_the_arguments_bound_to_its_function_have_changed(
    tmp_path: Path,
) -> None:
    class Scaled:
        def __init__(self, n: int) -> None:
            self.n = n

        def prepare(self) -> int:
            return self.n

    def prepare(n: int, *, times: int = 1) -> int:
        return n * times

    def by_default(n: int) -> Any:
        return lambda n=n: prepare(n)

    for number, bind in enumerate(
        [
            lambda n: functools.partial(prepare, n),
            lambda n: functools.partial(functools.partial(prepare, 1), times=n),
            lambda n: functools.partial(prepare, np.full(3, n)),
            lambda n: functools.partial(prepare, n, times=(lambda: 1)()),
            by_default,
        ]
    ):
        reused = []
        for n in (10, 10, 20):
            with training.stage(str(number), checkpoint_dir=tmp_path, resume=True) as stage:
                assert np.all(stage.cached(bind(n)) == n)
            reused.append(stage.reused)
        assert reused == [False, True, False], number
    for n in (10, 20):  # a class that cannot be pickled: nobody can tell that it is the same
        with training.stage("method", checkpoint_dir=tmp_path, resume=True) as stage:
            assert stage.cached(Scaled(n).prepare) == n


def test_a_damaged_stage_is_computed_again(tmp_path: Path) -> None:
    for _ in range(2):
        with training.stage("s", checkpoint_dir=tmp_path, resume=True) as stage:
            assert stage.cached(lambda: [1, 2]) == [1, 2]
        for path in tmp_path.rglob("*.pt"):
            path.write_bytes(path.read_bytes()[:-9])
        with pytest.warns(RuntimeWarning, match="damaged"):
            training.stage("s", checkpoint_dir=tmp_path, resume=True).__enter__().cached(lambda: 3)


def test_objects_of_a_stage_are_kept_too_in_a_later_attempt_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRD_CHECKPOINT_DIR", str(tmp_path))
    for attempt, reused in (("1", False), ("2", True)):
        monkeypatch.setenv("GRD_ATTEMPT", attempt)
        with training.stage("objects") as stage:
            assert stage.cached(lambda: Path("/x")) == Path("/x")
        assert stage.reused is reused


# --- when to save -------------------------------------------------------------------------------------------


def simulate(
    every: str | int, *, save: float, step: float, steps: int, epochs: int, size: int
) -> dict[str, float]:
    """Overhead of saving, and the longest time at risk, of a training with these costs."""
    now = last = at_risk = saving = 0.0
    schedule = Schedule(Every.parse(every), now=0.0, max_lost_work=300.0)
    for epoch in range(epochs):
        for number in range(steps):
            now += step
            at_risk = max(at_risk, now - last)
            schedule.step_ended(now)
            due = number + 1 < steps and schedule.due_after_step(now)
            if number + 1 == steps:
                schedule.epoch_ended(now)
                due = schedule.due_after_epoch(now, epoch)
            if due:
                now, saving = now + save, saving + save
                last = now
                schedule.save_ended(now, save, size)
    return {"overhead": saving / (now - saving), "at_risk": at_risk}


def test_saving_by_measured_cost_stays_within_its_share_of_the_time() -> None:
    result = simulate("auto", save=0.25, step=1.0, steps=50, epochs=40, size=250_000_000)
    assert result["overhead"] <= 0.035
    assert result["at_risk"] <= 30 + 1


def test_dear_saves_are_bounded_by_the_work_that_may_be_lost() -> None:
    result = simulate("auto", save=20.0, step=1.0, steps=10_000, epochs=1, size=10**10)
    assert result["at_risk"] <= 301


def test_a_small_model_is_saved_after_every_epoch_of_half_a_second_even_on_a_slow_disk() -> None:
    assert simulate("auto", save=0.3, step=0.6, steps=1, epochs=50, size=10**6)["at_risk"] < 0.7
    quick = simulate("auto", save=0.005, step=0.01, steps=10, epochs=50, size=10**6)
    assert quick["at_risk"] < 0.11 and quick["overhead"] <= 0.06


def test_a_save_comes_before_a_known_deadline_and_only_one() -> None:
    schedule = Schedule(Every.parse(1000), now=0.0, max_lost_work=300.0, deadline=100.0)
    schedule.save_ended(1.0, 2.0, 10**6)
    due = []
    for second in range(2, 101):
        schedule.step_ended(float(second))
        if schedule.due_after_step(float(second)):
            due.append(second)
            schedule.save_ended(second + 2.0, 2.0, 10**6)
    assert due == [95]


def test_the_users_own_interval_is_kept() -> None:
    every = Schedule(Every.parse(3), now=0.0, max_lost_work=300.0)
    assert [e for e in range(9) if every.due_after_epoch(1000.0, e)] == [2, 5, 8]
    timed = Schedule(Every.parse("5m"), now=0.0, max_lost_work=9.0)
    assert not timed.due_after_step(299.0) and timed.due_after_step(300.0)
    assert (seed_interval(10**6), seed_interval(10**9)) == (5, 1)
