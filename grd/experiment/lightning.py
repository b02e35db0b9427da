"""PyTorch Lightning trainings that survive: a callback, and a loader that a resume goes on in.

    survive = Survive(checkpoint_dir, resume=resume)
    trainer = Trainer(max_epochs=20, callbacks=[survive])
    trainer.fit(model, survive.loader(train_loader), ckpt_path=survive.ckpt_path)

Needs lightning or pytorch-lightning 2.x.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grd import contract
from grd.errors import CheckpointError, CheckpointFenced, CheckpointRefused
from grd.experiment import interruption, rng
from grd.experiment.counting import BatchSizes, Count
from grd.experiment.events import emit
from grd.experiment.loop_folder import make_handler, warn_without_folder
from grd.experiment.reporting import as_number, log_metrics, report_progress
from grd.experiment.resumable_loader import ResumableLoader, is_resumable
from grd.experiment.run_limits import deadline_of_run, max_lost_work
from grd.experiment.schedule import Every, Schedule
from grd.experiment.stopped import stopped
from grd.experiment.training_state import count_parameters


def _package() -> Any:
    """The one of Lightning's two names that the notebook uses: their classes are not each other's."""
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in [*(name for name in names if name in sys.modules), *names]:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise ImportError("grd.experiment.lightning needs Lightning: pip install 'grd-notebooks[lightning]'")


if TYPE_CHECKING:
    _Callback = Any
    _CheckpointIO = Any
else:
    _Callback = _package().Callback
    _CheckpointIO = importlib.import_module(f"{_package().__name__}.plugins").CheckpointIO


class Survive(_Callback):
    """Saves at the right moments, stops well when asked to, and lets ``trainer.fit`` go on.

    ``every``: ``"auto"`` (by measured cost), a number of epochs, or a duration such as ``"5m"``. ``seed``
    decides the data order of `loader` (default: torch's own seed). ``allow_pickle`` lets other objects into
    the checkpoint, such as hyperparameters that are no plain values. Without ``checkpoint_dir`` nothing is
    saved. Give it as the last callback: what comes later in the list is saved one step behind.

    Raises ExperimentInterrupted out of ``trainer.fit`` once a stop request is honoured, the state saved.
    """

    def __init__(
        self,
        checkpoint_dir: Path | str | None,
        *,
        resume: bool = False,
        every: str | int = "auto",
        seed: int | None = None,
        keep_bytes: int | str | None = None,
        allow_pickle: bool = False,
    ) -> None:
        super().__init__()
        self.every = Every.parse(every)
        self.allow_pickle = allow_pickle
        self.handler: Any = None
        if checkpoint_dir:
            self.handler = make_handler(
                checkpoint_dir, total=None, resume=bool(resume), keep_bytes=keep_bytes
            )
        else:
            warn_without_folder(stacklevel=2)
        self._resume = bool(resume)
        self._seed = rng.process_seed() if seed is None else int(seed)
        self._loaders: list[ResumableLoader] = []
        self._loader_states: list[dict[str, Any]] = []
        self._arming = contextlib.ExitStack()
        self._restored: dict[str, Any] | None = None
        self._saved_at: tuple[int, int | None] | None = None
        self._failure: str | None = None
        self._told: set[str] = set()
        self._count = Count()

    @property
    def ckpt_path(self) -> str | None:
        """What ``trainer.fit(ckpt_path=...)`` goes on from: the newest good checkpoint, or None."""
        if self.handler is None or not self._resume:
            return None
        found = self.handler.find_latest_checkpoint()
        return None if found is None else str(found)

    def loader(self, loader: Any) -> ResumableLoader:
        """``loader`` in an order that depends on seed and epoch only, so that a resume finds its place."""
        resumable = ResumableLoader(loader, self._seed)
        self._loaders.append(resumable)
        if len(self._loaders) <= len(self._loader_states):  # made by a hook, after the restoring
            resumable.load_state_dict(self._loader_states[len(self._loaders) - 1])
        return resumable

    # --- what Lightning calls ---

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before anything is restored."""
        if stage != "fit":
            return
        self._arming.close()
        self._arming = contextlib.ExitStack()
        self._arming.enter_context(interruption.armed())
        if self.handler is not None and not isinstance(trainer.strategy.checkpoint_io, _VerifiedIO):
            trainer.strategy.checkpoint_io = _VerifiedIO(self, trainer.strategy.checkpoint_io)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Everything is restored."""
        now = time.monotonic()
        between = None
        if self.handler is not None:
            self.handler.total_epochs = trainer.max_epochs if (trainer.max_epochs or -1) > 0 else None
            between = self.handler.seconds_between_interruptions() if self._resume else None
            self.handler.begin_work()
        self._schedule = Schedule(
            self.every,
            now=now,
            max_lost_work=max_lost_work(),
            parameters=count_parameters(pl_module),
            deadline=deadline_of_run(),
            between_interruptions=between,
        )
        if self.handler is not None and not is_resumable(trainer.train_dataloader):
            self._warn(
                "loader",
                "a resume puts the data into another order, since this is not known. "
                "Use trainer.fit(model, survive.loader(train_loader))",
            )
        if self._restored is not None:
            emit(
                contract.EVENT_RESUME,
                epoch=self._restored["epoch"],
                step=self._restored["step"],
                path=str(Path(self.handler.checkpoint_dir).absolute()),
            )
        self._report(trainer, trainer.current_epoch, force=True)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The epoch before, with its validation and its schedulers, is over."""
        interruption.rearm()
        epoch, restored = trainer.current_epoch, self._restored
        if restored is not None and restored["step"] is None:
            rng.restore(restored["rng"])
            self._restored = None
        elif restored is None and epoch > 0:
            now = time.monotonic()
            self._schedule.epoch_ended(now)
            if self._schedule.due_after_epoch(now, epoch - 1) or interruption.stop_requested() is not None:
                self._save(trainer, epoch - 1, None)
        self._stop_if_asked(f"before epoch {epoch}")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The first batch after a resume is there: loading it may have drawn random numbers."""
        interruption.rearm()  # Lightning takes SIGTERM when its loop begins
        if self._restored is not None:
            rng.restore(self._restored["rng"])
            self._restored = None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One batch is done."""
        now = time.monotonic()
        self._schedule.step_ended(now)
        done, total = batch_idx + 1, trainer.num_training_batches
        share = done / total if total not in (0, float("inf")) else 0.0
        loader = trainer.train_dataloader
        samples = BatchSizes(getattr(loader, "source", loader)).of(batch_idx)
        self._count.add(None if samples is None else samples * trainer.world_size)
        self._report(trainer, trainer.current_epoch + min(1.0, share), step=done)
        if done >= total:
            return  # the end of the epoch comes next
        if interruption.stop_requested() is not None or self._schedule.due_after_step(now):
            self._save(trainer, trainer.current_epoch, done)
            self._stop_if_asked(f"in epoch {trainer.current_epoch} after step {done}")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Report what the epoch's metrics are."""
        values: dict[str, Any] = {}
        for name, value in trainer.callback_metrics.items():
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                values[name] = as_number(value)
        if values:
            log_metrics(epoch=trainer.current_epoch, **values)
        self._report(trainer, trainer.current_epoch + 1, force=True)
        if trainer.fit_loop.restarting and all(
            config.monitor in trainer.callback_metrics
            for config in trainer.lr_scheduler_configs
            if config.reduce_on_plateau
        ):
            # Lightning leaves ReduceLROnPlateau out in the epoch that was resumed, for want of the metric.
            trainer.fit_loop.restarting = False

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last epoch is over: a resume then finds the training done."""
        if self._restored is None and self._saved_at != (trainer.current_epoch - 1, None):
            self._save(trainer, trainer.current_epoch - 1, None)
        self._stop_if_asked("after the last epoch")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the signals back."""
        if self._restored is not None:  # a training that was done already: later cells draw what they drew
            rng.restore(self._restored["rng"])
            self._restored = None
        self._end(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the signals back."""
        self._end(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What Lightning does not save: random states, and where in the training this is."""
        epoch, step = self._position
        loaders = [loader.state_dict() for loader in self._loaders]
        return {"rng": rng.capture(), "epoch": epoch, "step": step, "seed": self._seed, "loaders": loaders}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self._restored = dict(state_dict)
        self._seed = int(state_dict["seed"])
        # Lightning does it only where an epoch, or a later one, was under way.
        self._loader_states = list(state_dict["loaders"])
        for loader, state in zip(self._loaders, self._loader_states, strict=False):
            loader.load_state_dict(state)

    # --- saving and stopping ---

    _position: tuple[int, int | None] = (-1, None)

    def _save(self, trainer: Any, epoch: int, step: int | None) -> None:
        """``epoch`` is the last completed one, or with ``step`` the one that is under way."""
        if self.handler is None or self._saved_at == (epoch, step):
            return
        started = time.monotonic()
        self._position = (epoch if step is None else epoch - 1, step)
        with interruption.saving():
            try:
                trainer.save_checkpoint(_place(self.handler, epoch, step))
            except (CheckpointFenced, CheckpointRefused):
                raise
            except CheckpointError as error:
                self._failure = str(error)
                self._warn(f"save {error.__cause__}", str(error))
                self._schedule.save_ended(time.monotonic(), 0.0, None)
                return
        self._failure, self._saved_at = None, (epoch, step)
        now = time.monotonic()
        self._schedule.save_ended(now, now - started, self._written)

    _written = 0

    def _write(self, checkpoint: dict[str, Any], epoch: int, step: int | None) -> None:
        if step is None:
            _begin_epoch(checkpoint)
        path = self.handler.save_checkpoint(
            epoch, step=step, lightning=checkpoint, allow_pickle=self.allow_pickle
        )
        self._written = path.stat().st_size

    def _stop_if_asked(self, where: str) -> None:
        reason = interruption.stop_requested()
        if reason is None:
            return
        interruption.honoured()
        raise stopped(
            where,
            reason,
            saves=self.handler is not None,
            saved=self._saved_at is not None,
            failure=self._failure,
        )

    def _report(self, trainer: Any, done: float, *, force: bool = False, **more: Any) -> None:
        if not trainer.is_global_zero:
            return
        total = trainer.max_epochs if (trainer.max_epochs or -1) > 0 else None
        report_progress("epochs", round(done, 3), total, force=force, **self._count.told(), **more)

    def _end(self, trainer: Any) -> None:
        io = trainer.strategy.checkpoint_io
        if isinstance(io, _VerifiedIO):
            trainer.strategy.checkpoint_io = io.other
        self._arming.close()

    def _warn(self, key: str, message: str) -> None:
        if key in self._told:
            return
        self._told.add(key)
        warnings.warn(f"grd: {message}", RuntimeWarning, stacklevel=3)
        emit(contract.EVENT_WARNING, message=message)


_SEPARATOR = "::"


def _place(handler: Any, epoch: int, step: int | None) -> str:
    """A path that says to `_VerifiedIO` what it is asked to write."""
    return f"{handler.checkpoint_dir}{_SEPARATOR}{epoch}{_SEPARATOR}{'' if step is None else step}"


class _VerifiedIO(_CheckpointIO):
    """Reads and writes the files of one checkpoint folder as grd does; everything else as before."""

    def __init__(self, owner: Survive, other: Any) -> None:
        self.owner, self.other = owner, other

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ours verified and atomically. Raises CheckpointError."""
        folder, separator, position = str(path).partition(_SEPARATOR)
        if not separator or folder != str(self.owner.handler.checkpoint_dir):
            self.other.save_checkpoint(checkpoint, path, storage_options)
            return
        epoch, _, step = position.partition(_SEPARATOR)
        self.owner._write(checkpoint, int(epoch), int(step) if step else None)

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Read ours after its bytes were checked."""
        handler = self.owner.handler
        if os.path.realpath(Path(path).parent) != os.path.realpath(handler.checkpoint_dir):
            other: dict[str, Any] = self.other.load_checkpoint(path, *arguments, **options)
            return other
        newest = handler.find_latest_checkpoint()
        if newest is None or os.path.realpath(path) != os.path.realpath(newest):
            raise CheckpointError(
                f"{path} is not the newest good checkpoint ({newest}): give ckpt_path=survive.ckpt_path, "
                "or go back with grd resume RUN --from EPOCH"
            )
        saved = handler.load_checkpoint(allow_pickle=self.owner.allow_pickle)
        if saved is None or "lightning" not in saved:
            raise CheckpointError(f"{path} holds no training of Lightning's")
        content: dict[str, Any] = saved["lightning"]
        return content

    def remove_checkpoint(self, path: Any) -> None:
        """Not ours: those are pruned by their handler."""
        self.other.remove_checkpoint(path)

    def teardown(self) -> None:
        """Nothing of ours is open."""
        self.other.teardown()


def _begin_epoch(checkpoint: dict[str, Any]) -> None:
    """Let the next epoch begin at its first batch.

    Lightning sets the counts of the epoch back when its loop begins, which is after the state was saved.
    """
    loops = checkpoint["loops"]["fit_loop"]
    for name, progress in loops.items():
        if name.startswith("epoch_loop.") and "val_loop" not in name:
            _zero_current(progress)


def _zero_current(progress: Any) -> None:
    if not isinstance(progress, dict):
        return
    for name, value in progress.items():
        if name == "current" and isinstance(value, dict):
            progress[name] = dict.fromkeys(value, 0)
        elif name == "is_last_batch":
            progress[name] = False
        else:
            _zero_current(value)
