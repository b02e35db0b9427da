"""Pauses between tries, and the decorator that tries again after a timeout.

Full jitter: a pause is drawn evenly from zero to a ceiling that doubles with each try, so that many callers
that failed together do not come back together.
"""

from __future__ import annotations

import functools
import inspect
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from grd.errors import ApprovalDeclined

LONGEST_DELAY_SECONDS = 300.0

Function = TypeVar("Function", bound=Callable[..., Any])


def ceiling(failures: int, base: float, longest: float = LONGEST_DELAY_SECONDS) -> float:
    """Seconds that the pause after so many failures in a row (1, 2, ...) takes at most: it doubles."""
    return min(longest, base * 2.0 ** min(failures - 1, 64))


def full_jitter(
    failures: int,
    base: float,
    longest: float = LONGEST_DELAY_SECONDS,
    *,
    draw: Callable[[], float] = random.random,
) -> float:
    """The pause in seconds after so many failures in a row; ``draw`` gives numbers from 0 to 1."""
    return ceiling(failures, base, longest) * draw()


def retry_on_timeout(
    max_retries: int = 3,
    initial_delay: float = 2.0,
    *,
    max_delay: float = LONGEST_DELAY_SECONDS,
    jitter: bool = False,
    stop: threading.Event | None = None,
) -> Callable[[Function], Function]:
    """Call the decorated function again after a timeout: ``max_retries`` calls in all, the first included.

    The pause begins with ``initial_delay`` seconds and doubles, up to ``max_delay``; with ``jitter`` it is
    drawn evenly from zero to that. Only timeouts are tried again: TimeoutError with its subclasses, and
    ``subprocess.TimeoutExpired``, which is none; a declined approval is an answer, not a timeout. Every other
    error is raised at once, and after the last call its own. Works on functions, methods and coroutine
    functions. A ``stop`` that is set ends the pause, and no further call is made. Raises ValueError for
    ``max_retries`` below 1 or a delay below 0, TypeError for what is no number of calls or seconds.
    """
    if callable(max_retries):
        raise TypeError("write it with brackets: @retry_on_timeout()")
    if isinstance(max_retries, bool) or not isinstance(max_retries, int):
        raise TypeError(f"max_retries is a whole number of calls, not {max_retries!r}")
    if max_retries < 1:
        raise ValueError(f"max_retries counts the calls, the first included: {max_retries} would be none")
    for name, delay in (("initial_delay", initial_delay), ("max_delay", max_delay)):
        if isinstance(delay, bool) or not isinstance(delay, int | float):
            raise TypeError(f"{name} is a number of seconds, not {delay!r}")
        if not delay >= 0:  # which NaN is neither
            raise ValueError(f"{name} must not be below zero, and is {delay}")

    def pause_after(calls: int, error: BaseException, name: str) -> float | None:
        """Seconds to wait now; None if the error is the last word."""
        if isinstance(error, ApprovalDeclined) or (stop is not None and stop.is_set()):
            return None
        if calls >= max_retries:
            _say(f"{name}: {_first_line(error)}; attempt {calls} of {max_retries} was the last")
            return None
        wait = full_jitter if jitter else ceiling
        seconds = wait(calls, initial_delay, max_delay)
        _say(f"{name}: {_first_line(error)}; attempt {calls + 1} of {max_retries} follows in {seconds:.3g} s")
        return seconds

    def decorate(function: Function) -> Function:
        name = getattr(function, "__qualname__", repr(function))

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*args: Any, **kwargs: Any) -> Any:
                for calls in range(1, max_retries + 1):
                    try:
                        return await function(*args, **kwargs)
                    except (TimeoutError, subprocess.TimeoutExpired) as error:
                        seconds = pause_after(calls, error, name)
                        if seconds is None or await _stopped_async(seconds, stop):
                            raise
                raise AssertionError("the last attempt returns or raises")

            return cast(Function, awaited)

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            for calls in range(1, max_retries + 1):
                try:
                    return function(*args, **kwargs)
                except (TimeoutError, subprocess.TimeoutExpired) as error:
                    seconds = pause_after(calls, error, name)
                    if seconds is None or _stopped(seconds, stop):
                        raise
            raise AssertionError("the last attempt returns or raises")

        return cast(Function, called)

    return decorate


def _stopped(seconds: float, stop: threading.Event | None) -> bool:
    if stop is None:
        time.sleep(seconds)
        return False
    return stop.wait(seconds)


async def _stopped_async(seconds: float, stop: threading.Event | None) -> bool:
    if stop is None:
        import asyncio  # commands that only look must not pay for it

        await asyncio.sleep(seconds)
        return False
    give_up = time.monotonic() + seconds
    while not stop.is_set() and time.monotonic() < give_up:
        await asyncio.sleep(min(0.1, max(0.0, give_up - time.monotonic())))
    return stop.is_set()


def _say(text: str) -> None:
    print(f"grd: {text}", file=sys.stderr, flush=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
