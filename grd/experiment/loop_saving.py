"""Saving the state of a training loop: at the moments that are due, in a thread too, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from grd.errors import CheckpointError, CheckpointFenced, CheckpointRefused
from grd.experiment import interruption
from grd.experiment.background_save import BackgroundSave
from grd.experiment.checkpoint_handler import AsyncSave, CheckpointHandler
from grd.experiment.run_limits import deadline_of_run, max_lost_work
from grd.experiment.schedule import Every, Schedule

Position = tuple[int, int | None]
"""The epoch, and inside it the step."""


class Saving:
    """The saves of one training; without ``handler`` there are none. ``warn(key, message)`` tells once."""

    schedule: Schedule

    def __init__(
        self,
        handler: CheckpointHandler | None,
        *,
        total: int,
        every: Every,
        allow_pickle: bool,
        async_save: AsyncSave,
        warn: Callable[[str, str], None],
    ) -> None:
        self.handler = handler
        self.saved_at: Position | None = None
        self.failure: str | None = None
        """Why the last save failed."""

        self._total = total
        self._every = every
        self._allow_pickle = allow_pickle
        self._async_save = async_save
        self._warn = warn

    def begin(self, *, resumed: bool, parameters: int) -> None:
        """The training begins: time is counted from here."""
        between = None
        if self.handler is not None:
            between = self.handler.seconds_between_interruptions() if resumed else None
            self.handler.begin_work()
        self.schedule = Schedule(
            self._every,
            now=time.monotonic(),
            max_lost_work=max_lost_work(),
            parameters=parameters,
            deadline=deadline_of_run(),
            between_interruptions=between,
        )

    def save(
        self,
        at: Position,
        content: Callable[[], dict[str, Any]],
        *,
        loss: Any,
        metrics: dict[str, Any],
        is_last: bool = False,
    ) -> None:
        """Save what ``content`` takes, unless that was done; a failure is told and kept, not raised.

        What a stop request or the last epoch saves is waited for. Raises CheckpointFenced and
        CheckpointRefused.
        """
        if self.handler is None:
            return
        waits = is_last or interruption.stop_requested() is not None
        with interruption.saving():  # from the first look at the state: reading it may take long too
            if waits:
                self.hear(wait=True)
            if self.saved_at != at:
                async_save = False if waits else self._async_save
                self._save_now(self.handler, at, content, loss, metrics, async_save)

    def _save_now(
        self,
        handler: CheckpointHandler,
        at: Position,
        take: Callable[[], dict[str, Any]],
        loss: Any,
        metrics: dict[str, Any],
        async_save: AsyncSave,
    ) -> None:
        epoch, step = at
        started = time.monotonic()
        self.hear(wait=True)
        content = take()
        try:
            path = handler.save_checkpoint(
                epoch,
                content.pop("model_state", None),
                content.pop("optimizer_state", None),
                loss,
                {"total_epochs": self._total, "metrics": metrics},
                step=step,
                allow_pickle=self._allow_pickle,
                async_save=async_save,
                **content,
            )
        except (CheckpointFenced, CheckpointRefused):
            raise
        except CheckpointError as error:
            self._has_failed(error)
            self.schedule.save_ended(time.monotonic(), 0.0, None)
            return
        self.saved_at = at
        now = time.monotonic()
        if handler.is_saving:
            self.schedule.background_save_began(now, now - started)
            return
        self.failure = None
        self.schedule.save_ended(now, now - started, path.stat().st_size)
        self._tell_of_overhead(step)

    def _has_failed(self, error: CheckpointError) -> None:
        # The training is worth more than this one save: it goes on, and is told.
        self.failure = str(error)
        self._warn(f"save {error.__cause__}", str(error))

    def hear(self, *, wait: bool) -> None:
        """What has become of a save in the background. Raises CheckpointFenced."""
        try:
            ended = None if self.handler is None else self.handler.finished(wait=wait)
        except CheckpointError as error:
            self.saved_at = None
            self._has_failed(error)
            return
        if ended is not None:
            self._save_ended(ended)

    def _save_ended(self, ended: BackgroundSave) -> None:
        if isinstance(ended.error, CheckpointFenced):
            raise ended.error
        if ended.saved is None:
            self.saved_at = None
            self._has_failed(ended.error or CheckpointError(f"{ended.job.name} could not be saved"))
            self.schedule.background_save_ended(0.0, None)
            return
        self.failure = None
        self.schedule.background_save_ended(ended.saved.seconds, ended.saved.size)
        self._tell_of_overhead(ended.job.step)

    def end(self, error: type[BaseException] | None, *_: Any) -> None:
        """As an exit of the training: wait for the save in the background, and give its memory back."""
        if self.handler is None:
            return
        try:
            with interruption.saving():
                self.hear(wait=True)
        except CheckpointFenced:
            if error is None:
                raise
        finally:
            self.handler.release_memory()

    def _tell_of_overhead(self, step: int | None) -> None:
        overhead = self.schedule.expected_overhead
        if self._every == Every() and overhead is not None and overhead > 0.05 and step is not None:
            self._warn(
                "overhead",
                f"saving takes about {overhead:.0%} of the time, to risk no more work than was agreed",
            )
