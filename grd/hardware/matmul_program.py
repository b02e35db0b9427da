"""Measures matrix products and memory: ``python matmul_program.py SECONDS`` prints one JSON object.

``seconds`` in it is what measuring took, without importing the library and starting CUDA.

A program of its own, without any import of grd: it loads torch or numpy, which the process that wants to
know need not do, and it can be killed when it takes too long.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

SMALLEST, LARGEST = 256, 16384
SLOW_ENOUGH = 0.02
"""Seconds of one product from which on its size is large enough for a clock."""
TRIES = 3
"""Calls by the fastest of which a size is judged: any one may have waited for threads or for a core."""
COPY_BYTES = {"cpu": 64 * 1024**2, "cuda": 1024**3}


def _timed(once: Callable[[], None]) -> float:
    began = time.perf_counter()
    once()
    return time.perf_counter() - began


def measure_rate(once: Callable[[], None], give_up: float) -> tuple[float, int]:
    """Median seconds of one call of ``once``, and the number of calls that fit in until ``give_up``.

    ``give_up`` is a time of `time.perf_counter`. The first call, which warms up, does not count.
    """
    once()
    times = [_timed(once)]
    while time.perf_counter() + times[-1] < give_up:
        times.append(_timed(once))
    return statistics.median(times), len(times)


def measure_products(prepare: Callable[[int], Callable[[], None]], seconds: float) -> dict[str, Any]:
    """TFLOP/s of products of two square matrices; ``prepare(size)`` gives a function that makes one."""
    give_up, size = time.perf_counter() + seconds, SMALLEST
    while True:
        began = time.perf_counter()
        once = prepare(size)
        preparing = time.perf_counter() - began
        once()
        each = min(_timed(once) for _ in range(TRIES))
        # Twice the size takes four times as long to prepare and eight times as long to multiply, which is
        # done at least as often as here and twice after it.
        needed = 4 * preparing + 8 * each * (TRIES + 3)
        if each >= SLOW_ENOUGH or size >= LARGEST or time.perf_counter() + needed > give_up:
            break
        size *= 2
    each, repeats = measure_rate(once, give_up)
    return {"tflops": 2 * size**3 / each / 1e12, "size": size, "repeats": repeats}


class _Shares:
    """The time that is left until the end, in equal shares: a part that took longer leaves the rest less."""

    def __init__(self, seconds: float, parts: int) -> None:
        self.began = time.perf_counter()
        self._end, self._parts = self.began + seconds, parts

    def next(self) -> float:
        """Seconds for the next part."""
        share = max(0.0, self._end - time.perf_counter()) / self._parts
        self._parts -= 1
        return share


def with_torch(torch: Any, seconds: float) -> dict[str, Any]:
    """Products in each number type and a copy in memory, on the GPU torch sees first, else on the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if device == "cuda":
        types = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    torch.ones(1, device=device)  # starts CUDA, which takes seconds
    wait()
    shares = _Shares(seconds, len(types) + 1)
    rows: list[dict[str, Any]] = []
    for name, dtype in types.items():

        def prepare(size: int, dtype: Any = dtype) -> Callable[[], None]:
            # Random numbers: on zeros a GPU needs less power and clocks higher than it does in training.
            a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
            out = torch.empty(size, size, device=device, dtype=dtype)

            def once() -> None:
                torch.matmul(a, b, out=out)
                wait()

            return once

        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        try:
            rows.append({"dtype": name, **measure_products(prepare, shares.next())})
        except (RuntimeError, NotImplementedError) as error:
            lines = str(error).splitlines()
            rows.append(
                {"dtype": name, "tflops": None, "reason": lines[0] if lines else type(error).__name__}
            )
    source = torch.ones(COPY_BYTES[device] // 4, device=device, dtype=torch.float32)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        wait()

    each, _ = measure_rate(copy, time.perf_counter() + shares.next())
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None
    return {
        "seconds": time.perf_counter() - shares.began,
        "library": f"torch {torch.__version__}",
        "device": torch.cuda.get_device_name(0) if device == "cuda" else None,
        "device_memory_bytes": memory,
        "kind": "gpu" if device == "cuda" else "cpu",
        "threads": None if device == "cuda" else torch.get_num_threads(),
        "matmul": rows,
        "memory_bandwidth_gbs": 2 * COPY_BYTES[device] / each / 1e9,
    }


def with_numpy(numpy: Any, seconds: float) -> dict[str, Any]:
    """Products in fp32 and a copy in memory, on the CPU."""
    shares, random = _Shares(seconds, 2), numpy.random.default_rng(0)

    def prepare(size: int) -> Callable[[], None]:
        a, b = (random.standard_normal((size, size), dtype=numpy.float32) for _ in range(2))
        out = numpy.empty_like(a)
        return lambda: numpy.matmul(a, b, out=out)

    products = {"dtype": "fp32", **measure_products(prepare, shares.next())}
    source = numpy.ones(COPY_BYTES["cpu"] // 4, dtype=numpy.float32)
    target = numpy.empty_like(source)
    each, _ = measure_rate(lambda: numpy.copyto(target, source), time.perf_counter() + shares.next())
    return {
        "seconds": time.perf_counter() - shares.began,
        "library": f"numpy {numpy.__version__}",
        "device": None,
        "device_memory_bytes": None,
        "kind": "cpu",
        "threads": None,
        "matmul": [products],
        "memory_bandwidth_gbs": 2 * COPY_BYTES["cpu"] / each / 1e9,
    }


def measure(seconds: float) -> dict[str, Any]:
    """What the better library of the two that can be imported measures; a ``reason`` where neither can."""
    try:
        import torch
    except (ImportError, OSError):
        pass
    else:
        return with_torch(torch, seconds)
    try:
        import numpy
    except (ImportError, OSError):
        return {"reason": "neither torch nor numpy is installed"}
    return with_numpy(numpy, seconds)


if __name__ == "__main__":
    print(json.dumps(measure(float(sys.argv[1]))))
