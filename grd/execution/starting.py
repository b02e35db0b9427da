"""The part of our papermill client that brings a kernel up, or tells why it did not come up."""

from __future__ import annotations

import asyncio
import math
import time
from pathlib import Path
from typing import Any

from jupyter_client.utils import ensure_async, run_sync
from nbclient.util import run_hook
from papermill.clientwrap import PapermillNotebookClient

from grd.execution import kernel_start, provisioner
from grd.execution.stopping import Stopper

LOOK_SECONDS = 1.0
"""How often a kernel that has not answered yet is looked at."""


class StartingClient(PapermillNotebookClient):
    """Starts the kernel, within ``startup_timeout`` seconds in all.

    ``kernel_log`` is the file that this process's stderr is, where a kernel shares it.
    """

    km: Any
    shutdown_kernel: Any

    def __init__(
        self,
        managed: Any,
        stopper: Stopper,
        *,
        startup_timeout: float,
        kernel_log: Path | None = None,
        **kwargs: Any,
    ) -> None:
        # theirs takes whole seconds only, and is not used
        super().__init__(managed, startup_timeout=math.ceil(startup_timeout), **kwargs)
        self.stopper = stopper
        self.provisioner: Any = None
        self.popen: Any = None
        self.on_kernel: Any = None
        """Called with the provisioner of every kernel that was started."""
        self.on_warning: Any = None
        self._start_seconds = float(startup_timeout)
        self._start_began = 0.0
        self._start_options: dict[str, Any] = {}
        self._kernel_log = kernel_log
        self._said: kernel_start.SharedLog | kernel_start.PassedOn | None = None

    async def async_start_new_kernel(self, **kwargs: Any) -> None:
        """Start the kernel and remember its process: the kernel manager forgets it at the end."""
        self._start_options = dict(kwargs)
        self._start_began = time.monotonic()
        await self._launch()

    start_new_kernel = run_sync(async_start_new_kernel)

    async def async_start_new_kernel_client(self) -> Any:
        """Wait until the kernel answers; one that lost a port to another process is started again.

        Raises KernelStartError, with what the kernel said, when the start timeout is over at the latest.
        """
        tries = 1
        while True:
            try:
                return await self._connect()
            except Exception as failure:
                connection = self.km.get_connection_info()
                error = await self._end_failed_start(failure)
                if (
                    tries >= kernel_start.TRIES
                    or self._seconds_left() <= 0
                    or not self._may_retry(failure, error, connection)
                ):
                    raise error from failure
            tries += 1
            if self.on_warning is not None:
                self.on_warning(
                    "another process took a port before the kernel had bound it: "
                    f"starting the kernel again (try {tries} of {kernel_start.TRIES})"
                )
            self.km = self.create_kernel_manager()  # with ports of its own
            await self._launch()

    start_new_kernel_client = run_sync(async_start_new_kernel_client)

    def kernel_has_ended(self) -> None:
        """Wait for what it may still have written to its stderr."""
        if self._said is not None:
            self._said.close()

    async def _launch(self) -> None:
        self._said = said = kernel_start.listen(self._kernel_log)
        options = dict(self._start_options)
        named = self.km.kernel_spec.metadata.get("kernel_provisioner", {}).get("provisioner_name")
        if said.fd is not None and named == provisioner.NAME:
            options["stderr"] = said.fd
        try:
            await super().async_start_new_kernel(**options)
        finally:
            said.started()
        self.provisioner = self.km.provisioner
        self.popen = getattr(self.provisioner, "process", None)
        if self.on_kernel is not None:
            self.on_kernel(self.provisioner)

    async def _connect(self) -> Any:
        self.kc = self.km.client()
        await ensure_async(self.kc.start_channels())
        # Its own timeout is by a clock that somebody may set.
        answer = asyncio.ensure_future(ensure_async(self.kc.wait_for_ready(timeout=None)))
        try:
            await self._until_ready(answer)
        finally:
            answer.cancel()
        self.kc.allow_stdin = False
        await run_hook(self.on_notebook_start, notebook=self.nb)
        return self.kc

    async def _until_ready(self, answer: asyncio.Future[Any]) -> None:
        """Raises TimeoutError, LostPort, and what the ``answer`` raises."""
        looks_that_found_it = 0
        while True:
            left = max(0.1, self._seconds_left())
            done, _ = await asyncio.wait({answer}, timeout=min(left, LOOK_SECONDS))
            if done:
                await answer
                return
            if self._seconds_left() <= 0:
                raise TimeoutError
            # ipykernel does not always end when it cannot bind: threads of its own go on.
            looks_that_found_it += self._says_that_it_lost_a_port()
            if looks_that_found_it > 1:
                raise kernel_start.LostPort

    def _says_that_it_lost_a_port(self) -> bool:
        ports = kernel_start.ports_of(self.km.get_connection_info())
        return self._said is not None and kernel_start.lost_a_port(self._said.text(), ports, ())

    def _seconds_left(self) -> float:
        return self._start_began + self._start_seconds - time.monotonic()

    async def _end_failed_start(self, failure: Exception) -> Exception:
        """Kill the kernel; the error that tells all that is known."""
        died = not await ensure_async(self.km.is_alive())
        if died:
            self.kernel_has_ended()
        said = "" if self._said is None else self._said.text()  # before it hears of its end
        patient, self.shutdown_kernel = self.shutdown_kernel, "immediate"
        await self._async_cleanup_kernel()
        self.shutdown_kernel = patient
        if not died and not isinstance(failure, (TimeoutError, kernel_start.LostPort)):
            return failure
        returncode = self.popen.poll() if self.popen is not None else None
        waited = None if died else self._start_seconds
        if not died and isinstance(failure, kernel_start.LostPort):
            waited = time.monotonic() - self._start_began
        explained = kernel_start.explain(said, returncode=returncode, waited=waited)
        return kernel_start.KernelStartError(explained, said=said, died=died)

    def _may_retry(self, failure: Exception, error: Exception, connection: dict[str, Any]) -> bool:
        if isinstance(failure, kernel_start.LostPort):
            return not self.stopper.requested
        if not isinstance(error, kernel_start.KernelStartError) or not error.died or self.stopper.requested:
            return False
        ports = kernel_start.ports_of(connection)
        return kernel_start.lost_a_port(error.said, ports, kernel_start.taken_ports(connection["ip"], ports))
