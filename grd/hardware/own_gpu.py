"""GPUs for programs that grd did not start: a lease in this very process, until it ends."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from grd import contract
from grd.errors import ResourceUnavailable, UsageError
from grd.hardware import leases
from grd.hardware.leases import Lease, Wanted
from grd.hardware.pools import TRAINING
from grd.hardware.visible import VARIABLE
from grd.settings import find_project_root, load_settings

_held: list[Lease] = []
_before: list[str | None] = []
_changing = threading.Lock()


def allocate_gpu(job_type: str = TRAINING) -> int:
    """Lease the least loaded GPU of a pool ("training" or "inference") for this process; the card's number.

    CUDA_VISIBLE_DEVICES of this process becomes what it holds, by UUID, so call it before CUDA is used: the
    device is then ``cuda:0`` (a second one ``cuda:1``). The lease ends with `release_gpu` or the process,
    however that dies. In the kernel of a run that leased GPUs it is the first of those. Raises UsageError
    for another pool or where torch has already begun to use CUDA, ResourceUnavailable where none is free,
    none exists or they are invented, ConfigurationError for a pool that names one which does not exist.
    """
    wanted = Wanted.read(1, job_type)
    of_run = os.environ.get(contract.ENV_GPUS)
    if of_run:
        return int(of_run.split(":", 1)[0])
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise UsageError("CUDA is in use in this process already: call allocate_gpu before torch uses it")
    settings, _ = load_settings(find_project_root(Path.cwd()))
    with _changing:
        environment = dict(os.environ)
        if _held:
            _restore(environment)
        lease = leases.take(wanted, settings, {}, environment)
        if lease is None:
            who = "; ".join(leases.describe_holder(each) for each in leases.holders())
            raise ResourceUnavailable(f"no GPU is free: {who}; see: grd gpus")
        if not _held:
            _before[:] = [os.environ.get(VARIABLE)]
        _held.append(lease)
        _show()
        return lease.devices[0].card


def release_gpu(gpu: int) -> None:
    """Give back the card that `allocate_gpu` answered. Raises UsageError if this process does not hold it."""
    with _changing:
        for lease in _held:
            if lease.devices[0].card == gpu:
                lease.close()
                _held.remove(lease)
                _show()
                return
    raise UsageError(f"this process holds no lease of GPU {gpu}")


def _show() -> None:
    if _held:
        os.environ[VARIABLE] = ",".join(uuid for lease in _held for uuid in lease.uuids)
    else:
        _restore(os.environ)


def _restore(environment: dict[str, str] | os._Environ[str]) -> None:
    if _before[0] is None:
        environment.pop(VARIABLE, None)
    else:
        environment[VARIABLE] = _before[0]
