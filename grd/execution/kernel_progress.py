"""An IPython extension for kernels that grd starts: tqdm's bars become progress events of the run.

The notebook does not change. tqdm is not imported by this: a finder waits for somebody to import
``tqdm.std``, where all of tqdm's bars (plain, auto, notebook, asyncio) have their counting, and wraps three
methods there. Whatever goes wrong in here, the bar of the notebook goes on.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from grd import contract
from grd.experiment import reporting

TARGET = "tqdm.std"
UNNAMED = "tqdm"

_process = 0
_open_bars: list[weakref.ref[Any]] = []
"""The outermost first. Weak: a bar that nobody closes must not live longer for being watched."""


class _Finder(MetaPathFinder):
    """Wraps the loading of one module, once, and is gone then."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(fullname, path, target) if find is not None else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    """Loads with the module's own loader, which it also leaves behind in the module."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        module.__loader__ = self._own
        self._own.exec_module(module)
        with contextlib.suppress(Exception):
            watch(module.tqdm)


def watch(bar_class: Any) -> None:
    """Report what bars of ``bar_class`` and its subclasses count; a second call changes nothing."""
    if getattr(bar_class.update, "_grd", False):
        return
    bar_class.__init__ = _followed_by(bar_class.__init__, _opened)
    bar_class.update = _followed_by(bar_class.update, _moved)
    bar_class.close = _preceded_by(bar_class.close, _closing)


def _followed_by(method: Callable[..., Any], then: Callable[[Any], None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(bar: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(bar, *args, **kwargs)
        with contextlib.suppress(Exception):  # somebody's subclass may lack anything
            then(bar)
        return result

    wrapped._grd = True  # type: ignore[attr-defined]
    return wrapped


def _preceded_by(method: Callable[..., Any], first: Callable[[Any], None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(bar: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(Exception):
            first(bar)
        return method(bar, *args, **kwargs)

    return wrapped


def _opened(bar: Any) -> None:
    # A forked worker must not report: another thread may have held the writer's lock at the fork.
    if bar.disable or os.getpid() != _process:
        return
    _open_bars.append(weakref.ref(bar))
    _report(bar)


def _moved(bar: Any) -> None:
    due = bar.__dict__.get("_grd_due")
    if due is not None and time.monotonic() >= due:
        _report(bar)


def _closing(bar: Any) -> None:
    if bar.__dict__.get("_grd_due") is None or bar.disable:
        return
    _report(bar)
    bar._grd_due = None
    # By identity: bars are equal when they stand in the same line of the screen.
    _open_bars[:] = [ref for ref in _open_bars if (other := ref()) is not None and other is not bar]


def _report(bar: Any) -> None:
    bar._grd_due = time.monotonic() + reporting.PROGRESS_PERIOD_SECONDS
    name = _name(bar)
    within = reporting.outermost()
    if within is None:
        outer = next((other for ref in _open_bars if (other := ref()) is not None), bar)
        within = None if outer is bar else _name(outer)
    if within == name:
        name = f"{name} (inner)"
    total = None if bar.total is None else reporting.as_number(bar.total)
    more: dict[str, Any] = {} if within is None else {"within": within}
    reporting.report_progress(name, reporting.as_number(bar.n) or 0, total, force=True, **more)


def _name(bar: Any) -> str:
    return str(bar.desc or "").strip().removesuffix(":").strip() or UNNAMED


def load_ipython_extension(shell: Any) -> None:
    """Wait for tqdm, where there are events to write."""
    global _process
    if not os.environ.get(contract.ENV_EVENTS):
        return
    _process = os.getpid()
    loaded = sys.modules.get(TARGET)
    if loaded is not None:
        with contextlib.suppress(Exception):
            watch(loaded.tqdm)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
