"""What counts as evidence of an OOM kill: pure decisions, and cgroups of both versions as folders."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from grd.execution.out_of_memory import (
    Look,
    count_strangers,
    decide,
    describe_memory,
    find_folder,
    goes_on,
    members,
    read_kills,
)
from grd.execution.outcome import Seen, judge
from grd.hardware.limits import memory_folders

MIB = 1024**2
V2_MOUNT = "34 25 0:29 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate"
V1_MOUNT = "36 32 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
HYBRID_MOUNT = "37 32 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
EVENTS = "low 0\nhigh 0\nmax 12\noom 3\noom_kill {}\noom_group_kill 0\n"
OOM_CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"
KERNEL = 4711


def machine(root: Path, mounts: list[str], groups: list[str], files: dict[str, str]) -> Path:
    """A folder that looks like / of a machine on which KERNEL runs."""
    for process in ("self", str(KERNEL)):
        proc = root / "proc" / process
        proc.mkdir(parents=True)
        (proc / "mountinfo").write_text("\n".join(mounts) + "\n")
        (proc / "cgroup").write_text("\n".join(groups) + "\n")
    for path, content in files.items():
        file = root / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return root


def found(root: Path) -> str | None:
    return find_folder(memory_folders(root, KERNEL), KERNEL, root)


def test_on_v2_the_count_of_the_kernels_own_cgroup_is_read_not_that_of_those_below(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        [V2_MOUNT],
        ["0::/job"],
        {
            "job/memory.events": EVENTS.format(9),
            "job/memory.events.local": EVENTS.format(2),
            "job/cgroup.procs": f"{KERNEL}\n12\n",
            "job/memory.max": str(500 * MIB),
            "job/memory.peak": str(499 * MIB),
        },
    )
    folder = found(root)
    assert folder == "/sys/fs/cgroup/job"
    assert read_kills(folder, root) == 2
    assert members(folder, root) == {KERNEL, 12}
    told = describe_memory(memory_folders(root, KERNEL), root)
    assert told == "; its limit is 500 MiB, its peak was 499 MiB"


def test_on_v2_a_cgroup_that_counts_no_memory_is_counted_in_the_one_above(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        [V2_MOUNT],
        ["0::/job/step"],
        {
            "job/memory.events.local": EVENTS.format(4),
            "job/cgroup.procs": "12\n",
            "job/step/cgroup.procs": f"{KERNEL}\n",
            "job/other/cgroup.procs": "77\n",
            "job/memory.max": "max",
            "memory.max": str(800 * MIB),
        },
    )
    folder = found(root)
    assert folder == "/sys/fs/cgroup/job"
    assert members(folder, root) == {12, KERNEL, 77}
    assert describe_memory(memory_folders(root, KERNEL), root) == "; the limit of /sys/fs/cgroup is 800 MiB"


def test_on_v1_and_on_hybrid_machines_the_memory_hierarchy_is_read(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        [V1_MOUNT, HYBRID_MOUNT],
        ["4:memory:/job", "0::/"],
        {
            "memory/job/memory.oom_control": OOM_CONTROL.format(3),
            "memory/job/cgroup.procs": f"{KERNEL}\n",
            "memory/job/below/cgroup.procs": "99\n",
            "memory/job/below/memory.oom_control": OOM_CONTROL.format(8),
            "memory/job/memory.limit_in_bytes": str(250 * MIB),
            "memory/job/memory.max_usage_in_bytes": str(250 * MIB),
            "unified/memory.events": EVENTS.format(70),
        },
    )
    folder = found(root)
    assert folder == "/sys/fs/cgroup/memory/job"
    assert (read_kills(folder, root), members(folder, root)) == (3, {KERNEL})
    assert "its limit is 250 MiB, its peak was 250 MiB" in describe_memory(memory_folders(root, KERNEL), root)


@pytest.mark.parametrize(
    ("mounts", "groups", "files"),
    [
        ([], ["0::/job"], {}),
        ([V2_MOUNT], ["0::/job"], {"job/cgroup.procs": f"{KERNEL}\n"}),
        (
            [V1_MOUNT],
            ["4:memory:/job"],
            {"memory/job/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"},
        ),
        # the mount shows another cgroup than the kernel's own
        ([V2_MOUNT], ["0::/../job"], {"memory.events": EVENTS.format(1), "cgroup.procs": "1\n"}),
    ],
    ids=["no cgroups", "no memory controller", "v1 before Linux 4.13", "not its own"],
)
def test_where_no_count_is_the_kernels_nothing_is_claimed(
    tmp_path: Path, mounts: list[str], groups: list[str], files: dict[str, str]
) -> None:
    assert found(machine(tmp_path, mounts, groups, files)) is None


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (Look("/c", 3), Look("/c", 4), "confirmed"),
        (Look("/c", 3), Look("/c", 3), None),
        (Look("/c", 3, strangers=1), Look("/c", 4), "suspected"),
        (Look("/c", 3), Look("/c", 4, strangers=1), "suspected"),
        (Look("/c", 3, strangers=1), Look("/c", 3, strangers=1), None),
        (None, Look("/c", 4), "suspected"),
        (Look("/c", 3), None, "suspected"),
    ],
)
def test_only_a_count_that_rose_among_ones_own_is_evidence(
    before: Look | None, after: Look | None, expected: str | None
) -> None:
    verdict = decide(before, after, "; its limit is 1 MiB")
    assert verdict.oom == expected
    seen = Seen(
        all_cells_ran=False,
        kernel_died=True,
        kernel_returncode=-signal.SIGKILL,
        stopped_in_cell=2,
        oom=verdict,
    )
    outcome = judge(seen)
    assert outcome.oom == expected and outcome.state == "interrupted"
    assert outcome.cause == ("out_of_memory" if expected == "confirmed" else "kernel_died")
    assert outcome.detail is not None and "in cell 2" in outcome.detail


def test_another_signal_or_a_stop_is_never_called_out_of_memory() -> None:
    evidence = decide(Look("/c", 0), Look("/c", 1))
    other = Seen(all_cells_ran=False, kernel_died=True, kernel_returncode=-signal.SIGSEGV, oom=evidence)
    assert (judge(other).cause, judge(other).oom) == ("kernel_died", None)
    stopped = Seen(
        all_cells_ran=False, kernel_died=True, stop_reason="sigterm", kernel_returncode=-9, oom=evidence
    )
    assert judge(stopped).cause == "sigterm"
    assert "while stopping, the kernel died" in str(judge(stopped).detail)


def test_strangers_are_those_outside_the_runs_tree_and_without_its_mark() -> None:
    code = "import time; time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code])
    orphan_code = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {code!r}], stdout=subprocess.DEVNULL, "
        "stderr=subprocess.DEVNULL)\n"
        "print(child.pid)"
    )

    def orphan(**environment: str) -> int:
        command = [sys.executable, "-c", orphan_code]
        done = subprocess.run(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
        )
        return int(done.stdout)

    marked, unmarked = orphan(TEST_MARK="of this run"), orphan()
    try:
        mark = "TEST_MARK=of this run"
        assert count_strangers({os.getpid(), os.getppid(), child.pid, marked}, mark) == 0
        assert count_strangers({os.getpid(), unmarked}, mark) == 1
        assert count_strangers({os.getpid(), 0}, mark) == 1, "of another pid namespace"
        child.kill()
        child.wait()
        assert count_strangers({child.pid}, mark) == 0, "it has ended"
    finally:
        for pid in (marked, unmarked):
            os.kill(pid, signal.SIGKILL)
        child.kill()


def test_a_process_that_is_being_killed_does_not_go_on() -> None:
    from grd.runs.processes import start_time

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    started = start_time(child.pid)
    assert goes_on(child.pid, started)
    assert not goes_on(child.pid, (started or 0) + 1), "another process with its pid"
    child.kill()
    while goes_on(child.pid, started):
        pass
    child.wait()
    assert not goes_on(child.pid, started)
