"""Limits of containers and schedulers, read from folders built like /proc and /sys of such machines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from grd.hardware.limits import Limits, current_limits, read_limits
from grd.hardware.mounts import mount_of, parse_mountinfo

MIB = 1024**2
GIB = 1024**3

V2_MOUNT = "34 25 0:29 / /sys/fs/cgroup ro,nosuid,nodev - cgroup2 cgroup rw,nsdelegate"
V1_MEMORY = "36 32 0:31 {root} /sys/fs/cgroup/memory ro,relatime master:9 - cgroup cgroup rw,memory"
V1_CPU = "35 32 0:30 {root} /sys/fs/cgroup/cpu,cpuacct ro,relatime - cgroup cgroup rw,cpu,cpuacct"


def machine(root: Path, *, mounts: list[str], groups: list[str], files: dict[str, str]) -> Path:
    """A folder that looks like the / of a machine: mountinfo, own cgroups, and the files under cgroupfs."""
    proc = root / "proc/self"
    proc.mkdir(parents=True)
    (proc / "mountinfo").write_text("\n".join(mounts) + "\n")
    (proc / "cgroup").write_text("\n".join(groups) + "\n")
    for path, content in files.items():
        file = root / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    return root


def limits_of(root: Path, **facts: int | None) -> Limits:
    return read_limits(root=root, environment={}, **facts)


def tightest_memory(limits: Limits) -> int:
    return limits.memory[0].limit


def test_docker_on_v2_with_its_own_namespace_is_limited_by_the_root_it_sees(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        mounts=[V2_MOUNT],
        groups=["0::/"],
        files={"memory.max": str(4 * GIB), "memory.current": str(GIB), "cpu.max": "150000 100000"},
    )
    limits = limits_of(root, affinity=64)
    assert tightest_memory(limits) == 4 * GIB
    assert limits.memory[0].source == "cgroup /sys/fs/cgroup/memory.max"
    assert limits.usable_cores(64) == (2, "cgroup /sys/fs/cgroup/cpu.max")


def test_a_kubernetes_pod_whose_limit_stands_only_on_the_parent_is_limited_by_it(tmp_path: Path) -> None:
    pod = "kubepods.slice/kubepods-pod1.slice"
    root = machine(
        tmp_path,
        mounts=[V2_MOUNT],
        groups=[f"0::/{pod}/cri-1.scope"],
        files={
            f"{pod}/memory.max": str(8 * GIB),
            f"{pod}/cpu.max": "200000 100000",
            f"{pod}/cri-1.scope/memory.max": "max",
            f"{pod}/cri-1.scope/cpu.max": "max 100000",
        },
    )
    limits = limits_of(root)
    assert tightest_memory(limits) == 8 * GIB
    assert limits.usable_cores(96) == (2, f"cgroup /sys/fs/cgroup/{pod}/cpu.max")


def test_in_a_slurm_step_the_tightest_level_wins_though_it_is_not_the_innermost(tmp_path: Path) -> None:
    job = "system.slice/slurmstepd.scope/job_42"
    root = machine(
        tmp_path,
        mounts=[V2_MOUNT],
        groups=[f"0::/{job}/step_0/user/task_0"],
        files={
            f"{job}/memory.max": str(6 * GIB),
            f"{job}/step_0/memory.max": str(16 * GIB),
            f"{job}/step_0/user/memory.max": str(12 * GIB),
            f"{job}/step_0/user/task_0/memory.max": "max",
        },
    )
    limits = limits_of(root)
    assert tightest_memory(limits) == 6 * GIB
    assert "job_42/memory.max" in limits.memory[0].source


def test_memory_high_counts_where_it_is_below_memory_max(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        mounts=[V2_MOUNT],
        groups=["0::/a"],
        files={"a/memory.max": str(8 * GIB), "a/memory.high": str(5 * GIB)},
    )
    assert tightest_memory(limits_of(root)) == 5 * GIB


def test_docker_on_v1_is_read_at_the_mount_that_shows_its_own_path_as_root(tmp_path: Path) -> None:
    own = "/docker/4f2a"
    root = machine(
        tmp_path,
        mounts=[V1_MEMORY.format(root=own), V1_CPU.format(root=own)],
        groups=[f"9:memory:{own}", f"4:cpu,cpuacct:{own}"],
        files={
            "memory/memory.limit_in_bytes": str(3 * GIB),
            "memory/memory.usage_in_bytes": str(GIB),
            "memory/memory.stat": f"total_inactive_file {GIB // 2}\nhierarchical_memory_limit {3 * GIB}",
            "cpu,cpuacct/cpu.cfs_quota_us": "250000",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
    )
    limits = limits_of(root)
    assert tightest_memory(limits) == 3 * GIB
    assert limits.memory[0].used == GIB // 2
    assert limits.usable_cores(32)[0] == 3
    assert limits.whole_cores(32) == 2, "of two and a half, for runs that take a core each"


def test_on_v1_a_limit_above_the_mount_is_known_from_the_hierarchical_figure(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        mounts=[V1_MEMORY.format(root="/pod/c1")],
        groups=["9:memory:/pod/c1"],
        files={
            "memory/memory.limit_in_bytes": "9223372036854771712",
            "memory/memory.stat": f"hierarchical_memory_limit {2 * GIB}",
        },
    )
    assert tightest_memory(limits_of(root)) == 2 * GIB


def test_v1_without_a_limit_has_none(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        mounts=[V1_MEMORY.format(root="/"), V1_CPU.format(root="/")],
        groups=["9:memory:/", "4:cpu,cpuacct:/"],
        files={
            "memory/memory.limit_in_bytes": "9223372036854771712",
            "cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
    )
    limits = limits_of(root)
    assert (limits.memory, limits.cores, limits.unreadable) == ((), (), ())
    assert limits.usable_cores(8) == (8, "logical cores")


def test_a_hybrid_machine_takes_v1_limits_though_a_v2_tree_is_mounted_beside_them(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        mounts=[
            V1_MEMORY.format(root="/"),
            "50 32 0:40 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
        ],
        groups=["9:memory:/jobs/7", "1:name=systemd:/", "0::/"],
        files={
            "memory/jobs/memory.limit_in_bytes": str(GIB),
            "memory/jobs/7/memory.limit_in_bytes": str(7 * GIB),
            "unified/cgroup.procs": "1",
        },
    )
    assert tightest_memory(limits_of(root)) == GIB


def limit_seen_from_a_namespace(root: Path, mounted: str, group: str, **files: int) -> int:
    """Where the mount shows the tree from ``mounted`` on, and the process's own group is called ``group``."""
    machine(
        root,
        mounts=[V2_MOUNT.replace("0:29 / ", f"0:29 {mounted} ")],
        groups=[f"0::{group}"],
        files={f"{folder}/memory.max": str(limit) for folder, limit in files.items()},
    )
    return tightest_memory(limits_of(root))


def test_a_group_outside_the_visible_tree_falls_back_to_the_mount_itself(tmp_path: Path) -> None:
    assert (
        limit_seen_from_a_namespace(tmp_path, "/user.slice/box", "/../elsewhere", **{".": 2 * GIB}) == 2 * GIB
    )


def test_where_a_nested_namespace_names_both_from_outside_the_way_between_them_counts(tmp_path: Path) -> None:
    assert limit_seen_from_a_namespace(tmp_path, "/../..", "/../../x", **{".": 2 * GIB, "x": GIB}) == GIB


BIND = "40 25 0:29 {root} /var/lib/box rw - cgroup2 cgroup rw"


@pytest.mark.parametrize("shown", ["/a", "/a/b"])
@pytest.mark.parametrize("last", [True, False])
def test_of_two_mounts_of_a_hierarchy_the_one_that_shows_more_levels_counts(
    tmp_path: Path, shown: str, last: bool
) -> None:
    bind = BIND.format(root=shown)
    root = machine(
        tmp_path,
        mounts=[V2_MOUNT, bind] if last else [bind, V2_MOUNT],
        groups=["0::/a/b"],
        files={"a/memory.max": str(4 * GIB), "a/cpu.max": "200000 100000", "a/b/memory.max": "max"},
    )
    limits = limits_of(root)
    assert tightest_memory(limits) == 4 * GIB
    assert limits.usable_cores(64)[0] == 2


@pytest.mark.parametrize("name", ["a..b", "..a", "a\x0bb", "a\u2028b", "a\rb", "a b:c"])
def test_a_cgroup_may_have_any_name(tmp_path: Path, name: str) -> None:
    other = "29 24 0:26 / /mnt/x\x0by rw - ext4 /dev/sda rw"
    root = machine(
        tmp_path,
        mounts=[other, V2_MOUNT],
        groups=[],
        files={f"{name}/c/memory.max": str(GIB), "memory.max": "max"},
    )
    (root / "proc/self/cgroup").write_bytes(f"0::/{name}/c\n".encode())
    assert tightest_memory(limits_of(root)) == GIB


def test_rootless_podman_finds_the_limit_of_the_users_own_slice(tmp_path: Path) -> None:
    scope = "user.slice/user-1000.slice/user@1000.service/user.slice/libpod-9.scope"
    root = machine(
        tmp_path,
        mounts=[V2_MOUNT],
        groups=[f"0::/{scope}/container"],
        files={f"{scope}/memory.max": str(GIB), "user.slice/user-1000.slice/memory.max": str(9 * GIB)},
    )
    assert tightest_memory(limits_of(root)) == GIB


def test_an_unlimited_machine_has_no_limits(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        mounts=[V2_MOUNT],
        groups=["0::/user.slice"],
        files={"user.slice/memory.max": "max", "user.slice/cpu.max": "max 100000"},
    )
    limits = limits_of(root)
    assert (limits.memory, limits.cores, limits.unreadable) == ((), (), ())


def test_an_unreadable_cgroup_file_is_named_and_the_other_levels_still_count(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        mounts=[V2_MOUNT],
        groups=["0::/a/b"],
        files={"a/memory.max": str(2 * GIB), "a/b/cpu.max": "100000 100000"},
    )
    # A folder in place of the file: it cannot be read by root either.
    (tmp_path / "sys/fs/cgroup/a/b/memory.max").mkdir()
    limits = limits_of(root)
    assert tightest_memory(limits) == 2 * GIB
    assert limits.usable_cores(4)[0] == limits.whole_cores(4) == 1
    assert limits.unreadable == ("/sys/fs/cgroup/a/b/memory.max (IsADirectoryError)",)


def test_without_proc_nothing_is_claimed_and_the_gap_is_named(tmp_path: Path) -> None:
    limits = limits_of(tmp_path)
    assert (limits.memory, limits.cores) == ((), ())
    assert "cgroup" in limits.unreadable[0]
    assert limits.usable_cores(None) == (None, None)


NONSENSE = ["", "-5", "lots", "12 monkeys", "\x00", "9" * 5000, "9" * 400 + " 1", "\u0664"]


@pytest.mark.parametrize("garbage", NONSENSE)
def test_nonsense_in_cgroup_files_is_no_limit(tmp_path: Path, garbage: str) -> None:
    root = machine(
        tmp_path,
        mounts=[V2_MOUNT, "torn line", "1 2 3 - "],
        groups=["0::/a", "nonsense"],
        files={"a/cpu.max": garbage, "a/memory.max": garbage, "memory.max": garbage},
    )
    limits = limits_of(root)
    assert (limits.memory, limits.cores) == ((), ())


def test_slurm_variables_bound_cores_and_memory(tmp_path: Path) -> None:
    slurm = {"SLURM_CPUS_PER_TASK": "4", "SLURM_CPUS_ON_NODE": "16", "SLURM_MEM_PER_NODE": "8192"}
    limits = read_limits(root=tmp_path, environment=slurm)
    assert limits.usable_cores(64) == (4, "SLURM_CPUS_PER_TASK")
    assert tightest_memory(limits) == 8 * GIB


def test_slurm_memory_per_cpu_is_multiplied_by_the_cpus_of_the_node(tmp_path: Path) -> None:
    limits = read_limits(root=tmp_path, environment={"SLURM_CPUS_ON_NODE": "8", "SLURM_MEM_PER_CPU": "512"})
    assert tightest_memory(limits) == 8 * 512 * MIB


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"SLURM_MEM_PER_CPU": "512"}, "SLURM_MEM_PER_CPU (no SLURM_CPUS_ON_NODE to multiply it by)"),
        ({"SLURM_MEM_PER_GPU": "512"}, "SLURM_MEM_PER_GPU (no SLURM_GPUS_ON_NODE to multiply it by)"),
    ],
)
def test_slurm_memory_that_cannot_be_worked_out_is_said(
    tmp_path: Path, given: dict[str, str], reason: str
) -> None:
    root = machine(tmp_path, mounts=[], groups=[], files={})
    limits = read_limits(root=root, environment=given)
    assert (limits.memory, limits.unreadable) == ((), (reason,))


def test_slurm_memory_per_gpu_is_multiplied_by_the_gpus_of_the_node(tmp_path: Path) -> None:
    given = {"SLURM_MEM_PER_GPU": "512", "SLURM_GPUS_ON_NODE": "3", "SLURM_CPUS_ON_NODE": "8"}
    assert tightest_memory(read_limits(root=tmp_path, environment=given)) == 3 * 512 * MIB


@pytest.mark.parametrize("value", ["0", "", "all", "-1", "4G", "9" * 5000])
def test_slurm_values_that_are_no_counts_bound_nothing(tmp_path: Path, value: str) -> None:
    slurm = {"SLURM_CPUS_PER_TASK": value, "SLURM_MEM_PER_NODE": value, "SLURM_MEM_PER_CPU": value}
    limits = read_limits(root=tmp_path, environment=slurm)
    assert (limits.memory, limits.cores) == ((), ())


def test_affinity_and_address_space_bound_too(tmp_path: Path) -> None:
    limits = limits_of(tmp_path, affinity=1, address_space=2 * GIB)
    assert limits.usable_cores(64) == (1, "affinity")
    assert limits.memory_limit(64 * GIB) == limits.memory[0]
    assert limits.memory[0].source == "RLIMIT_AS"


def test_what_a_process_has_of_its_address_space_is_used_already(tmp_path: Path) -> None:
    root = machine(tmp_path, mounts=[], groups=[], files={})
    pages = GIB // os.sysconf("SC_PAGE_SIZE")
    (root / "proc/self/statm").write_text(f"{pages} 300 200 1 0 90 0\n")
    limits = limits_of(root, address_space=4 * GIB)
    assert limits.memory[0].used == GIB
    assert limits.memory_available(64 * GIB) == 3 * GIB


def test_a_quota_below_one_core_still_leaves_one(tmp_path: Path) -> None:
    root = machine(tmp_path, mounts=[V2_MOUNT], groups=["0::/"], files={"cpu.max": "20000 100000"})
    assert limits_of(root).usable_cores(8)[0] == 1


def test_a_limit_above_the_machines_memory_is_none(tmp_path: Path) -> None:
    limits = limits_of(tmp_path, address_space=64 * GIB)
    assert limits.memory_limit(16 * GIB) is None
    assert limits.memory_limit(128 * GIB) is not None


def test_available_memory_is_the_smallest_room_under_any_limit(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        mounts=[V2_MOUNT],
        groups=["0::/a"],
        files={
            "a/memory.max": str(4 * GIB),
            "a/memory.current": str(3 * GIB),
            "a/memory.stat": f"anon {2 * GIB}\ninactive_file {GIB}",
        },
    )
    limits = limits_of(root)
    assert limits.memory_available(100 * GIB) == 2 * GIB
    assert limits.memory_available(GIB) == GIB


def test_this_process_is_told_its_own_affinity() -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this platform has no affinity")
    cores, _ = current_limits().usable_cores(os.cpu_count())
    assert cores is not None and 1 <= cores <= len(os.sched_getaffinity(0))


def test_the_deepest_mount_holds_a_path_and_the_last_one_made_on_a_point_counts() -> None:
    mounts = parse_mountinfo(
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n"
        "2 1 0:9 / /data rw shared:3 - nfs4 server:/x rw\n"
        "3 1 0:9 / /data rw - xfs /dev/sdb rw\n"
        "4 1 0:9 / /with\\040space rw - tmpfs tmpfs rw\n"
    )
    assert [mount_of(Path(path), mounts).fs_type for path in ("/database", "/data/a", "/with space/b")] == [
        "ext4",
        "xfs",
        "tmpfs",
    ]
    assert mount_of(Path("/x"), []) is None
