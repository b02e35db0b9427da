"""One question at a time: who wants the same answer while somebody is asked waits for that answer."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

_LOCK = threading.Lock()
"""Of the module, not of an object: whoever has a question can still be copied."""


@dataclass
class Question:
    """A question that is being asked from ``thread``; ``answer`` is None where nobody answered."""

    thread: int = field(default_factory=threading.get_ident)
    answer: Future[bool | None] = field(default_factory=Future)


class OneQuestion:
    """At most one question is under way."""

    def __init__(self) -> None:
        self._under_way: Question | None = None

    @contextlib.contextmanager
    def join(self, *, blocks: bool) -> Iterator[tuple[Question, bool]]:
        """The question under way, and whether the caller is the one who asks it.

        Who asks sets its ``answer``; without one by the end of the block those who wait get None. ``blocks``
        is for callers that hold up their thread while they wait: a question of their own thread would never
        be answered then, so they ask beside it.
        """
        with _LOCK:
            question = self._under_way
            beside = question is not None and blocks and question.thread == threading.get_ident()
            asks = question is None or beside
            if question is None or beside:
                question = Question()
            if asks and not beside:
                self._under_way = question
        try:
            yield question, asks
        finally:
            if asks:
                with _LOCK:
                    if self._under_way is question:
                        self._under_way = None
                if not question.answer.done():
                    question.answer.set_result(None)
