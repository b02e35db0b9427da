"""What an agreement means for a start: a decision from facts alone (see the table in README, "Time")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grd.settings import format_duration

DEFAULT, TYPED, GRANT, ALLOCATION, ALLOWED = "default", "typed", "grant", "allocation", "allowed"
"""Who agreed: nobody yet, a person who typed it, a grant, a scheduler's job, the user's own settings file.

The last two are the kinds of the log's entries for attempts that start so, too."""

START, ASK, REFUSE = "start", "ask", "refuse"

ALLOCATION_SLACK_SECONDS = 60.0
"""Before the end of a scheduler's job, besides the grace, there is time to store the run's end."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that matters for a start or a resume. Times are seconds."""

    timeout: float | None
    """Cap on the attempt as it was typed now, or kept from before."""
    budget: float | None
    """The same of all attempts together."""
    used: float = 0.0
    """What earlier attempts of the run have taken."""
    typed_now: bool
    """Whether one of both was typed with this very command."""
    agreed_before: str = DEFAULT
    """How earlier attempts of the run were agreed to."""
    agreed_timeout: float | None = None
    """What a person typed for each attempt before, if ``agreed_before`` is `TYPED`; None if nothing."""
    agreed_total: float | None = None
    """The same for all of them together."""
    person: bool
    """Whether a person is there to be asked."""
    threshold: float
    default_timeout: float
    estimate_high: float | None = None
    """Upper bound of the estimate of the whole run; None if nothing is known."""
    granted: float | None = None
    """What a grant that covers the run gives it, all its attempts together; None without one."""
    granted_left: float | None = None
    """What is left of that grant's total, up to its end."""
    allocation: float | None = None
    """Seconds to the end of the scheduler's job it runs in; None outside of one or where nobody knows."""
    in_job: bool = False
    grace: float = 0.0
    allowed: bool = False
    """Whether the user's own file allows headless commands to agree."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do. ``total`` caps all attempts together, ``attempt`` this one; None is no cap of that kind."""

    action: str
    agreed: str = DEFAULT
    total: float | None = None
    attempt: float | None = None
    why: str = ""


def decide(facts: Facts) -> Decision:
    """Whether it starts, with which caps, or a person is asked, or it is refused."""
    wanted = _largest(facts.timeout, facts.budget)
    is_long = wanted is not None and wanted > facts.threshold
    if facts.in_job:
        return _of_job(facts)
    if facts.person and facts.typed_now:
        return Decision(action=START, agreed=TYPED, total=facts.budget, attempt=facts.timeout)
    if facts.agreed_before == TYPED and not facts.typed_now:
        return _goes_on(facts, TYPED)
    if facts.agreed_before == TYPED and _is_within_what_was_typed(facts):
        total = _typed_total(facts) if facts.budget is None else facts.budget
        return Decision(action=START, agreed=TYPED, total=total, attempt=facts.timeout)
    if facts.granted is not None and facts.granted_left is not None:
        fits = wanted is None or wanted <= facts.granted
        if fits and facts.granted - facts.used > 0 and facts.granted_left > 0:
            total = facts.granted if facts.budget is None else min(facts.budget, facts.granted)
            attempt = facts.granted_left if facts.timeout is None else min(facts.timeout, facts.granted_left)
            return Decision(action=START, agreed=GRANT, total=total, attempt=attempt)
    if facts.allowed and wanted is not None:
        if facts.agreed_before == ALLOWED and not facts.typed_now:
            return _goes_on(facts, ALLOWED)
        return Decision(action=START, agreed=ALLOWED, total=facts.budget, attempt=facts.timeout)
    if is_long and not facts.person:
        return Decision(action=REFUSE, why=_refusal(facts, wanted))
    long_by_estimate = facts.estimate_high is not None and facts.estimate_high > facts.threshold
    if facts.person and wanted is None and long_by_estimate:
        return Decision(action=ASK, agreed=DEFAULT, total=facts.default_timeout)
    if wanted is None:
        return Decision(action=START, agreed=DEFAULT, total=facts.default_timeout)
    # Short enough for nobody to be asked; resumes do not make it longer than that.
    total = facts.threshold if facts.budget is None else facts.budget
    return Decision(action=START, agreed=DEFAULT, total=total, attempt=facts.timeout)


def _of_job(facts: Facts) -> Decision:
    attempt = facts.timeout
    if facts.allocation is None and attempt is None and facts.budget is None:
        return Decision(action=START, agreed=DEFAULT, total=facts.default_timeout)
    if facts.allocation is not None:
        room = max(0.0, facts.allocation - facts.grace - ALLOCATION_SLACK_SECONDS)
        attempt = room if attempt is None else min(attempt, room)
        if room <= 0:
            return Decision(
                action=REFUSE,
                why=f"the scheduler's job ends in {format_duration(max(1.0, facts.allocation))}: too soon "
                "for a run and its grace",
            )
    return Decision(action=START, agreed=ALLOCATION, total=facts.budget, attempt=attempt)


def _goes_on(facts: Facts, agreed: str) -> Decision:
    """A person may go on as before; where nobody is there, all attempts get together what was typed."""
    total = facts.budget
    if total is None and not facts.person:
        total = max(facts.timeout or 0.0, _typed_total(facts) if agreed == TYPED else facts.threshold)
    return Decision(action=START, agreed=agreed, total=total, attempt=facts.timeout)


def _typed_total(facts: Facts) -> float:
    """What all attempts get together where nobody is there, by what a person typed."""
    return max(facts.agreed_total or 0.0, facts.agreed_timeout or 0.0, facts.threshold)


def _is_within_what_was_typed(facts: Facts) -> bool:
    """Whether limits that were typed where nobody sits ask for no more than a person has agreed to."""
    total = _typed_total(facts)
    attempt = total if facts.agreed_timeout is None else facts.agreed_timeout
    budget = total if facts.budget is None else facts.budget
    return facts.used < budget <= total and (facts.timeout is None or facts.timeout <= attempt)


def _refusal(facts: Facts, wanted: float | None) -> str:
    asked = format_duration(wanted or 0.0)
    if facts.granted is not None:
        if wanted is not None and wanted > facts.granted:
            return f"{asked} are more than the {format_duration(facts.granted)} that a grant gives to one run"
        return "the grant for it is used up"
    return f"nobody has agreed to {asked}: more than {format_duration(facts.threshold)} need it"


def _largest(*values: float | None) -> float | None:
    return max((value for value in values if value is not None), default=None)


def described(agreed: str) -> dict[str, Any]:
    """For people: who agreed, to be said behind that word."""
    words = {
        DEFAULT: "to no more than the default cap",
        TYPED: "by a person",
        GRANT: "by a grant",
        ALLOCATION: "by the scheduler's job",
        ALLOWED: "by the user's own settings",
    }
    return {"agreed": agreed, "text": words.get(agreed, agreed)}
