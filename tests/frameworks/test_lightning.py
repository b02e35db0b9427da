"""grd.experiment.lightning: a killed and resumed Trainer ends bit by bit where an uninterrupted one does."""

from __future__ import annotations

import hashlib
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore:.*:UserWarning")]
pl = pytest.importorskip("pytorch_lightning")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_training import Killed, Noisy, noisy_collate, repr_of  # noqa: E402

from grd.errors import CheckpointError, ExperimentInterrupted  # noqa: E402
from grd.experiment.lightning import Survive  # noqa: E402

EVERY_STEP = "0.0000001s"


class Kill(pl.Callback):  # type: ignore[misc]
    """kill -9 in one process: nothing of the Trainer's own runs any more."""

    def __init__(self, at: int) -> None:
        self.left = at

    def on_train_batch_end(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


class Model(pl.LightningModule):  # type: ignore[misc]
    def __init__(self, scheduler: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.scheduler = scheduler
        self.trace: list[tuple[int, int, float]] = []

    def loss_of(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x).squeeze(1), y)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.loss_of(batch)
        self.trace.append((self.current_epoch, index, loss.item()))
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss_of(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        if self.scheduler == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
        if self.scheduler == "steps":
            steps = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=100)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": steps, "interval": "step"}}
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)]


def train(
    folder: Path,
    *,
    resume: bool = False,
    kill_at: int | None = None,
    scheduler: str = "epochs",
    every: str | int = EVERY_STEP,
    epochs: int = 3,
    workers: int = 0,
    wrapped: bool = True,
    accumulate: int = 1,
) -> dict[str, Any]:
    """One training; what it came to, or after a kill only the steps it did."""
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    model = Model(scheduler)
    survive = Survive(folder, resume=resume, every=every, seed=11)
    loader = DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=workers, collate_fn=noisy_collate)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[*([Kill(kill_at)] if kill_at else []), survive],
        default_root_dir=folder.parent / "root",
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    validation = DataLoader(Noisy(), batch_size=20)
    try:
        loaders = survive.loader(loader) if wrapped else loader
        trainer.fit(model, loaders, validation, ckpt_path=survive.ckpt_path)
    except Killed:
        return {"trace": model.trace}
    return {
        "trace": model.trace,
        "net": hashlib.sha256(repr_of(model.net.state_dict())).hexdigest(),
        "optimizer": hashlib.sha256(repr_of(trainer.optimizers[0].state_dict())).hexdigest(),
        "scheduler": repr(trainer.lr_scheduler_configs[0].scheduler.state_dict()),
        "rng": (random.random(), float(np.random.rand()), torch.rand(3).tolist()),
        "at": (trainer.global_step, trainer.current_epoch),
    }


def same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in expected:
        if name != "trace":
            assert result[name] == expected[name], name
    steps = len(result["trace"])
    assert result["trace"] == expected["trace"][len(expected["trace"]) - steps :]


@pytest.mark.parametrize("scheduler", ["epochs", "steps", "plateau"])
def test_a_kill_at_any_step_then_a_resume_ends_where_no_kill_would_have(
    tmp_path: Path, scheduler: str
) -> None:
    whole = train(tmp_path / "whole" / "c", scheduler=scheduler)
    for kill_at in range(1, 16):
        folder = tmp_path / str(kill_at) / "c"
        train(folder, kill_at=kill_at, scheduler=scheduler)
        resumed = train(folder, resume=True, scheduler=scheduler)
        same(resumed, whole)
        assert len(resumed["trace"]) == 15 - kill_at + 1


def test_saving_does_not_change_a_training(tmp_path: Path) -> None:
    same(train(tmp_path / "often" / "c"), train(tmp_path / "seldom" / "c", every=100))


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 2), (2, 2)])
def test_workers_may_change_between_the_attempts(tmp_path: Path, before: int, after: int) -> None:
    whole = train(tmp_path / "whole" / "c")
    train(tmp_path / "parts" / "c", kill_at=8, workers=before)
    same(train(tmp_path / "parts" / "c", resume=True, workers=after), whole)


def test_several_kills_accumulated_gradients_and_more_epochs(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole" / "c", accumulate=2)
    train(tmp_path / "parts" / "c", kill_at=3, accumulate=2, epochs=2)
    train(tmp_path / "parts" / "c", kill_at=5, accumulate=2, epochs=2, resume=True, every=1)
    train(tmp_path / "parts" / "c", accumulate=2, epochs=2, resume=True, every=1)
    same(train(tmp_path / "parts" / "c", accumulate=2, resume=True), whole)


def test_a_finished_training_is_restored_and_not_trained_again(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole" / "c", every=100)
    resumed = train(tmp_path / "whole" / "c", every=100, resume=True)
    assert resumed["trace"] == []
    same(resumed, whole)


def test_a_stop_saves_raises_and_no_step_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path / "whole" / "c")
    stop = tmp_path / "stop.json"
    monkeypatch.setenv("GRD_STOP_FILE", str(stop))
    monkeypatch.setattr("grd.experiment.interruption.STOP_FILE_PERIOD_SECONDS", 0.0)
    original = Model.training_step

    def stopped(self: Model, batch: Any, index: int) -> torch.Tensor:
        loss = original(self, batch, index)
        if len(self.trace) == 7:
            stop.write_text('{"reason": "deadline"}')
        return loss

    monkeypatch.setattr(Model, "training_step", stopped)
    with pytest.raises(ExperimentInterrupted) as caught:
        train(tmp_path / "parts" / "c", every="1h")
    assert caught.value.reason == "deadline"
    monkeypatch.setattr(Model, "training_step", original)
    monkeypatch.delenv("GRD_STOP_FILE")
    resumed = train(tmp_path / "parts" / "c", resume=True)
    assert len(resumed["trace"]) == 15 - 7
    same(resumed, whole)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole" / "c")
    folder = tmp_path / "parts" / "c"
    train(folder, kill_at=8)
    (folder / "checkpoint_latest.pt").unlink()
    newest = folder / "checkpoint_epoch_1_step_2.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"checkpoint_epoch_1_step_2\.pt is damaged"):
        resumed = train(folder, resume=True)
    assert len(resumed["trace"]) == 15 - 6
    same(resumed, whole)


def test_a_checkpoint_of_another_kind_is_an_error_and_not_a_silent_start(tmp_path: Path) -> None:
    from grd.experiment import CheckpointHandler

    CheckpointHandler(tmp_path / "c", install_signal_handlers=False).save_checkpoint(0, {"w": torch.ones(2)})
    with pytest.raises(CheckpointError, match="no training of Lightning"):
        train(tmp_path / "c", resume=True)


def test_another_file_of_the_folder_is_refused_and_not_replaced_by_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "c"
    train(folder, every=1)
    monkeypatch.setattr(Survive, "ckpt_path", str(folder / "checkpoint_epoch_0.pt"))
    with pytest.raises(CheckpointError, match="not the newest good checkpoint"):
        train(folder, resume=True)


def test_a_loader_that_is_not_wrapped_is_said(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"survive\.loader\(train_loader\)"):
        train(tmp_path / "c", wrapped=False, epochs=1)


def test_without_a_folder_it_only_reports(tmp_path: Path) -> None:
    survive = Survive("", resume=True)
    assert survive.ckpt_path is None
