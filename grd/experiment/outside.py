"""What code outside of the steps finds, so that a resume inside an epoch can run that code again.

It stands before the first pass over batches and between two passes. A resume puts back what it found, runs
it, and where the interrupted pass goes on makes everything what it was when it was saved.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Mapping
from typing import Any

from grd.experiment import rng
from grd.experiment.training_state import PuttingBack, UserState, take

KEPT_BYTES = 64 * 1024
"""As much of a part, or of one value in ``state``, is copied for each pass and written with each save."""

_KEPT_PARTS = ("scheduler_state", "scaler_state")
_PLAIN = (bool, int, float, complex, type(None))


def found(parts: list[tuple[str, Any]]) -> dict[str, Any]:
    """The random generators, and of ``parts`` scheduler, scaler and ``state``, as far as they are small."""
    kept: dict[str, Any] = {}
    large: list[Any] = []
    for name, part in parts:
        if name in _KEPT_PARTS:
            _keep(kept, name, take(part))
        elif isinstance(part, UserState):
            values: dict[Any, Any] = {}
            kept[name] = values
            large = [key for key, value in part.values.items() if not _keep(values, key, take(value))]
    return {"rng": rng.capture(), "parts": kept, "large": large}


def put_back_found(parts: list[tuple[str, Any]], before: Mapping[str, Any], *, new: Collection[Any]) -> None:
    """Make ``parts`` what `found` saw of them; keys in ``new`` are those the checkpoint does not know."""
    kept = before.get("parts") or {}
    putting = PuttingBack()
    for name, part in parts:
        if name not in kept:
            continue
        values = copy.deepcopy(kept[name])
        if isinstance(part, UserState):
            part.forget_others(values, keep={*new, *before["large"]})
        putting.restore(part, values, name.removesuffix("_state"))
    if before.get("rng") is not None:
        rng.restore(before["rng"])


class _TooLarge(Exception):
    pass


def _keep(kept: dict[Any, Any], key: Any, value: Any) -> bool:
    try:
        kept[key] = _copied(value, [KEPT_BYTES])
    except _TooLarge:
        return False
    return True


def _copied(value: Any, room: list[int]) -> Any:
    """A copy of ``value``; raises _TooLarge for more than ``room`` and for what has no size that is known."""
    kind = type(value)
    room[0] -= 8 if kind in _PLAIN else _bytes_of(value)
    if room[0] < 0:
        raise _TooLarge
    if isinstance(value, dict):
        same = {key: _copied(item, room) for key, item in value.items()}
        return same if kind is dict else copy.deepcopy(value)
    if kind in (list, tuple, set):
        return kind(_copied(item, room) for item in value)
    return value if kind in _PLAIN or kind in (str, bytes) else copy.deepcopy(value)


def _bytes_of(value: Any) -> int:
    if isinstance(value, (str, bytes, dict, list, tuple, set, frozenset)):
        return 8 + len(value)
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, torch.Tensor):
        return int(value.numel() * value.element_size())
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)) and value.dtype != object:
        return int(value.nbytes)
    return KEPT_BYTES + 1
