"""Measures matrix products and memory: ``python matmul_program.py SECONDS`` prints one JSON object.

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
COPY_BYTES = {"cpu": 64 * 1024**2, "cuda": 1024**3}


def measure_rate(once: Callable[[], None], seconds: float) -> tuple[float, int]:
    """Median seconds of one call of ``once``, and the number of calls that fitted into ``seconds``."""
    once()
    times: list[float] = []
    give_up = time.perf_counter() + seconds
    while not times or time.perf_counter() < give_up:
        began = time.perf_counter()
        once()
        times.append(time.perf_counter() - began)
    return statistics.median(times), len(times)


def measure_products(prepare: Callable[[int], Callable[[], None]], seconds: float) -> dict[str, Any]:
    """TFLOP/s of products of two square matrices; ``prepare(size)`` gives a function that makes one."""
    began, size = time.perf_counter(), SMALLEST
    once = prepare(size)
    while size < LARGEST:
        each, _ = measure_rate(once, 0)
        left = seconds - (time.perf_counter() - began)
        # A product of twice the size takes eight times as long, and is made thrice at least.
        if each >= SLOW_ENOUGH or each * 8 * 3 > left:
            break
        size *= 2
        once = prepare(size)
    each, repeats = measure_rate(once, max(0.0, seconds - (time.perf_counter() - began)))
    return {"tflops": 2 * size**3 / each / 1e12, "size": size, "repeats": repeats}


def with_torch(torch: Any, seconds: float) -> dict[str, Any]:
    """Products in each number type and a copy in memory, on the GPU torch sees first, else on the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if device == "cuda":
        types = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    share = seconds / (len(types) + 1)
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
            rows.append({"dtype": name, **measure_products(prepare, share)})
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

    each, _ = measure_rate(copy, share)
    return {
        "library": f"torch {torch.__version__}",
        "device": torch.cuda.get_device_name(0) if device == "cuda" else None,
        "kind": "gpu" if device == "cuda" else "cpu",
        "threads": None if device == "cuda" else torch.get_num_threads(),
        "matmul": rows,
        "memory_bandwidth_gbs": 2 * COPY_BYTES[device] / each / 1e9,
    }


def with_numpy(numpy: Any, seconds: float) -> dict[str, Any]:
    """Products in fp32 and a copy in memory, on the CPU."""
    share, random = seconds / 2, numpy.random.default_rng(0)

    def prepare(size: int) -> Callable[[], None]:
        a, b = (random.standard_normal((size, size), dtype=numpy.float32) for _ in range(2))
        out = numpy.empty_like(a)
        return lambda: numpy.matmul(a, b, out=out)

    products = {"dtype": "fp32", **measure_products(prepare, share)}
    source = numpy.ones(COPY_BYTES["cpu"] // 4, dtype=numpy.float32)
    target = numpy.empty_like(source)
    each, _ = measure_rate(lambda: numpy.copyto(target, source), share)
    return {
        "library": f"numpy {numpy.__version__}",
        "device": None,
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
