"""An IPython extension for kernels that grd starts: schedulers' signals must not kill them.

Slurm, systemd and docker signal every process at once. An ipykernel dies of SIGTERM, SIGHUP and SIGUSR1/2
by default, before the training could save. With this extension SIGTERM becomes a KeyboardInterrupt in the
running cell where nothing else has taken the signal, and still ends a kernel that is idle. And a kernel that
nobody will send a cell any more ends by itself after the one that runs: its guardian need not wait longer.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from grd import contract
from grd.runs.processes import start_time


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    # ipykernel has a callable SIGINT handler exactly while a cell runs, and ignores SIGINT between cells.
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(signal.SIGINT, frame)
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_orphan() -> bool:
    """Whether the process that started this kernel has gone."""
    pid, _, started = os.environ.get(contract.ENV_REQUESTER, "").partition(":")
    try:
        return start_time(int(pid)) != float(started)
    except ValueError:
        return False


def load_ipython_extension(shell: Any) -> None:
    """Install the handlers where the signals still have their default action."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _on_sigterm)
    for name in ("SIGUSR1", "SIGUSR2", "SIGHUP"):
        signum = getattr(signal, name)
        if signal.getsignal(signum) is signal.SIG_DFL:
            signal.signal(signum, signal.SIG_IGN)

    def end_if_orphan(*result: Any) -> None:
        if _is_orphan():
            shell.ask_exit()

    shell.events.register("post_run_cell", end_if_orphan)
