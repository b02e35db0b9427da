"""Giving, using and taking back grants: what reads and writes the log for the rest of grd."""

from __future__ import annotations

import contextlib
import math
import secrets
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grd import contract
from grd.agreement import grants
from grd.agreement.clock import Moment, now
from grd.agreement.grants import Grant, Ledger, Place, Scope, replay
from grd.agreement.log import AgreementLog
from grd.errors import ConfigurationError, GrdError, NotFoundError, ResourceUnavailable, UsageError
from grd.runs import recovery, store
from grd.runs.folder import RunFolder
from grd.settings import state_dir, user_config_file

LONGEST_GRANT_SECONDS = 30 * 86400.0


@dataclass(frozen=True)
class Reservation:
    """What an attempt may take of a grant: seconds, whether the grant's end is what bounds them, and whether
    that could be written down."""

    grant: str
    seconds: float
    until_end: bool
    counted: bool


class Book:
    """The agreements of this user."""

    def __init__(self, folder: Path | None = None) -> None:
        self.log = AgreementLog(folder or state_dir())

    def ledger(self) -> tuple[Ledger, str | None]:
        """All grants, and what is wrong with the log; where something is, no grant counts."""
        found = self.log.read()
        return replay(() if found.problem else found.entries), found.problem

    def time(self) -> float:
        """The time as the log counts it (POSIX seconds), which ends of grants are counted from.

        It is ahead of this machine's clock where that was ahead once: what was written then has passed.
        """
        return self.ledger()[0].time_at(now())

    def grant(
        self,
        scope: Scope,
        *,
        per_run: float,
        total: float,
        ends: float,
        by: dict[str, Any],
        reason: str | None = None,
        estimate: dict[str, Any] | None = None,
    ) -> Grant:
        """Write a grant down; ``ends`` is by `time`. Raises UsageError for caps or an end that make no sense,
        and ResourceUnavailable where it cannot be written."""
        check_terms(per_run=per_run, total=total, lasts=ends - self.time())
        if per_run > total:
            per_run = total
        name = secrets.token_hex(3)
        self.log.append(
            grants.GRANTED,
            grant=name,
            scope={"kind": scope.kind, "value": scope.value},
            per_run=per_run,
            total=total,
            ends=ends,
            by=by,
            reason=reason,
            estimate=estimate,
        )
        return self.ledger()[0].grants[name]

    def revoke(self, name: str, by: dict[str, Any]) -> Grant:
        """Take a grant back, also while runs use it. Raises NotFoundError or UsageError for no such grant,
        and ResourceUnavailable where the log is damaged."""
        ledger = self._whole_ledger()
        found = [grant for grant in ledger.grants.values() if grant.id.startswith(name)] if name else []
        if len(found) != 1:
            raise NotFoundError(f"no grant {name!r}; see: grd approvals")
        if found[0].revoked_at is not None:
            raise UsageError(f"grant {found[0].id} is revoked already")
        self.log.append(grants.REVOKED, grant=found[0].id, by=by)
        return self.ledger()[0].grants[found[0].id]

    def revoke_all(self, by: dict[str, Any]) -> list[Grant]:
        """Take back all grants that are valid, or that a run still uses. Raises ResourceUnavailable."""
        self.settle()
        ledger, moment = self._whole_ledger(), now()
        names = [grant.id for grant in ledger.grants.values() if ledger.can_be_revoked(grant, moment)]
        return [self.revoke(name, by) for name in names]

    def _whole_ledger(self) -> Ledger:
        ledger, problem = self.ledger()
        if problem is not None:
            raise ResourceUnavailable(
                f"{problem}; no grant counts, and none can be taken back; a run is ended by: grd stop RUN, "
                "and all that use a grant of this log by a new one, which a person begins: grd approve"
            )
        return ledger

    def find(
        self, place: Place, used_by_run: float = 0.0, wanted: float | None = None
    ) -> tuple[Grant, Ledger, Moment] | None:
        """The grant for a run at ``place``: the narrowest of those that give it ``wanted`` seconds.

        Without ``wanted`` it is the one of the narrowest scope that gives most, for one that is about to end
        would cut the run off.
        """
        self.settle()
        ledger, _ = self.ledger()
        moment = now()

        def gives(grant: Grant) -> float:
            return used_by_run + ledger.gives(grant, moment, used_by_run)

        still = None if wanted is None else max(0.0, wanted - used_by_run)
        fitting = [
            grant
            for grant in ledger.covering(place, moment)
            if 0 < ledger.gives(grant, moment, used_by_run) >= grants.least_useful(grant, still)
        ]
        if wanted is not None:
            fitting.sort(key=lambda grant: gives(grant) < wanted)  # keeps the order otherwise
        else:
            fitting.sort(key=lambda grant: (grants.SCOPES.index(grant.scope.kind), -gives(grant)))
        return (fitting[0], ledger, moment) if fitting else None

    def reserve(self, grant: Grant, run: RunFolder, attempt: int, seconds: float) -> Reservation | None:
        """Reserve up to ``seconds`` of a grant for an attempt, none beyond its end; None if nothing is left.

        Nobody else can reserve the same time. Where the log is on a read-only file system the grant is used,
        but that is not counted.
        """
        granted, until_end = 0.0, False

        def look(entries: tuple[dict[str, Any], ...]) -> tuple[str, dict[str, Any]] | None:
            nonlocal granted, until_end
            granted, until_end = _take(replay(entries), grant.id, seconds)
            if granted <= 0 or granted < grants.least_useful(grant, seconds):
                return None
            return grants.RESERVED, {
                "grant": grant.id,
                "run": run.run_id,
                "attempt": attempt,
                "seconds": round(granted, 3),
                "folder": str(run.path),
            }

        try:
            made = self.log.append_after(look)
        except OSError:
            ledger, problem = self.ledger()
            granted, until_end = (0.0, False) if problem else _take(ledger, grant.id, seconds)
            return Reservation(grant.id, granted, until_end, counted=False) if granted > 0 else None
        return None if made is None else Reservation(grant.id, granted, until_end, counted=True)

    def note_use(self, grant_id: str, run_id: str, attempt: int, seconds: float) -> None:
        """What an attempt has really taken, in place of what was reserved. Never raises."""
        with contextlib.suppress(OSError, GrdError):
            self.log.append(
                grants.USED, grant=grant_id, run=run_id, attempt=attempt, seconds=round(max(0.0, seconds), 3)
            )

    def is_revoked(self, grant_id: str) -> bool:
        """Whether somebody took the grant back, or began a new log, in which nobody can show it.

        A log that cannot be read, and one that has no entries, say nothing.
        """
        found = self.log.read()
        if found.problem is not None or not found.entries:
            return False
        grant = replay(found.entries).grants.get(grant_id)
        return grant is None or grant.revoked_at is not None

    def settle(self) -> None:
        """Count what attempts have used whose runners could not tell it themselves, and write down once of
        each grant that it has ended. Never raises.

        What is reserved stays so until the end of its attempt is stored: only then it is known.
        """
        found = self.log.read()
        if found.problem:
            return
        ledger = replay(found.entries)
        folders = {
            (str(entry["run"]), int(entry["attempt"])): str(entry.get("folder"))
            for entry in found.entries
            if entry.get("kind") == grants.RESERVED
        }
        for (run_id, number), grant_id in ledger.open.items():
            with contextlib.suppress(GrdError, OSError, IndexError):
                folder = RunFolder(Path(folders[(run_id, number)]))
                recovery.current_record(folder)
                record = store.load(folder)  # not what is only told: its kernel may still be at work
                attempt = record.attempts[number - 1]
                if number < record.attempt or record.state in contract.ENDED_STATES:
                    self.note_use(grant_id, run_id, number, attempt.seconds)
        with contextlib.suppress(GrdError, OSError):
            if _unnoted_end(found.entries) is not None:
                while self.log.append_after(_unnoted_end) is not None:
                    pass


def _take(ledger: Ledger, grant_id: str, seconds: float) -> tuple[float, bool]:
    """Of ``seconds`` those that the grant gives now, and whether its end is what bounds them."""
    grant, moment = ledger.grants.get(grant_id), now()
    if grant is None:
        return 0.0, False
    available = ledger.available(grant, moment)
    return min(seconds, available), available < min(seconds, ledger.left(grant, moment))


def _unnoted_end(entries: tuple[dict[str, Any], ...]) -> tuple[str, dict[str, Any]] | None:
    """The entry for a grant that has ended, where there is one of which the log does not say so yet."""
    ledger, moment = replay(entries), now()
    for grant in ledger.grants.values():
        if grant.id not in ledger.expired and ledger.state_of(grant, moment) == "expired":
            return grants.EXPIRED, {"grant": grant.id, "ends": grant.ends}
    return None


SHORTEST_CAP_SECONDS = 1.0
"""No kernel starts in less."""


def check_terms(*, per_run: float, total: float, lasts: float) -> None:
    """Raise UsageError for a grant's caps, or a time to its end, that make no sense. All are seconds."""
    for name, value in (("per run", per_run), ("in all", total), ("until", lasts)):
        if not math.isfinite(value) or value <= 0:
            raise UsageError(f"a grant needs a time above zero {name}, not {value:g} s")
        if value < SHORTEST_CAP_SECONDS and name != "until":
            raise UsageError(f"a grant of {value:g} s {name} is too short for a run: give 1s at least")
    if lasts > LONGEST_GRANT_SECONDS + 1:
        raise UsageError("a grant ends after 30 days at the latest")


def is_allowed_headless(file: Path | None = None) -> bool:
    """``[approval] allow_noninteractive`` of the user's own settings file, and of no other.

    Raises ConfigurationError for a file or a value that cannot be used.
    """
    path = file or user_config_file()
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("approval", {})
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    value = table.get("allow_noninteractive", False) if isinstance(table, dict) else None
    if not isinstance(value, bool):
        raise ConfigurationError(f"{path}: [approval] allow_noninteractive must be true or false")
    return value
