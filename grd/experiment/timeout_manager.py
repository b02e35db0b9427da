"""How long an experiment may run, and whether somebody agreed to more.

Used bare, this guards against accidents in one process: the runner never takes what it grants itself for
somebody's agreement.
"""

from __future__ import annotations

import asyncio
import copy
import datetime
import inspect
import math
import numbers
import os
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from grd import contract
from grd.errors import ApprovalDeclined
from grd.experiment.one_question import OneQuestion
from grd.settings import format_duration

Answer = bool | tuple[bool, str]
Approver = Callable[[float], Answer | Awaitable[Answer]]
"""Answers for an estimate in minutes: True or False, and optionally who said so. Whatever else it answers is
a no. An ``async def`` one is for the async forms alone."""

_QUESTION = "Approve long-running mode for this session? (yes/no): "


def default_approver(estimated_minutes: float) -> tuple[bool, str]:
    """Ask at a terminal; where there is nobody to ask, grant it in memory as ``programmatic``."""
    if os.environ.get(contract.ENV_NONINTERACTIVE) or not _is_at_terminal():
        return True, "programmatic"
    try:
        answer = input(_QUESTION)
    except EOFError:
        answer = ""
    return answer.strip().lower() in ("yes", "y"), "terminal"


def _is_at_terminal() -> bool:
    if "ipykernel.kernelapp" in sys.modules:
        return False
    try:
        return sys.stdin.isatty() and sys.stdout.isatty()
    except (AttributeError, ValueError):
        return False


@dataclass(frozen=True)
class Budget:
    """What `ExperimentTimeoutManager.experiment_context` hands out; it does not bound blocking code."""

    timeout: float | None
    """Seconds granted; None if nothing bounds them."""
    deadline: float | None
    """The end on the monotonic clock, or None."""

    def remaining(self) -> float | None:
        """Seconds left, not below 0; None if nothing bounds them."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def check(self) -> None:
        """Raise TimeoutError if the time is used up."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise TimeoutError(f"the experiment has used up its {format_duration(self.timeout or 0.0)}")


class ExperimentTimeoutManager:
    """Session-level agreement to experiments longer than ``long_running_threshold`` seconds.

    Nothing runs longer than ``default_timeout`` seconds unless it is approved, and after that the session as
    a whole no longer than ``max_session_seconds``; an approval after that begins a new session. ``approver``
    decides; by default a person at a terminal is asked, and a script without one grants itself. Threads and
    tasks that ask at once are answered by one question. All clocks are monotonic.

    Raises ValueError for a time that is no finite number, and for a default or a cap that is not above zero.
    """

    def __init__(
        self,
        default_timeout: float = 600,
        *,
        long_running_threshold: float = 600,
        max_session_seconds: float = 14400,
        approver: Approver | None = None,
    ) -> None:
        self.default_timeout = _checked(default_timeout, "default_timeout", zero=False)
        self.long_running_threshold = _checked(long_running_threshold, "long_running_threshold")
        self.max_session_seconds = _checked(max_session_seconds, "max_session_seconds", zero=False)
        self.approver: Approver = default_approver if approver is None else approver
        self.session_timeout: int | None = None
        """Cap on one experiment after a decision: None before one and after a yes, seconds after a no."""
        self.approval_metadata: dict[str, Any] = {"approved": False, "history": []}
        self._approved = False
        self._approved_at = 0.0
        self._question = OneQuestion()

    @property
    def long_running_approved(self) -> bool:
        """Whether long runs are approved now; lapses with the session's cap."""
        return self._approved and self.remaining_session_seconds() > 0

    @long_running_approved.setter
    def long_running_approved(self, value: bool) -> None:
        if value and not self.long_running_approved:
            self._approved_at = time.monotonic()
        self._approved = bool(value)

    def request_long_running_approval(self, estimated_minutes: float) -> bool:
        """Whether a run of ``estimated_minutes`` may go on beyond the default; asked once per session.

        Raises ValueError for a negative or not finite estimate, and TypeError for an approver that must be
        awaited.
        """
        minutes = _checked(estimated_minutes, "estimated_minutes")
        while not self.long_running_approved:
            with self._question.join(blocks=True) as (question, asks):
                if not asks:
                    found = question.answer.result()
                elif self.long_running_approved:
                    found = True
                else:
                    self._announce(minutes)
                    found = self._decide(minutes, _at_once(self.approver(minutes)))
                if asks:
                    question.answer.set_result(found)
            if found is not None:
                return found
        return True

    async def arequest_long_running_approval(self, estimated_minutes: float) -> bool:
        """`request_long_running_approval` that does not hold up the event loop while it waits.

        The approver is called in a thread; what must be awaited of it is awaited here.
        """
        minutes = _checked(estimated_minutes, "estimated_minutes")
        while not self.long_running_approved:
            with self._question.join(blocks=False) as (question, asks):
                if not asks:
                    # Shielded: who gives up waiting takes the question from nobody else.
                    found = await asyncio.shield(asyncio.wrap_future(question.answer))
                elif self.long_running_approved:
                    found = True
                else:
                    self._announce(minutes)
                    answer = await asyncio.to_thread(self.approver, minutes)
                    found = self._decide(minutes, await answer if inspect.isawaitable(answer) else answer)
                if asks:
                    question.answer.set_result(found)
            if found is not None:
                return found
        return True

    def get_timeout(self, estimated_seconds: float) -> int | None:
        """Seconds for a run of this estimate: the default, or None (no timeout) for an approved long one.

        An approved run is still bounded by `effective_timeout`. Raises ValueError as above.
        """
        seconds = _checked(estimated_seconds, "estimated_seconds")
        if seconds > self.long_running_threshold and self.long_running_approved:
            return None
        return self._default_seconds()

    def effective_timeout(self, estimated_seconds: float) -> float:
        """Seconds a run of this estimate may really take: `get_timeout`, within what the session has left."""
        timeout = self.get_timeout(estimated_seconds)
        return float(timeout) if timeout is not None else self.remaining_session_seconds()

    def remaining_session_seconds(self) -> float:
        """Seconds that long runs have left in this session; the whole cap before an approval."""
        if not self._approved:
            return float(self.max_session_seconds)
        return max(0.0, self.max_session_seconds - (time.monotonic() - self._approved_at))

    def reset_approval(self) -> None:
        """Take the approval back; the history of decisions stays."""
        self._record(approved=False, estimated_minutes=None, granted_by="reset", event="reset")
        self._approved = False
        self.session_timeout = None

    def get_approval_metadata(self) -> dict[str, Any]:
        """A copy of all decisions: the last one's facts, and ``history`` with every one, oldest first."""
        return copy.deepcopy(self.approval_metadata)

    def experiment_context(self, estimated_seconds: float) -> _ExperimentContext:
        """For ``with`` and ``async with``: asks if needed, and hands out the time granted as a `Budget`.

        Raises ApprovalDeclined (a TimeoutError) on entry when the answer is no. Code that blocks is bounded
        by the runner's deadline, not here; ``budget.check()`` raises once the time is used up.
        """
        return _ExperimentContext(self, _checked(estimated_seconds, "estimated_seconds"))

    def _default_seconds(self) -> int:
        """The default in whole seconds, one at least: 0 would be no time at all."""
        return max(1, int(self.default_timeout))

    def _announce(self, minutes: float) -> None:
        print(
            f"grd: estimated duration {format_duration(minutes * 60)}, beyond the default timeout of "
            f"{format_duration(self.default_timeout)}",
            file=sys.stderr,
        )

    def _decide(self, minutes: float, answer: object) -> bool:
        """Write an approver's answer down and act on it. Only True approves: a word, say, does not."""
        said, who = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, "approver")
        approved = said is True
        self._record(approved=approved, estimated_minutes=minutes, granted_by=who, event="decision")
        self.long_running_approved = approved
        self.session_timeout = None if approved else self._default_seconds()
        return approved

    def _record(self, **facts: Any) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        entry = {"at": now, "max_session_seconds": self.max_session_seconds, "pid": os.getpid(), **facts}
        history = [*self.approval_metadata["history"], entry]
        self.approval_metadata = {**entry, "history": history}


class _ExperimentContext:
    def __init__(self, manager: ExperimentTimeoutManager, estimated_seconds: float) -> None:
        self._manager = manager
        self._estimate = estimated_seconds

    @property
    def _is_long(self) -> bool:
        return self._estimate > self._manager.long_running_threshold

    def _budget(self, approved: bool) -> Budget:
        if not approved:
            raise ApprovalDeclined(
                f"a run of about {format_duration(self._estimate)} was declined; the limit is "
                f"{format_duration(self._manager.default_timeout)}"
            )
        seconds = self._manager.effective_timeout(self._estimate)
        return Budget(seconds, time.monotonic() + seconds)

    def __enter__(self) -> Budget:
        approved = not self._is_long or self._manager.request_long_running_approval(self._estimate / 60)
        return self._budget(approved)

    async def __aenter__(self) -> Budget:
        approved = not self._is_long
        if not approved:
            approved = await self._manager.arequest_long_running_approval(self._estimate / 60)
        return self._budget(approved)

    def __exit__(self, *_: object) -> None:
        return None

    async def __aexit__(self, *_: object) -> None:
        return None


def _at_once(answer: Answer | Awaitable[Answer]) -> Answer:
    """``answer``, which must be there already. Raises TypeError for one that would have to be awaited."""
    if not inspect.isawaitable(answer):
        return answer
    if inspect.iscoroutine(answer):
        answer.close()  # else Python complains that nobody has awaited it
    raise TypeError(
        "the approver is async: use `await manager.arequest_long_running_approval(...)` or "
        "`async with manager.experiment_context(...)`"
    )


def _checked(value: float, name: str, *, zero: bool = True) -> float:
    """``value`` as a finite number from 0 on, or above ``zero``. Raises ValueError."""
    try:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError
        seconds = float(value)
        if not math.isfinite(seconds) or seconds < 0 or (seconds == 0 and not zero):
            raise ValueError
    except (ValueError, OverflowError):
        least = "from 0 on" if zero else "above zero"
        shown = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "one beyond every float"
        raise ValueError(f"{name} must be a finite number {least}, not {shown}") from None
    return int(value) if isinstance(value, numbers.Integral) else seconds
