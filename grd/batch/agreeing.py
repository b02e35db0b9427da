"""Agreeing to a whole batch in advance: whether each run may start, and one question for all of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grd import contract
from grd.agreement.book import LONGEST_GRANT_SECONDS, Book
from grd.agreement.grants import BATCH, DECLINED, Place, Scope
from grd.agreement.person import identity, who_can_answer
from grd.batch.plan import Plan, PlannedRun
from grd.errors import ApprovalRequired, GrdError
from grd.settings import Settings, format_duration, parse_duration
from grd.steps.agreeing import ASK_AGAIN, Wanted, agree, whole_minutes
from grd.steps.estimator import Estimator

MOST_ESTIMATED = 100
"""Of more runs so many, evenly spread, stand for all."""

LEAST_SECONDS_TO_END = 86400.0
"""A batch that is stopped over night may go on the next day."""


@dataclass(frozen=True, kw_only=True)
class Total:
    """How long the runs of a batch take together, as far as earlier runs tell. Times are seconds."""

    runs: int
    unknown: int
    """Runs of which nobody knows."""
    seconds: float | None
    high: float | None
    """Upper bound of all together; None where none is known."""
    longest: float | None
    """The largest upper bound of one run."""
    basis: str


@dataclass(frozen=True, kw_only=True)
class BatchQuestion:
    """What a person is asked about a batch: its estimate, and what a yes agrees to. Times are seconds."""

    total: Total
    jobs: int | None
    per_run: float
    in_all: float
    otherwise: float | None
    """The cap on each run without a yes; None where the spec's own limits need one."""


BatchAsker = Callable[[BatchQuestion], str]
"""Gets a question, returns what the person typed: y, c, n, or a time for each run."""


def estimate_total(plan: Plan, runs: Sequence[PlannedRun], runs_dir: Path) -> Total:
    """The estimates of ``runs`` of a plan, together. Takes some tenths of a second."""
    step = max(1, -(-len(runs) // MOST_ESTIMATED))
    looked_at = runs[::step]
    estimator = Estimator(runs_dir)
    found = [estimator.estimate(plan.request(run)).estimate for run in looked_at]
    known = [each for each in found if each.seconds is not None and each.high is not None]
    share = len(runs) / max(1, len(looked_at))
    if not known:
        return Total(
            runs=len(runs),
            unknown=len(runs),
            seconds=None,
            high=None,
            longest=None,
            basis="no earlier run of these notebooks tells how long they take",
        )
    basis = known[0].basis if len(looked_at) == len(runs) else f"every {step}th run: {known[0].basis}"
    return Total(
        runs=len(runs),
        unknown=round((len(found) - len(known)) * share),
        seconds=sum(each.seconds or 0.0 for each in known) * share,
        high=sum(each.high or 0.0 for each in known) * share,
        longest=max(each.high or 0.0 for each in known),
        basis=basis,
    )


def agree_in_advance(
    plan: Plan | None,
    runs: Sequence[PlannedRun],
    settings: Settings,
    *,
    batch_id: str,
    project: Path,
    runs_dir: Path,
    typed: bool,
    asker: BatchAsker | None,
    environment: Mapping[str, str] = os.environ,
    book: Book | None = None,
) -> str | None:
    """See that each of ``runs`` may start as it will be started later: with nobody there. Returns the id of
    the grant that a person has given for the batch, where one was needed.

    ``typed``: the limits were typed with this very command. Without a ``plan`` nobody is asked about an
    estimate. Raises ApprovalRequired.
    """
    book = book or Book()
    who = who_can_answer(environment)
    try:
        alone = _agree_alone(runs, settings, project, batch_id, environment, book)
    except ApprovalRequired:
        if who is None or (plan is None and not typed):
            raise
        per_run = max(_limit(run.timeout, run.budget) or settings.default_timeout for run in runs)
        in_all = sum(_limit(run.timeout, run.budget) or settings.default_timeout for run in runs)
        if plan is not None and not typed:
            total = estimate_total(plan, runs, runs_dir)
            question = BatchQuestion(
                total=total, jobs=plan.options.jobs, per_run=per_run, in_all=in_all, otherwise=None
            )
            per_run, in_all = _ask(question, asker, book, project, who) or (0.0, 0.0)
        return _grant(book, batch_id, per_run, in_all, who)
    if who is None or asker is None or plan is None or not alone:
        return None
    total = estimate_total(plan, runs, runs_dir)
    threshold = settings.long_running_threshold
    if total.high is None or total.longest is None or max(total.high, total.longest) <= threshold:
        return None
    per_run = whole_minutes(total.longest)
    question = BatchQuestion(
        total=total,
        jobs=plan.options.jobs,
        per_run=per_run,
        in_all=max(per_run, whole_minutes(total.high)),
        otherwise=settings.default_timeout,
    )
    answer = _ask(question, asker, book, project, who)
    return None if answer is None else _grant(book, batch_id, *answer, who)


def _agree_alone(
    runs: Sequence[PlannedRun],
    settings: Settings,
    project: Path,
    batch_id: str,
    environment: Mapping[str, str],
    book: Book,
) -> bool:
    """Whether some run has no more than the default cap. Raises ApprovalRequired as its start would."""
    at_default = False
    for notebook, timeout, budget in dict.fromkeys((run.notebook, run.timeout, run.budget) for run in runs):
        wanted = Wanted(
            place=Place(project=str(project), notebook=notebook, batch_id=batch_id),
            timeout=timeout,
            budget=budget,
            typed_now=False,
            grace=settings.grace,
        )
        alone = {**environment, contract.ENV_NONINTERACTIVE: "1"}
        agreed = agree(wanted, settings, environment=alone, book=book)
        at_default = at_default or (agreed.word == "default" and timeout is None and budget is None)
    return at_default


def _limit(timeout: float | None, budget: float | None) -> float | None:
    """The most a run was given by its own limits."""
    return max((cap for cap in (timeout, budget) if cap is not None), default=None)


def _ask(
    question: BatchQuestion, asker: BatchAsker | None, book: Book, project: Path, who: str | None
) -> tuple[float, float] | None:
    """What a run, and all together, may take; None for the default cap. Raises ApprovalRequired for a no."""
    for _ in range(ASK_AGAIN if asker is not None else 0):
        answer = asker(question).strip().lower() if asker is not None else ""
        if answer in ("c", "capped") and question.otherwise is not None:
            return None
        if answer in ("y", "yes"):
            return question.per_run, question.in_all
        if answer in ("n", "no", ""):
            break
        try:
            seconds = parse_duration(answer)
        except ValueError:
            continue
        return seconds, seconds * question.total.runs
    try:
        book.log.append(
            DECLINED,
            place={"project": str(project), "notebook": None, "run": None},
            by=identity(who),
            estimate=None,
        )
    except GrdError:
        pass  # that a no cannot be written down does not make it a yes
    capped = (
        ""
        if question.otherwise is None
        else (f"; to run each within {format_duration(question.otherwise)}, answer: c")
    )
    raise ApprovalRequired(f"declined: nothing was started{capped}")


def _grant(book: Book, batch_id: str, per_run: float, in_all: float, who: str | None) -> str:
    to_end = min(LONGEST_GRANT_SECONDS, max(LEAST_SECONDS_TO_END, 2 * in_all))
    grant = book.grant(
        Scope(kind=BATCH, value=batch_id),
        per_run=per_run,
        total=in_all,
        ends=book.time() + to_end,
        by=identity(who),
    )
    return grant.id
