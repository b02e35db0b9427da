"""How fast this machine is right now, with whatever else it does: compared with then, it scales history."""

from __future__ import annotations

import hashlib
import os
import threading
import time

BLOCK = bytes(256 * 1024)
MOST_THREADS = 8
SECONDS = 0.1


def machine_speed(seconds: float = SECONDS) -> float | None:
    """MB/s of SHA-256 on all usable cores together, measured for ``seconds`` of wall time.

    It says little of a processor and much of what is left of it: a core that somebody else uses counts
    half. None where no thread can be started.
    """
    threads = min(MOST_THREADS, _usable_cores())
    done = [0] * threads
    began = time.perf_counter()

    def work(index: int) -> None:
        while time.perf_counter() - began < seconds:
            hashlib.sha256(BLOCK).digest()  # leaves the interpreter's lock to the other threads
            done[index] += len(BLOCK)

    workers = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(threads)]
    try:
        for worker in workers:
            worker.start()
    except RuntimeError:
        return None
    for worker in workers:
        worker.join()
    elapsed = time.perf_counter() - began
    return round(sum(done) / elapsed / 1e6, 1) if sum(done) else None


def _usable_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count() or 1
