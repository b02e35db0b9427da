"""Progress and metrics, told from inside a notebook."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from grd import contract
from grd.experiment.events import emit

T = TypeVar("T")

PROGRESS_PERIOD_SECONDS = 0.25
"""Progress events of one name are at least this far apart, except the last one."""

_last_report: dict[str, float] = {}
_under_way: list[str] = []


@contextlib.contextmanager
def under_way(name: str) -> Iterator[None]:
    """Until the block ends, other progress counts as part of ``name``, unless it began before."""
    _under_way.append(name)
    try:
        yield
    finally:
        _under_way.remove(name)


def outermost() -> str | None:
    """The progress that everything else is part of now, or None."""
    return _under_way[0] if _under_way else None


def report_progress(
    name: str, n: float, total: float | None = None, *, force: bool = False, **more: Any
) -> None:
    """Tell that ``name`` is at ``n`` of ``total``; dropped within 0.25 s of the last, unless forced."""
    now = time.monotonic()
    if not force and now - _last_report.get(name, -math.inf) < PROGRESS_PERIOD_SECONDS:
        return
    _last_report[name] = now
    emit(contract.EVENT_PROGRESS, name=name, n=n, total=total, **more)


def progress(iterable: Iterable[T], name: str, total: int | None = None) -> Iterator[T]:
    """Iterate and report the items done under ``name``, at most 4 times a second and at the end."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    n = 0
    outer = outermost()
    more: dict[str, Any] = {} if outer is None else {"within": outer}
    report_progress(name, 0, total, force=True, **more)
    try:
        with under_way(name):
            for item in iterable:
                yield item
                n += 1
                report_progress(name, n, total, **more)
    finally:
        report_progress(name, n, total, force=True, **more)


def train_with_progress(num_epochs: int, steps_per_epoch: int) -> Iterator[tuple[int, int]]:
    """Iterate over ``(epoch, step)``, both from 0, and report both: a bar each for training and epoch.

    Saves nothing: `training.epochs` and ``epoch.steps`` report the same and can be resumed.
    Raises ValueError for negative numbers.
    """
    if num_epochs < 0 or steps_per_epoch < 0:
        raise ValueError(f"num_epochs and steps_per_epoch must be 0 or more: {num_epochs}, {steps_per_epoch}")
    return (
        (epoch, step)
        for epoch in progress(range(num_epochs), "Training")
        for step in progress(range(steps_per_epoch), f"Epoch {epoch + 1}/{num_epochs}")
    )


def as_number(value: Any) -> float | int | None:
    """``value`` as a plain number; None for NaN and infinities, which JSON cannot hold.

    Takes what has ``item()``: scalars of torch and numpy. Raises TypeError for anything else.
    """
    if hasattr(value, "item") and not isinstance(value, (bool, int, float)):
        value = value.item()
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    raise TypeError(f"a metric must be a number, not {type(value).__name__}")


def log_metrics(*, epoch: int | None = None, step: int | None = None, **values: Any) -> None:
    """Report metrics by name; numbers, or scalars of torch and numpy. NaN and infinities become null.

    Raises TypeError for values that are no numbers.
    """
    numbers = {}
    for name, value in values.items():
        try:
            numbers[name] = as_number(value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"metric {name!r} must be a number, not {type(value).__name__}") from None
    emit(
        contract.EVENT_METRICS,
        values=numbers,
        epoch=None if epoch is None else int(epoch),
        step=None if step is None else int(step),
    )
