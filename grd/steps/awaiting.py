"""The Researcher for an event loop: runs go on in their own processes, so waiting for them blocks nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from grd.errors import UsageError
from grd.steps.researcher import research
from grd.steps.resuming import resume
from grd.steps.run import Run


async def aresearch(notebook: str | Path, parameters: Mapping[str, Any] | None = None, **options: Any) -> Run:
    """`grd.research` to be awaited; takes its options but ``wait`` and ``on_event``.

    A cancelled task asks its run to save and stop. Raises what `grd.research` raises.
    """
    return await _seen_to_end(research, notebook, parameters, options)


async def aresume(run: str | Run, parameters: Mapping[str, Any] | None = None, **options: Any) -> Run:
    """`grd.resume` to be awaited; takes its options but ``wait`` and ``on_event``.

    A cancelled task asks its run to save and stop. Raises what `grd.resume` raises.
    """
    return await _seen_to_end(resume, run, parameters, options)


async def _seen_to_end(
    begin: Callable[..., Run], what: Any, parameters: Mapping[str, Any] | None, options: dict[str, Any]
) -> Run:
    for name in ("wait", "on_event"):
        if name in options:
            raise UsageError(f"{name} does not go with await; see Run.events for what happens meanwhile")
    starting = asyncio.ensure_future(
        asyncio.to_thread(partial(begin, what, parameters, wait=False, **options))
    )
    try:
        run = await asyncio.shield(starting)
        await run.await_end()
    except asyncio.CancelledError:
        # The thread cannot be cancelled: what it is about to start must be stopped too.
        with contextlib.suppress(Exception):
            (await starting).stop()
        raise
    return run
