"""What the whole machine does: the numbers that MLflow's own monitor knows, whoever causes them."""

from __future__ import annotations

import contextlib
from typing import Any


class HostUse:
    """Rates and sums count from its making, or from the look before; what cannot be known is None."""

    def __init__(self) -> None:
        self._times = self._busy_and_all()
        self._network = self._transferred()

    def look(self) -> dict[str, Any]:
        """The machine now; bytes and percent, of the file system ``/`` for the disk. Never raises."""
        found: dict[str, Any] = {"cpu_percent": self._cpu_percent()}
        with contextlib.suppress(Exception):
            import psutil

            memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
            found |= {"memory_used_bytes": memory.used, "memory_percent": memory.percent}
            found |= {
                "disk_used_bytes": disk.used,
                "disk_free_bytes": disk.free,
                "disk_percent": disk.percent,
            }
        now = self._transferred()
        if now is not None and self._network is not None:
            found["received_bytes"] = max(0, now[0] - self._network[0])
            found["sent_bytes"] = max(0, now[1] - self._network[1])
        return found

    def _cpu_percent(self) -> float | None:
        before, self._times = self._times, self._busy_and_all()
        if before is None or self._times is None or self._times[1] <= before[1]:
            return None
        share = (self._times[0] - before[0]) / (self._times[1] - before[1])
        return round(100 * min(1.0, max(0.0, share)), 1)

    @staticmethod
    def _busy_and_all() -> tuple[float, float] | None:
        with contextlib.suppress(Exception):
            import psutil

            times = psutil.cpu_times()
            # Linux counts a guest's time in user and nice already.
            known = {name: value for name, value in times._asdict().items() if not name.startswith("guest")}
            everything = float(sum(known.values()))
            return everything - float(times.idle) - float(getattr(times, "iowait", 0.0)), everything
        return None

    @staticmethod
    def _transferred() -> tuple[int, int] | None:
        with contextlib.suppress(Exception):
            import psutil

            counters = psutil.net_io_counters()
            return int(counters.bytes_recv), int(counters.bytes_sent)
        return None
