"""What MLflow is told of a run, and what is refused before anything starts; no MLflow is needed here."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import Project
from test_research import PARAMETERS, TRAIN

from grd.errors import ConfigurationError
from grd.settings import load_settings, parse_mlflow
from grd.tracking.host_use import HostUse
from grd.tracking.mlflow import choice, follower, translation

without_mlflow = pytest.mark.skipif(find_spec("mlflow") is not None, reason="MLflow is installed here")


def sample(t: float, **values: Any) -> dict[str, Any]:
    host = {
        "cpu_percent": 50.0,
        "memory_used_bytes": 2_000_000_000,
        "memory_percent": 25.0,
        "disk_percent": 10.0,
        "disk_used_bytes": 1_000_000_000,
        "disk_free_bytes": 9_000_000_000,
        "received_bytes": 3_000_000,
        "sent_bytes": 1_000_000,
    }
    return {"t": t, "cpu_seconds": t, "rss_bytes": 300_000_000, "processes": 2, "host": host, **values}


def test_an_events_metrics_have_its_step_else_its_epoch_and_null_is_not_a_number() -> None:
    event = {"kind": "metrics", "t": 12.5, "epoch": 3, "step": None, "values": {"loss": 0.5, "bad": None}}
    loss, bad = translation.metrics_of(event)
    assert (loss.key, loss.value, loss.t, loss.step) == ("loss", 0.5, 12.5, 3)
    assert math.isnan(bad.value)
    assert translation.metrics_of({**event, "step": 40})[0].step == 40
    assert translation.metrics_of({**event, "epoch": None})[0].step == 0
    assert translation.metrics_of({"kind": "progress", "t": 1.0, "n": 3}) == []


def test_names_that_mlflow_refuses_are_changed_and_long_values_cut() -> None:
    assert translation.key_of("top-5 acc (%)") == "top-5 acc ___"
    assert len(translation.key_of("x" * 400)) == 250
    assert translation.text_of("y" * 7000).endswith("...")
    assert len(translation.text_of("y" * 7000)) == 6000


def test_hardware_is_told_without_a_gpu_or_a_cuda_version() -> None:
    profile = {"cpu": {"cores_usable": 4}, "memory": {"total_gb": 64.0, "limit_gb": 8.0}, "gpu": None}
    assert translation.hardware_parameters(profile) == {
        "cpu_cores": "4",
        "memory_gb": "8.00",
        "gpu_name": "none",
        "cuda_version": "none",
    }
    by_gputil = {"gpu": {"name": "NVIDIA A40", "total_memory_gb": 44.6}}
    assert translation.hardware_parameters(by_gputil)["gpu_name"] == "NVIDIA A40"
    assert translation.hardware_parameters(by_gputil)["cuda_version"] == "none"
    assert translation.hardware_parameters({})["cpu_cores"] == "unknown"


def test_a_parameter_that_a_resume_changed_becomes_a_tag() -> None:
    first, newest = {"lr": 0.01, "epochs": 5}, {"lr": 0.1, "epochs": 5, "new": 1}
    parameters, tags = translation.parameters_and_changes(first, newest, {"lr": "0.01"}, 2)
    assert parameters == {"epochs": "5"}
    assert tags == {"grd.attempt-2.lr": "0.1", "grd.attempt-2.new": "1"}
    assert translation.parameters_and_changes(first, first, {}, 1) == ({"lr": "0.01", "epochs": "5"}, {})


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("completed", "FINISHED"),
        ("failed", "FAILED"),
        ("interrupted", "KILLED"),
        ("running", "RUNNING"),
        ("queued", "RUNNING"),
    ],
)
def test_states_have_a_status_in_mlflow(state: str, status: str) -> None:
    assert translation.status_of(state) == status


def test_rates_are_means_of_the_window_and_amounts_the_newest() -> None:
    window = [sample(10.0), sample(11.0, cpu_seconds=13.0)]
    window[0]["host"]["cpu_percent"] = 100.0
    found = translation.system_metrics(window, {"t": 9.0, "cpu_seconds": 9.0}, None)
    assert found["system/cpu_utilization_percentage"] == 75.0
    assert found["system/system_memory_usage_megabytes"] == 2000.0
    assert found["system/process/cpu_percent"] == 200.0
    assert found["system/process/rss_megabytes"] == 300.0
    assert found["system/process/num_processes"] == 2.0


def test_what_is_not_known_is_left_out_and_never_0() -> None:
    found = translation.system_metrics([{"t": 1.0, "cpu_seconds": 0.0, "rss_bytes": None}], None, None)
    assert "system/process/rss_megabytes" not in found
    assert "system/process/cpu_percent" not in found
    assert not any("gpu" in name or "cgroup" in name for name in found)


def test_gpus_have_mlflows_names_by_index_and_the_runs_own_memory_by_uuid() -> None:
    gpu = {
        "uuid": "GPU-8a7b6c5d-0000",
        "index": 1,
        "utilization_percent": 80,
        "memory_used_mb": 1000,
        "memory_total_mb": 4000,
        "power_usage_w": 150.0,
        "process_memory_mb": None,
    }
    profile = {"gpus": [{"uuid": "GPU-8a7b6c5d-0000", "power_limit_w": 300.0}]}
    found = translation.system_metrics([sample(1.0, gpu_now=[gpu])], None, profile)
    assert found["system/gpu_1_utilization_percentage"] == 80.0
    assert found["system/gpu_1_memory_usage_megabytes"] == pytest.approx(1048.576)
    assert found["system/gpu_1_memory_usage_percentage"] == 25.0
    assert found["system/gpu_1_power_usage_watts"] == 150.0
    assert found["system/gpu_1_power_usage_percentage"] == 50.0
    assert "system/process/gpu_8a7b6c5d_memory_megabytes" not in found
    known = translation.system_metrics([sample(1.0, gpu_now=[{**gpu, "process_memory_mb": 500}])], None, None)
    assert known["system/process/gpu_8a7b6c5d_memory_megabytes"] == pytest.approx(524.288)


@pytest.mark.parametrize(
    ("uuids", "names"),
    [
        (("MIG-1a2b3c4d-0001", "MIG-2b3c4d5e-0002"), ("1a2b3c4d", "2b3c4d5e")),
        (("MIG-GPU-8a7b6c5d-0000/1/0", "MIG-GPU-8a7b6c5d-0000/2/0"), ("8a7b6c5d_1_0", "8a7b6c5d_2_0")),
    ],
)
def test_mig_instances_stand_beside_their_card_and_not_in_its_place(
    uuids: tuple[str, str], names: tuple[str, str]
) -> None:
    known = {"utilization_percent": None, "memory_total_mb": 1000, "power_usage_w": None}
    rows = [
        {**known, "uuid": uuid, "index": 0, "memory_used_mb": used, "process_memory_mb": used}
        for uuid, used in zip(("GPU-8a7b6c5d-0000", *uuids), (900, 600, 300), strict=True)
    ]
    found = translation.system_metrics([sample(1.0, gpu_now=rows)], None, None)
    assert found["system/gpu_0_memory_usage_percentage"] == 90.0
    assert [found[f"system/gpu_0_mig_{name}_memory_usage_percentage"] for name in names] == [60.0, 30.0]
    own = [found[f"system/process/gpu_{name}_memory_megabytes"] for name in ("8a7b6c5d", *names)]
    assert own == pytest.approx([943.7184, 629.1456, 314.5728])


def test_a_containers_limit_is_told_and_an_address_space_limit_is_none_of_it() -> None:
    used = sample(1.0, cgroup_memory_bytes=500_000_000, cgroup_oom_kills=2, throttled_seconds=1.5)
    memory = {"limit_gb": 1.0, "limit_source": "cgroup /sys/fs/cgroup/memory.max"}
    found = translation.system_metrics([used], None, {"memory": memory})
    assert found["system/cgroup/memory_limit_megabytes"] == pytest.approx(1073.741824)
    assert found["system/cgroup/memory_usage_megabytes"] == 500.0
    assert found["system/cgroup/oom_kill"] == 2.0
    assert found["system/cgroup/throttled_seconds"] == 1.5
    elsewhere = {"memory": {**memory, "limit_source": "RLIMIT_AS"}}
    assert "system/cgroup/memory_limit_megabytes" not in translation.system_metrics([used], None, elsewhere)


def test_the_first_sample_is_due_at_once_and_the_next_after_the_interval() -> None:
    assert translation.is_due({"t": 100.0}, None, 10.0)
    assert not translation.is_due({"t": 105.0}, 100.0, 10.0)
    assert translation.is_due({"t": 109.9}, 100.0, 10.0)


def test_the_machines_own_numbers_are_shares_and_never_negative() -> None:
    host = HostUse()
    math.factorial(20000)
    found = host.look()
    assert found["cpu_percent"] is None or 0.0 <= found["cpu_percent"] <= 100.0
    assert found["memory_used_bytes"] > 0
    assert found["received_bytes"] >= 0
    assert 0.0 < found["disk_percent"] <= 100.0


@pytest.mark.parametrize(
    ("value", "setting"),
    [
        (True, "on"),
        (False, "off"),
        ("yes", "on"),
        ("0", "off"),
        ("http://host:5000", "http://host:5000"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("https://me@host/store", "https://me@host/store"),
        ("databricks://profile", "databricks://profile"),
    ],
)
def test_a_store_is_named_by_a_switch_or_a_uri(value: str | bool, setting: str) -> None:
    assert parse_mlflow(value) == setting


@pytest.mark.parametrize("value", ["", "mlruns", "host:", "./store", "postgresql://me:secret@host/db"])
def test_what_is_no_uri_or_has_a_password_is_refused(value: str) -> None:
    with pytest.raises(ValueError):
        parse_mlflow(value)


def test_files_are_those_of_the_folder_it_was_typed_in(tmp_path: Path) -> None:
    for typed, kept in (
        ("sqlite:///mlflow.db", f"sqlite:///{tmp_path}/mlflow.db"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("file:./mlruns", f"file:{tmp_path}/mlruns"),
        ("http://host:5000", "http://host:5000"),
    ):
        chosen = choice.chosen(typed, None, 10.0, tmp_path)
        assert chosen is not None
        assert chosen["uri"] == kept
    assert choice.chosen("off", None, 10.0, tmp_path) is None
    on = choice.chosen("on", "mine", 10.0, tmp_path)
    assert on == {"uri": None, "experiment": "mine", "interval": 10.0}


def test_a_password_is_not_shown() -> None:
    assert follower.without_password("http://me:secret@host:5000") == "http://me:***@host:5000"
    assert follower.without_password("http://host:5000/a:b@c") == "http://host:5000/a:b@c"
    assert follower.without_password("sqlite:////data/x.db") == "sqlite:////data/x.db"


def test_a_wrong_setting_names_its_place(tmp_path: Path) -> None:
    (tmp_path / "grd.toml").write_text('mlflow = "mlruns"\n')
    with pytest.raises(ConfigurationError, match="mlflow"):
        load_settings(tmp_path, environment={})


def test_a_uri_that_is_none_is_refused_before_anything_starts(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    for typed in ("mlruns", "postgresql://me:secret@host/db"):
        refused = project.grd("research", "train.ipynb", "--mlflow", typed)
        assert refused.code == 2
        assert len(refused.err.strip().splitlines()) == 1
        assert "secret" not in refused.err
    swallowed = project.grd("research", "--mlflow", "train.ipynb")
    assert swallowed.code == 2
    assert "--mlflow=on" in swallowed.err
    assert project.run_folders() == []


@without_mlflow
def test_without_mlflow_the_flag_is_an_error_and_the_setting_a_warning(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    refused = project.grd("research", "train.ipynb", "--mlflow")
    assert refused.code == 69
    assert "grd-notebooks[mlflow]" in refused.err
    assert project.run_folders() == []
    (project.path / "grd.toml").write_text("mlflow = true\n")
    done = project.grd("research", "train.ipynb", "--json")
    assert done.code == 0, done.err
    assert done.json["mlflow"] is None
    assert any("MLflow is not installed" in warning for warning in done.json["warnings"])
    exported = project.grd("mlflow", "export", "last")
    assert exported.code == 69


def test_every_sample_of_a_run_has_the_machines_numbers(project: Project) -> None:
    project.notebook("short.ipynb", "print(1)")
    assert project.grd("research", "short.ipynb").code == 0
    lines = (project.only_run() / "attempts/1/resources.jsonl").read_text().splitlines()
    assert len(lines) >= 2
    assert all(json.loads(line)["host"]["memory_used_bytes"] > 0 for line in lines)
