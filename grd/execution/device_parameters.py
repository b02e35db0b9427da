"""What a notebook is told of the GPUs it was given, where its ``parameters`` cell declares the names.

One rule for batch sizes: the global batch is the batch of one device times the number of devices, at least
one. Nothing that somebody gave with -p is ever replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

DEFAULT_BATCH_SIZE = 16


def device_parameters(
    declared: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    n_gpus: int,
    batch_size: int = DEFAULT_BATCH_SIZE,
    base_batch_size: int | None = None,
) -> dict[str, Any]:
    """Values for those of the names below that the notebook declares and nobody has given.

    ``declared`` has the literal default of each declared name (``...`` for an expression), ``given`` what
    the run's parameters are. Where neither says a batch size, it is ``base_batch_size`` (by default the same)
    on one device or none, and ``batch_size`` on each of several. Always given:
    ``gpu_ids`` (positions among the devices the kernel sees, from 0), ``batch_size_per_gpu`` and
    ``global_batch``. Only where the notebook leaves them None, since these names are everybody's: ``devices``
    (as ``gpu_ids``), ``num_gpus``, ``device`` ("cuda" or "cpu"), ``strategy`` ("ddp" for several devices,
    else None), ``base_batch_size``, and ``deepspeed_config`` (ZeRO stage 2 without offloading).
    """
    base = batch_size if base_batch_size is None else base_batch_size
    said = _batch_size(declared, given)
    per_gpu = said or (batch_size if n_gpus > 1 else base)
    values: dict[str, Callable[[], Any]] = {
        "gpu_ids": lambda: list(range(n_gpus)),
        "batch_size_per_gpu": lambda: per_gpu,
        "global_batch": lambda: per_gpu * max(1, n_gpus),
        "devices": lambda: list(range(n_gpus)),
        "num_gpus": lambda: n_gpus,
        "device": lambda: "cuda" if n_gpus else "cpu",
        "strategy": lambda: "ddp" if n_gpus > 1 else None,
        "base_batch_size": lambda: said or base,
        "deepspeed_config": lambda: _deepspeed(per_gpu, n_gpus),
    }
    return {
        name: value()
        for name, value in values.items()
        if name in declared and name not in given and (name in _OURS or declared[name] is None)
    }


_OURS = ("gpu_ids", "batch_size_per_gpu", "global_batch")

NAMES = (*_OURS, "devices", "num_gpus", "device", "strategy", "base_batch_size", "deepspeed_config")


def _batch_size(declared: Mapping[str, Any], given: Mapping[str, Any]) -> int | None:
    """Of one device: the base size is the one that counts where that of a device is not said."""
    for source in (given, declared):
        for name in ("batch_size_per_gpu", "base_batch_size"):
            value = source.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _deepspeed(per_gpu: int, n_gpus: int) -> dict[str, Any]:
    # The keys are DeepSpeed's own ("offload_param", not "offload_parameters").
    return {
        "train_micro_batch_size_per_gpu": per_gpu,
        "gradient_accumulation_steps": 1,
        "train_batch_size": per_gpu * max(1, n_gpus),
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "none"},
            "offload_param": {"device": "none"},
        },
    }
