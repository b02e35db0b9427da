"""What a run does with the GPUs that it may use: its share of their memory, and whether they wait for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from grd.hardware.monitor import GPUStats

UNUSED_SECONDS = 120.0
SLACK_SECONDS = 180.0
BUSY_PERCENT = 85.0
MOVED_MB = 64
"""A device's memory moves by less than this without anybody using it."""

BY_PROCESS = "the driver, by process"
OF_DEVICE = "the driver, of the whole device since the start"


@dataclass
class _Seen:
    name: str
    baseline_mb: int | None
    peak_mb: float | None = None
    source: str | None = None
    used: bool = False
    samples: deque[tuple[float, int]] = field(default_factory=deque)
    busy_sum: float = 0.0
    busy_count: int = 0


class GpuUse:
    """Takes one look after the other; `warnings` are told once each."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self._began: float | None = None
        self._told: set[str] = set()

    def take(self, now: float, rows: Sequence[GPUStats], pids: Collection[int]) -> list[dict[str, Any]]:
        """A look at ``now`` (seconds); returns what goes into the run's samples, a device each.

        ``process_memory_mb`` is None where the driver does not list a process of ours: in a container it
        lists the host's pids, and that is not 0.
        """
        self._began = now if self._began is None else self._began
        shown = []
        for row in rows:
            if not row.visible:
                continue
            key = row.uuid or f"index {row.gpu_id}"
            seen = self._seen.setdefault(key, _Seen(row.name or "a GPU", row.memory_used_mb))
            ours = [p["memory_mb"] for p in row.processes or [] if p["pid"] in pids]
            listed = [mb for mb in ours if mb is not None]
            memory = float(sum(listed)) if listed else None
            self._take_memory(seen, memory, row)
            seen.used = seen.used or bool(ours)
            if row.utilization_percent is not None:
                seen.samples.append((now, row.utilization_percent))
                seen.busy_sum += row.utilization_percent
                seen.busy_count += 1
                while seen.samples[0][0] < now - SLACK_SECONDS:
                    seen.samples.popleft()
            shown.append(
                {
                    "uuid": row.uuid,
                    "index": row.gpu_id,
                    "utilization_percent": row.utilization_percent,
                    "memory_used_mb": row.memory_used_mb,
                    "memory_total_mb": row.memory_total_mb,
                    "power_usage_w": row.power_usage_w,
                    "process_memory_mb": memory,
                    **({"mock": True} if row.mock else {}),
                }
            )
        return shown

    def _take_memory(self, seen: _Seen, memory: float | None, row: GPUStats) -> None:
        source = BY_PROCESS
        if memory is None and row.memory_used_mb is not None and seen.baseline_mb is not None:
            moved = row.memory_used_mb - seen.baseline_mb
            if moved >= MOVED_MB:
                seen.used = True
                if seen.source in (None, OF_DEVICE):
                    memory, source = float(moved), OF_DEVICE
        if memory is None:
            return
        if seen.source == OF_DEVICE and source == BY_PROCESS:
            seen.peak_mb = None  # the better source has come
        if seen.peak_mb is None or memory > seen.peak_mb:
            seen.peak_mb, seen.source = memory, source

    def warnings(self, now: float) -> list[str]:
        """What is worth telling now, and was not told before."""
        if self._began is None or not self._seen:
            return []
        found = {}
        used = [seen for seen in self._seen.values() if seen.used]
        if not used and now - self._began >= UNUSED_SECONDS:
            names = ", ".join(dict.fromkeys(seen.name for seen in self._seen.values()))
            found["unused"] = (
                f"there is a GPU ({names}), and nothing of this run has used it for "
                f"{UNUSED_SECONDS / 60:.0f} minutes: are model and data on it?"
            )
        for key, seen in self._seen.items():
            covers = seen.samples and seen.samples[-1][0] - seen.samples[0][0] >= 0.9 * SLACK_SECONDS
            if not seen.used or not covers:
                continue
            mean = sum(percent for _, percent in seen.samples) / len(seen.samples)
            if mean < BUSY_PERCENT:
                found[key] = (
                    f"{seen.name} did something in {mean:.0f} % of the last {SLACK_SECONDS / 60:.0f} "
                    "minutes: it waits for data or for the processor (and that share says nothing of how "
                    "much of it was used)"
                )
        fresh = {key: text for key, text in found.items() if key not in self._told}
        self._told |= set(fresh)
        return list(fresh.values())

    def summary(self) -> list[dict[str, Any]]:
        """Each visible device over the whole run."""
        return [
            {
                "uuid": key,
                "name": seen.name,
                "peak_memory_mb": seen.peak_mb,
                "memory_source": seen.source,
                "mean_utilization_percent": (
                    round(seen.busy_sum / seen.busy_count, 1) if seen.busy_count else None
                ),
            }
            for key, seen in self._seen.items()
        ]
