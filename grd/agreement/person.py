"""Whether somebody is there to answer, and who it is: said by the surroundings, never assumed."""

from __future__ import annotations

import contextlib
import getpass
import os
import sys
from collections.abc import Mapping
from typing import Any

from grd import contract

TERMINAL, JUPYTER = "terminal", "jupyter"


def who_can_answer(environment: Mapping[str, str] = os.environ) -> str | None:
    """``terminal``, ``jupyter``, or None where nobody is.

    In a kernel the front end says so with each request (papermill, nbclient and nbconvert say no); elsewhere
    both input and messages must be a terminal's. GRD_NONINTERACTIVE=1 says no for all.
    """
    if environment.get(contract.ENV_NONINTERACTIVE) not in (None, "", "0"):
        return None
    kernel = _kernel()
    if kernel is not None:
        # ipykernel sets it for each request, and has no public name for it
        return JUPYTER if getattr(kernel, "_allow_stdin", False) else None
    try:
        return TERMINAL if sys.stdin.isatty() and sys.stderr.isatty() else None
    except (AttributeError, ValueError):
        return None


def _kernel() -> Any:
    if "ipykernel" not in sys.modules:
        return None
    with contextlib.suppress(Exception):
        from IPython.core.getipython import get_ipython

        return getattr(get_ipython(), "kernel", None)
    return None


def identity(how: str | None) -> dict[str, Any]:
    """Who does this: user, how (terminal, jupyter, config), the terminal's name, pid."""
    found: dict[str, Any] = {"user": None, "how": how or "headless", "pid": os.getpid(), "tty": None}
    with contextlib.suppress(Exception):  # a uid without a name
        found["user"] = getpass.getuser()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found["tty"] = os.ttyname(sys.stdin.fileno())
    return found
