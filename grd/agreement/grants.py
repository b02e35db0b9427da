"""Grants and what is left of them, as the log tells: replayed, never stored, so that there is one truth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grd.agreement.clock import Moment, true_time

GRANTED, DECLINED, TYPED, RESERVED, USED, REVOKED, EXPIRED = (
    "granted", "declined", "typed", "reserved", "used", "revoked", "expired"
)  # fmt: skip

RUN, BATCH, NOTEBOOK, PROJECT, EVERYWHERE = "run", "batch", "notebook", "project", "everywhere"
SCOPES = (RUN, BATCH, NOTEBOOK, PROJECT, EVERYWHERE)
"""Narrowest first: of the grants that cover a run the narrowest is used."""


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What a grant is for: a run's or a batch's id, a notebook's path, a project's folder, or everything."""

    kind: str
    value: str = ""

    def covers(self, place: Place) -> bool:
        """Whether a run at ``place`` is within it."""
        if self.kind == RUN:
            return self.value == place.run_id
        if self.kind == BATCH:
            return self.value == place.batch_id
        if self.kind == NOTEBOOK:
            return self.value == place.notebook
        if self.kind == PROJECT:
            return Path(self.value) in (Path(place.project), *Path(place.project).parents)
        return self.kind == EVERYWHERE

    def __str__(self) -> str:
        return self.kind if self.kind == EVERYWHERE else f"{self.kind} {self.value}"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which run wants time: its id where it has one, its batch's where it is of one, its notebook and its
    project (absolute paths)."""

    project: str
    notebook: str
    run_id: str | None = None
    batch_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Grant:
    """An agreement: at most ``per_run`` seconds a run and ``total`` in all, up to ``ends`` (POSIX)."""

    id: str
    scope: Scope
    per_run: float
    total: float
    ends: float
    by: dict[str, Any]
    reason: str | None = None
    estimate: dict[str, Any] | None = None
    made: Moment
    revoked_at: float | None = None

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Grant:
        """The grant of a log entry. Raises KeyError, TypeError or ValueError for what is none."""
        numbers = {name: float(entry[name]) for name in ("per_run", "total", "ends")}
        for name, value in numbers.items():
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name} must be above zero, not {value}")
        scope = entry["scope"]
        if scope["kind"] not in SCOPES:
            raise ValueError(f"no scope {scope['kind']!r}")
        return cls(
            id=str(entry["grant"]),
            scope=Scope(kind=scope["kind"], value=str(scope.get("value", ""))),
            by=dict(entry.get("by") or {}),
            reason=entry.get("reason"),
            estimate=entry.get("estimate"),
            made=Moment.from_dict(entry),
            **numbers,
        )


@dataclass
class Ledger:
    """All grants, and what runs have used of them or have reserved, in seconds by (run, attempt)."""

    grants: dict[str, Grant] = field(default_factory=dict)
    used: dict[str, dict[tuple[str, int], float]] = field(default_factory=dict)
    open: dict[tuple[str, int], str] = field(default_factory=dict)
    """Reservations that no use has settled yet, with their grant."""
    expired: set[str] = field(default_factory=set)
    """Grants of which the log says that they have ended."""
    last: Moment | None = None
    """The time of the newest entry."""

    def spent(self, grant_id: str) -> float:
        """Seconds of a grant that were used or are reserved."""
        return sum(self.used.get(grant_id, {}).values())

    def reserved(self, grant_id: str) -> float:
        """Of these the seconds that attempts under way may take: what they took is known at their end."""
        of_grant = self.used.get(grant_id, {})
        return sum(of_grant.get(attempt, 0.0) for attempt, by in self.open.items() if by == grant_id)

    def holders(self, place: Place, moment: Moment) -> list[str]:
        """The runs under way that have taken all that is of use of the grants for a run at ``place``."""
        names = {
            grant.id
            for grant in self.grants.values()
            if grant.scope.covers(place)
            and self.state_of(grant, moment) in ("in use", "valid")
            and self.available(grant, moment) < least_useful(grant, None)
        }
        return sorted({run for (run, _), by in self.open.items() if by in names and run != place.run_id})

    def time_at(self, moment: Moment, grant: Grant | None = None) -> float:
        """The wall clock at ``moment``, as far as it can be believed: ends of grants are counted by it."""
        made = None if grant is None else grant.made
        return true_time(moment, [past for past in (made, self.last) if past is not None])

    def state_of(self, grant: Grant, moment: Moment) -> str:
        """valid, revoked, expired, used up; or in use, where runs under way may take all that is left."""
        if grant.revoked_at is not None:
            return "revoked"
        if self.seconds_to_end(grant, moment) <= 0:
            return "expired"
        if self.left(grant, moment) > 0:
            return "valid"
        return "in use" if self.reserved(grant.id) > 0 else "used up"

    def can_be_revoked(self, grant: Grant, moment: Moment) -> bool:
        """Whether taking it back changes anything: it is valid, or an attempt that has not ended uses it."""
        if grant.revoked_at is not None:
            return False
        return self.state_of(grant, moment) == "valid" or grant.id in self.open.values()

    def left(self, grant: Grant, moment: Moment) -> float:
        """Seconds that are left of a grant's total, 0 if it is no longer valid."""
        if grant.revoked_at is not None or self.seconds_to_end(grant, moment) <= 0:
            return 0.0
        return max(0.0, grant.total - self.spent(grant.id))

    def seconds_to_end(self, grant: Grant, moment: Moment) -> float:
        """Seconds from ``moment`` to a grant's end, 0 for one that has ended."""
        return 0.0 if grant.id in self.expired else max(0.0, grant.ends - self.time_at(moment, grant))

    def available(self, grant: Grant, moment: Moment) -> float:
        """Seconds that an attempt which starts at ``moment`` may take: of what is left, up to the end."""
        return min(self.left(grant, moment), self.seconds_to_end(grant, moment))

    def gives(self, grant: Grant, moment: Moment, used_by_run: float = 0.0) -> float:
        """Seconds that a grant gives to the next attempt of a run whose earlier ones have used so many."""
        return min(grant.per_run - used_by_run, self.available(grant, moment))

    def used_by_run(self, grant_id: str, run_id: str) -> float:
        """Seconds of a grant that one run has used or reserved."""
        return sum(seconds for (run, _), seconds in self.used.get(grant_id, {}).items() if run == run_id)

    def covering(self, place: Place, moment: Moment) -> list[Grant]:
        """The valid grants for a run at ``place``, the narrowest and soonest to end first."""
        found = [
            grant
            for grant in self.grants.values()
            if grant.scope.covers(place) and self.state_of(grant, moment) == "valid"
        ]
        return sorted(found, key=lambda grant: (SCOPES.index(grant.scope.kind), grant.ends, grant.id))


LEAST_SECONDS = 60.0


def least_useful(grant: Grant, wanted: float | None) -> float:
    """What a grant must have left for a run that wants so many seconds (None: any).

    A minute, or a tenth of what it gives to one run, or of its whole length: what is less is over before
    anything was done, where without any grant there are ten minutes, or a question.
    """
    lasts = max(0.0, grant.ends - grant.made.wall)
    return min(LEAST_SECONDS, grant.per_run / 10, lasts / 10, math.inf if wanted is None else wanted)


def replay(entries: Iterable[Mapping[str, Any]]) -> Ledger:
    """The ledger after all entries. Entries of a kind this version does not know change nothing."""
    ledger = Ledger()
    for entry in entries:
        moment = Moment.from_dict(entry)
        if ledger.last is None or moment.wall >= ledger.last.wall:
            ledger.last = moment
        kind, grant_id = entry.get("kind"), str(entry.get("grant"))
        try:
            if kind == GRANTED:
                ledger.grants[grant_id] = Grant.from_entry(entry)
            elif kind == REVOKED and grant_id in ledger.grants:
                before = ledger.grants[grant_id]
                ledger.grants[grant_id] = Grant(**{**vars(before), "revoked_at": moment.wall})
            elif kind == EXPIRED:
                ledger.expired.add(grant_id)
            elif kind in (RESERVED, USED):
                attempt = (str(entry["run"]), int(entry["attempt"]))
                seconds = float(entry["seconds"])
                if not math.isfinite(seconds) or seconds < 0:
                    raise ValueError("seconds must be 0 or more")
                ledger.used.setdefault(grant_id, {})[attempt] = seconds
                if kind == RESERVED:
                    ledger.open[attempt] = grant_id
                else:
                    ledger.open.pop(attempt, None)
        except (KeyError, TypeError, ValueError, OverflowError):
            continue  # of no grant that could be understood: it gives nobody anything
    return ledger
