"""The loop behind ``training.epochs``: restore, hand out epochs, save at the right moments, stop well."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from grd import contract
from grd.errors import CheckpointError, ResumeError, UsageError
from grd.experiment import checkpoint_file, interruption, rng
from grd.experiment.checkpoint_folder import available_epochs
from grd.experiment.checkpoint_handler import AsyncSave, CheckpointHandler
from grd.experiment.counting import BatchSizes, Count
from grd.experiment.epoch import Epoch, Inside
from grd.experiment.events import emit
from grd.experiment.live_state import LiveState, Parts
from grd.experiment.loader import OrderChanged, Steps, steps_of
from grd.experiment.loop_saving import Saving
from grd.experiment.reporting import report_progress, under_way
from grd.experiment.schedule import Every
from grd.experiment.stopped import stopped
from grd.experiment.training_state import count_parameters

T = TypeVar("T")


@dataclass
class Loop:
    """One training: its parts, where it is, and what it has recorded."""

    total: int
    parts: Parts
    handler: CheckpointHandler | None
    resume: bool
    every: Every
    seed: int | None
    allow_pickle: bool
    async_save: AsyncSave
    history: list[dict[str, Any]] = field(default_factory=list)
    _first: int = 0
    _inside: Inside | None = None
    _restored_from: tuple[int, int | None] | None = None
    _at_start: bool = False
    """Whether the parts are those of the interrupted epoch's beginning, for the code that stands there."""

    _ended_early: bool = False
    _seed: int = 0
    _armed: object | None = None
    _after_another: bool = False
    """Whether another training of this process had ended in the folder before."""

    _told: set[str] = field(default_factory=set)
    _count: Count = field(default_factory=Count)
    _steps_in_epoch: int | None = None
    """Those of the last whole epoch, in all its passes."""

    def run(self) -> Iterator[Epoch]:
        """Hand out the epochs that are still to be trained."""
        self._arming = contextlib.ExitStack()
        with self._arming:
            self._armed = self._arming.enter_context(interruption.armed())
            self._arming.callback(self._disarmed)
            self._tell_of_another()
            self._live = LiveState(self.parts)
            self._saving = Saving(
                self.handler, total=self.total, every=self.every, allow_pickle=self.allow_pickle,
                async_save=self.async_save, warn=self._warn,
            )  # fmt: skip
            if self.handler is not None:
                self._live.watch(self._arming)
            self._arming.enter_context(under_way("epochs"))
            self._arming.push(self._saving.end)  # also where the training is left by an error
            self._restore()
            self._saving.begin(resumed=self.resume, parameters=count_parameters(self.parts.model))
            self._stop_if_asked(f"before epoch {self._first}")
            if self._ended_early:
                return
            if self.handler is not None and self._first < self.total:
                checkpoint_file.prepare(self._content(self._first - 1, None), allow_pickle=self.allow_pickle)
            self._report(self._first, force=True)
            self._stop_if_asked(f"before epoch {self._first}")
            for index in range(self._first, self.total):
                epoch = self._begin(index)
                started = time.monotonic()
                yield epoch
                interruption.rearm(self._armed)
                self._end(epoch, time.monotonic() - started)
                if epoch._ends_training:
                    return

    def _disarmed(self) -> None:
        self._armed = None  # an epoch may be gone through after its loop is closed

    def _begin(self, index: int) -> Epoch:
        resumed, self._inside = self._inside, None
        epoch = Epoch.begin(self, index, resumed)
        if resumed is not None and not resumed.outside:
            rng.restore(resumed.rng_at_epoch or {})
        if resumed is not None and index > 0:
            self._find_start(index, resumed)
        self._look_outside(epoch, 0)
        return epoch

    def _find_start(self, index: int, resumed: Inside) -> None:
        """Make the parts those of the beginning of epoch ``index``, if there is a checkpoint of it yet."""
        saved = None
        if self.handler is not None and index - 1 in available_epochs(self.handler.checkpoint_dir):
            with contextlib.suppress(CheckpointError):
                saved = self.handler.load_checkpoint(epoch=index - 1, allow_pickle=self.allow_pickle)
        if saved is not None and self._is_start(saved, resumed):
            self._live.undo(saved)
            self._at_start = True

    def _is_start(self, saved: dict[str, Any], resumed: Inside) -> bool:
        """Whether ``saved`` is of this very training: an epoch may have been trained again otherwise."""
        if not resumed.outside or saved.get("rng") is None or not self._live.fits(saved):
            return False
        same = not rng.differing(saved["rng"], resumed.outside[0]["rng"])
        return same and repr(saved.get("history")) == repr(self.history)  # text, since NaN is not NaN

    def _leave_start(self) -> None:
        if self._at_start:
            self._live.undo(self._saved_again())
            self._at_start = False

    # --- inside an epoch ---

    def _look_outside(self, epoch: Epoch, passes: int) -> None:
        """Remember what the code after so many passes finds, or put it back where it runs again."""
        resumed = epoch._resumed
        if resumed is not None and passes < len(resumed.outside):
            before = resumed.outside[passes]
            self._live.put_back_found(before)
        else:
            before = self._live.found(kept=self.handler is not None)
        epoch._outside.append(before)

    def steps(self, epoch: Epoch, loader: Iterable[T]) -> Iterator[T]:
        """`Epoch.steps`."""
        if epoch._in_steps:
            raise UsageError(
                "two epoch.steps() are gone through side by side, where no one step can be gone on from: use "
                "one for both, epoch.steps(zip(a, b))"
            )
        epoch._call += 1
        resumed = epoch._resumed
        if resumed is not None and epoch._call < resumed.call:
            self._leave_start()
            self._look_outside(epoch, epoch._call + 1)
            return  # done before the interruption
        steps = steps_of(loader, self._seed, int(epoch))
        if steps.refusal is not None and self.handler is not None:
            self._warn(
                "refusal",
                f"a resume starts the interrupted epoch again, since of this loader {steps.refusal}",
            )
        self._live.carried.pass_begins(epoch._call, steps)
        sizes = BatchSizes(loader)
        epoch._in_steps = True
        try:
            done, batches = (
                (0, steps.begin(0, None)) if resumed is None else self._go_on(epoch, steps, resumed)
            )
            for batch in batches:
                yield batch
                interruption.rearm(self._armed)
                self._count.add(sizes.of(done))
                done += 1
                epoch._step += 1
                self._step_done(epoch, steps, done)
            self._look_outside(epoch, epoch._call + 1)
        except GeneratorExit:  # a break
            if not sys.is_finalizing():
                self._look_outside(epoch, epoch._call + 1)
            raise
        finally:
            epoch._in_steps = False

    def _go_on(self, epoch: Epoch, steps: Steps, resumed: Inside) -> tuple[int, Iterator[Any]]:
        """The pass that was interrupted: how many of its steps are done, and the batches after them."""
        done = 0 if steps.refusal is not None else resumed.call_steps
        batches = None
        if done:
            try:
                batches = steps.begin(done, resumed.loader)
            except OrderChanged:
                done = 0
                self._warn(
                    "order", "the data are in another order than before: the epoch starts again from its top"
                )
        self._undo_outside(epoch, resumed)
        if batches is None:
            epoch._step -= resumed.call_steps
            return 0, steps.begin(0, None)
        if steps.is_inexact(resumed.rng):
            self._warn(
                "replay",
                "both the loop and what epoch.steps goes through draw random numbers at every batch, so "
                "those before the position were drawn again with other ones: the resume is exact only if no "
                "batch depends on the batches before it",
            )
        # A loader draws from the global generators while it starts and while it skips.
        rng.restore(resumed.rng)
        return done, batches

    def _undo_outside(self, epoch: Epoch, resumed: Inside) -> None:
        """Undo what code outside of the steps has done since the epoch began: it was done before the save."""
        epoch._resumed = None
        epoch._gathered(resumed)
        self._at_start = False
        self._live.undo(self._saved_again())

    def _saved_again(self) -> dict[str, Any]:
        """The checkpoint that this training goes on from. Raises ResumeError."""
        # Read again rather than kept since: the memory for a second state may not be there.
        saved = self.handler.load_checkpoint(allow_pickle=self.allow_pickle) if self.handler else None
        if saved is None or (int(saved["epoch"]), saved.get("step")) != self._restored_from:
            raise ResumeError("the checkpoint that this training goes on from is gone: resume it once more")
        return saved

    def _step_done(self, epoch: Epoch, steps: Steps, done: int) -> None:
        self._saving.hear(wait=False)
        now = time.monotonic()
        self._saving.schedule.step_ended(now)
        self._report(int(epoch) + self._share(epoch, steps, done), step=done, steps=steps.total)
        reason = interruption.stop_requested()
        if reason is None and (done == steps.total or not self._saving.schedule.due_after_step(now)):
            return
        if steps.refusal is None:
            inside = Inside(
                call=epoch._call, call_steps=done, step=epoch._step, loader=steps.position(),
                rng=rng.capture(), record=epoch._record, state=epoch.state, means=epoch._means,
                outside=epoch._outside,
            )  # fmt: skip
            self._save(int(epoch), inside, ended_early=False)
        # Asked again: a stop that came while the state was being saved finds all of it saved.
        self._stop_if_asked(f"in epoch {int(epoch)} after step {epoch._step}")

    def _share(self, epoch: Epoch, steps: Steps, done: int) -> float:
        """How much of the epoch is done; it never falls, though a second pass (a validation) begins anew."""
        if self._steps_in_epoch:
            return min(1.0, epoch._step / self._steps_in_epoch)
        if epoch._call > 0:
            return 1.0
        return min(1.0, done / steps.total) if steps.total else 0.0

    def _report(self, n: float, *, force: bool = False, **more: Any) -> None:
        report_progress("epochs", round(n, 3), self.total, force=force, **self._count.told(), **more)

    def _end(self, epoch: Epoch, seconds: float) -> None:
        self._saving.hear(wait=False)
        if epoch._resumed is not None:
            self._warn(
                "pass",
                f"epoch {int(epoch)} was interrupted in its pass {epoch._resumed.call + 1} over batches, "
                "which did not come again: what it had not done yet is left out",
            )
            self._undo_outside(epoch, epoch._resumed)
        now = time.monotonic()
        self._saving.schedule.epoch_ended(now)
        self.note(epoch)
        if epoch._call >= 0:
            self._steps_in_epoch = epoch._step
        self._report(int(epoch) + 1, force=True)
        is_last = int(epoch) == self.total - 1 or epoch._ends_training
        if epoch._call < 0 and self.handler is not None and seconds > self._saving.schedule.max_lost_work:
            self._warn(
                "long", f"an epoch takes {seconds:.0f} s: use epoch.steps(loader), or all of it is at risk"
            )
        due = is_last or self._saving.schedule.due_after_epoch(now, int(epoch))
        if due or interruption.stop_requested() is not None:
            self._save(int(epoch), None, ended_early=epoch._ends_training, is_last=is_last)
            if is_last and self.handler is not None:
                _ended_here.add(os.path.realpath(self.handler.checkpoint_dir))
            self._stop_if_asked(f"after epoch {int(epoch)}")

    def note(self, epoch: Epoch) -> None:
        """Put the epoch's record into the history, once."""
        if not self.history or self.history[-1] is not epoch._record:
            self.history.append(epoch._record)

    # --- saving and restoring ---

    def _content(self, epoch: int, inside: Inside | None, ended_early: bool = False) -> dict[str, Any]:
        content = self._live.take()
        done = self.history
        if inside is not None and done and done[-1] is inside.record:
            done = done[:-1]
        content["history"] = [dict(record) for record in done]
        content["training"] = {
            "seed": self._seed,
            "total": self.total,
            "ended_early": ended_early,
            "after_another": self._after_another,
            "inside": None if inside is None else dict(vars(inside)),
            "loaders": self._live.carried.take(None if inside is None else inside.call),
        }
        return content

    def _save(self, epoch: int, inside: Inside | None, *, ended_early: bool, is_last: bool = False) -> None:
        record = self.history[-1] if self.history else {}
        self._saving.save(
            (epoch, None if inside is None else inside.step),
            lambda: self._content(epoch, inside, ended_early),
            loss=record.get("loss") if inside is None else inside.record.get("loss"),
            metrics={name: value for name, value in record.items() if name != "epoch"},
            is_last=is_last,
        )

    def _tell_of_another(self) -> None:
        if self.handler is None or os.path.realpath(self.handler.checkpoint_dir) not in _ended_here:
            return
        self._after_another = True
        if not self.resume:
            self._warn(
                "another",
                f"another training has ended in {self.handler.checkpoint_dir} and this one takes the place "
                "of its checkpoints: where both are to be resumed, give each a checkpoint_dir of its own",
            )

    def _restore(self) -> None:
        saved = None
        if self.handler is not None and self.resume:
            saved = self.handler.load_checkpoint(allow_pickle=self.allow_pickle)
        if saved is None:
            self._seed = rng.process_seed() if self.seed is None else int(self.seed)
            return
        training = saved.get("training") or {}
        inside = training.get("inside")
        self._first = int(saved["epoch"]) + 1
        self._at_start = inside is not None and self._first == 0 and bool(inside.get("outside"))
        if self._at_start:  # the notebook has just made what the first epoch begins with
            self._live.expect(saved, on_missing=self._tell_of_missing)
        else:
            self._live.put_back(saved, on_missing=self._tell_of_missing)
        self.history.extend(saved.get("history") or [])
        if training.get("after_another") and not self._after_another:
            self._warn(
                "another",
                "the newest checkpoint is of the second training of a process that saved both to one folder: "
                "if this is the first, start it fresh with a checkpoint_dir of its own",
            )
            self._after_another = True
        self._seed = int(training.get("seed", rng.process_seed() if self.seed is None else self.seed))
        self._live.carried.put_back(training.get("loaders") or {})
        self._ended_early = bool(training.get("ended_early", False))
        self._restored_from = (int(saved["epoch"]), saved.get("step"))
        if inside is not None and self._first < self.total:
            self._inside = Inside(**inside)
        elif saved.get("rng") is not None:
            rng.restore(saved["rng"])
        emit(
            contract.EVENT_RESUME,
            epoch=int(saved["epoch"]),
            step=saved.get("step"),
            path=None if self.handler is None else str(self.handler.checkpoint_dir.absolute()),
        )

    def _tell_of_missing(self, name: str) -> None:
        self._warn(name, f"the checkpoint has no {name}: that part goes on as it is")

    # --- stopping ---

    def _stop_if_asked(self, where: str) -> None:
        reason = interruption.stop_requested()
        if reason is None:
            return
        with interruption.saving():
            self._saving.hear(wait=True)
        interruption.honoured()
        # The generator lives on in the traceback of a cell that ended here; the signals must not.
        self._arming.close()
        raise stopped(
            where,
            reason,
            saves=self.handler is not None,
            saved=self._saving.saved_at is not None,
            failure=self._saving.failure,
        )

    def _warn(self, key: str, message: str) -> None:
        if key in self._told:
            return
        self._told.add(key)
        warnings.warn(f"grd: {message}", RuntimeWarning, stacklevel=4)
        emit(contract.EVENT_WARNING, message=message)


_ended_here: set[str] = set()
