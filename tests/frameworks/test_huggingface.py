"""grd.experiment.huggingface: a killed and resumed Trainer ends where an uninterrupted one does."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.frameworks
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from torch import nn  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_training import Killed, repr_of  # noqa: E402

from grd.errors import CheckpointFenced, ExperimentInterrupted, UsageError  # noqa: E402
from grd.experiment.huggingface import Survive  # noqa: E402
from grd.experiment.sealed_folder import SEAL  # noqa: E402

EVERY_STEP = "0.0000001s"


class Kill(transformers.TrainerCallback):  # type: ignore[misc]
    """kill -9 in one process, at a step's beginning or before what was written is sealed."""

    def __init__(self, step: int | None = None, save: int | None = None) -> None:
        self.step, self.save = step, save

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.step is not None:
            self.step -= 1
            if self.step < 0:
                raise Killed

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.save is not None:
            self.save -= 1
            if self.save == 0:
                raise Killed


class Data(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((6,), index / 40), "labels": torch.tensor(float(index % 3))}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.trace: list[float] = []
        self.on_step: Any = None

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = nn.functional.mse_loss(self.net(x).squeeze(1), labels)
        self.trace.append(loss.item())
        if self.on_step is not None:
            self.on_step(len(self.trace))
        return {"loss": loss, "logits": x}


def train(
    folder: Path,
    *,
    resume: bool = False,
    kill: Kill | None = None,
    every: str | int = EVERY_STEP,
    on_step: Any = None,
    arguments: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """One training; what it came to, or after a kill only the steps it did."""
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    model = Model()
    model.on_step = on_step
    survive = Survive(folder, resume=resume, every=every, **options)
    settings: dict[str, Any] = {
        "output_dir": f"{folder}-own",
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
        **(arguments or {}),
    }
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(**settings),
        callbacks=[*([kill] if kill else []), survive],
        **(data or {"train_dataset": Data()}),
    )
    try:
        trainer.train(resume_from_checkpoint=survive.checkpoint)
    except Killed:
        return {"trace": model.trace}
    return {
        "trace": model.trace,
        "net": hashlib.sha256(repr_of(model.net.state_dict())).hexdigest(),
        "optimizer": hashlib.sha256(repr_of(trainer.optimizer.state_dict())).hexdigest(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "at": trainer.state.global_step,
        "trainer": trainer,
    }


def same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in expected:
        if name not in ("trace", "trainer"):
            assert result[name] == expected[name], name
    steps = len(result["trace"])
    assert result["trace"] == expected["trace"][len(expected["trace"]) - steps :]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("whole"))


def test_saving_does_not_change_a_training(tmp_path: Path, whole: dict[str, Any]) -> None:
    same(train(tmp_path, every=100), whole)


def test_a_kill_at_any_step_then_a_resume_ends_where_no_kill_would_have(
    tmp_path: Path, whole: dict[str, Any]
) -> None:
    for step in range(1, 15):
        folder = tmp_path / str(step)
        train(folder, kill=Kill(step=step))
        resumed = train(folder, resume=True)
        assert len(resumed["trace"]) == 15 - step
        same(resumed, whole)


def test_what_was_being_written_at_a_kill_is_not_resumed_from(tmp_path: Path, whole: dict[str, Any]) -> None:
    train(tmp_path, kill=Kill(save=7))
    assert not (tmp_path / "checkpoint-7" / SEAL).exists() and (tmp_path / "checkpoint-7").is_dir()
    with pytest.warns(RuntimeWarning, match=r"checkpoint-7 was never finished; used instead: checkpoint-6"):
        resumed = train(tmp_path, resume=True)
    assert len(resumed["trace"]) == 15 - 6
    same(resumed, whole)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damage_in_any_file_is_named_and_the_folder_before_is_used(
    tmp_path: Path, whole: dict[str, Any], damage: str
) -> None:
    train(tmp_path / "killed", kill=Kill(step=6))
    names = sorted(
        path.name for path in (tmp_path / "killed" / "checkpoint-6").iterdir() if path.name != SEAL
    )
    assert len(names) >= 4
    for name in names:
        folder = tmp_path / name
        shutil.copytree(tmp_path / "killed", folder)
        file = folder / "checkpoint-6" / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(content if damage == "flipped" else content[:-1])
        with pytest.warns(RuntimeWarning, match=r"checkpoint-6 is damaged: .*; used instead: checkpoint-5"):
            chosen = Survive(folder, resume=True).checkpoint
        assert chosen is not None and Path(chosen).name == "checkpoint-5"


def test_a_stop_saves_raises_and_no_step_is_repeated(
    tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = tmp_path / "stop.json"
    monkeypatch.setenv("GRD_STOP_FILE", str(stop))
    monkeypatch.setattr("grd.experiment.interruption.STOP_FILE_PERIOD_SECONDS", 0.0)

    def on_step(step: int) -> None:
        if step == 7:
            stop.write_text('{"reason": "deadline"}')

    with pytest.raises(ExperimentInterrupted) as caught:
        train(tmp_path / "c", every="1h", on_step=on_step)
    assert caught.value.reason == "deadline"
    monkeypatch.delenv("GRD_STOP_FILE")
    resumed = train(tmp_path / "c", resume=True)
    assert len(resumed["trace"]) == 15 - 7
    same(resumed, whole)


def test_a_fresh_start_moves_an_earlier_runs_folders_aside(tmp_path: Path) -> None:
    train(tmp_path, every=100)
    assert Survive(tmp_path).checkpoint is None
    assert [path.name for path in (tmp_path / "superseded-1").iterdir()] == ["checkpoint-15"]
    assert not (tmp_path / "checkpoint-15").exists()
    assert Survive(tmp_path, resume=True).checkpoint is None


def test_folders_beyond_the_budget_go_but_never_the_last_two_good_ones(tmp_path: Path) -> None:
    train(tmp_path, keep_bytes=1)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-14", "checkpoint-15"]


def test_an_older_attempt_can_no_longer_seal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fence = tmp_path / "fence"
    fence.write_text("2")
    monkeypatch.setenv("GRD_FENCE", str(fence))
    monkeypatch.setenv("GRD_ATTEMPT", "1")
    with pytest.raises(CheckpointFenced):
        Survive(tmp_path / "c")


def test_the_trainer_saves_into_checkpoint_dir_and_then_has_its_own_settings_again(tmp_path: Path) -> None:
    own = tmp_path / "own"
    settings = {"output_dir": str(own), "save_total_limit": 1, "save_strategy": "steps", "save_steps": 2}
    trainer = train(tmp_path / "c", every=1, arguments=settings)["trainer"]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "checkpoint-10",
        "checkpoint-15",
        "checkpoint-5",
    ]
    trainer.save_model()
    assert [path.name for path in own.iterdir() if path.is_dir()] == []
    assert (own / "pytorch_model.bin").exists() or (own / "model.safetensors").exists()
    assert (trainer.args.save_strategy, trainer.args.save_total_limit) == ("steps", 1)


def test_without_a_folder_the_trainer_saves_as_it_would_without_grd(tmp_path: Path) -> None:
    own = tmp_path / "own"
    settings = {"output_dir": str(own), "save_strategy": "epoch"}
    trainer = train("", arguments=settings)["trainer"]
    assert sorted(path.name for path in own.glob("*")) == ["checkpoint-10", "checkpoint-15", "checkpoint-5"]
    assert not list(own.rglob(SEAL))
    assert Survive("", resume=True).checkpoint is None
    assert trainer.state.global_step == 15
    with pytest.raises(UsageError, match="resume"):
        Survive("", resume="False")  # type: ignore[arg-type]


def test_a_trainer_that_keeps_the_model_only_can_be_resumed_all_the_same(
    tmp_path: Path, whole: dict[str, Any]
) -> None:
    settings = {"save_only_model": True}
    train(tmp_path / "c", kill=Kill(step=7), arguments=settings)
    same(train(tmp_path / "c", resume=True, arguments=settings), whole)


class Worse(Data):
    """What the training makes worse from epoch to epoch."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((6,), index / 40), "labels": torch.tensor(-5.0 * (index % 3))}


@pytest.mark.parametrize("killed_at", [None, 12])
def test_the_best_model_is_loaded_at_the_end_though_it_is_beyond_the_budget(
    tmp_path: Path, killed_at: int | None
) -> None:
    settings = {
        "load_best_model_at_end": True,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "learning_rate": 0.05,
    }
    data = {"train_dataset": Data(), "eval_dataset": Worse()}
    if killed_at is not None:
        train(tmp_path, kill=Kill(step=killed_at), arguments=settings, data=data, keep_bytes=1)
    result = train(tmp_path, resume=True, arguments=settings, data=data, keep_bytes=1)
    best = tmp_path / "checkpoint-5"
    assert result["trainer"].state.best_model_checkpoint == str(best)
    assert sorted(tmp_path.glob("checkpoint-*")) == [
        tmp_path / "checkpoint-14",
        tmp_path / "checkpoint-15",
        best,
    ]
    survivor = Model()
    with torch.no_grad():
        for parameter in survivor.parameters():
            parameter.zero_()
    plain = transformers.TrainingArguments(output_dir=str(tmp_path / "own"), report_to=[], use_cpu=True)
    transformers.Trainer(survivor, plain)._load_from_checkpoint(str(best))
    assert repr_of(survivor.net.state_dict()) == repr_of(result["trainer"].model.net.state_dict())


def test_a_seal_says_what_it_sealed(tmp_path: Path) -> None:
    train(tmp_path, every=1)
    seal = json.loads((tmp_path / "checkpoint-15" / SEAL).read_text())
    assert (seal["step"], seal["epoch"], seal["lineage"]) == (15, 2, 1)
    assert {"trainer_state.json", "optimizer.pt", "scheduler.pt"} <= set(seal["files"])
