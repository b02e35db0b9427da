"""What a piece of work used, against what it is known to have used. Each case is a process of its own."""

from __future__ import annotations

import asyncio
import gc
import json
import mmap
import os
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from nvml_replay import A100_SPLIT, H200, Device, Machine, process

import grd
from grd.tracking.resources import (
    ResourceSnapshot,
    ResourceTracker,
    ResourceUsage,
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
base = tree.look_at_tree(os.getpid()).rss / 2**20
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


def run(before: str, work: str, *, proc: bool = True) -> tuple[float, dict[str, float]]:
    """The memory before the work, and what the tracker says; without ``proc`` as where there is no /proc."""
    hidden = "" if proc else "\ntree.PROC = __import__('pathlib').Path('/nowhere')"
    program = PROGRAM.replace("BEFORE", before + hidden).replace("WORK", work)
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


def test_a_file_that_others_have_mapped_too_counts_whole(tmp_path: Path) -> None:
    library = tmp_path / "library"
    library.write_bytes(b"x" * (64 << 20))
    mapped = "import mmap; f = mmap.mmap(os.open({!r}, os.O_RDONLY), 0, prot=mmap.PROT_READ); f[::4096]"
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as ours:
        assert len(ours[::4096]) == 64 << 8  # every page is read here, too
        base, usage = run(mapped.format(str(library)), f"subprocess.run([sys.executable, '-c', {CHILD!r}])")
    assert base + 200 - 5 <= usage["peak_memory_mb"] <= base + 200 + 40


def test_the_time_of_children_counts() -> None:
    burn = "import time; e = time.process_time() + 0.5\nwhile time.process_time() < e: pass"
    _, usage = run("", f"subprocess.run([sys.executable, '-c', {burn!r}])")
    assert usage["cpu_time_seconds"] >= 0.45
    assert usage["wall_clock_seconds"] >= usage["cpu_time_seconds"] * 0.5


# A spike between two looks is known from the kernel's own mark, which only /proc has.
@pytest.mark.parametrize("case", ["held", "in a child", "shared by forks"])
def test_without_proc_the_peak_is_the_true_one_too(case: str) -> None:
    before, work, more = CASES[case]
    base, usage = run(before, work, proc=False)
    room = 40 if case in ("in a child", "shared by forks") else 12
    assert base + more - 5 <= usage["peak_memory_mb"] <= base + more + room


def test_without_proc_the_time_of_children_that_have_ended_counts_too() -> None:
    burn = "import time\nwhile time.process_time() < 0.15: pass"
    work = f"for _ in range(6):\n        subprocess.run([sys.executable, '-c', {burn!r}])"
    _, usage = run("", work, proc=False)
    assert usage["cpu_time_seconds"] >= 0.85


def test_without_proc_a_process_that_is_gone_is_no_surprise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grd.tracking.process_tree.PROC", Path("/nowhere"))
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with ResourceTracker(child) as tracker:
        child.communicate(b"\n")
    assert tracker.get_usage().peak_memory_mb > 0
    with pytest.raises(ProcessLookupError):
        capture_resource_snapshot(child.pid)


def test_a_snapshot_has_the_plans_fields_and_cannot_be_changed() -> None:
    before = capture_resource_snapshot()
    held = bytearray(30 << 20)
    held[::4096] = b"x" * (30 << 8)
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    after = capture_resource_snapshot()
    assert after.wall_clock > before.wall_clock
    assert after.cpu_time_seconds - before.cpu_time_seconds >= 0.03  # the system counts hundredths
    assert after.rss_bytes - before.rss_bytes > 25 << 20
    assert after.vms_bytes >= after.rss_bytes > 0
    with pytest.raises(AttributeError):
        after.rss_bytes = 0  # type: ignore[misc]


def snapshot(**values: object) -> ResourceSnapshot:
    at = {"wall_clock": 100.0, "cpu_time_seconds": 5.0, "rss_bytes": 300 << 20, "vms_bytes": 1 << 30,
          "gpu_vram_mb": None, "gpu_available": False}  # fmt: skip
    return ResourceSnapshot(**{**at, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("end", "peak", "expected"),
    [
        ({"wall_clock": 102.5, "cpu_time_seconds": 6.25}, None, (1.25, 2.5, 300.0, None)),
        ({"rss_bytes": 500 << 20}, None, (0.0, 0.0, 500.0, None)),
        ({"rss_bytes": 100 << 20}, None, (0.0, 0.0, 300.0, None)),
        ({"rss_bytes": 500 << 20}, 900 << 20, (0.0, 0.0, 900.0, None)),
        ({"cpu_time_seconds": 4.0, "wall_clock": 99.0}, None, (0.0, 0.0, 300.0, None)),
        ({"gpu_vram_mb": 0.0, "gpu_available": True}, None, (0.0, 0.0, 300.0, 0.0)),
        ({"gpu_vram_mb": 512.0, "gpu_available": True}, None, (0.0, 0.0, 300.0, 512.0)),
    ],
)
def test_usage_is_the_difference_of_two_snapshots_and_never_negative(
    end: dict[str, object], peak: int | None, expected: tuple[float, float, float, float | None]
) -> None:
    usage = calculate_resource_usage(snapshot(), snapshot(**end), peak)
    found = (usage.cpu_time_seconds, usage.wall_clock_seconds, usage.peak_memory_mb, usage.gpu_vram_used_mb)
    assert found == expected
    assert usage.gpu_available is bool(end.get("gpu_available"))


def test_the_dict_rounds_as_the_plan_does_and_leaves_unknown_what_is_unknown() -> None:
    usage = ResourceUsage(
        cpu_time_seconds=1.23456, wall_clock_seconds=2.0004, peak_memory_mb=256.789,
        gpu_vram_used_mb=1024.126, gpu_available=True,
    )  # fmt: skip
    told = resource_usage_to_dict(usage)
    assert told == {
        "cpu_time_seconds": 1.235, "wall_clock_seconds": 2.0, "peak_memory_mb": 256.79,
        "gpu_vram_used_mb": 1024.13,
    }  # fmt: skip
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    unknown = resource_usage_to_dict(replace(usage, gpu_vram_used_mb=None))
    assert json.loads(json.dumps(unknown))["gpu_vram_used_mb"] is None


def test_a_tracker_can_be_used_again_and_tells_of_the_last_time() -> None:
    tracker = ResourceTracker()
    with tracker:
        held = bytearray(60 << 20)
        held[::4096] = b"x" * (60 << 8)
        del held
    first = tracker.get_usage()
    with tracker, pytest.raises(RuntimeError, match="not ended"):
        tracker.get_usage()
    assert tracker.get_usage() != first
    assert tracker.peak_bytes >= tracker.start_bytes > 0


@pytest.mark.parametrize("error", [asyncio.CancelledError, ZeroDivisionError])
def test_what_an_awaited_block_raises_passes_and_the_usage_is_there(error: type[BaseException]) -> None:
    tracker = ResourceTracker()

    async def work() -> None:
        async with tracker:
            await asyncio.sleep(0)
            raise error

    with pytest.raises(error):
        asyncio.run(work())
    assert tracker.get_usage().wall_clock_seconds >= 0


def test_what_asks_the_driver_comes_without_a_warning_of_its_package() -> None:
    """The package named pynvml warns at its import; NVIDIA's own, with a module of that name, does not."""
    program = (
        "import pynvml\nfrom importlib import metadata\nfrom grd.hardware import GPUMonitor, find_gpus\n"
        "from grd.tracking import ResourceTracker\nGPUMonitor(mock_mode=False).get_gpu_stats(); find_gpus()\n"
        "with ResourceTracker(): pass\n"
        "assert 'nvidia-ml-py' in metadata.packages_distributions()['pynvml']"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(grd.__file__).parents[1])}
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::FutureWarning",
            "-W",
            "error::DeprecationWarning:pynvml",
            "-c",
            program,
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")


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
    program = (
        "b = bytearray(200 << 20); b[::4096] = b'x' * (200 << 8); del b; print(flush=True); input()\n"
        "b = bytearray(20 << 20); b[::4096] = b'x' * (20 << 8); print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        with ResourceTracker(child) as tracker:
            for _ in range(3):  # as its thread does: idle for a while, then with a little more
                tracker.look()
            child.stdin.write(b"\n")
            child.stdin.flush()
            child.stdout.readline()
        child.communicate(b"\n")
    assert tracker.start_bytes + (15 << 20) < tracker.peak_bytes < 100 << 20


SPIKE = (
    "import sys\n"
    "for word in sys.stdin:\n"
    "    b = None\n"
    "    if word == 'more\\n': b = bytearray(100 << 20); b[::4096] = b'x' * (100 << 8)\n"
    "    print(flush=True)"
)
TOGETHER = """    import grd.tracking.tree_walk as walk
    def ask(child, word):
        child.stdin.write(word + "\\n"); child.stdin.flush(); child.stdout.readline()
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    children = [subprocess.Popen([sys.executable, "-S", "-c", SPIKE], **pipes) for _ in range(3)]
    for child in children:
        ask(child, "more"); AFTER_EACH
    time.sleep(0.2)
    for child in children:
        ask(child, "less")
    for child in children:
        child.stdin.close(); child.wait(); child.stdout.close()"""


@pytest.mark.parametrize(("together", "more"), [(True, 300), (False, 100)], ids=["together", "in turn"])
def test_what_children_have_at_the_same_time_counts_together_and_else_not(together: bool, more: int) -> None:
    after_each = "" if together else "time.sleep(0.05); ask(child, 'less')"
    work = TOGETHER.replace("SPIKE", repr(SPIKE)).replace("AFTER_EACH", after_each).strip()
    # Not only when it is time to count shared pages again: that would be luck.
    base, usage = run("import grd.tracking.resources as tracked; tracked.SHARED_SECONDS = 600", work)
    assert base + more - 5 <= usage["peak_memory_mb"] <= base + more + 40


def test_a_tracker_that_cannot_begin_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        zombie = ResourceTracker(child)
        with pytest.raises(ProcessLookupError, match="memory it had is not known"):
            zombie.__enter__()
    gone = ResourceTracker(child)
    with pytest.raises(ProcessLookupError):
        gone.__enter__()

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    own = ResourceTracker()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(threading.Thread, "start", fail)
        own.__enter__()
    left = [weakref.ref(zombie), weakref.ref(gone), weakref.ref(own)]
    del zombie, gone, own
    gc.collect()
    assert [each() for each in left] == [None, None, None]


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


@pytest.mark.parametrize("told", [True, False], ids=["both tell", "the instances do not"])
def test_a_process_on_mig_instances_holds_what_it_holds_once(
    monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """Replayed: there was no GPU. The card lists what its instances list."""
    monkeypatch.setattr("grd.hardware.monitor._monitors", {})
    own = [process(os.getpid(), 300), process(os.getpid(), 700)]
    parts = [
        part.but(GetComputeRunningProcesses=[each] if told else [])
        for part, each in zip(A100_SPLIT.instances, own, strict=True)
    ]
    card = Device({**A100_SPLIT.answers, "GetComputeRunningProcesses": own}, parts)
    monkeypatch.setitem(sys.modules, "pynvml", Machine([card]).module())
    assert capture_resource_snapshot().gpu_vram_mb == 1000.0
