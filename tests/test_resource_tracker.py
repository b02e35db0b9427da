"""What a piece of work used, against what it is known to have used. Each case is a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nvml_replay import H200, Machine, process

import grd
from grd.tracking.resources import (
    ResourceTracker,
    calculate_resource_usage,
    capture_resource_snapshot,
    resource_usage_to_dict,
)

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")

PROGRAM = """
import json, os, subprocess, sys, time
from grd.tracking.resources import ResourceTracker, resource_usage_to_dict
import grd.tracking.process_tree as tree
def full(megabytes):
    whole = bytearray(megabytes << 20)
    whole[::4096] = b"x" * (megabytes << 8)  # every page is touched
    return whole
BEFORE
base = tree.measure_tree(os.getpid()).rss_bytes / 2**20
with ResourceTracker() as tracker:
    WORK
print(json.dumps([base, resource_usage_to_dict(tracker.get_usage())]))
"""
CHILD = "b = bytearray(200 << 20); b[::4096] = b'x' * (200 << 8); import time; time.sleep(1.0)"
FORKS = """pids = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            time.sleep(1.0); os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)"""
CASES = {
    "held": ("", "b = full(200); time.sleep(0.3)", 200),
    "a spike": ("", "b = full(200); del b", 200),
    "after a larger one": ("b = full(350); del b", "b = full(200); del b", 200),
    "in a child": ("", f"subprocess.run([sys.executable, '-c', {CHILD!r}])", 200),
    "shared by forks": ("b = full(200)", FORKS, 0),
}


def run(before: str, work: str) -> tuple[float, dict[str, float]]:
    program = PROGRAM.replace("BEFORE", before).replace("WORK", work)
    environment = {**os.environ, "PYTHONPATH": str(Path(grd.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    base, usage = json.loads(done.stdout)
    return base, usage


@pytest.mark.parametrize("case", CASES)
def test_the_peak_is_the_true_one(case: str) -> None:
    before, work, more = CASES[case]
    base, usage = run(before, work)
    # A child has some memory of its own besides what it fills.
    room = 40 if case in ("in a child", "shared by forks") else 12
    assert base + more - 5 <= usage["peak_memory_mb"] <= base + more + room


def test_the_time_of_children_counts() -> None:
    burn = "import time; e = time.process_time() + 0.5\nwhile time.process_time() < e: pass"
    _, usage = run("", f"subprocess.run([sys.executable, '-c', {burn!r}])")
    assert usage["cpu_time_seconds"] >= 0.45
    assert usage["wall_clock_seconds"] >= usage["cpu_time_seconds"] * 0.5


def test_the_dict_has_exactly_the_keys_of_the_plan() -> None:
    with ResourceTracker() as tracker:
        sum(range(1000))
    told = resource_usage_to_dict(tracker.get_usage())
    assert list(told) == ["cpu_time_seconds", "wall_clock_seconds", "peak_memory_mb", "gpu_vram_used_mb"]
    json.dumps(told, allow_nan=False)


def test_asking_before_the_end_is_an_error_and_async_works_too() -> None:
    async def work() -> ResourceTracker:
        async with ResourceTracker() as tracker:
            with pytest.raises(RuntimeError, match="not ended"):
                tracker.get_usage()
            await asyncio.sleep(0.01)
        return tracker

    assert asyncio.run(work()).get_usage().wall_clock_seconds >= 0.01


def test_an_exception_inside_passes_and_the_usage_is_there() -> None:
    tracker = ResourceTracker()
    with pytest.raises(ZeroDivisionError), tracker:
        _ = 1 / 0
    assert tracker.get_usage().peak_memory_mb > 0


def test_an_inner_tracker_takes_nothing_from_an_outer_one() -> None:
    work = "b = full(200); del b\n    with ResourceTracker() as inner:\n        pass"
    base, usage = run("", work)
    assert usage["peak_memory_mb"] >= base + 195


def test_another_process_can_be_measured_and_a_missing_one_is_said() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        snapshot = capture_resource_snapshot(child)
        assert snapshot.rss_bytes > 0
        child.communicate(b"\n")
    with pytest.raises(ProcessLookupError):
        capture_resource_snapshot(child.pid)


def test_what_another_process_used_before_is_not_counted() -> None:
    program = "b = bytearray(200 << 20); b[::4096] = b'x' * (200 << 8); del b; print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with ResourceTracker(child) as tracker:
            capture_resource_snapshot(child)
        child.communicate(b"\n")
    assert tracker.get_usage().peak_memory_mb < 100


def test_without_a_gpu_its_memory_is_unknown_and_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grd.hardware.monitor._monitors", {})
    monkeypatch.setitem(sys.modules, "pynvml", None)
    start = capture_resource_snapshot()
    usage = calculate_resource_usage(start, capture_resource_snapshot())
    assert (usage.gpu_vram_used_mb, usage.gpu_available) == (None, False)


@pytest.mark.parametrize(("pid", "expected"), [(os.getpid, 500.0), (lambda: 3_900_001, None)])
def test_gpu_memory_is_this_processs_own_and_a_miss_is_unknown(
    monkeypatch: pytest.MonkeyPatch, pid: object, expected: float | None
) -> None:
    """Replayed: there was no GPU."""
    monkeypatch.setattr("grd.hardware.monitor._monitors", {})
    listed = [process(pid(), 500), process(1, 70_000)]  # type: ignore[operator]
    device = H200.but(GetComputeRunningProcesses=listed)
    monkeypatch.setitem(sys.modules, "pynvml", Machine([device]).module())
    with ResourceTracker() as tracker:
        pass
    usage = tracker.get_usage()
    assert (usage.gpu_vram_used_mb, usage.gpu_available) == (expected, True)
