"""A loader for a training whose framework asks it for its position and gives that back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from grd.experiment.loader import Steps, steps_of


class ResumableLoader:
    """The batches of a loader, epoch after epoch, in an order that depends on seed and epoch only.

    Lightning saves its position with the checkpoint. See `Epoch.steps` for what it makes of which loader.
    """

    def __init__(self, loader: Any, seed: int) -> None:
        self.source = loader
        self.seed = seed
        self._epoch = 0
        self._start = self._done = 0
        self._steps: Any = None
        self._resumed: dict[str, Any] | None = None
        self._carried: Any = None
        """What the loader had kept from the passes before, until the next one begins."""

        self._ended = False
        """The pass of `_epoch` has given batches, so that the next one is another epoch's."""

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Any]:
        if self._ended:  # Lightning may ask twice before it takes the first batch
            self._epoch += 1
            self._start, self._resumed, self._ended = 0, None, False
        self._done = self._start
        self._steps = steps_of(self.source, self.seed, self._epoch)
        if self._carried is not None and self._steps.owner is not None:
            self._steps.owner.load_state_dict(self._carried)
        self._carried = None
        return self._counted(self._steps, None if self._resumed is None else self._resumed["loader"])

    def _counted(self, steps: Steps, resumed: dict[str, Any] | None) -> Iterator[Any]:
        for batch in steps.begin(self._start, resumed):
            self._ended = True
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position, as Lightning keeps it."""
        begun = self._ended and self._done < (self._steps.total or float("inf"))
        owner = None if self._steps is None or begun else self._steps.owner
        return {
            "seed": self.seed,
            "epoch": self._epoch + (self._ended and not begun),
            "done": self._done if begun else 0,
            "loader": self._steps.position() if begun else None,
            "carried": None if owner is None else copy.deepcopy(owner.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.seed, self._epoch, self._start = int(state["seed"]), int(state["epoch"]), int(state["done"])
        self._resumed = state if self._start else None
        self._carried = state.get("carried")
        self._ended = False


def is_resumable(loaders: Any) -> bool:
    """Whether all of ``loaders``, one or dictionaries and lists of them, are such."""
    if isinstance(loaders, dict):
        return all(map(is_resumable, loaders.values()))
    if isinstance(loaders, (list, tuple)):
        return all(map(is_resumable, loaders))
    return isinstance(loaders, ResumableLoader)
