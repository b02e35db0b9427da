"""A grant while an attempt runs on it: watched, for it may be revoked, and settled at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable

from grd.agreement.book import Book
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
        now = (stat.st_mtime_ns, stat.st_size)
        if now != self._seen:
            self._revoked = self._book.is_revoked(self._grant)
            self._seen = now
        return self._revoked


class GrantInUse:
    """The grant that an attempt was started with; nothing happens for one that has none."""

    def __init__(self, record: RunRecord, attempt: Attempt) -> None:
        cap = attempt.cap or {}
        self._grant: str | None = cap.get("grant")
        self._run, self._attempt = record.run_id, attempt.number
        self._book = Book()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, on_revoked: Callable[[], object]) -> None:
        """Call ``on_revoked``, once, when somebody takes the grant back."""
        if self._grant is None:
            return
        self._thread = threading.Thread(
            target=self._look, args=(self._grant, on_revoked), name="grd-grant", daemon=True
        )
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Note what the attempt has taken: ``seconds`` of awake time."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
        if self._grant is not None:
            self._book.note_use(self._grant, self._run, self._attempt, seconds)

    def _look(self, grant: str, on_revoked: Callable[[], object]) -> None:
        revocation = Revocation(grant)
        while not self._over.wait(LOOK_SECONDS):
            if revocation.has_come():
                on_revoked()
                return
