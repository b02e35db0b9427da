"""The objects of a training as they are now: taken for a save, put back by a resume."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grd.experiment import outside, rng
from grd.experiment.carried import Carried
from grd.experiment.gradients import Gradients
from grd.experiment.module_flags import ModuleFlags
from grd.experiment.training_state import PuttingBack, UserState, take


@dataclass
class Parts:
    """What belongs to the training: objects with ``state_dict()``, and the user's own ``state``."""

    model: Any = None
    optimizer: Any = None
    scheduler: Any = None
    scaler: Any = None
    ema: Any = None
    state: UserState | None = None

    def items(self) -> list[tuple[str, Any]]:
        """Name in the checkpoint, and object, of each part there is."""
        named = [
            ("model_state", self.model),
            ("optimizer_state", self.optimizer),
            ("scheduler_state", self.scheduler),
            ("scaler_state", self.scaler),
            ("ema_state", self.ema),
            ("state", self.state),
        ]
        return [(name, part) for name, part in named if part is not None]


class LiveState:
    """The parts with what they hold beside their states, and what loaders keep from pass to pass.

    Made before anything is restored: what the notebook gave is what was not changed yet.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.carried = Carried()
        self._gradients = Gradients(parts.optimizer)
        self._flags = ModuleFlags(parts.model)
        self._restored: list[tuple[str, Any]] = []
        """The parts that the checkpoint had."""

        self._new_keys: set[Any] = set()
        """Of the user's ``state``: those that the checkpoint did not have."""

    def watch(self, until: contextlib.ExitStack) -> None:
        """Begin to see what the optimizers use."""
        self._gradients.watch()
        until.callback(self._gradients.close)

    def take(self) -> dict[str, Any]:
        """What a checkpoint has of it, by name; ``gradients`` only where some are still to be used."""
        content = {name: take(part) for name, part in self.parts.items()}
        content["rng"] = rng.capture()
        gradients = self._gradients.take()
        if gradients:
            content["gradients"] = gradients
        content["module_flags"] = self._flags.take()
        return content

    def put_back(self, saved: Mapping[str, Any], *, on_missing: Callable[[str], None]) -> None:
        """Make everything what it was; the random generators are left to the caller. Raises ResumeError."""
        self.expect(saved, on_missing=on_missing)
        putting = PuttingBack()
        for name, part in self._restored:
            putting.restore(part, saved[name], name.removesuffix("_state"))
        self._put_back_the_rest(saved)

    def expect(self, saved: Mapping[str, Any], *, on_missing: Callable[[str], None]) -> None:
        """Leave everything as it is; ``saved`` is what `undo` will be given."""
        for name, part in self.parts.items():
            if saved.get(name) is None:
                on_missing(name)
                continue
            self._restored.append((name, part))
            if isinstance(part, UserState):
                self._new_keys = part.unknown_to(saved[name])

    def undo(self, saved: Mapping[str, Any]) -> None:
        """Make it what ``saved`` says, whatever code that ran again has done. Raises ResumeError."""
        putting = PuttingBack()
        for name, part in self._restored:
            if isinstance(part, UserState):
                part.forget_others(saved[name], keep=self._new_keys)
            putting.restore(part, saved[name], name.removesuffix("_state"))
        self._put_back_the_rest(saved)

    def fits(self, saved: Mapping[str, Any]) -> bool:
        """Whether ``saved`` has all parts that are restored here."""
        return all(saved.get(name) is not None for name, _ in self._restored)

    def _put_back_the_rest(self, saved: Mapping[str, Any]) -> None:
        self._gradients.put_back(saved.get("gradients") or {})
        self._flags.put_back(saved.get("module_flags"))

    def found(self, *, kept: bool) -> dict[str, Any]:
        """What code outside of the steps finds (`outside.found`); if not ``kept``, of the generators only."""
        return outside.found(self.parts.items() if kept else [])

    def put_back_found(self, before: Mapping[str, Any]) -> None:
        """Let that code find it again."""
        outside.put_back_found(self._restored, before, new=self._new_keys)
