"""What MLflow is told of a run: decisions without MLflow, from the run's own files.

Names under ``system/`` are those of MLflow's own monitor (MLflow 3.17, `mlflow.system_metrics`), with its
meanings: of the whole machine, megabytes of 10^6. What is this run's alone is under ``system/process/``, what
is its container's under ``system/cgroup/``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from grd import contract

MEGABYTE = 1e6
MEBIBYTE_IN_MEGABYTES = 1024**2 / 1e6
GIBIBYTE = 1024**3

LONGEST_KEY = 250
LONGEST_VALUE = 6000
"""MLflow's own limits (`mlflow.utils.validation`); the value's is that of parameters."""

_NOT_IN_KEYS = re.compile(r"[^\w.\- /:]")


@dataclass(frozen=True)
class Metric:
    """One number at one time (POSIX seconds)."""

    key: str
    value: float
    t: float
    step: int


def key_of(name: str) -> str:
    """``name`` as MLflow takes it."""
    return _NOT_IN_KEYS.sub("_", name)[:LONGEST_KEY] or "_"


def text_of(value: Any) -> str:
    """A parameter's or a tag's value as text that is not too long."""
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def metrics_of(event: Mapping[str, Any]) -> list[Metric]:
    """The metrics that an event tells; the step is the event's, else its epoch, else 0."""
    values = event.get("values")
    if event.get("kind") != contract.EVENT_METRICS or not isinstance(values, dict):
        return []
    steps = [event.get("step"), event.get("epoch"), 0]
    step = next(int(at) for at in steps if isinstance(at, (int, float)))
    found = []
    for name, value in values.items():
        # null stands for a number that JSON cannot hold
        if value is None or isinstance(value, (int, float)):
            found.append(
                Metric(key_of(name), math.nan if value is None else float(value), float(event["t"]), step)
            )
    return found


def status_of(state: str) -> str:
    """MLflow's word for a state: one that can go on was killed, as far as MLflow is concerned."""
    if state == contract.COMPLETED:
        return "FINISHED"
    if state == contract.FAILED:
        return "FAILED"
    return "KILLED" if state in contract.ENDED_STATES else "RUNNING"


def hardware_parameters(profile: Mapping[str, Any]) -> dict[str, str]:
    """cpu_cores, memory_gb (what the run may use, GiB), gpu_name and cuda_version, or the word none."""
    cpu, memory, gpu = profile.get("cpu") or {}, profile.get("memory") or {}, profile.get("gpu") or {}
    cores = cpu.get("cores_usable") or cpu.get("cores_logical")
    room = memory.get("limit_gb") or memory.get("total_gb")
    return {
        "cpu_cores": "unknown" if cores is None else str(cores),
        "memory_gb": "unknown" if room is None else f"{float(room):.2f}",
        "gpu_name": gpu.get("name") or ("unknown" if gpu else "none"),
        "cuda_version": gpu.get("cuda_version") or "none",
    }


def parameters_and_changes(
    first: Mapping[str, Any], newest: Mapping[str, Any], logged: Mapping[str, str], attempt: int
) -> tuple[dict[str, str], dict[str, str]]:
    """What to log as parameters, and as tags: MLflow's parameters cannot change, a later attempt's can.

    ``first`` and ``newest``: the parameters of the first and of this attempt; ``logged``: what MLflow has.
    """
    parameters = {key_of(name): text_of(value) for name, value in first.items() if key_of(name) not in logged}
    known = {**parameters, **logged}
    tags = {
        f"grd.attempt-{attempt}.{key_of(name)}": text_of(value)
        for name, value in newest.items()
        if known.get(key_of(name)) != text_of(value)
    }
    return parameters, tags


def tags_of(record: Mapping[str, Any], profile: Mapping[str, Any] | None) -> dict[str, str]:
    """What a run is and how it stands."""
    attempt = (record.get("attempts") or [{}])[-1]
    used = attempt.get("resources") or {}
    peak = used.get("peak_memory_bytes")
    checkpoint = record.get("checkpoint") or {}
    commit = ((profile or {}).get("code") or {}).get("commit")
    found = {
        "mlflow.runName": record["run_id"],
        "mlflow.source.name": record["notebook"],
        "mlflow.source.type": "NOTEBOOK",
        "mlflow.source.git.commit": commit,
        "grd.run_id": record["run_id"],
        "grd.version": record.get("grd_version"),
        "grd.folder": record.get("folder"),
        "grd.notebook_sha256": record.get("notebook_sha256"),
        "grd.state": record["state"],
        "grd.cause": record.get("cause") or "",
        "grd.detail": record.get("detail") or "",
        "grd.attempt": record["attempt"],
        "grd.resume_command": record.get("resume_command") or "",
        "grd.checkpoint_epoch": checkpoint.get("epoch"),
        "grd.peak_memory_megabytes": None if peak is None else round(peak / MEGABYTE, 1),
        "grd.peak_memory_source": used.get("peak_source"),
        "grd.gpus": "; ".join(str(gpu.get("name")) for gpu in (profile or {}).get("gpus") or []) or None,
    }
    return {name: text_of(value) for name, value in found.items() if value is not None}


def milliseconds(iso: str | None) -> int | None:
    """A time of the record as MLflow counts it."""
    return None if not iso else int(datetime.fromisoformat(iso).timestamp() * 1000)


def is_due(sample: Mapping[str, Any], last: float | None, interval: float) -> bool:
    """Whether a sample is the first, or ``interval`` seconds after the one sent last."""
    # the sampler's lines are not exactly a second apart
    return last is None or float(sample["t"]) >= last + interval - 0.5


def system_metrics(
    window: Sequence[Mapping[str, Any]], before: Mapping[str, Any] | None, profile: Mapping[str, Any] | None
) -> dict[str, float]:
    """What the samples since ``before`` (the last that was sent) say: means of rates, newest of amounts."""
    newest = window[-1]
    found = {
        **_host(window),
        **_process(newest, before),
        **_cgroup(newest, profile),
        **_gpus(window, profile),
    }
    return {f"system/{name}": float(value) for name, value in found.items() if value is not None}


def _mean(values: Iterable[Any]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _megabytes(size: float | None) -> float | None:
    return None if size is None else size / MEGABYTE


def _host(window: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    hosts = [sample.get("host") or {} for sample in window]
    newest = hosts[-1]
    return {
        "cpu_utilization_percentage": _mean(host.get("cpu_percent") for host in hosts),
        "system_memory_usage_megabytes": _megabytes(newest.get("memory_used_bytes")),
        "system_memory_usage_percentage": newest.get("memory_percent"),
        "disk_usage_percentage": newest.get("disk_percent"),
        "disk_usage_megabytes": _megabytes(newest.get("disk_used_bytes")),
        "disk_available_megabytes": _megabytes(newest.get("disk_free_bytes")),
        "network_receive_megabytes": _megabytes(newest.get("received_bytes")),
        "network_transmit_megabytes": _megabytes(newest.get("sent_bytes")),
    }


def _process(newest: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, float | None]:
    percent = None
    if before is not None and newest["t"] > before["t"] and newest["cpu_seconds"] >= before["cpu_seconds"]:
        percent = 100 * (newest["cpu_seconds"] - before["cpu_seconds"]) / (newest["t"] - before["t"])
    return {
        "process/cpu_percent": percent,
        "process/cpu_seconds": newest.get("cpu_seconds"),
        "process/rss_megabytes": _megabytes(newest.get("rss_bytes")),
        "process/pss_megabytes": _megabytes(newest.get("pss_bytes")),
        "process/peak_rss_megabytes": _megabytes(newest.get("peak_memory_bytes")),
        "process/num_processes": newest.get("processes"),
        "process/threads": newest.get("threads"),
        "process/io_read_megabytes": _megabytes(newest.get("read_bytes")),
        "process/io_write_megabytes": _megabytes(newest.get("written_bytes")),
    }


def _cgroup(newest: Mapping[str, Any], profile: Mapping[str, Any] | None) -> dict[str, float | None]:
    memory = (profile or {}).get("memory") or {}
    of_cgroup = memory.get("limit_gb") and str(memory.get("limit_source")).startswith("cgroup")
    limit = float(memory["limit_gb"]) * GIBIBYTE if of_cgroup else None
    return {
        "cgroup/memory_usage_megabytes": _megabytes(newest.get("cgroup_memory_bytes")),
        "cgroup/memory_peak_megabytes": _megabytes(newest.get("cgroup_peak_bytes")),
        "cgroup/memory_limit_megabytes": _megabytes(limit),
        "cgroup/throttled_seconds": newest.get("throttled_seconds"),
        "cgroup/oom_kill": newest.get("cgroup_oom_kills"),
    }


def _short_uuid(uuid: str | None) -> tuple[str | None, bool]:
    """Enough of a GPU's UUID to know it by, and whether it is a MIG instance's.

    Older drivers name an instance ``MIG-GPU-<the card's UUID>/<instance>/<instance within it>``.
    """
    whole, *within = (uuid or "").removeprefix("MIG-").removeprefix("GPU-").split("/")
    return "_".join([whole[:8], *within]) or None, (uuid or "").startswith("MIG-")


def _gpus(window: Sequence[Mapping[str, Any]], profile: Mapping[str, Any] | None) -> dict[str, float | None]:
    limits = {gpu.get("uuid"): gpu.get("power_limit_w") for gpu in (profile or {}).get("gpus") or []}
    found: dict[str, float | None] = {}
    for gpu in window[-1].get("gpu_now") or []:
        same = [
            row for sample in window for row in sample.get("gpu_now") or [] if row.get("uuid") == gpu["uuid"]
        ]
        used, total = gpu.get("memory_used_mb"), gpu.get("memory_total_mb")
        power = _mean(row.get("power_usage_w") for row in same)
        limit = limits.get(gpu["uuid"])
        short, instance = _short_uuid(gpu["uuid"])
        name = f"gpu_{gpu['index']}" + (f"_mig_{short}" if instance else "")
        found |= {
            f"{name}_memory_usage_megabytes": None if used is None else used * MEBIBYTE_IN_MEGABYTES,
            f"{name}_memory_usage_percentage": 100 * used / total if used is not None and total else None,
            f"{name}_utilization_percentage": _mean(row.get("utilization_percent") for row in same),
            f"{name}_power_usage_watts": power,
            f"{name}_power_usage_percentage": 100 * power / limit if power is not None and limit else None,
        }
        own = gpu.get("process_memory_mb")
        found[f"process/gpu_{short or name[:8]}_memory_megabytes"] = (
            None if own is None else own * MEBIBYTE_IN_MEGABYTES
        )
    return found
