"""The GPU monitor over replayed drivers (see nvml_replay: there was no GPU), and its invented GPUs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
from conftest import Project
from nvml_replay import (
    A100_SPLIT,
    BUSY_WITH_HOST_PIDS,
    GUARDED,
    H200,
    LAPTOP,
    LOST,
    NO_PERMISSION,
    NOT_LOADED,
    V100,
    Machine,
)

from grd.errors import ResourceUnavailable
from grd.hardware import GPUMonitor, GPUStats, find_gpus, get_gpu_monitor


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "GRD_GPU_MOCK", "GRD_GPU_MOCK_SEED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("grd.hardware.monitor._monitors", {})


@pytest.fixture
def monitor_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., GPUMonitor]:
    def make(*devices: Any, **machine: Any) -> GPUMonitor:
        monkeypatch.setitem(sys.modules, "pynvml", Machine(list(devices), **machine).module())
        return GPUMonitor()

    return make


def assert_every_null_has_a_reason(stats: GPUStats) -> None:
    unknown = {name for name, value in stats.to_dict().items() if value is None}
    assert unknown == set(stats.reasons)
    assert all(stats.reasons.values())
    json.dumps(stats.to_dict(), allow_nan=False)


def test_a_card_tells_its_sensors_in_the_units_of_the_plan(monitor_of: Any) -> None:
    (stats,) = monitor_of(H200).get_gpu_stats()
    assert (stats.gpu_id, stats.name, stats.mock) == (0, "NVIDIA H200", False)
    assert (stats.memory_used_mb, stats.memory_total_mb) == (120411, 143771)
    assert (stats.utilization_percent, stats.temperature_c, stats.power_usage_w) == (98, 66, 699.0)
    assert_every_null_has_a_reason(stats)
    plan = ["gpu_id", "name", "memory_used_mb", "memory_total_mb", "utilization_percent", "temperature_c"]
    assert [field.name for field in fields(GPUStats)][:8] == [*plan, "fan_speed_percent", "power_usage_w"]


def test_a_sensor_that_is_not_there_is_null_and_never_zero(monitor_of: Any) -> None:
    stats = monitor_of(V100, LAPTOP).get_gpu_stats()
    assert stats[0].fan_speed_percent is None  # passively cooled
    assert stats[0].utilization_percent == 0  # idle, which is known
    assert stats[1].power_usage_w is None and "Not Supported" in stats[1].reasons["power_usage_w"]
    assert stats[1].name == "NVIDIA GeForce RTX 4090 Laptop GPU"
    assert stats[1].processes == [{"pid": 977, "memory_mb": None}]
    for each in stats:
        assert_every_null_has_a_reason(each)


def test_what_is_not_permitted_is_null_beside_what_is(monitor_of: Any) -> None:
    (stats,) = monitor_of(GUARDED).get_gpu_stats()
    assert stats.utilization_percent is None and stats.processes is None
    assert "Permission" in stats.reasons["processes"]
    assert stats.memory_used_mb == 1045


def test_a_lost_device_is_listed_with_nothing_known_and_the_others_stay(monitor_of: Any) -> None:
    lost, healthy = monitor_of(LOST, V100).get_gpu_stats()
    assert (lost.gpu_id, lost.name, lost.memory_total_mb) == (0, None, None)
    assert "lost" in lost.reasons["name"]
    assert_every_null_has_a_reason(lost)
    assert healthy.name == "Tesla V100-SXM2-32GB"


def test_a_device_that_is_lost_later_raises_nothing(monitor_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = monitor_of(V100)
    assert monitor.get_gpu_stats()[0].temperature_c == 38
    monitor._nvml.nvmlDeviceGetHandleByIndex = lambda index: (_ for _ in ()).throw(LOST)
    assert monitor.get_gpu_stats()[0].temperature_c is None


def test_instances_of_a_split_card_are_rows_of_their_own(monitor_of: Any) -> None:
    card, small, large = monitor_of(A100_SPLIT).get_gpu_stats()
    assert card.utilization_percent is None  # the driver tells none of a card that is split
    assert [(row.gpu_id, row.mig_profile) for row in (card, small, large)] == [
        (0, None),
        (0, "1g.5gb"),
        (0, "3g.20gb"),
    ]
    assert large.memory_total_mb == 19968
    for row in (card, small, large):
        assert_every_null_has_a_reason(row)


def test_host_pids_in_a_container_are_passed_on_as_the_driver_tells_them(monitor_of: Any) -> None:
    (stats,) = monitor_of(BUSY_WITH_HOST_PIDS).get_gpu_stats()
    assert stats.processes == [
        {"pid": 3_900_001, "memory_mb": 119_000},
        {"pid": 3_900_044, "memory_mb": 500},
    ]


def test_without_a_driver_there_are_no_gpus_and_a_reason(monitor_of: Any) -> None:
    monitor = monitor_of(init=NOT_LOADED)
    assert (monitor.mock_mode, monitor.device_count, monitor.get_gpu_stats()) == (False, 0, [])
    assert "Driver Not Loaded" in monitor.reason
    assert "lists no device" in monitor_of().reason


def test_without_the_package_there_are_no_gpus_and_no_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monitor = GPUMonitor()
    assert monitor.get_gpu_stats() == [] and monitor.reason


def test_hidden_devices_are_shown_and_marked(monitor_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monitor = monitor_of(H200, V100)
    assert [row.visible for row in monitor.get_gpu_stats()] == [False, True]
    assert monitor.allocatable() == [V100.answers["GetUUID"]]


def test_work_is_given_to_instances_and_whole_cards_but_not_to_split_ones(monitor_of: Any) -> None:
    instances = [each.answers["GetUUID"] for each in A100_SPLIT.instances]
    assert monitor_of(A100_SPLIT, H200).allocatable() == [*instances, H200.answers["GetUUID"]]


OLD_NAME = f"MIG-{A100_SPLIT.answers['GetUUID']}/2/0"
LARGE = A100_SPLIT.instances[1].answers["GetUUID"]


@pytest.mark.parametrize(
    ("setting", "given"),
    [
        (LARGE, [LARGE]),
        (OLD_NAME, [LARGE]),
        (LARGE[:16], []),
        (OLD_NAME[:20] + "/2/0", []),
        ("MIG-none,0", []),
    ],
)
def test_an_instance_goes_by_both_of_its_names_written_out(
    monitor_of: Any, monkeypatch: pytest.MonkeyPatch, setting: str, given: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    monitor = monitor_of(H200, A100_SPLIT)
    assert [row.uuid for row in monitor.get_gpu_stats() if row.visible] == monitor.allocatable() == given
    assert [gpu.values["uuid"] for gpu in find_gpus().devices] == given


def test_an_instance_whose_profile_the_driver_does_not_tell_is_one_too(
    monitor_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded = A100_SPLIT.but()
    guarded.instances = [part.but(GetAttributes=NO_PERMISSION) for part in A100_SPLIT.instances]
    assert monitor_of(guarded).allocatable() == [each.answers["GetUUID"] for each in guarded.instances]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", LARGE)
    monitor = monitor_of(guarded)
    assert [row.visible for row in monitor.get_gpu_stats()] == [False, False, True]
    assert monitor.allocatable() == [LARGE]
    found = find_gpus()
    assert [gpu.values["uuid"] for gpu in found.devices] == [LARGE]
    assert not any("split by MIG" in note for note in found.notes)


def test_shutting_down_twice_is_harmless_and_leaves_nothing_to_show(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine([V100])
    monkeypatch.setitem(sys.modules, "pynvml", machine.module())
    with GPUMonitor() as monitor:
        monitor.shutdown()
        assert monitor.get_gpu_stats() == []
    assert machine.calls.count("shutdown") == 1


# --- invented GPUs


def test_nothing_is_invented_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("GRD_GPU_MOCK", "1")
    assert GPUMonitor(mock_mode=False).get_gpu_stats() == []
    assert len(GPUMonitor().get_gpu_stats()) == 3
    monkeypatch.setenv("GRD_GPU_MOCK", "0")
    assert GPUMonitor().get_gpu_stats() == []
    assert len(GPUMonitor(mock_mode=True).get_gpu_stats()) == 3


def test_invented_gpus_say_so_and_stay_in_the_plans_ranges() -> None:
    for seed in range(50):
        rows = GPUMonitor(mock_mode=True, seed=seed).get_gpu_stats()
        for row in rows:
            light = row.gpu_id == 2
            assert row.mock and row.name == "NVIDIA A40 (Mock)" and row.memory_total_mb == 45634
            assert row.memory_used_mb in (range(2000, 10001) if light else range(5000, 30001))
            assert row.utilization_percent in range(51 if light else 101)
            assert row.temperature_c in (range(40, 66) if light else range(40, 76))
            assert row.fan_speed_percent in (range(20, 61) if light else range(30, 81))
            assert row.power_usage_w is not None
            assert (30 if light else 50) <= row.power_usage_w <= (150 if light else 300)
            assert_every_null_has_a_reason(row)


def test_a_seed_makes_invented_numbers_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    first, same, other = (GPUMonitor(mock_mode=True, seed=seed).get_gpu_stats() for seed in (7, 7, 8))
    assert first == same != other
    monkeypatch.setenv("GRD_GPU_MOCK_SEED", "7")
    assert GPUMonitor(mock_mode=True).get_gpu_stats() == GPUMonitor(mock_mode=True).get_gpu_stats()


def test_nothing_can_be_allocated_on_invented_gpus() -> None:
    with pytest.raises(ResourceUnavailable, match="invented"):
        GPUMonitor(mock_mode=True).allocatable()


def test_the_shared_monitor_honours_the_mode_and_is_made_anew_after_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Machine([V100]).module())
    real, invented = get_gpu_monitor(), get_gpu_monitor(mock_mode=True)
    assert (real.mock_mode, invented.mock_mode) == (False, True)
    assert get_gpu_monitor(mock_mode=False) is real and get_gpu_monitor(True) is invented
    real.shutdown()
    assert [row.name for row in get_gpu_monitor().get_gpu_stats()] == ["Tesla V100-SXM2-32GB"]


# --- the command


def test_gpus_on_a_machine_without_any_says_why(project: Project) -> None:
    done = project.grd("gpus", "--json", env={"CUDA_VISIBLE_DEVICES": ""})
    if done.json["gpus"]:
        pytest.skip("this machine has GPUs")
    assert done.code == 0
    assert (done.json["mock"], done.json["gpus"]) == (False, [])
    assert done.json["reason"]
    assert "no GPU" in project.grd("gpus").out


def test_invented_gpus_are_called_so_in_every_line(project: Project) -> None:
    shown = project.grd("gpus", "--mock", "--seed", "1")
    rows = [line for line in shown.out.splitlines() if "A40" in line]
    assert len(rows) == 3 and all("(Mock)" in row for row in rows)
    assert "invented" in shown.err
    told = project.grd("gpus", "--mock", "--seed", "1", "--json").json
    assert told["mock"] is True and all(gpu["mock"] for gpu in told["gpus"])
    assert (
        told["gpus"] == project.grd("gpus", "--json", "--seed", "1", env={"GRD_GPU_MOCK": "1"}).json["gpus"]
    )


def test_watching_prints_one_json_line_a_sample(project: Project) -> None:
    done = project.grd("gpus", "--mock", "--watch", "--json", "--interval", "0.01", "--samples", "3")
    samples = [json.loads(line) for line in done.out.splitlines()]
    assert len(samples) == 3
    assert {sample["schema"] for sample in samples} == {"grd.gpus/1"}
    assert samples[0]["gpus"] != samples[1]["gpus"]


@pytest.mark.parametrize(
    "options",
    [
        ("--watch", "--interval", "nan"),
        ("--watch", "--interval", "inf"),
        ("--watch", "--interval", "1e12"),
        ("--samples", "3"),
    ],
)
def test_an_interval_that_is_no_time_and_samples_without_watching_are_refused(
    project: Project, options: tuple[str, ...]
) -> None:
    done = project.grd("gpus", "--mock", *options)
    assert done.code == 2 and options[-2] in done.err and "Traceback" not in done.err, done.err
