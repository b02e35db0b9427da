"""The GPUs of one attempt: waited for before it begins, told to its kernel, given back at its end."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grd import contract
from grd.errors import ConfigurationError, ResourceUnavailable
from grd.execution.device_parameters import DEFAULT_BATCH_SIZE, NAMES, device_parameters
from grd.hardware import leases
from grd.hardware.leases import Lease, Wanted
from grd.hardware.pools import TRAINING
from grd.hardware.visible import VARIABLE
from grd.runs.model import Attempt, RunRecord
from grd.settings import find_project_root, load_settings

POLL_SECONDS = 0.5
SAY_SECONDS = 10.0
"""How often the record says anew what is waited for."""


class GpuTurn:
    """What an attempt has of the machine's GPUs."""

    def __init__(self, record: RunRecord, attempt: Attempt) -> None:
        self._record, self._attempt = record, attempt
        chosen = record.gpus or {}
        self._wanted = Wanted(chosen.get("count"), str(chosen.get("pool") or TRAINING))
        self._lease = Lease()

    def wait(self, stopped: Callable[[], bool], say: Callable[[str], None]) -> str | None:
        """Lease what the run wants, once it is free; ``say`` hears now and then what is waited for.

        Returns without any if ``stopped`` says so. Where nobody asked for GPUs and none can be leased it
        returns a warning, for the run goes on with all of them. Raises ResourceUnavailable where those that
        were asked for can never be had, and ConfigurationError where a pool names what is not there.
        """
        if leases.is_unasked_for_nothing(self._wanted, os.environ):
            return None
        said_at = -SAY_SECONDS
        owner = {
            "run_id": self._record.run_id,
            "attempt": self._attempt.number,
            "folder": self._record.folder,
        }
        try:
            settings, _ = load_settings(find_project_root(Path(self._record.working_dir)))
            while not stopped():
                lease = leases.take(self._wanted, settings, owner)
                if lease is not None:
                    self._lease = lease
                    break
                if time.monotonic() - said_at >= SAY_SECONDS:
                    said_at = time.monotonic()
                    who = "; ".join(leases.describe_holder(each) for each in leases.holders())
                    say(f"waiting for {_count(self._wanted.count or 1)}: {who or 'none is free'}")
                time.sleep(POLL_SECONDS)
        except ResourceUnavailable as error:
            if self._wanted.count is None:
                return f"no GPU was leased, another run may use the same: {error}"
            raise
        self._attempt.gpus = self._lease.describe() or None
        return None

    def environment(self) -> dict[str, str]:
        """What the kernel hears of it."""
        uuids = self._lease.uuids
        if not uuids:
            return {VARIABLE: ""} if self._wanted.count == 0 else {}
        return {
            VARIABLE: ",".join(uuids),
            contract.ENV_GPUS: ",".join(f"{each.card}:{each.uuid}" for each in self._lease.devices),
            contract.ENV_LEASES: ",".join(map(str, self._lease.descriptors)),
        }

    def parameters(self) -> dict[str, Any]:
        """What the notebook is told where it declares it; nothing where the number of GPUs is not known."""
        declared: Mapping[str, Any] = {
            **{name: ... for name in self._record.declared if name in NAMES},
            **{name: value for name, value in self._record.defaults.items() if name in NAMES},
        }
        if not declared:
            return {}
        count = len(self._lease.devices)
        if not count and self._wanted.count != 0:
            found = leases.visible_count()
            if found is None:
                return {}
            count = found
        per_gpu, base = self._batch_sizes()
        return device_parameters(
            declared, self._attempt.parameters, n_gpus=count, batch_size=per_gpu, base_batch_size=base
        )

    def _batch_sizes(self) -> tuple[int, int]:
        """Of each of several devices, and of a single one."""
        with contextlib.suppress(ConfigurationError):
            settings, _ = load_settings(find_project_root(Path(self._record.working_dir)))
            return settings.batch_size_per_gpu, settings.base_batch_size
        return DEFAULT_BATCH_SIZE, DEFAULT_BATCH_SIZE

    def close(self) -> None:
        """Give them back. The guardian, if it still lives, keeps them until the kernel's end."""
        self._lease.close()


def _count(number: int) -> str:
    return "a GPU" if number == 1 else f"{number} GPUs"
