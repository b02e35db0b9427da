"""What torch's modules hold beside their state_dict: train or eval mode, and which parameters are trained.

Only what has changed since the training's beginning is kept: whatever a changed notebook sets up otherwise
stays as it sets it up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class ModuleFlags:
    """Those of the modules in ``model``: one, or dictionaries and lists of them. Made before a restore."""

    def __init__(self, model: Any) -> None:
        self._modules = list(_modules_of(model))
        self._at_first = self._now()

    def take(self) -> dict[str, bool]:
        """By name, what has changed since the beginning."""
        return {name: value for name, value in self._now().items() if self._at_first.get(name) != value}

    def put_back(self, saved: Mapping[str, bool] | None) -> None:
        """Make the flags what they were when `take` gave ``saved``; None, of an older checkpoint: nothing."""
        if saved is None:
            return
        wanted = {**self._at_first, **saved}
        for name, owner, attribute in self._flags():
            if name in wanted and getattr(owner, attribute) != wanted[name]:
                setattr(owner, attribute, wanted[name])

    def _now(self) -> dict[str, bool]:
        return {name: bool(getattr(owner, attribute)) for name, owner, attribute in self._flags()}

    def _flags(self) -> Iterator[tuple[str, Any, str]]:
        for number, model in enumerate(self._modules):
            for name, module in model.named_modules():
                yield f"{number}:{name}:training", module, "training"
            for name, parameter in model.named_parameters():
                yield f"{number}:{name}:requires_grad", parameter, "requires_grad"


def _modules_of(item: Any) -> Iterator[Any]:
    if isinstance(item, Mapping):
        item = list(item.values())
    if isinstance(item, (list, tuple)):
        for part in item:
            yield from _modules_of(part)
    elif hasattr(item, "named_modules") and hasattr(item, "named_parameters"):
        yield item
