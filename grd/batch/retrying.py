"""Which ends of a batch's runs are followed by another attempt, and when.

The coordinator does for its runs what the retrier does for a single one (`grd.steps.retrier`), by the same
rules: no run of a batch needs a second process that waits for its end.
"""

from __future__ import annotations

from collections import Counter

from grd.batch.plan import Options, PlannedRun
from grd.runs import retry
from grd.runs.model import RunRecord
from grd.settings import Settings


class Retrying:
    """Counts the attempts that this start of the batch has made of each run."""

    def __init__(self, options: Options, settings: Settings) -> None:
        self._most = options.max_attempts or settings.max_attempts
        self._settings = settings
        self._made: Counter[int] = Counter()

    def __call__(self, record: RunRecord, run: PlannedRun) -> float | None:
        """Seconds until ``run``, one of whose attempts has ended, is resumed; None where this was its end."""
        self._made[run.index] += 1
        policy = retry.Policy(
            max_attempts=self._most,
            from_attempt=record.attempt - self._made[run.index] + 1,
            delay=self._settings.retry_delay,
            longest=self._settings.retry_max_delay,
        )
        return retry.decide(record, policy, asked=None).pause
