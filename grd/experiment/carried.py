"""What loaders keep from one pass to the next, such as a sampler that counts its epochs.

A position inside a pass (`Steps.position`) has it for that pass. The passes of an epoch are told apart by
their number, and one object that several of them go through is kept once.
"""

from __future__ import annotations

import copy
from typing import Any

from grd.experiment.loader import Steps


class Carried:
    """The states of the loaders that a training goes through, by the number of the pass in its epoch."""

    def __init__(self) -> None:
        self._owners: dict[int, Any] = {}
        self._saved: dict[int, Any] = {}

    def pass_begins(self, call: int, steps: Steps) -> None:
        """Let the loader go on from what was saved, if this is its first pass since the resume."""
        saved = self._saved.pop(call, None)
        if steps.owner is not None and saved is not None:
            steps.owner.load_state_dict(saved)
        self._owners[call] = steps.owner

    def take(self, inside: int | None) -> dict[int, Any]:
        """The states now; without that of the loader whose pass ``inside`` of the epoch is under way."""
        seen = set() if inside is None else {id(self._owners.get(inside))}
        taken = dict(self._saved)  # of those that have not come again yet
        for call, owner in sorted(self._owners.items()):
            if owner is not None and id(owner) not in seen:
                seen.add(id(owner))
                taken[call] = copy.deepcopy(owner.state_dict())
        return taken

    def put_back(self, saved: dict[int, Any]) -> None:
        """Keep what `take` gave until the loaders are there."""
        self._saved = dict(saved)
