"""What earlier runs say of a new one: which are like it, and how they scale to its size. Pure."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grd import contract

SIZE_NAME = re.compile(
    r"(?:n|nb|num|number_of|max|total)?_?(?:train(?:ing)?_)?"
    r"(?:epochs|steps|iterations|iters|rounds|trials|episodes|samples|rows|repeats)(?:_per_epoch)?",
    re.IGNORECASE,
)
"""Parameters that say how much there is to do: num_epochs, max_steps, n_samples; not warmup_steps."""

RUNS_USED = 5
"""The newest runs of the best kind; their median counts."""

MOST_SPEED_RATIO = 2.0
"""What a tenth of a second says of the machine's load is believed up to here."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that is to be estimated."""

    notebook: str
    """Absolute path, or a URL."""
    sha256: str
    """Of the notebook's file."""
    code_sha256: str
    """Of its code cells alone: outputs and metadata change without any change to the work."""
    defaults: Mapping[str, Any]
    """Literal defaults of the parameters cell."""
    parameters: Mapping[str, Any]
    """What the run is given."""


_OF_PROGRESS = ("n", "total", "eta_seconds", "per_second")
_OF_ESTIMATE = ("seconds", "method", "speed_mbs", "probe")
_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class PastRun:
    """What run.json says of an earlier run, as far as an estimate needs it: a batch keeps a thousand."""

    run_id: str
    notebook: str
    sha256: str
    code_sha256: str | None
    parameters: Mapping[str, Any]
    state: str
    seconds: float
    """All attempts together."""
    attempts: int
    changed: bool
    """Notebook or parameters were changed by a resume: it is not one thing that took so long."""
    progress: Mapping[str, Any]
    estimate: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> PastRun | None:
        """What is needed of a record's JSON; None where it is damaged or has not run."""
        try:
            attempts = record["attempts"]
            seconds = sum(float(attempt["seconds"]) for attempt in attempts)
            worth = {"notebook", "parameters", "from_epoch"}
            estimate = record.get("estimate") or {}
            code = estimate.get("code_sha256")
            return cls(
                run_id=str(record["run_id"]),
                notebook=sys.intern(str(record["notebook"])),
                sha256=sys.intern(str(attempts[0].get("notebook_sha256") or record["notebook_sha256"])),
                code_sha256=None if code is None else sys.intern(str(code)),
                parameters={sys.intern(name): value for name, value in dict(record["parameters"]).items()},
                state=sys.intern(str(record["state"])),
                seconds=seconds,
                attempts=len(attempts),
                changed=any(worth & set(attempt.get("changes") or ()) for attempt in attempts),
                progress=_only(_OF_PROGRESS, record.get("progress") or {}),
                estimate=_only(_OF_ESTIMATE, estimate),
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, IndexError):
            return None

    def total_seconds(self) -> float | None:
        """How long it took, or would have taken in all by its own pace; None where that was not seen."""
        if self.state == contract.COMPLETED:
            return self.seconds
        left = self.progress.get("eta_seconds")
        if self.state != contract.INTERRUPTED or isinstance(left, bool):
            return None
        seconds = 0.0 if left == 0 else _number(left)
        return None if seconds is None else self.seconds + seconds

    def loop_seconds(self) -> float | None:
        """How much of it was the loop that its progress was about; None where that cannot be told."""
        rate, n, total = (_number(self.progress.get(name)) for name in ("per_second", "n", "total"))
        whole = self.total_seconds()
        if self.attempts != 1 or rate is None or n is None or total is None or whole is None:
            return None
        return min(whole, (n if self.state == contract.COMPLETED else total) / rate)


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """An earlier run that is like the new one, and in what it is not."""

    run: PastRun
    other_version: bool
    other_parameters: tuple[str, ...]
    """Names of those that differ and say nothing of the size."""
    sizes: Mapping[str, tuple[float, float]]
    """By name: then and now, where the size differs."""

    @property
    def rank(self) -> tuple[int, ...]:
        """Smaller is more like it."""
        return (
            int(self.other_version),
            len(self.other_parameters),
            int(bool(self.sizes)),
            int(self.run.state != contract.COMPLETED),
            int(self.run.attempts > 1),
        )

    @property
    def ratio(self) -> float:
        """How many times as much there is to do now."""
        ratio = 1.0
        for then, now in self.sizes.values():
            ratio *= now / then
        return ratio

    def scaled(self) -> float | None:
        """Seconds for the new size: the loop grows with it, what is around the loop does not."""
        whole, loop = self.run.total_seconds(), self.run.loop_seconds()
        if whole is None:
            return None
        return whole * self.ratio if loop is None else whole - loop + loop * self.ratio


def likeness(job: Job, past: PastRun) -> Likeness | None:
    """How an earlier run compares with the new one; None if it is of another notebook."""
    same = past.sha256 == job.sha256 or past.code_sha256 == job.code_sha256
    if not same and past.notebook != job.notebook:
        return None
    # A notebook of another version may have had other defaults: only what was typed then is known.
    then = {**(job.defaults if same else {}), **past.parameters}
    now = {**job.defaults, **job.parameters}
    sizes: dict[str, tuple[float, float]] = {}
    others: list[str] = []
    for name in sorted({*then, *now} - set(contract.INJECTED_PARAMETERS)):
        if name not in then:
            others += [name] if same else []
            continue
        before, after = then[name], now.get(name)
        if before == after and isinstance(before, bool) == isinstance(after, bool):
            continue
        is_size = SIZE_NAME.fullmatch(name) or before == past.progress.get("total")
        size_then, size_now = _number(before), _size(after)
        if is_size and size_then is not None and size_now is not None:
            sizes[name] = (size_then, size_now)
        else:
            others.append(name)
    return Likeness(run=past, other_version=not same, other_parameters=tuple(others), sizes=sizes)


def most_alike(job: Job, past: Sequence[PastRun]) -> list[Likeness]:
    """The newest runs of the kind that is most like the new one; ``past`` comes newest first.

    A run whose notebook or parameters were changed on the way counts for nothing.
    """
    found = [like for run in past if not run.changed and (like := likeness(job, run)) is not None]
    useful = [like for like in found if like.scaled() is not None]
    best = min((like.rank for like in useful), default=None)
    return [like for like in useful if like.rank == best][:RUNS_USED]


def lower_bound(job: Job, past: Sequence[PastRun]) -> float:
    """The longest that the very same run has gone on without coming to its end; 0 if none has."""
    found = [like for run in past if not run.changed and (like := likeness(job, run)) is not None]
    return max(
        (
            like.run.seconds
            for like in found
            if like.run.state == contract.INTERRUPTED
            and like.run.attempts == 1
            and not like.other_version
            and not like.other_parameters
            and all(now >= then for then, now in like.sizes.values())
        ),
        default=0.0,
    )


def speed_ratio(then: Any, now: Any) -> float | None:
    """By what the machine's load makes now slower than then, at most ×÷2; None where one is not known."""
    before, after = _number(then), _number(now)
    if before is None or after is None:
        return None
    return min(MOST_SPEED_RATIO, max(1 / MOST_SPEED_RATIO, before / after))


def predictions(past: Sequence[PastRun], method: str) -> list[tuple[float, float]]:
    """Predicted and real seconds of the completed runs that ``method`` had predicted before their start."""
    found = []
    for run in past:
        seconds = _number(run.estimate.get("seconds"))
        ran = run.state == contract.COMPLETED and run.attempts == 1 and not run.changed
        if ran and run.estimate.get("method") == method and seconds is not None:
            found.append((seconds, run.seconds))
    return found


def probe_predictions(past: Sequence[PastRun]) -> list[tuple[float, float]]:
    """Seconds left as probes predicted them, and as they were, of the loops that came to their end."""
    found = []
    for run in past:
        probe = run.estimate.get("probe")
        if not isinstance(probe, Mapping):
            continue
        predicted, took = _number(probe.get("remaining_seconds")), _number(probe.get("took_seconds"))
        if predicted is not None and took is not None:
            found.append((predicted, took))
    return found


def _only(names: Sequence[str], values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those that are known, of those that are needed."""
    found = {name: values[name] for name in names if values.get(name) is not None}
    return found or _NOTHING


def _number(value: Any) -> float | None:
    """``value`` if it is a number above zero."""
    number = _size(value)
    return None if number is None or math.isinf(number) else number


def _size(value: Any) -> float | None:
    """The same of a size, which may be beyond every float: infinite then, and so is the estimate."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return math.inf if value > 0 else None
    return number if number > 0 else None
