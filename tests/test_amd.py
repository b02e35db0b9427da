"""AMD GPUs, in the profile and as they are now, over replayed libraries: there was no device here.

The libraries' Python parts are real in one test: ROCm's own library, which they look for, is not here.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import amd_replay
import pytest
from amd_replay import GUARDED, MI300X, NO_PERMISSION, NOT_LOADED, OF_PYRSMI, RADEON, Machine, process
from click.testing import CliRunner
from nvml_replay import H200
from nvml_replay import Machine as NvidiaMachine
from test_gpu_monitor import assert_every_null_has_a_reason
from test_hardware import assert_truthful

from grd.errors import ResourceUnavailable
from grd.hardware import GPUMonitor, amd, capture_hardware_profile, find_gpus
from grd.hardware.frameworks import TorchBuild
from grd.interfaces.cli.main import cli
from grd.tracking import ResourceTracker


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GRD_GPU_MOCK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine whose kernel has AMD's driver."""
    (tmp_path / "sys/module/amdgpu").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    def make(*cards: Any, **options: Any) -> Machine:
        made = Machine(list(cards), **options)
        amd_replay.install(monkeypatch, {"amdsmi": made.module()})
        return made

    return make


def test_the_replay_speaks_only_words_that_the_libraries_have() -> None:
    for package, file, words in (
        ("amdsmi", "amdsmi_interface.py", vars(Machine([MI300X, RADEON]).module())),
        ("pyrsmi", "rocml.py", vars(amd_replay.pyrsmi()["pyrsmi.rocml"])),
    ):
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            pytest.skip(f"{package} is not installed")
        tree = ast.parse((Path(spec.origin).parent / file).read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        mine = {name for name in words if name.startswith(("amdsmi_", "AmdSmi", "smi_"))}
        assert len(mine) > 8 and mine <= defined, mine - defined


# --- the profile


def test_an_amd_card_is_described_in_the_profiles_own_words(machine: Any, root: Path) -> None:
    made = machine(MI300X)
    profile = capture_hardware_profile(root=root)
    assert profile["gpu_source"] == "amdsmi" and "AMD support is experimental" in profile["notes"]
    (gpu,) = profile["gpus"]
    assert (gpu["index"], gpu["name"], gpu["architecture"]) == (0, "AMD Instinct MI300X OAM", "gfx942")
    assert (gpu["uuid"], gpu["driver_version"]) == ("GPU-8f2b4e6d1c3a5790", "6.12.12")
    assert gpu["total_memory_gb"] == pytest.approx(196592 / 1024)
    assert gpu["memory_free_gb"] == pytest.approx((196592 - 120284) / 1024)
    assert (gpu["power_limit_w"], gpu["power_default_w"]) == (750.0, 750.0)
    assert (gpu["temperature_c"], gpu["multi_processor_count"], gpu["numa_node"]) == (61, 304, 0)
    assert (gpu["clock_sm_max_mhz"], gpu["clock_memory_max_mhz"]) == (2100, 1300)
    assert (gpu["pcie_generation_max"], gpu["pcie_width"], gpu["pci_bus_id"]) == (5, 16, "0000:05:00.0")
    assert gpu["peak_tflops"]["bf16"] == pytest.approx(1307.4)
    assert (gpu["compute_capability"], gpu["cuda_version"], gpu["mig_enabled"]) == (None, None, None)
    assert profile["gpu_software"]["driver"] == "6.12.12"
    assert set(profile["gpu"]) - {"device_count"} == set(gpu)
    assert_gpu_reasons(profile)
    assert made.calls.count("init") == made.calls.count("shut_down") == 1


def assert_gpu_reasons(profile: dict[str, Any]) -> None:
    """Whatever is null about a GPU has a reason, and nothing else has one (the rest has no /proc here)."""
    reasons = {name: why for name, why in profile["reasons"].items() if name.startswith(("gpu.", "gpus."))}
    bare = {"gpu": profile["gpu"], "gpus": profile["gpus"], "reasons": reasons}
    assert_truthful(bare)


def test_what_may_not_be_seen_is_null_with_the_librarys_own_words(machine: Any, root: Path) -> None:
    machine(GUARDED)
    profile = capture_hardware_profile(root=root)
    gpu = profile["gpus"][0]
    assert gpu["uuid"] == "GPU-8f2b4e6d1c3a5790", (
        "made of the serial number, where nothing numbers it for HIP"
    )
    assert (gpu["temperature_c"], gpu["numa_node"]) == (None, None)
    assert "AMDSMI_STATUS_NO_PERM" in profile["reasons"]["gpus.0.temperature_c"]
    assert_gpu_reasons(profile)


def test_a_partition_has_its_own_name_and_no_peak_of_the_whole_card(machine: Any, root: Path) -> None:
    machine(MI300X.but(get_gpu_compute_partition="CPX"))
    (gpu,) = find_gpus(root=root).devices
    assert gpu.values["name"] == "AMD Instinct MI300X OAM (CPX partition)"
    assert gpu.values["peak_tflops"] is None
    machine(MI300X.but(get_gpu_asic_info={**MI300X.answers["get_gpu_asic_info"], "market_name": "0x74a1"}))
    (gpu,) = find_gpus(root=root).devices
    assert gpu.values["name"] is None, "a number is no name"


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (TorchBuild(version="2.9.0+rocm6.4", cuda=None, hip="6.4.1"), None),
        (TorchBuild(version="2.9.0+cu128", cuda="12.8", hip=None), "2.9.0+cu128 is a build without ROCm"),
    ],
)
def test_a_torch_that_cannot_use_an_amd_card_is_pointed_out(
    machine: Any, root: Path, monkeypatch: pytest.MonkeyPatch, build: TorchBuild, says: str | None
) -> None:
    machine(MI300X)
    monkeypatch.setattr("grd.hardware.gpus.installed_torch", lambda: build)
    found = find_gpus(root=root)
    notes = [note for note in found.notes if "torch" in note]
    assert len(notes) == (says is not None) and (says or "") in "".join(notes)
    assert found.devices[0].values["cuda_version"] is None


# --- where the libraries are not there


def test_without_amds_driver_its_libraries_are_not_even_looked_for(machine: Any, tmp_path: Path) -> None:
    made = machine(MI300X)
    found, monitor = find_gpus(root=tmp_path), GPUMonitor(root=tmp_path)
    assert found.devices == () and "amd" not in (found.reason or "").lower()
    assert monitor.get_gpu_stats() == [] and "amd" not in (monitor.reason or "").lower()
    assert made.calls == []


def test_pyrsmi_answers_where_amdsmi_is_not_installed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    amd_replay.install(monkeypatch, dict(amd_replay.pyrsmi({**OF_PYRSMI, "uuid": "GPU-0f0f"}, {"name": ""})))
    profile = capture_hardware_profile(root=root)
    assert profile["gpu_source"] == "pyrsmi"
    assert [gpu["name"] for gpu in profile["gpus"]] == ["AMD Instinct MI210", None]
    assert profile["gpu"]["total_memory_gb"] == pytest.approx(65520 / 1024)
    assert_gpu_reasons(profile)
    known, unknown = GPUMonitor(root=root).get_gpu_stats()
    assert (known.memory_used_mb, known.utilization_percent, known.power_usage_w) == (11, 3, 41.0)
    assert (known.fan_speed_percent, known.temperature_c, known.processes) == (None, None, None)
    assert (unknown.memory_used_mb, unknown.utilization_percent, unknown.power_usage_w) == (None, None, None)
    for row in (known, unknown):
        assert_every_null_has_a_reason(row)


@pytest.mark.parametrize(
    ("modules", "says"),
    [
        ({}, "amdsmi: ModuleNotFoundError"),
        ({"amdsmi": Machine(init=NOT_LOADED).module()}, "AMDSMI_STATUS_DRIVER_NOT_LOADED"),
        ({"amdsmi": Machine(init=NO_PERMISSION).module()}, "Permission Denied"),
        ({"amdsmi": Machine([]).module()}, "amdsmi: it lists no device"),
        (amd_replay.pyrsmi(error=RuntimeError("AMD GPU driver not initialized.")), "pyrsmi: RuntimeError"),
        (amd_replay.pyrsmi(), "pyrsmi: it lists no device"),
    ],
)
def test_a_library_that_does_not_work_is_no_gpu_with_its_own_words(
    root: Path, monkeypatch: pytest.MonkeyPatch, modules: dict[str, Any], says: str
) -> None:
    amd_replay.install(monkeypatch, modules)
    found, monitor = find_gpus(root=root), GPUMonitor(root=root)
    assert found.devices == () and says in (found.reason or "")
    assert monitor.get_gpu_stats() == [] and says in (monitor.reason or "")


def test_the_real_packages_without_rocms_library_say_so_and_print_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not a replay: both packages are installed, and what they would load is not."""
    if find_spec("amdsmi") is None or find_spec("pyrsmi") is None or Path("/sys/module/amdgpu").exists():
        pytest.skip("needs amdsmi and pyrsmi, and no AMD driver")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    handlers = list(logging.getLogger().handlers)
    for reason in (find_gpus(root=root).reason, GPUMonitor(root=root).reason):
        for source in ("amdsmi", "pyrsmi"):
            assert f"{source}: OSError: ROCm's library libamd_smi.so is not there" in (reason or "")
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "")
    assert logging.getLogger().handlers == handlers


def test_nvidia_comes_first(machine: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(MI300X)
    monkeypatch.setitem(sys.modules, "pynvml", NvidiaMachine([H200]).module())
    assert find_gpus(root=root).source == "nvml"
    assert [row.name for row in GPUMonitor(root=root).get_gpu_stats()] == ["NVIDIA H200"]


# --- as they are now


def test_sensors_come_in_the_units_of_the_plan_and_a_missing_one_is_null(machine: Any, root: Path) -> None:
    machine(MI300X, RADEON)
    monitor = GPUMonitor(root=root)
    assert (monitor.driver, monitor.reason) == ("6.12.12", None)
    instinct, radeon = monitor.get_gpu_stats()
    assert (instinct.memory_used_mb, instinct.memory_total_mb) == (120284, 196592)
    assert (instinct.utilization_percent, instinct.temperature_c, instinct.power_usage_w) == (97, 61, 702.0)
    assert instinct.fan_speed_percent is None and "NOT_SUPPORTED" in instinct.reasons["fan_speed_percent"]
    assert instinct.processes == [{"pid": 4242, "memory_mb": 120_000}]
    assert (radeon.utilization_percent, radeon.temperature_c, radeon.power_usage_w) == (0, 34, 18.0)
    assert (radeon.fan_speed_percent, radeon.processes) == (20, [])
    for row in (instinct, radeon):
        assert_every_null_has_a_reason(row)


def test_zeros_and_not_available_that_mean_unknown_are_null(machine: Any, root: Path) -> None:
    machine(GUARDED, MI300X.but(get_gpu_memory_total={amd_replay.AmdSmiMemoryType.VRAM: 0}))
    guarded, odd = GPUMonitor(root=root).get_gpu_stats()
    assert (guarded.utilization_percent, guarded.power_usage_w, guarded.temperature_c) == (None, None, None)
    assert guarded.processes == [{"pid": 77, "memory_mb": None}]
    assert odd.memory_total_mb is None
    for row in (guarded, odd):
        assert_every_null_has_a_reason(row)


def test_a_card_that_stops_answering_is_listed_with_nothing_known(machine: Any, root: Path) -> None:
    gone = RuntimeError("ring gfx timeout")
    machine(MI300X.but(**dict.fromkeys(MI300X.answers, gone)))
    (row,) = GPUMonitor(root=root).get_gpu_stats()
    assert (row.gpu_id, row.name, row.memory_used_mb, row.visible) == (0, None, None, True)
    assert "ring gfx timeout" in row.reasons["processes"]
    assert find_gpus(root=root).devices[0].values["name"] is None


def test_closing_lets_go_and_work_is_not_given_to_experimental_devices(machine: Any, root: Path) -> None:
    made = machine(MI300X)
    with GPUMonitor(root=root) as monitor:
        with pytest.raises(ResourceUnavailable, match="experimental"):
            monitor.allocatable()
        assert not monitor.closed
    assert monitor.closed and monitor.get_gpu_stats() == []
    assert made.calls.count("shut_down") == 1


def test_the_command_and_a_tracker_show_them(
    machine: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(MI300X.but(get_gpu_process_list=[process(os.getpid(), 300)]))
    monkeypatch.setattr("grd.hardware.monitor._monitors", {})
    monkeypatch.setattr("grd.hardware.monitor.open_amd", lambda _: amd.open_amd(root))
    shown = CliRunner().invoke(cli, ["gpus"]).output
    assert "AMD Instinct MI300X OAM" in shown and "97%" in shown
    told = json.loads(CliRunner().invoke(cli, ["gpus", "--json"]).output)
    assert told["gpus"][0]["power_usage_w"] == 702.0
    with ResourceTracker() as tracker:
        pass
    assert (tracker.get_usage().gpu_vram_used_mb, tracker.get_usage().gpu_available) == (300.0, True)


# --- which of them a program would see

FIRST, SECOND, THIRD = "GPU-8f2b4e6d1c3a5790", "GPU-00000000000000ab", "GPU-00000000000000cd"
THREE = [MI300X, RADEON, RADEON.but(get_gpu_enumeration_info=amd_replay._hip(2, THIRD[4:]))]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [FIRST, SECOND, THIRD]),
        ({"ROCR_VISIBLE_DEVICES": "2,0"}, [THIRD, FIRST]),
        ({"ROCR_VISIBLE_DEVICES": f"{SECOND.upper()},0"}, [SECOND, FIRST]),
        ({"HIP_VISIBLE_DEVICES": "1"}, [SECOND]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, [SECOND]),
        ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, [FIRST]),
        ({"ROCR_VISIBLE_DEVICES": "2,0", "HIP_VISIBLE_DEVICES": "1"}, [FIRST]),
        ({"ROCR_VISIBLE_DEVICES": "2", "CUDA_VISIBLE_DEVICES": "1"}, []),
        ({"HIP_VISIBLE_DEVICES": "-1"}, []),
        ({"ROCR_VISIBLE_DEVICES": ""}, []),
        ({"HIP_VISIBLE_DEVICES": "0,7,1"}, [FIRST]),
    ],
)
def test_rocms_variables_hide_as_rocm_does(
    machine: Any, root: Path, settings: dict[str, str], expected: list[str]
) -> None:
    machine(*THREE)
    found = find_gpus(environment=settings, root=root)
    assert [facts.values["uuid"] for facts in found.devices] == expected
    if not expected:
        assert "selects none of the 3 GPU(s)" in (found.reason or "")
        assert all(name in (found.reason or "") for name in settings)
    rows = GPUMonitor(environment=settings, root=root).get_gpu_stats()
    assert {str(row.uuid) for row in rows if row.visible} == set(expected)
    assert len(rows) == 3


def test_positions_are_hips_own_where_it_counts_otherwise_than_the_driver(machine: Any, root: Path) -> None:
    late = MI300X.but(get_gpu_enumeration_info=amd_replay._hip(1, FIRST[4:]))
    early = RADEON.but(get_gpu_enumeration_info=amd_replay._hip(0, SECOND[4:]))
    machine(late, early)
    assert [facts.values["index"] for facts in find_gpus(root=root).devices] == [1, 0]
    (only,) = find_gpus(environment={"HIP_VISIBLE_DEVICES": "0"}, root=root).devices
    assert only.values["uuid"] == SECOND
