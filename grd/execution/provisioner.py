"""Starts kernels for grd: in a session of their own, marked, signalled politely, killed wholly.

Named by the engine in the loaded kernelspec's metadata, in memory, so that any kernelspec gets it. The
guardian, the kernel's parent that outlives neither it nor its requester, will be started from here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

from jupyter_client.provisioning.local_provisioner import LocalProvisioner

from grd import contract
from grd.runs.processes import reap

NAME = "grd-provisioner"
KERNEL_EXTENSIONS = tuple(f"grd.execution.kernel_{part}" for part in ("signals", "outputs", "progress"))
SHUTDOWN_SECONDS = 10.0
"""Time for a kernel's own exit (atexit handlers, threads) after a notebook's last cell."""


def is_ipykernel(argv: list[str]) -> bool:
    """Whether a kernelspec's command starts IPython's own kernel."""
    return any(part in ("ipykernel_launcher", "ipykernel") for part in argv) or any(
        part.endswith("ipykernel_launcher.py") for part in argv
    )


class GrdProvisioner(LocalProvisioner):
    """A LocalProvisioner whose signals go to the kernel alone and whose kill reaches every process of it."""

    marker: str | None = None

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Add what the kernel needs to hear of a stop; the environment comes from the engine."""
        prepared: dict[str, Any] = await super().pre_launch(**kwargs)
        environment = prepared.get("env") or {}
        if contract.ENV_MARKER in environment:
            self.marker = f"{contract.ENV_MARKER}={environment[contract.ENV_MARKER]}"
        if is_ipykernel(prepared["cmd"]):
            extensions = [word for name in KERNEL_EXTENSIONS for word in ("--ext", name)]
            prepared["cmd"] = [*prepared["cmd"], *extensions]
        return prepared

    async def send_signal(self, signum: int) -> None:
        """Signal the kernel's process only: its DataLoader workers must live until it has saved."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signum)

    async def terminate(self, restart: bool = False) -> None:
        """Ask the kernel to end; what it leaves is killed at the end."""
        await self.send_signal(signal.SIGTERM)

    async def kill(self, restart: bool = False) -> None:
        """SIGKILL to the kernel's group, its session, and whatever else carries its mark."""
        self.kill_tree()

    def kill_tree(self) -> list[int]:
        """The same, callable from any thread; returns the pids that were killed."""
        if self.pgid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pgid, signal.SIGKILL)
        if self.process:
            # Reaped here, or the zombie would be looked for until the wait runs out.
            give_up = time.monotonic() + 1.0
            while self.process.poll() is None and time.monotonic() < give_up:
                time.sleep(0.01)
        if self.marker is not None:
            return reap(self.marker, session=self.pgid)
        return []

    def get_shutdown_wait_time(self, recommended: float = 5.0) -> float:
        """Seconds that jupyter_client waits for the kernel's own exit before it kills."""
        return max(recommended, SHUTDOWN_SECONDS)
