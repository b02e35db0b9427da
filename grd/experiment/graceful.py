"""A loop over epochs that ends well when it is asked to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grd.errors import ExperimentInterrupted
from grd.experiment import interruption
from grd.experiment.checkpoint_handler import CheckpointHandler


class GracefulExperiment:
    """Runs epochs, saves every fifth and the last, and saves once more before a requested stop.

    ``current_epoch`` is the last completed epoch, -1 before the first.
    """

    def __init__(self, checkpoint_handler: CheckpointHandler) -> None:
        self.checkpoint_handler = checkpoint_handler
        self.interrupted = False
        self.current_epoch = -1
        interruption.watch(self)

    def run(
        self,
        train_one_epoch: Callable[[int], Any],
        num_epochs: int,
        *,
        model: Any = None,
        optimizer: Any = None,
        start_epoch: int = 0,
        every: int = 5,
        metadata: dict[str, Any] | None = None,
    ) -> list[float | None]:
        """Call ``train_one_epoch(epoch)`` from ``start_epoch`` to ``num_epochs - 1``; returns the losses.

        What it returns is the epoch's loss, or None. Raises ExperimentInterrupted after a stop request,
        when the state is saved with the metadata ``{"interrupted": True}``.
        """
        losses: list[float | None] = []
        self.current_epoch = start_epoch - 1
        saved: int | None = None
        facts = {"total_epochs": num_epochs, **(metadata or {})}

        def save(**more: Any) -> None:
            nonlocal saved
            loss = losses[-1] if losses else None
            self.checkpoint_handler.save_checkpoint(
                self.current_epoch, model, optimizer, loss, {**facts, **more}
            )
            saved = self.current_epoch

        def asked() -> bool:
            return self.interrupted or self.checkpoint_handler.check_interrupted()

        with interruption.armed():
            while True:
                if asked():
                    reason = interruption.stop_requested()
                    self.interrupted = True
                    if saved != self.current_epoch:  # else the request came while just that was being saved
                        save(interrupted=True)
                    raise ExperimentInterrupted(
                        f"stopped after epoch {self.current_epoch}; resume to go on", reason=reason
                    )
                if self.current_epoch + 1 >= num_epochs:
                    return losses
                epoch = self.current_epoch + 1
                result = train_one_epoch(epoch)
                losses.append(None if result is None else float(result))
                self.current_epoch = epoch
                due = (epoch + 1 - start_epoch) % every == 0 or epoch + 1 == num_epochs
                if due and not asked():
                    save()
