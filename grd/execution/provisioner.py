"""Starts kernels for grd: behind a guardian, marked, signalled politely, killed wholly.

Named by the engine in the loaded kernelspec's metadata, in memory, so that any kernelspec gets it, and by
the installed kernelspec `grd-python3`, for tools that cannot name an engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import secrets
import signal
import time
from pathlib import Path
from typing import Any

from jupyter_client.provisioning.local_provisioner import LocalProvisioner

from grd import contract
from grd.execution.guarded_kernel import GuardedKernel, can_be_guarded, start_guarded
from grd.runs import processes
from grd.settings import parse_duration

NAME = "grd-provisioner"
KERNEL_EXTENSIONS = tuple(f"grd.execution.kernel_{part}" for part in ("signals", "outputs", "progress"))
SHUTDOWN_SECONDS = 10.0
"""Time for a kernel's own exit (atexit handlers, threads) after a notebook's last cell."""

QUICK_EXIT_SECONDS = 1.0
SAME_SHUTDOWN_SECONDS = 5.0
"""An interrupt so shortly before a shutdown is the shutdown's own: jupyter_client sends it first."""


def is_ipykernel(argv: list[str]) -> bool:
    """Whether a kernelspec's command starts IPython's own kernel."""
    return any(part in ("ipykernel_launcher", "ipykernel") for part in argv) or any(
        part.endswith("ipykernel_launcher.py") for part in argv
    )


class GrdProvisioner(LocalProvisioner):
    """A LocalProvisioner whose signals go to the kernel alone and whose kill reaches every process of it."""

    process: Any = None
    pid: Any = None
    marker: str | None = None
    started: float | None = None
    """When the kernel was started, as `processes.start_time` has it."""
    guarded: GuardedKernel | None = None
    exit_seconds: float = SHUTDOWN_SECONDS
    """How long the kernel's own exit may take once no further cell will run."""
    grace: float | None = None
    """Seconds that a shutdown leaves to a running cell; None where our engine does the stopping."""
    _interrupted_at = -math.inf
    _told = False

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Add what the kernel needs to hear of a stop, and the mark by which all its processes are found."""
        prepared: dict[str, Any] = await super().pre_launch(**kwargs)
        environment = prepared.get("env")
        environment = dict(os.environ if environment is None else environment)
        mark = environment.get(contract.ENV_MARKER)
        if mark is None or mark == os.environ.get(contract.ENV_MARKER):
            # None of its own: a kernel started from inside a run is not to take that run along when it ends.
            self.grace = _grace(environment, of_run=False)
            mark = environment[contract.ENV_MARKER] = f"kernel-{os.getpid()}-{secrets.token_hex(4)}"
        self.marker = f"{contract.ENV_MARKER}={mark}"
        me = processes.identity()
        environment[contract.ENV_REQUESTER] = f"{me['pid']}:{me['started']}"
        prepared["env"] = environment
        if is_ipykernel(prepared["cmd"]):
            extensions = [word for name in KERNEL_EXTENSIONS for word in ("--ext", name)]
            prepared["cmd"] = [*prepared["cmd"], *extensions]
        return prepared

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        """Start the kernel behind its guardian, where the machine can have one."""
        if kwargs.get("independent") or not can_be_guarded():
            info = await super().launch_kernel(cmd, **kwargs)
            self.started = processes.start_time(self.pid)
            return info
        environment = kwargs["env"]
        leases = environment.pop(contract.ENV_LEASES, "")
        kernel = await start_guarded(
            cmd,
            held=tuple(int(number) for number in leases.split(",") if number),
            grace=_grace(environment, of_run=True) if self.grace is None else self.grace,
            deadline=_seconds(environment.get(contract.ENV_DEADLINE)),
            connection_file=getattr(self.parent, "connection_file", None),
            **LocalProvisioner._scrub_kwargs(kwargs),
        )
        self.process = self.guarded = kernel
        self.pid = self.pgid = kernel.pid
        self.started = kernel.started
        self.cwd = kwargs.get("cwd", Path.cwd())
        return self.connection_info

    async def send_signal(self, signum: int) -> None:
        """Signal the kernel's process only: its DataLoader workers must live until it has saved."""
        if signum == signal.SIGINT and self.pid is not None:
            heard = processes.catches_signal(self.pid, signum)  # an idle ipykernel ignores it
            self._interrupted_at = time.monotonic() if heard else -math.inf
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signum)

    async def terminate(self, restart: bool = False) -> None:
        """Ask the kernel to end, unless it was asked already; what it leaves is killed at the end.

        jupyter_client calls this in the middle of the wait, when a cell may be saving in its ``finally``: a
        second KeyboardInterrupt would cut that.
        """
        if self.grace is None or not self._told:
            await self.send_signal(signal.SIGTERM)

    async def shutdown_requested(self, restart: bool = False) -> None:
        """Wait for an exit that is quick, as most are: jupyter_client looks only every 0.1 s.

        Remembers whether the running cell has already been interrupted for this shutdown.
        """
        self._told = time.monotonic() - self._interrupted_at < SAME_SHUTDOWN_SECONDS
        give_up = time.monotonic() + QUICK_EXIT_SECONDS
        while await self.poll() is None and time.monotonic() < give_up:
            await asyncio.sleep(0.005)

    async def kill(self, restart: bool = False) -> None:
        """SIGKILL to the kernel's group, its session, and whatever else carries its mark."""
        self.kill_tree()

    def kill_tree(self) -> list[int]:
        """The same, callable from any thread; returns the pids that were beyond the guardian's reach."""
        if self.guarded is not None:
            self.guarded.end_tree()
        elif self.pid is not None:
            processes.end_group(self.pid, self.started)
            if self.process:
                # Reaped here, or the zombie would be looked for until the wait runs out.
                give_up = time.monotonic() + 1.0
                while self.process.poll() is None and time.monotonic() < give_up:
                    time.sleep(0.01)
        if self.marker is None:
            return []
        return processes.reap(self.marker, session=self.pid, session_started=self.started)

    def get_shutdown_wait_time(self, recommended: float = 5.0) -> float:
        """Seconds that jupyter_client waits before it kills: the grace for a cell that was interrupted."""
        return max(recommended, self.grace if self.grace and self._told else self.exit_seconds)


def _grace(environment: dict[str, str], *, of_run: bool) -> float:
    """The run's grace; GRD_GRACE for kernels of other tools. What cannot be read counts as not said."""
    for name in (contract.ENV_KERNEL_GRACE, "GRD_GRACE") if of_run else ("GRD_GRACE",):
        with contextlib.suppress(ValueError):
            return parse_duration(environment.get(name, ""))
    return contract.DEFAULT_GRACE_SECONDS


def _seconds(text: str | None) -> float | None:
    with contextlib.suppress(ValueError):
        return float(text or "")
    return None
