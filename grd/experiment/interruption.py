"""Stop requests inside the notebook's process: signals and the stop file, as a flag a loop looks at.

One dispatcher for the whole process. A signal handler only sets a flag; the loop saves and raises at its
next boundary. Signals can be taken only in the main thread; elsewhere the stop file alone works.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any, Protocol

from grd import contract

STOP_FILE_PERIOD_SECONDS = 0.1
SAME_REQUEST_SECONDS = 5.0
"""A scheduler and the runner may both deliver one request: SIGTERMs closer together than this are one."""

SAVES_AT_EXIT_SECONDS = 600.0
"""How long the process's end waits for saves in daemon threads, which Python would cut off."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_REASONS: dict[int, str] = {signal.SIGTERM: contract.SIGTERM, signal.SIGINT: contract.SIGINT}


class Watcher(Protocol):
    """Whoever wants its ``interrupted`` set by a stop signal."""

    interrupted: bool


class _Dispatcher:
    def __init__(self) -> None:
        self.watchers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.armings: set[object] = set()
        self.previous: dict[int, Any] = {}
        self.signal: int | None = None
        self.signal_time = 0.0
        self.saves: set[object] = set()  # its changes are atomic: several threads may save
        self.background_saves: set[object] = set()
        self.handling = False
        self.owner = os.getpid()
        self.stop_file_time = float("-inf")
        self.stop_file_reason: str | None = None
        self.stop_file_path = ""
        self.hooked_shell: Any = None


_state = _Dispatcher()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _watched() -> bool:
    return any(True for _ in _state.watchers)  # len() would count the one that is just being collected


def _kernel_is_idle() -> bool:
    """Whether this is an ipykernel between two cells.

    ipykernel ignores SIGINT while idle and installs a handler around every request it executes.
    """
    app = sys.modules.get("ipykernel.kernelapp")
    return (
        app is not None
        and bool(app.IPKernelApp.initialized())
        and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    )


def _on_signal(signum: int, frame: FrameType | None) -> None:
    if _state.handling:
        return  # a handler of somebody else that calls the one before it, which is this one
    if os.getpid() != _state.owner:
        _on_signal_in_forked_child(signum, frame)
        return
    if not (_state.armings or _watched()) or _kernel_is_idle():
        _hand_on(signum, frame)
        return
    if _state.signal is not None and not _state.saves:
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        if not _state.armings and time.monotonic() - _state.signal_time > SAME_REQUEST_SECONDS:
            _hand_on(signum, frame)
            return
    if _state.signal is None:
        _state.signal, _state.signal_time = signum, time.monotonic()
    for watcher in list(_state.watchers):
        watcher.interrupted = True
    previous = _state.previous.get(signum)
    # Not for SIGINT: what stood there before raises or cancels, which is what the flag replaces.
    if signum == signal.SIGTERM and callable(previous):
        _state.handling = True
        try:
            previous(signum, frame)
        except (KeyboardInterrupt, SystemExit):
            pass  # the loop raises by itself once the state is saved
        finally:
            _state.handling = False


def _hand_on(signum: int, frame: FrameType | None) -> None:
    """Do what would have happened without us."""
    previous = _state.previous.get(signum, signal.SIG_DFL)
    if callable(previous):
        _state.handling = True
        try:
            previous(signum, frame)
        finally:
            _state.handling = False
    elif previous is not signal.SIG_IGN:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)


def _install() -> None:
    if not _in_main_thread():
        return
    for signum in _SIGNALS:
        current = signal.getsignal(signum)
        if current is _on_signal or current is None:  # None: set by C code, which could not be restored
            continue
        if signum == signal.SIGINT and current is signal.SIG_IGN:
            continue  # a background job, or a kernel between two cells
        try:
            signal.signal(signum, _on_signal)
        except ValueError:
            return  # not the main interpreter
        _state.previous[signum] = current


def _uninstall_if_unused() -> None:
    if _state.armings or _watched():
        return
    _state.signal = None
    if not _in_main_thread():
        return  # the handler hands on by itself until somebody in the main thread passes here
    for signum, previous in list(_state.previous.items()):
        if signal.getsignal(signum) is _on_signal:
            with contextlib.suppress(ValueError, TypeError):
                signal.signal(signum, previous)


def _on_signal_in_forked_child(signum: int, frame: FrameType | None) -> None:
    # A DataLoader worker must end on SIGTERM; but a Ctrl-C that reaches the whole process group must not
    # take the workers away from a loop that is about to save.
    if signum == signal.SIGTERM:
        _hand_on(signum, frame)
    elif _state.signal is not None:
        raise KeyboardInterrupt
    else:
        _state.signal = signum


_forking = threading.local()


def _before_fork() -> None:
    # CPython forgets, in the child, the signals whose handlers were still to run. Held back in the kernel
    # until the child is ready, a SIGTERM sent right after the fork still ends it.
    if _state.armings or _watched():
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _after_fork() -> None:
    mask = getattr(_forking, "mask", None)
    if mask is not None:
        _forking.mask = None
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_fork_in_child() -> None:
    if signal.getsignal(signal.SIGTERM) is _on_signal:
        with contextlib.suppress(ValueError, TypeError):
            signal.signal(signal.SIGTERM, _state.previous.get(signal.SIGTERM, signal.SIG_DFL))
    _state.saves.clear()  # the threads that save were not forked
    _state.background_saves.clear()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def _own() -> None:
    """In a forked child that arms for itself: what the parent had armed is none of its business."""
    if _state.owner != os.getpid():
        _state.owner = os.getpid()
        _state.armings.clear()
        _state.watchers = weakref.WeakSet()
        _state.signal = None


def watch(watcher: Watcher) -> None:
    """Set ``watcher.interrupted`` when a stop signal comes; held weakly, main thread only."""
    if not _in_main_thread():
        return
    _own()
    _state.watchers.add(watcher)
    weakref.finalize(watcher, _uninstall_if_unused).atexit = False
    _install()


def unwatch(watcher: Watcher) -> None:
    """Forget ``watcher``; the last one gives the signals back."""
    _state.watchers.discard(watcher)
    _uninstall_if_unused()


def rearm(token: object | None = None) -> None:
    """Take SIGINT again in a new cell: ipykernel resets it around every cell. Cheap; harmless elsewhere.

    ``token``: what `armed` gave to a loop that goes on in this cell; the end of the one before disarmed it.
    """
    if not _in_main_thread():
        return
    if token is not None and token not in _state.armings:
        _own()
        _state.armings.add(token)
    if _state.armings or _watched():
        _install()


def _cell_ended(*_: Any) -> None:
    # An exception in a cell keeps its frames, and with them a half-run loop, alive in the traceback.
    _state.armings.clear()
    _uninstall_if_unused()


def _hook_cell_end() -> None:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None and shell is not _state.hooked_shell:
        shell.events.register("post_run_cell", _cell_ended)
        _state.hooked_shell = shell


@contextlib.contextmanager
def armed() -> Iterator[object]:
    """Turn SIGTERM and SIGINT into `stop_requested` until the block ends; the old handlers come back then.

    A second SIGINT raises KeyboardInterrupt, except while a save is in progress. A signal that came but
    was honoured by nobody is delivered again at a normal end. Off the main thread only the stop file works.
    """
    token = object()
    if _in_main_thread():
        _own()
        _hook_cell_end()
        _state.armings.add(token)
        _install()
    try:
        yield token
    except BaseException:
        _disarm(token)
        raise
    unheard = _disarm(token)
    if unheard is not None:
        os.kill(os.getpid(), unheard)


def _disarm(token: object) -> int | None:
    _state.armings.discard(token)
    if _state.armings:
        return None
    unheard = _state.signal if not _watched() else None
    _state.signal = None
    _uninstall_if_unused()
    return unheard


def honoured() -> None:
    """Forget the signal that came: the caller is about to raise ExperimentInterrupted for it."""
    _state.signal = None


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Mark a save in progress: until it ends, no signal does more than set the flag.

    Where nothing is armed or watches, a signal that came meanwhile is delivered at the end. A process that
    ends waits for saves in other threads.
    """
    token = object()
    arms = False
    if _in_main_thread():
        _own()
        arms = not (_state.armings or _watched())
        if arms:
            _state.armings.add(token)
        _install()
    _state.saves.add(token)
    try:
        yield
    finally:
        _state.saves.discard(token)
        unheard = _disarm(token) if arms else None
        if unheard is not None:
            os.kill(os.getpid(), unheard)


@contextlib.contextmanager
def saving_in_background() -> Iterator[None]:
    """Mark a save of a state that nobody changes any more: a process that ends waits for it."""
    token = object()
    _state.background_saves.add(token)
    try:
        yield
    finally:
        _state.background_saves.discard(token)


def _finish_saves() -> None:
    give_up = time.monotonic() + SAVES_AT_EXIT_SECONDS
    while (_state.saves or _state.background_saves) and time.monotonic() < give_up:
        time.sleep(0.05)


atexit.register(_finish_saves)


def _reason_of_stop_file() -> str | None:
    path = os.environ.get(contract.ENV_STOP_FILE)
    if not path:
        return None
    now = time.monotonic()
    if path == _state.stop_file_path:
        if _state.stop_file_reason is not None:
            return _state.stop_file_reason
        if now - _state.stop_file_time < STOP_FILE_PERIOD_SECONDS:
            return None
    _state.stop_file_path, _state.stop_file_time, _state.stop_file_reason = path, now, None
    try:
        with open(path, encoding="utf-8") as stream:
            text = stream.read()
    except OSError:
        return None
    reason: Any = None
    with contextlib.suppress(ValueError):
        content = json.loads(text)
        reason = content.get("reason") if isinstance(content, dict) else None
    _state.stop_file_reason = str(reason) if reason else contract.STOPPED
    return _state.stop_file_reason


def stop_requested() -> str | None:
    """Why this experiment should stop now, as one of the causes of `grd.contract`, or None.

    Cheap enough for every step: the stop file is looked at 10 times a second at most.
    """
    reason = _reason_of_stop_file()
    if reason is not None:
        return reason
    return None if _state.signal is None else _REASONS.get(_state.signal, contract.STOPPED)
