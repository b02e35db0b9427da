"""Hugging Face trainings that survive: a callback for ``transformers.Trainer``.

    survive = Survive(checkpoint_dir, resume=resume)
    trainer = Trainer(model, arguments, callbacks=[survive], ...)
    trainer.train(resume_from_checkpoint=survive.checkpoint)

The Trainer writes its own folders, ``checkpoint-STEP``, file by file. Each is sealed once it is whole: only a
sealed one whose bytes are still those that were sealed is resumed from. Needs transformers 4.46 or newer.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grd import contract
from grd.errors import UsageError
from grd.experiment import interruption, sealed_folder
from grd.experiment.checkpoint_writer import budget_of, check_fence
from grd.experiment.events import emit
from grd.experiment.loop_folder import folder_of_loop, warn_without_folder
from grd.experiment.reporting import as_number, log_metrics, report_progress
from grd.experiment.run_limits import deadline_of_run, max_lost_work
from grd.experiment.schedule import Every, Schedule
from grd.experiment.stopped import stopped
from grd.experiment.training_state import count_parameters

if TYPE_CHECKING:
    _TrainerCallback = Any
else:
    try:
        from transformers import TrainerCallback as _TrainerCallback
    except ImportError as error:
        raise ImportError(
            "grd.experiment.huggingface needs transformers: pip install 'grd-notebooks[huggingface]'"
        ) from error


class Survive(_TrainerCallback):
    """Saves at the right moments, seals what the Trainer has written, and stops well when asked to.

    While it trains, the Trainer saves into ``checkpoint_dir``, whatever its ``output_dir``. ``every``:
    ``"auto"`` (by measured cost), a number of epochs, or a duration such as ``"5m"``; it takes the place of
    the Trainer's ``save_strategy``, which counts besides where ``load_best_model_at_end`` needs it.
    ``keep_bytes`` bounds the folders kept (default GRD_CHECKPOINT_BUDGET, else 20 GB; never fewer than two
    good ones). ``resume=False`` moves earlier folders aside. Without ``checkpoint_dir`` the Trainer saves
    where and when it would without grd, and nothing of that is sealed. Losses and weights are those of an
    uninterrupted training where the data draw no random numbers while they are loaded; the Trainer keeps no
    position for those.

    Raises ExperimentInterrupted out of ``trainer.train`` once a stop request is honoured, the state saved;
    UsageError for a ``resume`` that is a text.
    """

    def __init__(
        self,
        checkpoint_dir: Path | str | None,
        *,
        resume: bool = False,
        every: str | int = "auto",
        keep_bytes: int | str | None = None,
    ) -> None:
        if isinstance(resume, str):
            raise UsageError(f"Survive(resume=...) must be True or False, not the text {resume!r}")
        self.every = Every.parse(every)
        self.keep_bytes = budget_of(keep_bytes)
        self.checkpoint_dir = folder_of_loop(checkpoint_dir) if checkpoint_dir else None
        self._resume = bool(resume)
        self._arming = contextlib.ExitStack()
        self._saved_step: int | None = None
        self._good: set[Path] = set()
        self._lineage = 1
        if self.checkpoint_dir is None:
            warn_without_folder(stacklevel=2)
            return
        self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        check_fence(self.checkpoint_dir)
        newest = max((item.lineage for item in sealed_folder.sealed(self.checkpoint_dir)), default=0)
        self._lineage = max(1, newest) if resume else newest + 1
        if not resume:
            sealed_folder.set_aside(self.checkpoint_dir)

    @property
    def checkpoint(self) -> str | None:
        """What ``trainer.train(resume_from_checkpoint=...)`` goes on from: the newest good folder, or None.

        What is damaged, or was never finished, is named in a warning.
        """
        if self.checkpoint_dir is None or not self._resume:
            return None
        found, passed_over = sealed_folder.newest_good(self.checkpoint_dir)
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

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        """Everything is restored."""
        self._arming.close()
        self._arming = contextlib.ExitStack()
        self._arming.enter_context(interruption.armed())
        if self.checkpoint_dir is not None:
            self._take_over_saving(args)
        now = time.monotonic()
        self._schedule = Schedule(
            self.every,
            now=now,
            max_lost_work=max_lost_work(),
            parameters=count_parameters(model),
            deadline=deadline_of_run(),
        )
        self._save_began = now
        if state.global_step and self.checkpoint_dir is not None:
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
        self._save_began = now = time.monotonic()
        self._schedule.step_ended(now)
        self._report(args, state)
        is_last = state.global_step >= state.max_steps
        if is_last or interruption.stop_requested() is not None or self._schedule.due_after_step(now):
            self._ask_to_save(state, control)
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        """One epoch is done."""
        self._save_began = now = time.monotonic()
        self._schedule.epoch_ended(now)
        self._report(args, state, force=True)
        due = self._schedule.due_after_epoch(now, _completed(state))
        if due or interruption.stop_requested() is not None:
            self._ask_to_save(state, control)
        return control

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The Trainer has written a folder."""
        if self.checkpoint_dir is None:
            return
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
        self._save_began = time.monotonic()  # the Trainer logs and evaluates before it saves

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """An evaluation is done."""
        self._save_began = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Give the signals back."""
        self._arming.close()

    # --- saving and stopping ---

    def _take_over_saving(self, args: Any) -> None:
        """Until the training ends: what the notebook saves afterwards goes to its own output_dir."""
        for name in ("output_dir", "save_strategy", "save_total_limit", "save_only_model"):
            self._arming.callback(setattr, args, name, getattr(args, name))
        args.output_dir = str(self.checkpoint_dir)
        args.save_total_limit, args.save_only_model = None, False
        if not args.load_best_model_at_end:
            args.save_strategy = type(args.save_strategy)("no")

    def _ask_to_save(self, state: Any, control: Any) -> None:
        if self.checkpoint_dir is None or self._saved_step == state.global_step:
            self._stop_if_asked(f"after step {state.global_step}")
            return
        control.should_save = True

    def _seal(self, path: Path, state: Any) -> int:
        size = sealed_folder.seal(
            path, step=state.global_step, epoch=_completed(state), lineage=self._lineage
        )
        self._good.add(path)
        emit(
            contract.EVENT_CHECKPOINT,
            epoch=_completed(state),
            step=state.global_step,
            path=str(path.absolute()),
            bytes=size,
            seconds=round(time.monotonic() - self._save_began, 6),
        )
        best = state.best_model_checkpoint
        sealed_folder.prune(
            path.parent, self.keep_bytes, good=self._good, spared=[] if best is None else [Path(best)]
        )
        return size

    def _stop_if_asked(self, where: str) -> None:
        reason = interruption.stop_requested()
        if reason is None:
            return
        interruption.honoured()
        self._arming.close()
        raise stopped(
            where,
            reason,
            saves=self.checkpoint_dir is not None,
            saved=self._saved_step is not None,
            failure=None,
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


def _completed(state: Any) -> int:
    """The last completed epoch; -1 before the first."""
    return int((state.epoch or 0.0) + 1e-9) - 1
