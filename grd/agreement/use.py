"""A grant while an attempt runs on it: watched, for it ends or may be revoked, and settled at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable

from grd import contract
from grd.agreement.book import Book
from grd.agreement.clock import now
from grd.runs.model import Attempt, RunRecord

LOOK_SECONDS = 1.0
CLOSE_SECONDS = 5.0


class Revocation:
    """Whether a grant was taken back, to be asked often: the log is only read where it has changed."""

    def __init__(self, grant: str) -> None:
        self._grant, self._book = grant, Book()
        self._seen: object = None
        self._revoked = False

    def has_come(self) -> bool:
        """Whether somebody has taken the grant back; a log that is not there says nothing."""
        try:
            stat = self._book.log.path.stat()
        except OSError:
            return self._revoked
        seen = (stat.st_mtime_ns, stat.st_size)
        if seen != self._seen:
            self._revoked = self._book.is_revoked(self._grant)
            self._seen = seen
        return self._revoked

    @classmethod
    def of(cls, attempt: Attempt) -> Revocation | None:
        """That of the grant that ``attempt`` was started with; None if it had none."""
        grant = (attempt.cap or {}).get("grant")
        return None if grant is None else cls(str(grant))

    @property
    def text(self) -> str:
        """What there is to say once it has come."""
        return f"grant {self._grant} was taken back"


class End:
    """The end of a grant, to be asked often: the log is read once."""

    def __init__(self, grant: str) -> None:
        self._ledger, _ = Book().ledger()
        self._grant = self._ledger.grants.get(grant)

    def has_come(self) -> bool:
        """Whether the grant has ended; of one that cannot be found nothing is said."""
        return self._grant is not None and self._ledger.time_at(now(), self._grant) >= self._grant.ends


class GrantInUse:
    """The grant that an attempt was started with; nothing happens for one that has none."""

    def __init__(self, record: RunRecord, attempt: Attempt) -> None:
        cap = attempt.cap or {}
        self._grant: str | None = cap.get("grant")
        self._bounded_by_end = bool(cap.get("until_end"))
        self._run, self._attempt = record.run_id, attempt.number
        self._book = Book()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, on_over: Callable[[str], object]) -> None:
        """Call ``on_over``, once, with the cause: when somebody takes the grant back, or when it ends.

        The attempt's deadline is not beyond its end, but that is counted in awake time and from the moment on
        in which there were GPUs for it.
        """
        if self._grant is None:
            return
        self._thread = threading.Thread(
            target=self._look, args=(self._grant, on_over), name="grd-grant", daemon=True
        )
        self._thread.start()

    def detail(self, cause: str | None) -> str | None:
        """What there is to say of an end with ``cause`` that came of the grant; None for any other."""
        if self._grant is None:
            return None
        if cause == contract.REVOKED:
            return Revocation(self._grant).text
        if cause == contract.APPROVAL_REQUIRED and self._bounded_by_end:
            return f"grant {self._grant} has ended; a person types: grd approve"
        return None

    def close(self, seconds: float) -> None:
        """Note what the attempt has taken: ``seconds`` of awake time."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
        if self._grant is not None:
            self._book.note_use(self._grant, self._run, self._attempt, seconds)

    def _look(self, grant: str, on_over: Callable[[str], object]) -> None:
        revocation, end = Revocation(grant), End(grant)
        while not self._over.wait(LOOK_SECONDS):
            if revocation.has_come():
                on_over(contract.REVOKED)
                return
            if end.has_come():
                self._bounded_by_end = True
                on_over(contract.APPROVAL_REQUIRED)
                return
