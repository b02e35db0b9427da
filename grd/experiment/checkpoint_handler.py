"""Saving and loading training state so that nothing bad is ever loaded, whatever kills the process."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from grd import contract
from grd.errors import (
    CheckpointFenced,
    CheckpointRefused,
    UsageError,
)
from grd.experiment import checkpoint_file, checkpoint_folder, interruption, saving_history
from grd.experiment.background_save import BackgroundSave
from grd.experiment.checkpoint_file import FORMAT
from grd.experiment.checkpoint_folder import Found, version_name
from grd.experiment.checkpoint_reader import CheckpointReader, epoch_of, restore
from grd.experiment.checkpoint_writer import CheckpointWriter, Job, Saved, budget_of, check_fence
from grd.experiment.events import emit, run_id
from grd.experiment.manifest import read_entries
from grd.experiment.reporting import as_number
from grd.experiment.schedule import SMALL_STATE_BYTES
from grd.experiment.snapshot import Size, SnapshotMemory, available_bytes, size_of, spare_cores
from grd.experiment.state_encoding import as_json

AsyncSave = bool | Literal["auto"]


class CheckpointHandler:
    """Writes and reads the checkpoints of one folder.

    ``epoch`` counts from 0. ``total_epochs`` is for the hints. ``keep_bytes`` bounds the versions kept
    (default GRD_CHECKPOINT_BUDGET, else 20 GB; never fewer than two good ones). ``resume=False`` moves the
    files of earlier attempts aside; otherwise what is there is continued. With ``install_signal_handlers``
    SIGTERM and SIGINT set ``interrupted`` (main thread only) until `close` or the handler's end.

    With ``async_save`` a save copies the state and returns; a thread writes it, while the training goes on
    (`flush` waits). That takes as much memory as the state has. ``"auto"`` does so for states of 32 MB and
    more that half of the free memory holds, if they are on a GPU or torch leaves a core alone: where all are
    busy the training loses to the thread most of what it gains by not waiting.

    Without torch the files keep their names and hold JSON and raw arrays. Raises UsageError for wrong
    arguments, OSError if the folder cannot be made.
    """

    def __init__(
        self,
        checkpoint_dir: Path | str,
        *,
        total_epochs: int | None = None,
        keep_bytes: int | str | None = None,
        install_signal_handlers: bool = True,
        resume: bool | None = None,
        report_events: bool = True,
        async_save: AsyncSave = False,
    ) -> None:
        self.report_events = report_events
        self.checkpoint_dir = Path(checkpoint_dir)
        if isinstance(resume, str):
            raise UsageError(f"resume must be True, False or None, not the text {resume!r}")
        try:
            self.keep_bytes = budget_of(keep_bytes)
            self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UsageError(f"checkpoint_dir {str(checkpoint_dir)!r} is a file, or lies under one") from None
        except ValueError as error:
            raise UsageError(f"keep_bytes: {error}") from None
        self.total_epochs = total_epochs
        self.async_save = async_save
        self.interrupted = False
        self._writer = CheckpointWriter(self.checkpoint_dir, self.keep_bytes)
        self._memory = SnapshotMemory()
        self._saving: BackgroundSave | None = None
        self._turn = threading.RLock()
        self._told_of_no_copy = False
        self._reader = CheckpointReader(self.checkpoint_dir)
        checkpoint_folder.sweep(self.checkpoint_dir)
        if resume is False:
            self._writer.move_aside_what_is_not_ours()
        if install_signal_handlers:
            interruption.watch(self)

    # --- writing ---

    def save_checkpoint(
        self,
        epoch: int,
        model_state: Any = None,
        optimizer_state: Any = None,
        loss: Any = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        model: Any = None,
        optimizer: Any = None,
        step: int | None = None,
        state: Any = None,
        allow_pickle: bool = False,
        async_save: AsyncSave | None = None,
        **more: Any,
    ) -> Path:
        """Save the state after ``epoch``, or after ``step`` steps inside it; returns the file's path.

        Model and optimizer are objects with ``state_dict()`` or their states. ``metadata`` becomes JSON
        data. Whatever else is to come back goes by name. Values keep their types; attributes that somebody
        gave to a tensor are left behind. ``async_save`` is the handler's where not given; such a save first
        waits for the one before, and its file is there once `flush` has returned.

        Raises UsageError for an epoch or step that is no whole number, CheckpointRefused for what could not
        be loaded without running code, CheckpointFenced if a newer attempt owns the folder, CheckpointError
        if it cannot be written; then the versions before are as they were. What was wrong with a save in the
        background is raised by `flush`, or told in a warning by the next save.
        """
        clash = sorted(set(more) & {"format", "lineage"})
        if clash:
            raise CheckpointRefused(f"{clash[0]!r} is a name the checkpoint needs itself: choose another")
        epoch = _whole("epoch", epoch)
        step = None if step is None else _whole("step", step)
        if step is not None and step < 0:
            raise UsageError(f"save_checkpoint(): step must be 0 or more, not {step}")
        if metadata is not None and not isinstance(metadata, Mapping):
            raise CheckpointRefused(f"metadata must be a dictionary, not {type(metadata).__name__}")
        facts = as_json(metadata or {})
        loss_value = None if loss is None else _plain_loss(loss)
        total = self.total_epochs if self.total_epochs is not None else facts.get("total_epochs")
        # From the first look at the state to the event: none of it may be cut by a signal.
        with interruption.saving(), self._turn:
            began = time.monotonic()
            self._tell_of_the_one_before()
            payload = {
                "format": FORMAT,
                "epoch": epoch if step is None else epoch - 1,
                "model_state": _state_of(model if model is not None else model_state),
                "optimizer_state": _state_of(optimizer if optimizer is not None else optimizer_state),
                "loss": loss_value,
                "metadata": facts,
                **({} if step is None else {"step": step}),
                **({} if state is None else {"state": state}),
                **more,
            }
            private: list[Any] = []
            job = Job(
                name=version_name(epoch, step),
                content=checkpoint_file.prepare(payload, allow_pickle=allow_pickle, private=private),
                named_epoch=epoch,
                epoch=payload["epoch"],
                step=step,
                loss=None if loss_value is None else as_number(loss_value),
                total_epochs=total if isinstance(total, int) else None,
                stop=interruption.stop_requested(),
                began=began,
                work_seconds=began - self._writer.work_began,
            )
            wanted = self.async_save if async_save is None else async_save
            if wanted == "auto":
                wanted = _gains_time(size_of(job.content))
            if wanted and self._begin_in_background(job, private):
                return self.checkpoint_dir / job.name
            return self._write(job).path

    def _write(self, job: Job) -> Saved:
        saved = self._writer.write(job)
        if job.stall is None:
            self._writer.begin_work()
        if self.report_events:
            emit(
                contract.EVENT_CHECKPOINT,
                epoch=job.epoch,
                step=job.step,
                path=str(saved.path.absolute()),
                bytes=saved.size,
                seconds=round(saved.seconds, 6),
            )
        return saved

    # --- writing in the background ---

    def _begin_in_background(self, job: Job, private: list[Any]) -> bool:
        """Whether a thread writes ``job``; not where there is no memory for a copy."""
        check_fence(self.checkpoint_dir)
        try:
            snapshot = self._memory.take(job.content, private)
        except (MemoryError, RuntimeError) as error:
            self._memory.clear()
            if not self._told_of_no_copy:
                self._told_of_no_copy = True
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                _warn(f"no copy to save in the background ({first}): the training waits for its saves")
            return False
        now = time.monotonic()

        def write(job: Job) -> Saved:
            snapshot.finish()
            return self._write(job)

        self._saving = BackgroundSave(replace(job, content=snapshot.content, stall=now - job.began), write)
        self._writer.begin_work()
        return True

    @property
    def is_saving(self) -> bool:
        """Whether a save in the background has not been heard of yet."""
        return self._saving is not None

    def finished(self, *, wait: bool) -> BackgroundSave | None:
        """The save in the background that has ended since the last call, however; None if none has.

        Raises CheckpointError if it is waited for and the disk hangs.
        """
        saving = self._saving
        if saving is None or not (wait or saving.is_done):
            return None
        saving.finish()
        self._saving = None
        return saving

    def _tell_of_the_one_before(self) -> None:
        before = self.finished(wait=True)
        if before is not None and isinstance(before.error, CheckpointFenced):
            raise before.error
        if before is not None and before.error is not None:
            _warn(str(before.error))

    def flush(self) -> Path | None:
        """Wait for the save in the background; its path, or None if there was none.

        Raises CheckpointError if it failed, CheckpointFenced if a newer attempt owns the folder.
        """
        with interruption.saving():
            ended = self.finished(wait=True)
        if ended is None or ended.saved is None:
            if ended is not None and ended.error is not None:
                raise ended.error
            return None
        return ended.saved.path

    def release_memory(self) -> None:
        """Give back the memory that saves in the background are copied to. Call `flush` before."""
        self._memory.clear()

    def begin_lineage(self) -> None:
        """Let what is saved from now on win over everything in the folder, whatever its epoch."""
        self._writer.begin_lineage()

    def begin_work(self) -> None:
        """Count what the next save makes safe from here: a training begins."""
        self._writer.begin_work()

    # --- reading ---

    def _reader_after_saving(self) -> CheckpointReader:
        if self._saving is not None:
            self._saving.finish()
        return self._reader

    def load_checkpoint(
        self,
        model: Any = None,
        optimizer: Any = None,
        *,
        epoch: int | None = None,
        map_location: Any = None,
        allow_pickle: bool = False,
    ) -> dict[str, Any] | None:
        """The newest good checkpoint, or that of a completed ``epoch``; None if there is none.

        The dictionary has epoch (the last completed one), model_state, optimizer_state, loss, metadata and
        what else was saved; ``model`` and ``optimizer`` get their states by ``load_state_dict``. Damaged
        files are named in a warning and passed over. ``allow_pickle`` is for objects saved with it, and
        only in files of the folder's own manifest.

        Raises CheckpointRefused for a file that needs code, CheckpointCorrupt for a damaged ``epoch``,
        CheckpointError for a sound file that cannot be opened here.
        """
        newest = self._reader_after_saving().newest(
            epoch=epoch, map_location=map_location, allow_pickle=allow_pickle, read_ours=True
        )
        if newest is None or newest[1] is None:
            return None
        return restore(newest[1], newest[0], model, optimizer)

    def find_latest_checkpoint(self) -> Path | None:
        """Path of the checkpoint that `load_checkpoint` would load, or None.

        Raises what it raises for a file that came from elsewhere and needs code, or torch.
        """
        newest = self._reader_after_saving().newest(map_location="cpu")
        return None if newest is None else newest[0].path

    def get_resumability_hints(self) -> dict[str, Any]:
        """Whether and where a resume would go on; of our own files never loads the state.

        Keys: has_checkpoint, valid, latest_epoch (last completed), step (inside the next, or None),
        next_epoch, checkpoint_path, estimated_remaining_epochs (None if the total is unknown),
        expected_lost_seconds (training that a kill without warning loses on average) and expected_overhead
        (saving as a share of the training), both as measured and None before the second save, and
        resume_command (what to type to go on; None if there is nothing to go on from or with).
        """
        newest = self._reader_after_saving().newest(map_location="cpu")
        found, content = (None, None) if newest is None else newest
        total = self.total_epochs
        latest: int | None = None
        if found is not None:
            latest = epoch_of(content or {}, found)
            if total is None and found.entry is not None:
                total = found.entry.total_epochs
        next_epoch = 0 if latest is None else latest + 1
        remaining = None if total is None else max(0, total - next_epoch)
        entries = read_entries(self.checkpoint_dir)
        return {
            "has_checkpoint": found is not None,
            "valid": found is not None,
            "latest_epoch": latest,
            "step": None if found is None else found.step,
            "next_epoch": next_epoch,
            "checkpoint_path": None if found is None else found.path,
            "estimated_remaining_epochs": remaining,
            "expected_lost_seconds": saving_history.expected_lost_seconds(entries),
            "expected_overhead": saving_history.expected_overhead(entries),
            "resume_command": None if found is None or remaining == 0 else self._resume_command(found),
        }

    def _resume_command(self, found: Found) -> str:
        run = run_id() or (found.entry.run_id if found.entry is not None else None)
        if run is not None:
            return f"grd resume {run}"
        return f"CheckpointHandler({str(self.checkpoint_dir)!r}).load_checkpoint()"

    def seconds_between_interruptions(self) -> float | None:
        """Mean training time between ends without warning, as the folder tells; None while there was none."""
        return saving_history.seconds_between_interruptions(read_entries(self.checkpoint_dir))

    # --- stopping ---

    def check_interrupted(self) -> bool:
        """Whether a signal came or the runner asked to stop; cheap enough for every step."""
        interruption.rearm()
        if not self.interrupted and interruption.stop_requested() is not None:
            self.interrupted = True
        return self.interrupted

    def close(self) -> None:
        """Give the signals back, and `flush`, which raises what it raises; closing twice is harmless."""
        interruption.unwatch(self)
        self.flush()


def _whole(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or isinstance(value, (str, bytes)) or number != value:
        raise UsageError(f"save_checkpoint(): {name} must be a whole number, not {value!r}")
    return number


def _state_of(value: Any) -> Any:
    if value is None or isinstance(value, (dict, list, tuple)):
        return value
    return value.state_dict() if hasattr(value, "state_dict") else value


def _plain_loss(loss: Any) -> float:
    try:
        return float(loss)
    except (TypeError, ValueError, RuntimeError):
        raise CheckpointRefused(f"loss must be one number, not {type(loss).__name__}") from None


def _gains_time(size: Size) -> bool:
    """Whether a training is over sooner if it does not wait (measured: benchmarks/RESULTS.md)."""
    room = available_bytes()
    big = size.nbytes >= SMALL_STATE_BYTES and (room is None or 2 * size.nbytes <= room)
    return big and (2 * size.on_gpu >= size.nbytes or spare_cores() > 0)


def _warn(message: str) -> None:
    warnings.warn(f"grd: {message}", RuntimeWarning, stacklevel=4)
    emit(contract.EVENT_WARNING, message=message)
