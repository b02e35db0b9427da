"""Before a start: what was agreed to, asking whoever is there, and writing it down."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grd import contract
from grd.agreement import allocation, decision, grants
from grd.agreement.book import Book, is_allowed_headless
from grd.agreement.clock import now
from grd.agreement.decision import Decision, Facts
from grd.agreement.grants import EVERYWHERE, PROJECT, RUN, Grant, Place, Scope
from grd.agreement.person import identity, who_can_answer
from grd.errors import ApprovalRequired, GrdError, UsageError
from grd.estimation.estimate import Estimate
from grd.runs.folder import RunFolder
from grd.settings import LONGEST_DURATION_SECONDS, Settings, format_duration, parse_duration

SESSION_SECONDS = 4 * 3600.0
"""What "the session" is when it is approved: this project, so long in all, and not beyond."""

ASK_AGAIN = 3


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a person is asked: an estimate (seconds) with its interval and basis, and the cap otherwise."""

    place: Place
    estimate: Estimate
    high: float
    otherwise: float

    @property
    def notebook(self) -> str:
        """The notebook that may take long."""
        return self.place.notebook

    @property
    def proposed(self) -> float:
        """What a yes agrees to: the upper bound, in whole minutes."""
        return whole_minutes(self.high)


Asker = Callable[[Question], str]
"""Gets a question, returns what the person typed: y, s, c, n, or a time."""

YES, SESSION, CAPPED, NO = "yes", "session", "capped", "no"


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A question that a person was shown before, and the answer: yes, session or capped.

    It is the answer to what was shown then, whatever an estimate or a grant would say now.
    """

    question: Question
    answer: str
    who: str


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """What a run may take: all attempts together, and this attempt; None is no cap of that kind."""

    word: str
    total: float | None
    attempt: float | None
    grant: Grant | None = None
    note: Mapping[str, Any] | None = None
    """What the log is told once an attempt starts on it, where no person and no grant has agreed."""

    def budget(self, used: float) -> dict[str, Any]:
        """As the record keeps it."""
        found: dict[str, Any] = {"seconds": self.total, "used_seconds": used, "agreed": self.word}
        return found if self.grant is None else {**found, "grant": self.grant.id}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be started or resumed. Times are seconds."""

    place: Place
    timeout: float | None
    budget: float | None
    typed_now: bool
    grace: float
    used: float = 0.0
    agreed_before: str = decision.DEFAULT
    agreed_timeout: float | None = None
    agreed_total: float | None = None
    estimate: Estimate | None = None


def agree(
    wanted: Wanted,
    settings: Settings,
    *,
    asker: Asker | Answered | None = None,
    environment: Mapping[str, str] = os.environ,
    book: Book | None = None,
) -> Agreed:
    """What the run may take. Raises ApprovalRequired where nobody has agreed, or somebody said no."""
    book = book or Book()
    if isinstance(asker, Answered):
        return _agreed_by(book, asker.question, asker.answer, asker.who)
    who = who_can_answer(environment)
    grant, granted, left = _grant_for(book, wanted)
    in_job = allocation.job_of(environment) is not None
    ends = allocation.end_of_job(environment) if in_job else None
    facts = Facts(
        timeout=wanted.timeout,
        budget=wanted.budget,
        used=wanted.used,
        typed_now=wanted.typed_now,
        agreed_before=wanted.agreed_before,
        agreed_timeout=wanted.agreed_timeout,
        agreed_total=wanted.agreed_total,
        person=who is not None,
        threshold=settings.long_running_threshold,
        default_timeout=settings.default_timeout,
        estimate_high=None if wanted.estimate is None else wanted.estimate.high,
        granted=granted,
        granted_left=left,
        allocation=None if ends is None else ends - time.time(),
        in_job=in_job,
        grace=wanted.grace,
        allowed=is_allowed_headless(),
    )
    decided = decision.decide(facts)
    if decided.action == decision.REFUSE:
        helps = _how_to_have_time(facts) if in_job else _how_to_grant(book, wanted)
        raise ApprovalRequired(f"{decided.why}; {'' if in_job else _who_has_it(book, wanted)}{helps}")
    if decided.action == decision.ASK:
        return _ask(book, wanted, facts, decided, asker, who)
    if decided.agreed == decision.TYPED and wanted.typed_now:
        _note(
            book,
            grants.TYPED,
            wanted.place,
            wanted.estimate,
            who,
            timeout=wanted.timeout,
            budget=wanted.budget,
        )
    used_grant = grant if decided.agreed == decision.GRANT else None
    note: dict[str, Any] | None = None
    if decided.agreed == decision.ALLOCATION:
        note = {"by": identity(decision.ALLOCATION), "job": allocation.job_of(environment), "ends": ends}
    elif decided.agreed == decision.ALLOWED and (wanted.typed_now or not _was_allowed_before(wanted)):
        note = {"by": identity("config")}
    return Agreed(
        word=decided.agreed,
        total=decided.total,
        attempt=decided.attempt,
        grant=used_grant,
        note=None if note is None else {**note, "timeout": wanted.timeout, "budget": wanted.budget},
    )


def _was_allowed_before(wanted: Wanted) -> bool:
    """Whether the log has it already that the user's own file allows these limits."""
    return (
        wanted.agreed_before == decision.ALLOWED
        and wanted.timeout == wanted.agreed_timeout
        and (wanted.budget is None or wanted.budget == wanted.agreed_total)
    )


def _grant_for(book: Book, wanted: Wanted) -> tuple[Grant | None, float | None, float | None]:
    longest = max((cap for cap in (wanted.timeout, wanted.budget) if cap is not None), default=None)
    found = book.find(wanted.place, wanted.used, longest)
    if found is None:
        return None, None, None
    grant, ledger, moment = found
    return grant, grant.per_run, ledger.available(grant, moment)


def _ask(
    book: Book, wanted: Wanted, facts: Facts, decided: Decision, asker: Asker | None, who: str | None
) -> Agreed:
    """One question; without an answer that is understood it is a no."""
    capped = Agreed(word=decision.DEFAULT, total=decided.total, attempt=None)
    if asker is None:
        return capped  # nobody can show the question here: it runs as if nothing were known
    estimate = wanted.estimate
    if estimate is None or estimate.high is None:
        return capped
    question = Question(
        place=wanted.place, estimate=estimate, high=estimate.high, otherwise=facts.default_timeout
    )
    for _ in range(ASK_AGAIN):
        answer = asker(question).strip().lower()
        if answer in ("n", "no", ""):
            break
        try:
            return _agreed_by(book, question, answer, who)
        except ValueError:
            continue
    decline(question, who, book)
    raise ApprovalRequired(f"declined; to run it within {format_duration(facts.default_timeout)}, answer: c")


def _agreed_by(book: Book, question: Question, answer: str, who: str | None) -> Agreed:
    """What a person's answer to a question gives the run. Raises ValueError for one that is none."""
    if answer in ("c", CAPPED):
        return Agreed(word=decision.DEFAULT, total=question.otherwise, attempt=None)
    if answer in ("s", SESSION):
        grant = book.grant(
            Scope(kind=PROJECT, value=question.place.project),
            per_run=SESSION_SECONDS,
            total=SESSION_SECONDS,
            ends=book.time() + SESSION_SECONDS,
            by=identity(who),
            estimate=question.estimate.to_dict(),
        )
        # Not the whole grant for this run: the session's next one may start beside it.
        total = min(grant.per_run, question.proposed)
        return Agreed(word=decision.GRANT, total=total, attempt=grant.total, grant=grant)
    seconds = question.proposed if answer in ("y", YES) else parse_duration(answer)
    _note(book, grants.TYPED, question.place, question.estimate, who, timeout=None, budget=seconds)
    return Agreed(word=decision.TYPED, total=seconds, attempt=None)


def decline(question: Question, who: str | None, book: Book | None = None) -> None:
    """Write down that a person said no. Never raises: that it cannot be written does not undo it."""
    _note(book or Book(), grants.DECLINED, question.place, question.estimate, who)


def _note(
    book: Book, kind: str, place: Place, estimate: Estimate | None, who: str | None, **values: Any
) -> None:
    """Write down what a person said; that it cannot be written does not undo it."""
    try:
        book.log.append(
            kind,
            place={"project": place.project, "notebook": place.notebook, "run": place.run_id},
            by=identity(who),
            estimate=None if estimate is None else estimate.to_dict(),
            **values,
        )
    except GrdError:
        return


def whole_minutes(seconds: float) -> float:
    """``seconds`` rounded up to whole minutes, within what a person can type."""
    return min(LONGEST_DURATION_SECONDS, max(60.0, -(-seconds // 60) * 60))


def _how_to_grant(book: Book, wanted: Wanted) -> str:
    """The command that a person types.

    A grant's cap on a run is for all its attempts: what earlier ones have used is added to a ``timeout``.
    """
    problem = book.ledger()[1]
    if problem is not None:
        return f"no grant counts, for {problem}; a person types: grd approvals --verify"
    if wanted.budget is not None and wanted.budget <= wanted.used:
        return f"its attempts have used {format_duration(wanted.used)} already: give a longer --budget"
    seconds = wanted.budget or 0.0
    if wanted.timeout is not None:
        rest = wanted.timeout if wanted.budget is None else min(wanted.timeout, wanted.budget - wanted.used)
        seconds = max(seconds, wanted.timeout, wanted.used + rest)
    caps = f"--max {_typed(seconds)} --total {_typed(max(seconds, SESSION_SECONDS))}"
    return f"a person types, in {wanted.place.project}: grd approve {caps}"


def _who_has_it(book: Book, wanted: Wanted) -> str:
    """Of a grant that would be there, if runs under way had not reserved all of it."""
    held_by = book.ledger()[0].holders(wanted.place, now())
    if not held_by:
        return ""
    more = "" if len(held_by) == 1 else f" and {len(held_by) - 1} more"
    return (
        f"all that a grant has left is reserved by {held_by[0]}{more} until it ends and gives back what it "
        f"has not used (grd wait {held_by[0]}); or "
    )


def _how_to_have_time(facts: Facts) -> str:
    """What helps in a scheduler's job that ends too soon: no grant makes it longer."""
    room = 0.0 if facts.allocation is None else facts.allocation - decision.ALLOCATION_SLACK_SECONDS
    needed = facts.grace + decision.ALLOCATION_SLACK_SECONDS
    shorter = f", or give a --grace below {int(room)}s" if room >= 2 else ""
    return f"no grant helps there: ask the scheduler for more than {format_duration(needed)}{shorter}"


def cap_of(agreed: Agreed, folder: RunFolder, attempt: int, used: float) -> dict[str, Any] | None:
    """What the attempt may take beside what was typed, as the record keeps it; a grant's time is reserved,
    and none beyond its end. What neither a person nor a grant has agreed to is written into the log.

    Raises ApprovalRequired where the grant has ended, or another run has taken the rest of it, meanwhile.
    """
    if agreed.note is not None:
        with contextlib.suppress(GrdError):  # that it cannot be written does not undo it
            Book().log.append(
                agreed.word, run=folder.run_id, attempt=attempt, folder=str(folder.path), **agreed.note
            )
    if agreed.word == decision.ALLOCATION and agreed.attempt is not None:
        return {"seconds": agreed.attempt, "cause": contract.DEADLINE, "grant": None, "counted": True}
    if agreed.grant is None:
        return None
    total = agreed.grant.per_run if agreed.total is None else agreed.total
    seconds = total - used if agreed.attempt is None else min(total - used, agreed.attempt)
    taken = Book().reserve(agreed.grant, folder, attempt, seconds)
    if taken is None:
        raise ApprovalRequired(
            f"grant {agreed.grant.id} has ended, or other runs have used it up meanwhile; "
            "a person types: grd approve"
        )
    return {
        "seconds": taken.seconds,
        "cause": contract.APPROVAL_REQUIRED,
        "grant": taken.grant,
        "until_end": taken.until_end,
        "counted": taken.counted,
    }


def give_back(cap: Mapping[str, Any] | None, run_id: str, attempt: int) -> None:
    """An attempt that was not started has used nothing of its grant."""
    if cap is not None and cap["grant"] is not None:
        Book().note_use(str(cap["grant"]), run_id, attempt, 0.0)


def _typed(seconds: float) -> str:
    """A duration that can be typed, not shorter than ``seconds``."""
    whole = int(-(-seconds // 1))
    if whole % 3600 == 0:
        return f"{whole // 3600}h"
    return f"{-(-whole // 60)}m"


def scope_of(*, run: RunFolder | None, notebook: str | None, everywhere: bool, project: Path) -> Scope:
    """The scope of a grant as it was typed. Raises UsageError for more than one."""
    chosen = [run is not None, notebook is not None, everywhere]
    if sum(chosen) > 1:
        raise UsageError("name a notebook, or give --run, or --everywhere: one of them")
    if run is not None:
        return Scope(kind=RUN, value=run.run_id)
    if notebook is not None:
        return Scope(kind=grants.NOTEBOOK, value=notebook)
    if everywhere:
        return Scope(kind=EVERYWHERE)
    return Scope(kind=PROJECT, value=str(project))
