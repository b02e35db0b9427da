"""Exit codes, in one place; README documents them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from grd import contract, errors

OK: Final = 0
RUN_FAILED: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 66
UNAVAILABLE: Final = 69
INTERRUPTED: Final = 75
APPROVAL: Final = 77
CONFIGURATION: Final = 78
WAIT_TIMEOUT: Final = 124

_BY_ERROR: Final[tuple[tuple[type[Exception], int], ...]] = (
    (errors.UsageError, USAGE),
    (errors.NotFoundError, NOT_FOUND),
    (errors.ResourceUnavailable, UNAVAILABLE),
    (errors.ApprovalRequired, APPROVAL),
    (errors.ConfigurationError, CONFIGURATION),
    (errors.ResumeError, USAGE),
    (errors.GrdError, RUN_FAILED),
)


def of_error(error: Exception) -> int:
    """The exit code of an error that grd raised on purpose."""
    for kind, code in _BY_ERROR:
        if isinstance(error, kind):
            return code
    return RUN_FAILED


def worst(codes: Iterable[int]) -> int:
    """The one code for several runs: a failure before an interruption before success."""
    found = set(codes)
    for code in (
        WAIT_TIMEOUT,
        RUN_FAILED,
        UNAVAILABLE,
        APPROVAL,
        INTERRUPTED,
        USAGE,
        CONFIGURATION,
        NOT_FOUND,
    ):
        if code in found:
            return code
    return OK


def of_loop(reason: str) -> int:
    """The exit code that a loop's end gives to its command."""
    return {"done": OK, "failures": RUN_FAILED, "approval_required": APPROVAL}.get(reason, INTERRUPTED)


def of_run(state: str, cause: str | None) -> int:
    """The exit code that a run's end gives to the command that followed it."""
    if state == contract.COMPLETED:
        return OK
    if state == contract.INTERRUPTED:
        return INTERRUPTED
    if state == contract.DECLINED:
        return APPROVAL
    if cause == contract.START_FAILED:
        return UNAVAILABLE
    return RUN_FAILED
