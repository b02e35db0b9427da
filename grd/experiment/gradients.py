"""Gradients that an accumulation has gathered and no optimizer has used yet: they belong to the state.

After a step of its optimizer a gradient is used up, until something is added to it. So only what was gathered
since is saved, and a training without accumulation saves none. Where gradients outlive a step, because nobody
sets them to None, the next ones may be added to them: seen once, all are saved from then on.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

OUTLIVE = "outlive"


class Gradients:
    """Those of the parameters of torch's optimizers: one, or dictionaries and lists of them."""

    def __init__(self, optimizers: Any) -> None:
        self._optimizers = _flat(optimizers)
        self._used: dict[int, list[Any]] = {}
        """Of each optimizer: what its last step has left."""

        self._steps_seen: set[int] = set()
        """Optimizers of which two steps have told what becomes of gradients between them."""

        self._outlive: set[int] = set()
        """Optimizers whose gradients were still there at their next step."""

        self._hooks: list[Any] = []

    def watch(self) -> None:
        """Begin to see the optimizers' steps; until `close`."""
        for number, optimizer in enumerate(self._optimizers):
            if hasattr(optimizer, "register_step_post_hook"):

                def seen(*_: Any, number: int = number) -> None:
                    present = [grad for grad in self._of(number) if grad is not None]
                    if number in self._used:
                        self._steps_seen.add(number)
                    left = (reference() for reference, _ in self._used.get(number, []))
                    if {id(grad) for grad in left if grad is not None} & {id(grad) for grad in present}:
                        self._outlive.add(number)
                    self._used[number] = [_identity(grad) for grad in present]

                self._hooks.append(optimizer.register_step_post_hook(seen))

    def close(self) -> None:
        """Leave the optimizers alone again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def take(self) -> dict[str, list[Any]]:
        """For each optimizer by its number, what it has still to use, in the order of its parameters."""
        gathered = {}
        for number in range(len(self._optimizers)):
            grads = self._of(number)
            present = [grad for grad in grads if grad is not None]
            known = number in self._steps_seen and number not in self._outlive
            if not present or (known and self._are_used(number, present)):
                continue
            gathered[str(number)] = [None if grad is None else grad.detach() for grad in grads]
        if gathered and self._outlive:
            gathered[OUTLIVE] = [str(number) for number in sorted(self._outlive)]
        return gathered

    def put_back(self, saved: Mapping[str, list[Any]]) -> None:
        """Give the parameters the gradients that `take` took, and no others."""
        for number, optimizer in enumerate(self._optimizers):
            grads = saved.get(str(number))
            parameters = _parameters(optimizer)
            if str(number) in saved.get(OUTLIVE, []):
                self._outlive.add(number)
            if grads is None or len(grads) != len(parameters):
                continue
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = None if grad is None else grad.to(parameter.device)

    def _of(self, number: int) -> list[Any]:
        return [parameter.grad for parameter in _parameters(self._optimizers[number])]

    def _are_used(self, number: int, present: list[Any]) -> bool:
        used = self._used.get(number)
        if used is None or len(used) != len(present):
            return False
        return all(
            reference() is grad and version == grad._version
            for (reference, version), grad in zip(used, present, strict=True)
        )


def _identity(grad: Any) -> tuple[Any, int]:
    return weakref.ref(grad), grad._version


def _parameters(optimizer: Any) -> list[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _flat(item: Any) -> list[Any]:
    if isinstance(item, Mapping):
        return [optimizer for part in item.values() for optimizer in _flat(part)]
    if isinstance(item, (list, tuple)):
        return [optimizer for part in item for optimizer in _flat(part)]
    return [item] if hasattr(item, "param_groups") else []
