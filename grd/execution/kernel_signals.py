"""An IPython extension for kernels that grd starts: schedulers' signals must not kill them.

Slurm, systemd and docker signal every process at once. An ipykernel dies of SIGTERM, SIGHUP and SIGUSR1/2
by default, before the training could save. With this extension SIGTERM becomes a KeyboardInterrupt in the
running cell where nothing else has taken the signal, and still ends a kernel that is idle. One stop
interrupts a cell once: what it does then, in an except or a finally, is its saving. And a kernel that nobody
will send a cell any more ends by itself after the one that runs: its guardian need not wait longer. A
shutdown leaves a kernel its children (workers, a copy under way) until it has ended; the guardian ends what
is left of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from types import FrameType
from typing import Any

from grd import contract
from grd.runs.processes import start_time

SAME_REQUEST_SECONDS = 5.0
"""A scheduler and the runner may both deliver one request: SIGTERMs closer together than this are one."""

FLUSH_SECONDS = 0.5
"""How long a kernel that ends waits for its last output to be sent; ipykernel: 10 s, for each of two."""

_taken_at = float("-inf")


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    global _taken_at
    before, _taken_at = _taken_at, time.monotonic()
    if _taken_at - before < SAME_REQUEST_SECONDS:
        return
    # ipykernel has a callable SIGINT handler exactly while a cell runs, and ignores SIGINT between cells.
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        if handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, _on_last_call)  # for this cell: ipykernel sets it anew in the next
        if not _is_cleaning_up():
            handler(signal.SIGINT, frame)
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def _on_last_call(signum: int, frame: FrameType | None) -> None:
    """SIGINT in a cell that was asked to stop before."""
    if not _is_cleaning_up():
        signal.default_int_handler(signum, frame)


def _is_cleaning_up() -> bool:
    """Whether the interrupted code is in an except or a finally that a KeyboardInterrupt has led to."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def _be_an_ordinary_process() -> None:
    # A pool ends its workers by SIGTERM, and waits for them.
    if signal.getsignal(signal.SIGTERM) is _on_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _is_orphan() -> bool:
    """Whether the process that started this kernel has gone."""
    pid, _, started = os.environ.get(contract.ENV_REQUESTER, "").partition(":")
    try:
        return start_time(int(pid)) != float(started)
    except ValueError:
        return False


def _leave_children_to_the_guardian(kernel: Any) -> None:
    """ipykernel ends the kernel's children as soon as a shutdown is requested: also those of a cell that
    still runs, also a pool's workers, for whose locks the pool then waits for ever at exit, and for half a
    minute if one is a zombie that nobody waits for. The guardian ends them once the kernel has ended."""
    if getattr(kernel, "_progressively_terminate_all_children", None) is None or sys.platform != "linux":
        return  # where there is no guardian nobody else would end them

    async def leave_them() -> None:
        """Nothing."""

    kernel._progressively_terminate_all_children = leave_them


def _flush_soon(stream: Any) -> None:
    """Make it wait briefly for its last output to be sent, and say nothing where that is in vain.

    ipykernel asks the thread that sends, which the main thread may have ended in the same moment: the
    question is put through a socket that blocks for ever where nobody is left to hear it, and is waited for
    10 s otherwise; then it complains to the kernel's real stderr, which is that of whoever runs the notebook.
    """
    import zmq

    flush = stream.flush
    stream.flush_timeout = FLUSH_SECONDS
    with contextlib.suppress(zmq.ZMQError):
        asking = getattr(stream.pub_thread, "_event_pipe", None)  # this thread's own
        if asking is not None:
            asking.sndtimeo = int(FLUSH_SECONDS * 1000)

    def flush_quietly() -> None:
        real = sys.__stderr__
        with open(os.devnull, "w") as nowhere, contextlib.suppress(zmq.ZMQError):
            sys.__stderr__ = nowhere  # type: ignore[misc]
            try:
                flush()
            finally:
                sys.__stderr__ = real  # type: ignore[misc]

    stream.flush = flush_quietly


def _end_soon(kernel: Any) -> None:
    """ipykernel flushes its streams after it has answered a shutdown, while its main thread is ending the
    thread that would do it: now and then it then waits for that, in vain, longer than most graces."""
    handlers = getattr(kernel, "control_handlers", {})
    shutdown = handlers.get("shutdown_request")
    if shutdown is None:
        return

    def end_soon(*request: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "flush_timeout"):
                _flush_soon(stream)
        return shutdown(*request)

    handlers["shutdown_request"] = end_soon


def load_ipython_extension(shell: Any) -> None:
    """Install the handlers where the signals still have their default action."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _on_sigterm)
        os.register_at_fork(after_in_child=_be_an_ordinary_process)
    for name in ("SIGUSR1", "SIGUSR2", "SIGHUP"):
        signum = getattr(signal, name)
        if signal.getsignal(signum) is signal.SIG_DFL:
            signal.signal(signum, signal.SIG_IGN)

    def end_if_orphan(*result: Any) -> None:
        if _is_orphan():
            shell.ask_exit()

    shell.events.register("post_run_cell", end_if_orphan)
    kernel = getattr(shell, "kernel", None)
    _leave_children_to_the_guardian(kernel)
    _end_soon(kernel)
