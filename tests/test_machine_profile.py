"""What the profile tells beyond the basics: GPUs in detail, code, surroundings, numerics, fingerprint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nvml_replay import A100_SPLIT, H200, LAPTOP, LOST, NO_PERMISSION, V100, Machine
from test_hardware import assert_truthful, nulls

from grd.hardware import capture_hardware_profile
from grd.hardware.code_version import code_version
from grd.hardware.cpu_details import cpu_details
from grd.hardware.disks import is_network
from grd.hardware.fingerprint import fingerprint
from grd.hardware.limits import Limits
from grd.hardware.memory import memory_facts
from grd.hardware.numerics import NCCL, VARIABLES, numerics_environment
from grd.hardware.surroundings import surroundings


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GRD_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(
        "grd.hardware.profile.cpuinfo_answer", lambda root: {"brand_raw": "A CPU", "arch": "X"}
    )


@pytest.fixture
def profile_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    def take(*devices: Any, **machine: Any) -> dict[str, Any]:
        monkeypatch.setitem(sys.modules, "pynvml", Machine(list(devices), **machine).module())
        profile = capture_hardware_profile()
        assert_truthful(profile)
        return profile

    return take


# --- GPUs


def test_a_card_tells_its_link_limits_and_health(profile_of: Any) -> None:
    gpu = profile_of(V100)["gpu"]
    told = {
        "uuid": "GPU-f1d2d2f9-24e9-86ac-fe1e-000000000100",
        "architecture": "Volta",
        "pci_bus_id": "00000000:8A:00.0",
        "pcie_generation": 3,
        "pcie_width_max": 16,
        "nvlinks_active": 6,
        "ecc_enabled": True,
        "ecc_uncorrected_errors": 0,
        "compute_mode": "default",
        "power_limit_w": 300.0,
        "clock_sm_max_mhz": 1530,
        "throttled_by": [],
        "temperature_c": 38,
        "mig_profile": None,
        "peak_source": "NVIDIA Tesla V100 datasheet, SXM2",
    }
    assert {name: gpu[name] for name in told} == told
    assert gpu["peak_tflops"] == {"fp32": 15.7, "fp16": 125.0}


def test_a_throttled_card_says_by_what(profile_of: Any) -> None:
    assert profile_of(H200)["gpu"]["throttled_by"] == ["power_cap"]


def test_what_a_laptop_does_not_tell_is_null_with_the_drivers_words_and_it_has_no_peak(
    profile_of: Any,
) -> None:
    profile = profile_of(LAPTOP)
    assert profile["gpu"]["name"] == "NVIDIA GeForce RTX 4090 Laptop GPU"
    assert profile["gpu"]["power_limit_w"] is None
    assert "Not Supported" in profile["reasons"]["gpu.power_limit_w"]
    assert profile["gpu"]["peak_tflops"] is None
    assert "datasheet" in profile["reasons"]["gpu.peak_tflops"]


def test_a_split_card_lists_its_instances_has_no_peak_and_is_pointed_out(profile_of: Any) -> None:
    profile = profile_of(A100_SPLIT)
    gpu = profile["gpu"]
    assert gpu["mig_enabled"] is True
    assert [(each["profile"], each["uuid"][:4]) for each in gpu["mig_instances"]] == [
        ("1g.5gb", "MIG-"),
        ("3g.20gb", "MIG-"),
    ]
    assert gpu["peak_tflops"] is None
    assert any("split by MIG" in note for note in profile["notes"])


def test_an_instance_named_in_cuda_visible_devices_is_the_only_gpu_with_its_own_profile(
    profile_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", A100_SPLIT.instances[1].answers["GetUUID"])
    profile = profile_of(H200, A100_SPLIT)
    gpu = profile["gpu"]
    assert (gpu["device_count"], gpu["mig_profile"], gpu["multi_processor_count"]) == (1, "3g.20gb", 42)
    assert (gpu["total_memory_gb"], gpu["compute_capability"], gpu["peak_tflops"]) == (19.5, "8.0", None)
    assert not any("split" in note for note in profile["notes"])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_instances_named_a_cuda_program_sees_the_first_and_the_profile_says_so(
    profile_of: Any, monkeypatch: pytest.MonkeyPatch, order: tuple[int, int]
) -> None:
    names = [A100_SPLIT.instances[index].answers["GetUUID"] for index in order]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"0,{','.join(names)}")
    profile = profile_of(H200, A100_SPLIT)
    assert [gpu["uuid"] for gpu in profile["gpus"]] == names[:1]
    assert profile["gpu"]["device_count"] == 1
    assert any("first MIG instance alone" in note for note in profile["notes"])


def test_a_mig_instance_that_is_not_there_by_this_name_is_to_be_written_out(
    profile_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-2b6a0c")
    profile = profile_of(A100_SPLIT)
    assert profile["gpus"] == [] and "write a MIG instance's name out" in profile["reasons"]["gpu"]


def test_a_part_with_the_whole_cards_name_but_not_its_memory_has_no_peak(profile_of: Any) -> None:
    part = V100.but(GetName="AMD Instinct MI300X")
    assert profile_of(part)["gpu"]["peak_tflops"] is None


def test_lost_and_guarded_devices_are_null_throughout_and_raise_nothing(profile_of: Any) -> None:
    guarded = V100.but(**{name: NO_PERMISSION for name in V100.answers if name != "GetUUID"})
    profile = profile_of(LOST, guarded)
    assert profile["gpu"]["device_count"] == 2
    assert set(nulls(profile["gpus"][0])) >= {"name", "temperature_c", "mig_enabled", "peak_tflops"}
    assert "Permission" in profile["reasons"]["gpus.1.temperature_c"]


# --- processor and surroundings


def cpu_tree(root: Path) -> Path:
    (root / "proc").mkdir(parents=True)
    record = (
        "processor : {}\nmodel name : X\nphysical id : {}\nsiblings : 4\ncpu cores : 2\n"
        "flags : fpu avx2 sse amx_bf16\n"
    )
    (root / "proc/cpuinfo").write_text("\n".join(record.format(i, i // 4) for i in range(8)))
    for node in ("node0", "node1"):
        (root / "sys/devices/system/node" / node).mkdir(parents=True)
    for cpu in range(8):
        cache = root / f"sys/devices/system/cpu/cpu{cpu}/cache/index3"
        cache.mkdir(parents=True)
        (cache / "size").write_text("32768K\n")
        (cache / "shared_cpu_list").write_text(f"{cpu // 4 * 4}-{cpu // 4 * 4 + 3}\n")
    governor = root / "sys/devices/system/cpu/cpu0/cpufreq"
    governor.mkdir()
    (governor / "scaling_governor").write_text("powersave\n")
    return root


def test_sockets_caches_and_instruction_sets_come_from_the_kernels_files(tmp_path: Path) -> None:
    assert cpu_details(cpu_tree(tmp_path)).values == {
        "flags": ["avx2", "amx_bf16"],
        "sockets": 2,
        "threads_per_core": 2,
        "numa_nodes": 2,
        "l3_cache_bytes": 64 * 1024**2,
        "governor": "powersave",
    }


def test_an_arm_board_tells_its_features_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(
        "processor\t: 0\nFeatures\t: fp asimd sve i8mm bf16\nCPU part\t: 0xd40\n"
    )
    facts = cpu_details(tmp_path)
    assert facts.values["flags"] == ["asimd", "sve", "i8mm", "bf16"]
    assert facts.values["sockets"] is None and facts.reasons["sockets"]


@pytest.mark.parametrize(
    ("files", "environment", "expected"),
    [
        ({}, {}, {"container": None, "virtual_machine": None, "scheduler_job": None, "hosted_by": None}),
        ({".dockerenv": ""}, {}, {"container": "docker"}),
        ({"run/.containerenv": ""}, {}, {"container": "podman"}),
        ({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {"container": "kubernetes"}),
        ({"proc/self/cgroup": "0::/kubepods.slice/x"}, {}, {"container": "kubernetes"}),
        ({"proc/self/cgroup": "9:memory:/docker/4f2a"}, {}, {"container": "docker"}),
        ({"proc/sys/kernel/osrelease": "5.15.1-microsoft-standard-WSL2"}, {}, {"virtual_machine": "wsl"}),
        (
            {"proc/cpuinfo": "flags : fpu hypervisor\n", "sys/class/dmi/id/sys_vendor": "QEMU\n"},
            {},
            {"virtual_machine": "QEMU"},
        ),
        (
            {"proc/cpuinfo": "flags : fpu\n", "sys/class/dmi/id/sys_vendor": "Dell\n"},
            {},
            {"virtual_machine": None},
        ),
        ({}, {"SLURM_JOB_ID": "47"}, {"scheduler_job": "slurm 47"}),
        (
            {},
            {"SLURM_JOB_ID": "48", "SLURM_ARRAY_JOB_ID": "47", "SLURM_ARRAY_TASK_ID": "3"},
            {"scheduler_job": "slurm 47_3"},
        ),
        ({}, {"COLAB_RELEASE_TAG": "r1"}, {"hosted_by": "colab"}),
    ],
)
def test_containers_machines_and_schedulers_are_recognised(
    tmp_path: Path, files: dict[str, str], environment: dict[str, str], expected: dict[str, Any]
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    values = surroundings(tmp_path, environment).values
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("fs_type", "network"),
    [
        ("nfs4", True),
        ("lustre", True),
        ("ext4", False),
        ("overlay", False),
        ("fuse.mine", None),
        (None, None),
    ],
)
def test_a_network_disk_is_told_from_a_local_one_and_doubt_is_null(
    fs_type: str | None, network: bool | None
) -> None:
    assert is_network(fs_type) is network


def test_the_disk_of_the_checkpoints_is_described_where_one_is_named(tmp_path: Path) -> None:
    disk = capture_hardware_profile(Path("/"), checkpoint_dir=tmp_path / "later")["disk"]
    assert disk["checkpoints"]["path"] == str(tmp_path.resolve())
    assert disk["checkpoints"]["inodes_free"] != 0


def test_shared_memory_is_measured_and_huge_pages_are_counted(tmp_path: Path) -> None:
    (tmp_path / "dev/shm").mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("HugePages_Total:     512\nHugepagesize:       2048 kB\n")
    values = memory_facts(Limits(), tmp_path).values
    assert values["huge_pages_gb"] == 1.0
    assert 0 <= values["shm_free_gb"] <= values["shm_gb"]


# --- numerics


def test_only_listed_variables_are_recorded_and_never_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-for-the-record")
    monkeypatch.setenv("NCCL_PASSWORD", "not-for-the-record")
    profile = capture_hardware_profile()
    told = profile["numerics"]["environment"]
    assert told["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and told["NCCL_ALGO"] == "Ring"
    assert set(told) <= {*VARIABLES, *NCCL}
    assert "not-for-the-record" not in json.dumps(profile)


def test_a_variable_that_is_set_and_empty_is_not_an_unset_one() -> None:
    assert numerics_environment({"CUDA_VISIBLE_DEVICES": ""}) == {"CUDA_VISIBLE_DEVICES": ""}
    assert numerics_environment({}) == {}


# --- code


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", *settings, *arguments],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init")
    (folder / "a.py").write_text("1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "one")
    return folder


def test_the_commit_is_gits_own_and_changes_are_told_apart(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    clean = code_version(repository / "deep/er").values
    assert (clean["commit"], clean["branch"], clean["dirty"]) == (commit, "main", False)
    digests = []
    for text in ("2\n", "3\n"):
        (repository / "a.py").write_text(text)
        dirty = code_version(repository).values
        assert (dirty["commit"], dirty["dirty"]) == (commit, True)
        digests.append(dirty["changes_sha256"])
    assert len({*digests, None}) == 3


def test_what_grd_itself_writes_is_no_change_of_the_code(repository: Path) -> None:
    def now() -> tuple[bool, str | None]:
        found = code_version(repository).values
        return found["dirty"], found["changes_sha256"]

    def write(*names: str) -> None:
        for name in names:
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            (repository / name).write_text("made")

    (repository / "grd.toml").write_text("")
    git(repository, "add", ".")
    git(repository, "commit", "-m", "two")
    write("experiments/20261128-083133-train-21a6/run.json", "experiments/.keys/a", "loops/plan/loop.json")
    write(".planning/DATA_REPORT.md")
    assert now() == (False, None)
    git(repository, "add", ".planning")
    git(repository, "commit", "-m", "three")
    (repository / ".planning/DATA_REPORT.md").write_text("made again")
    write(".planning/STATE.md")
    assert now() == (False, None)
    digests = [now()[1]]
    write("experiments/own.py")
    git(repository, "add", "experiments/own.py")
    git(repository, "commit", "-m", "four")
    assert now() == (False, None)
    for name in ("experiments/own.py", "experiments/other.py", ".planning/PLAN.md"):
        (repository / name).write_text("changed")
        assert now()[0] is True, name
        digests.append(now()[1])
    assert len(set(digests)) == 4
    (repository / "lib/deep").mkdir(parents=True)
    for text in ("one", "two"):
        (repository / "lib/deep/new.py").write_text(text)
        digests.append(now()[1])
    assert len(set(digests)) == 6, "what git does not track yet is code, too"
    assert digests[-1] == now()[1]


def test_packed_refs_linked_worktrees_and_detached_heads_are_read(repository: Path, tmp_path: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    git(repository, "worktree", "add", "-b", "side", str(tmp_path / "linked"))
    git(repository, "pack-refs", "--all")
    linked = code_version(tmp_path / "linked").values
    assert (linked["commit"], linked["branch"]) == (commit, "side")
    git(repository, "checkout", "--detach")
    detached = code_version(repository)
    assert detached.values["commit"] == commit
    assert detached.values["branch"] is None and detached.reasons["branch"] == "HEAD is detached"


def test_a_remotes_credentials_are_never_recorded(repository: Path) -> None:
    git(repository, "remote", "add", "origin", "https://me:secret@example.org/team/x.git?token=secret")
    assert code_version(repository).values["remote"] == "https://example.org/team/x.git"


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("git@example.org:team/x.git", "git@example.org:team/x.git"),
        ("https://token@example.org/x", "https://example.org/x"),
        ("https://me:p@ss@example.org:8443/x.git", "https://example.org:8443/x.git"),
        ("ssh://me@[::1]:22/x", "ssh://[::1]:22/x"),
        ("https://example.org/x#token", "https://example.org/x"),
        ("https://example.org/x?token=a#b", "https://example.org/x"),
        ("oauth2:token@example.org:team/x.git", "example.org:team/x.git"),
        ("oauth2:to/k@n@example.org:team/x.git", "example.org:team/x.git"),
        ("/home/me@work/x.git", "/home/me@work/x.git"),
        ("../x", "../x"),
        ("https://me:pass/word@example.org/x", None),
        ("https://me:pass?word@example.org/x", None),
        ("https://me:pass#word@example.org/x", None),
        ("https://me:123/word@example.org/x", None),
        ("https://me:password", None),
        ("token@example.org/x", None),
        ("helper::https://me:password@example.org/x", None),
    ],
)
def test_no_part_of_what_may_be_a_password_is_kept_of_a_remote(
    repository: Path, url: str, kept: str | None
) -> None:
    git(repository, "config", "remote.origin.url", url)
    config = repository / ".git/config"
    config.write_text(config.read_text().rstrip() + ("" if "#" in url else " # password") + "\n")
    told = code_version(repository, ask_git=False)
    assert told.values["remote"] == kept
    if kept is None:
        assert "may hold a password" in told.reasons["remote"]


@pytest.mark.parametrize("broken", ["empty", "nonsense", "no commit"])
def test_a_broken_or_empty_repository_is_unknown_and_no_exception(tmp_path: Path, broken: str) -> None:
    if broken == "no commit":
        git(tmp_path, "init")
    else:
        (tmp_path / ".git").mkdir()
        if broken == "nonsense":
            (tmp_path / ".git/HEAD").write_bytes(b"\xff\x00 nonsense")
    facts = code_version(tmp_path)
    assert facts.values["commit"] is None and facts.values["dirty"] is None
    assert facts.reasons["commit"] and facts.reasons["dirty"]


# --- fingerprint


def test_the_fingerprint_stays_with_the_machine_and_changes_with_it(profile_of: Any) -> None:
    first, again = (
        profile_of(H200),
        profile_of(H200.but(GetTemperature=20, GetUUID="GPU-another-of-the-kind")),
    )
    assert first["fingerprint"] == again["fingerprint"] == fingerprint(first)
    others = [
        profile_of(V100),
        profile_of(H200, H200),
        profile_of(H200, version="560.1"),
        {**first, "cpu": {**first["cpu"], "cores_usable": 3}},
        {**first, "memory": {**first["memory"], "limit_gb": 8.0}},
        {**first, "frameworks": {**first["frameworks"], "torch": "9.9"}},
    ]
    assert len({fingerprint(other) for other in [first, *others]}) == len(others) + 1
    assert fingerprint(profile_of(H200, version="550.99")) == first["fingerprint"]


def test_limits_that_cannot_be_found_do_not_cost_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> Limits:
        raise OverflowError("too large")

    monkeypatch.setattr("grd.hardware.profile.current_limits", fail)
    profile = capture_hardware_profile()
    assert profile["memory"]["total_gb"] > 0 and profile["memory"]["limit_gb"] is None
    assert "OverflowError" in profile["reasons"]["memory.limit_gb"]


# --- the report


def test_the_report_tells_peaks_identity_and_measurements_after_the_plans_own_lines(profile_of: Any) -> None:
    from grd.reports.hardware_section import render_hardware_section

    profile = profile_of(H200)
    measured = {
        "compute": {"matmul": [{"dtype": "bf16", "tflops": 788.0}]},
        "disks": {"/": {"write_mbs": 334.0}},
    }
    section = render_hardware_section({**profile, "measured": measured})
    lines = section.splitlines()
    assert any(line.startswith("- **Peak by Datasheet:** fp32 67.0 TFLOP/s, tf32 494.5") for line in lines)
    assert "- **Matrix Product bf16:** 788.00 TFLOP/s" in lines
    assert f"- **Fingerprint:** {profile['fingerprint']}" in lines
    assert lines.index("### GPU") < lines.index("### Measured") < lines.index("### Identity")
