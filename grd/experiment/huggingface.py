"""Hugging Face trainings that survive: a callback for ``transformers.Trainer``.

    survive = Survive(checkpoint_dir, resume=resume)
    trainer = Trainer(model, TrainingArguments(output_dir=checkpoint_dir), callbacks=[survive], ...)
    trainer.train(resume_from_checkpoint=survive.checkpoint)

The Trainer writes its own folders, ``checkpoint-STEP``, file by file. Each is sealed once it is whole: only a
sealed one whose bytes are still those that were sealed is resumed from. Needs transformers 4.46 or newer.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grd import contract
from grd.errors import CheckpointError, ExperimentInterrupted, UsageError
from grd.experiment import interruption
from grd.experiment.checkpoint_file import digest
from grd.experiment.checkpoint_folder import NEVER_FEWER_THAN
from grd.experiment.checkpoint_writer import budget_of, check_fence
from grd.experiment.events import attempt_number, emit, run_id
from grd.experiment.reporting import as_number, log_metrics, report_progress
from grd.experiment.schedule import Every, Schedule
from grd.experiment.training_loop import deadline_of_run, max_lost_work
from grd.experiment.training_state import count_parameters
from grd.files import atomic_write, fsync_folder

if TYPE_CHECKING:
    _TrainerCallback = Any
else:
    try:
        from transformers import TrainerCallback as _TrainerCallback
    except ImportError as error:
        raise ImportError(
            "grd.experiment.huggingface needs transformers: pip install 'grd-notebooks[huggingface]'"
        ) from error

SEAL = "grd-seal.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Sealed:
    """A folder ``checkpoint-STEP`` with its seal; ``files`` are names with size (bytes) and xxh3_128."""

    path: Path
    step: int
    lineage: int
    files: dict[str, tuple[int, str]]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self.files.values())

    def problem(self) -> str | None:
        """What is wrong with it, or None; reads every byte."""
        for name, (size, expected) in self.files.items():
            path = self.path / name
            try:
                if path.stat().st_size != size:
                    return f"{name} has {path.stat().st_size} bytes instead of {size}"
                if digest(path)[1] != expected:
                    return f"the bytes of {name} are not those that were written"
            except OSError as error:
                return f"{name} cannot be read: {error.strerror or error}"
        return None


class Survive(_TrainerCallback):
    """Saves at the right moments, seals what the Trainer has written, and stops well when asked to.

    ``every``: ``"auto"`` (by measured cost), a number of epochs, or a duration such as ``"5m"``; it takes the
    place of the Trainer's ``save_strategy``. ``keep_bytes`` bounds the folders kept (default
    GRD_CHECKPOINT_BUDGET, else 20 GB; never fewer than two good ones). ``resume=False`` moves earlier folders
    aside. Losses and weights are those of an uninterrupted training where the data draw no random numbers
    while they are loaded; the Trainer keeps no position for those.

    Raises ExperimentInterrupted out of ``trainer.train`` once a stop request is honoured, the state saved;
    UsageError where the Trainer's ``output_dir`` is not ``checkpoint_dir``.
    """

    def __init__(
        self,
        checkpoint_dir: Path | str,
        *,
        resume: bool = False,
        every: str | int = "auto",
        keep_bytes: int | str | None = None,
    ) -> None:
        if not checkpoint_dir:
            raise UsageError(
                "Survive(checkpoint_dir) needs a folder, the output_dir of TrainingArguments too"
            )
        self.checkpoint_dir = Path(checkpoint_dir)
        self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        self.every = Every.parse(every)
        self.keep_bytes = budget_of(keep_bytes)
        self._resume = bool(resume)
        self._arming = contextlib.ExitStack()
        self._saved_step: int | None = None
        self._good: set[Path] = set()
        check_fence(self.checkpoint_dir)
        present = sealed(self.checkpoint_dir)
        newest = max((item.lineage for item in present), default=0)
        self._lineage = max(1, newest) if resume else newest + 1
        if not resume:
            self._set_aside()

    @property
    def checkpoint(self) -> str | None:
        """What ``trainer.train(resume_from_checkpoint=...)`` goes on from: the newest good folder, or None.

        What is damaged, or was never finished, is named in a warning.
        """
        if not self._resume:
            return None
        passed_over: list[str] = []
        found = None
        for item in sealed(self.checkpoint_dir):
            reason = item.problem()
            if reason is None:
                found = item
                break
            passed_over.append(f"{item.path} is damaged: {reason}")
        for path in _unsealed(self.checkpoint_dir):
            if found is None or _step(path) > found.step:
                passed_over.append(f"{path} was never finished")
        for words in passed_over:
            used = "none, there is no other good one" if found is None else found.path.name
            message = f"checkpoint {words}; used instead: {used}"
            warnings.warn(f"grd: {message}", RuntimeWarning, stacklevel=2)
            emit(contract.EVENT_WARNING, message=message)
        if found is None:
            return None
        self._good.add(found.path)
        self._saved_step = found.step
        return str(found.path)

    # --- what the Trainer calls ---

    def on_init_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The Trainer was made."""
        if os.path.realpath(args.output_dir) != os.path.realpath(self.checkpoint_dir):
            raise UsageError(
                f"the Trainer saves into {args.output_dir}, grd looks in {self.checkpoint_dir}: give "
                "TrainingArguments(output_dir=checkpoint_dir)"
            )
        args.save_strategy = type(args.save_strategy)("no")
        args.save_total_limit = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        """Everything is restored."""
        self._arming.close()
        self._arming = contextlib.ExitStack()
        self._arming.enter_context(interruption.armed())
        now = time.monotonic()
        self._schedule = Schedule(
            self.every,
            now=now,
            max_lost_work=max_lost_work(),
            parameters=count_parameters(model),
            deadline=deadline_of_run(),
        )
        self._save_began = now
        if state.global_step:
            emit(
                contract.EVENT_RESUME,
                epoch=_completed(state),
                step=state.global_step,
                path=str(self.checkpoint_dir.absolute()),
            )
        self._report(args, state, force=True)
        if state.global_step == self._saved_step:
            self._stop_if_asked("before the first step")

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        """One optimizer step is done."""
        interruption.rearm()
        now = time.monotonic()
        self._schedule.step_ended(now)
        self._report(args, state)
        is_last = state.global_step >= state.max_steps
        if is_last or interruption.stop_requested() is not None or self._schedule.due_after_step(now):
            self._ask_to_save(state, control)
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        """One epoch is done."""
        now = time.monotonic()
        self._schedule.epoch_ended(now)
        self._report(args, state, force=True)
        due = self._schedule.due_after_epoch(now, _completed(state))
        if due or interruption.stop_requested() is not None:
            self._ask_to_save(state, control)
        return control

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The Trainer has written a folder."""
        path = self.checkpoint_dir / f"checkpoint-{state.global_step}"
        if path.is_dir() and state.is_world_process_zero:
            with interruption.saving():
                size = self._seal(path, state)
            now = time.monotonic()
            self._schedule.save_ended(now, now - self._save_began, size)
        self._saved_step = state.global_step
        self._stop_if_asked(f"after step {state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """Report the metrics that are numbers."""
        values: dict[str, Any] = {}
        for name, value in (logs or {}).items():
            if name in ("epoch", "step"):
                continue
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                values[name] = as_number(value)
        if values and state.is_world_process_zero:
            log_metrics(epoch=max(0, math.ceil(state.epoch or 0) - 1), step=state.global_step, **values)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Give the signals back."""
        self._arming.close()

    # --- saving and stopping ---

    def _ask_to_save(self, state: Any, control: Any) -> None:
        if self._saved_step == state.global_step:
            self._stop_if_asked(f"after step {state.global_step}")
            return
        self._save_began = time.monotonic()
        control.should_save = True

    def _seal(self, path: Path, state: Any) -> int:
        check_fence(self.checkpoint_dir)
        try:
            files = {}
            for file in sorted(item for item in path.rglob("*") if item.is_file() and item.name != SEAL):
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
                files[str(file.relative_to(path))] = digest(file)
            for folder in [item for item in path.rglob("*") if item.is_dir()]:
                fsync_folder(folder)
            seal = {
                "format": "grd.sealed/1",
                "step": state.global_step,
                "epoch": _completed(state),
                "lineage": self._lineage,
                "attempt": attempt_number(),
                "run_id": run_id(),
                "t": time.time(),
                "files": files,
            }
            atomic_write(path / SEAL, json.dumps(seal))
            fsync_folder(self.checkpoint_dir)
        except OSError as error:
            raise CheckpointError(
                f"{path} could not be sealed: {error.strerror or error}; those before it are untouched"
            ) from error
        self._good.add(path)
        size = sum(size for size, _ in files.values())
        emit(
            contract.EVENT_CHECKPOINT,
            epoch=_completed(state),
            step=state.global_step,
            path=str(path.absolute()),
            bytes=size,
            seconds=round(time.monotonic() - self._save_began, 6),
        )
        self._prune()
        return size

    def _prune(self) -> None:
        kept = good = 0
        for item in sealed(self.checkpoint_dir):
            if good >= NEVER_FEWER_THAN and kept + item.size > self.keep_bytes:
                (item.path / SEAL).unlink(missing_ok=True)  # first: half a folder must not look whole
                shutil.rmtree(item.path, ignore_errors=True)
                continue
            kept += item.size
            good += item.path in self._good or item.problem() is None

    def _set_aside(self) -> None:
        moving = _folders(self.checkpoint_dir)
        if not moving:
            return
        for number in itertools.count(1):
            target = self.checkpoint_dir / f"superseded-{number}"
            with contextlib.suppress(FileExistsError):
                target.mkdir()
                break
        for path in moving:
            path.replace(target / path.name)

    def _stop_if_asked(self, where: str) -> None:
        reason = interruption.stop_requested()
        if reason is None:
            return
        interruption.honoured()
        self._arming.close()
        raise ExperimentInterrupted(
            f"stopped {where} ({reason}); the state is saved: resume to go on", reason=reason
        )

    def _report(self, args: Any, state: Any, *, force: bool = False) -> None:
        if state.is_world_process_zero:
            report_progress(
                "epochs",
                round(state.epoch or 0.0, 3),
                args.num_train_epochs if args.max_steps <= 0 else None,
                force=force,
                step=state.global_step,
                steps=state.max_steps or None,
                batches=state.global_step,
                samples=state.global_step * _samples_of_step(args),
            )


def _samples_of_step(args: Any) -> int:
    """How many samples one optimizer step takes, over all processes; an epoch's last may take fewer."""
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


def sealed(folder: Path) -> list[Sealed]:
    """The folders with a seal, newest first: by lineage, then by step. Their files are not read."""
    found = []
    for path in _folders(folder):
        try:
            seal = json.loads((path / SEAL).read_text(encoding="utf-8"))
            files = {str(name): (int(size), str(value)) for name, (size, value) in seal["files"].items()}
            found.append(Sealed(path, _step(path), int(seal["lineage"]), files))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return sorted(found, key=lambda item: (item.lineage, item.step), reverse=True)


def _unsealed(folder: Path) -> list[Path]:
    known = {item.path for item in sealed(folder)}
    return [path for path in _folders(folder) if path not in known]


def _folders(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(path for path in folder.iterdir() if path.is_dir() and _FOLDER.fullmatch(path.name))
    return []


def _step(path: Path) -> int:
    match = _FOLDER.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _completed(state: Any) -> int:
    """The last completed epoch; -1 before the first."""
    return int((state.epoch or 0.0) + 1e-9) - 1
