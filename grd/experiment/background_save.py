"""One save that goes on while the training does."""

from __future__ import annotations

import threading
from collections.abc import Callable

from grd.errors import CheckpointError
from grd.experiment import interruption
from grd.experiment.checkpoint_writer import Job, Saved
from grd.settings import format_duration

LIMIT_SECONDS = 3600.0


class BackgroundSave:
    """A save in a thread of its own, begun at once. A process that ends normally waits for it.

    ``write`` gets the job and never touches what the training may change. Its errors are kept for whoever
    asks: a failed save is no reason to end a training that runs.
    """

    def __init__(self, job: Job, write: Callable[[Job], Saved]) -> None:
        self.job = job
        self.saved: Saved | None = None
        self.error: CheckpointError | None = None
        self._write = write
        self._done = threading.Event()
        self._entered = threading.Event()
        threading.Thread(target=self._run, name="grd-save", daemon=True).start()
        self._entered.wait(LIMIT_SECONDS)

    def _run(self) -> None:
        with interruption.saving_in_background():
            self._entered.set()
            try:
                self.saved = self._write(self.job)
            except CheckpointError as error:
                self.error = error
            except BaseException as error:
                self.error = CheckpointError(f"{self.job.name} could not be saved: {error}")
                self.error.__cause__ = error
            finally:
                self._done.set()

    @property
    def is_done(self) -> bool:
        """Whether the file is there, or will not be."""
        return self._done.is_set()

    def finish(self) -> None:
        """Until `is_done`. Raises CheckpointError if that takes too long for any disk that still answers."""
        if not self._done.wait(LIMIT_SECONDS):
            raise CheckpointError(
                f"{self.job.name} has not been written for {format_duration(LIMIT_SECONDS)}: the disk hangs; "
                "the versions before it are untouched"
            )
