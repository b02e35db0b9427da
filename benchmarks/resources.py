"""What it costs to sample what a run uses: a tree of eight processes, four looks a second.

python -m benchmarks resources
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from grd.tracking.sampler import SAMPLE_SECONDS, ResourceSampler

ROUNDS = 7
LOOKS = 80
CHILDREN = 7
_CHILD = (
    "import time; block = bytearray(100_000_000); block[::4096] = b'x' * len(block[::4096]); time.sleep(600)"
)


def main() -> None:
    """Processor time of the sampler's own thread, as a share of one core."""
    held = bytearray(200_000_000)
    held[::4096] = b"x" * len(held[::4096])
    children = [subprocess.Popen([sys.executable, "-c", _CHILD]) for _ in range(CHILDREN)]
    time.sleep(2.0)
    shares = []
    try:
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory(prefix="grd-bench-") as place:
                sampler = ResourceSampler(Path(place) / "resources.jsonl")
                sampler.watch({"kernel": {"pid": os.getpid()}})
                before, now = time.thread_time(), time.monotonic()
                for _ in range(LOOKS):
                    now += SAMPLE_SECONDS  # as if so much time had passed
                    sampler._look(now)
                shares.append((time.thread_time() - before) / (LOOKS * SAMPLE_SECONDS))
                sampler.close()
    finally:
        for child in children:
            child.kill()
            child.wait()
    middle, low, high = statistics.median(shares), min(shares), max(shares)
    print(f"{CHILDREN + 1} processes of 0.1 GB each, {1 / SAMPLE_SECONDS:.0f} looks a second", flush=True)
    spread = f"({low:.3%} to {high:.3%}, n={ROUNDS})"
    print(f"  share of one core {middle:.3%} {spread}  (target <= 0.5 %)")


if __name__ == "__main__":
    main()
