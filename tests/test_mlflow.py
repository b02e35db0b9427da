"""Runs in a real MLflow: its sqlite store, and a tracking server that is killed, stopped, started again."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Project, wait_until

pytestmark = pytest.mark.mlflow

PARAMETERS = "epochs = 3\nlr = 0.1\nwait_at = -1\ntimeout = None\ncheckpoint_dir = ''\nresume = False"

TRAIN = """
import pathlib, time
from grd.experiment import log_metrics, training
state = {"total": 0.0}
for epoch in training.epochs(epochs, state=state, checkpoint_dir=checkpoint_dir, resume=resume, every=1):
    while int(epoch) == wait_at and not pathlib.Path("go").exists():
        time.sleep(0.05)
    state["total"] += lr * (int(epoch) + 1)
    epoch.log(total=state["total"])
    print("epoch", int(epoch), flush=True)
log_metrics(step=7, final=state["total"])
"""

SYSTEM_FIRST = "system/system_memory_usage_megabytes"


def client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def shipped(run: Path, uri: str | None = None) -> dict[str, Any]:
    """What mlflow.json says of a store, or of the only one."""
    with contextlib.suppress(OSError, ValueError):
        stores = json.loads((run / "mlflow.json").read_text())["stores"]
        return dict(stores[uri] if uri else next(iter(stores.values())))
    return {}


def followers(run: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if "grd.tracking.mlflow.follower" in words and str(run) in words:
                found.append(process)
    return found


def wait_for_end(run: Path) -> None:
    """Nothing stays behind: the process that sends ends soon after the run, whatever the store does."""
    wait_until(lambda: not followers(run), "the end of the sending process")


def wait_for_all(run: Path) -> dict[str, Any]:
    attempt = json.loads((run / "run.json").read_text())["attempt"]
    found = wait_until(lambda: shipped(run).get("whole") == attempt and shipped(run), "everything to arrive")
    wait_for_end(run)
    return dict(found)


def points(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client(uri).get_metric_history(run_id, key)]


def history(run: Path) -> list[tuple[int, float]]:
    """What the run itself says of its metric: epoch and value, in the order in which they were told."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [
        (event["epoch"], event["values"]["total"])
        for event in events
        if event["kind"] == "metrics" and "total" in event["values"]
    ]


@dataclass
class Server:
    """A tracking server with a sqlite store, at one address for its whole life and those after."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1"]
        command += ["--default-artifact-root", str(self.folder / "artifacts")]
        log = open(self.folder / "server.log", "ab")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        log.close()
        wait_until(self.answers, f"the server, see {self.folder}/server.log", 240.0, pause=0.5)

    def answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5) as page:
            return bool(page.status == 200)
        return False

    def signal(self, number: int) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait(60)
            self.process = None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture
def server(place: Path) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server(place, port)
    server.start()
    yield server
    server.signal(signal.SIGCONT)
    server.kill()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sqlite store whose tables are made: that takes longer than all the rest."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    client(uri).search_experiments()
    return uri


def test_a_run_is_there_with_parameters_hardware_metrics_and_its_use_of_the_machine(
    project: Project, store: str
) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    done = project.grd("research", "train.ipynb", "-p", "lr", "0.25", "--mlflow", store, "--json")
    assert done.code == 0, done.err
    run = project.only_run()
    sent = wait_for_all(run)
    assert sent["error"] is None
    assert sent["refused"] == []
    found = client(store).get_run(sent["run_id"])
    assert found.info.status == "FINISHED"
    assert found.info.run_name == run.name
    assert client(store).get_experiment(found.info.experiment_id).name == "train"
    assert found.data.params["lr"] == "0.25"
    profile = json.loads((run / "hardware.json").read_text())
    assert found.data.params["cpu_cores"] == str(profile["cpu"]["cores_usable"])
    assert found.data.params["gpu_name"] == (profile["gpu"] or {"name": "none"})["name"]
    assert found.data.params["cuda_version"]
    assert found.data.tags["grd.state"] == "completed"
    assert found.data.tags["mlflow.source.name"].endswith("train.ipynb")
    assert points(store, sent["run_id"], "total") == history(run)
    assert points(store, sent["run_id"], "final") == [(7, pytest.approx(1.5))]
    # shorter than MLflow's own ten seconds: the first sample is there, and the last
    samples = points(store, sent["run_id"], SYSTEM_FIRST)
    lines = [json.loads(line) for line in (run / "attempts/1/resources.jsonl").read_text().splitlines()]
    assert len(samples) >= 2
    assert samples[0] == (0, pytest.approx(lines[0]["host"]["memory_used_bytes"] / 1e6))
    assert samples[-1][1] == pytest.approx(lines[-1]["host"]["memory_used_bytes"] / 1e6)
    peak = done.json["attempts"][0]["resources"]["peak_memory_bytes"] / 1e6
    assert points(store, sent["run_id"], "system/process/peak_rss_megabytes")[-1][1] == pytest.approx(peak)
    assert float(found.data.tags["grd.peak_memory_megabytes"]) == pytest.approx(peak, abs=0.1)
    shown = project.grd("status", run.name, "--json").json["mlflow"]["stores"]
    assert shown == [
        {
            "uri": store,
            "run_id": sent["run_id"],
            "metrics": sent["metrics"],
            "refused": 0,
            "complete": True,
            "error": None,
        }
    ]
    assert sent["run_id"] in project.grd("status", run.name).out


def test_the_machines_metrics_have_the_names_that_mlflows_own_monitor_gives(
    project: Project, store: str
) -> None:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    theirs = set()
    for monitor in (CPUMonitor(), DiskMonitor(), NetworkMonitor()):
        monitor.collect_metrics()
        theirs |= set(monitor.aggregate_metrics())
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    assert project.grd("research", "train.ipynb", "--mlflow", store).code == 0
    sent = wait_for_all(project.only_run())
    names = set(client(store).get_run(sent["run_id"]).data.metrics)
    of_host = {
        name.removeprefix("system/")
        for name in names
        if name.startswith("system/") and name.count("/") == 1 and "gpu" not in name
    }
    assert of_host == theirs
    for own in ("cpu_seconds", "rss_megabytes", "peak_rss_megabytes", "num_processes", "threads"):
        assert f"system/process/{own}" in names


def test_a_resume_goes_on_in_the_same_run_and_a_changed_parameter_is_a_tag(
    project: Project, store: str
) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    process = project.start("research", "train.ipynb", "-p", "wait_at", "2", f"--mlflow={store}")
    project.wait_for_event("checkpoint", epoch=1)
    run = project.only_run()
    assert project.grd("stop", run.name).code == 0
    assert project.finish(process).code == 75
    sent = wait_for_all(run)
    stopped = client(store).get_run(sent["run_id"])
    assert stopped.info.status == "KILLED"
    assert stopped.data.tags["grd.cause"] == "stopped"
    assert stopped.data.tags["grd.resume_command"].startswith("grd resume")
    (project.path / "go").touch()
    assert project.grd("resume", run.name, "-p", "lr", "0.5").code == 0
    again = wait_for_all(run)
    assert again["run_id"] == sent["run_id"]
    found = client(store).get_run(sent["run_id"])
    assert found.info.status == "FINISHED"
    assert found.data.params["lr"] == "0.1"
    assert found.data.tags["grd.attempt-2.lr"] == "0.5"
    assert found.data.tags["grd.cause"] == ""
    assert Counter(points(store, sent["run_id"], "total")) == Counter(history(run))
    assert [step for step, _ in points(store, sent["run_id"], SYSTEM_FIRST)] == list(range(again["samples"]))


def test_a_runner_that_is_killed_is_told_and_nothing_that_sends_stays(project: Project, store: str) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    process = project.start("research", "train.ipynb", "-p", "wait_at", "1", f"--mlflow={store}")
    project.wait_for_event("metrics", epoch=0)
    run = project.only_run()
    wait_until(lambda: shipped(run).get("run_id"), "the run in MLflow")
    os.kill(project.record()["runner"]["pid"], signal.SIGKILL)
    project.finish(process)
    sent = wait_for_all(run)
    found = client(store).get_run(sent["run_id"])
    assert found.info.status == "KILLED"
    assert found.data.tags["grd.cause"] == "runner_lost"
    assert points(store, sent["run_id"], "total") == history(run)


def test_a_sender_that_is_killed_loses_nothing_and_sends_nothing_twice(project: Project, store: str) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    process = project.start("research", "train.ipynb", "-p", "wait_at", "2", f"--mlflow={store}")
    project.wait_for_event("metrics", epoch=1)
    run = project.only_run()
    wait_until(lambda: shipped(run).get("metrics"), "metrics in MLflow")
    for follower in followers(run):
        follower.kill()
    (project.path / "go").touch()
    assert project.finish(process).code == 0
    assert shipped(run)["whole"] == 0
    told = project.grd("status", run.name)
    assert f"grd mlflow export {run.name}" in told.out
    sent = project.grd("mlflow", "export", "--waiting", "--json")
    assert sent.code == 0, sent.err
    assert [row["run"] for row in sent.json["runs"]] == [run.name]
    run_id = sent.json["runs"][0]["run_id"]
    assert points(store, run_id, "total") == history(run)
    steps = [step for step, _ in points(store, run_id, SYSTEM_FIRST)]
    assert steps == sorted(set(steps))
    assert client(store).get_run(run_id).info.status == "FINISHED"
    assert "nothing waits" in project.grd("mlflow", "export", "--waiting").out


def test_a_run_that_was_never_sent_can_be_exported_and_twice_is_once(project: Project, store: str) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    assert project.grd("research", "train.ipynb").code == 0
    run = project.only_run()
    assert not (run / "mlflow.json").exists()
    ids = []
    for _ in range(2):
        done = project.grd("mlflow", "export", "last", "--uri", store, "--experiment", "mine", "--json")
        assert done.code == 0, done.err
        ids.append(done.json["runs"][0]["run_id"])
    assert ids[0] == ids[1]
    assert points(store, ids[0], "total") == history(run)
    found = client(store).get_run(ids[0])
    assert client(store).get_experiment(found.info.experiment_id).name == "mine"
    (run / "mlflow.json").unlink()  # what is known of the store is lost: the run is found there again
    done = project.grd("mlflow", "export", "last", "--uri", store, "--experiment", "mine", "--json")
    assert done.json["runs"][0]["run_id"] == ids[0]
    assert points(store, ids[0], "total") == history(run)


def test_a_server_that_dies_in_mid_run_costs_the_run_nothing_and_gets_the_rest_later(
    project: Project, server: Server
) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    process = project.start("research", "train.ipynb", "-p", "wait_at", "1", f"--mlflow={server.uri}")
    project.wait_for_event("metrics", epoch=0)
    run = project.only_run()
    wait_until(lambda: shipped(run).get("metrics"), "metrics in MLflow")
    server.kill()
    (project.path / "go").touch()
    done = project.finish(process)
    assert done.code == 0, done.err
    assert project.record()["state"] == "completed"
    wait_for_end(run)
    before = shipped(run)
    assert before["whole"] == 0
    assert before["error"]
    down = project.grd("mlflow", "export", "last")
    assert down.code == 69
    assert f"grd mlflow export {run.name}" in down.out
    server.start()
    later = project.grd("mlflow", "export", "--waiting", "--json")
    assert later.code == 0, later.err
    assert later.json["runs"][0]["run_id"] == before["run_id"]
    assert points(server.uri, before["run_id"], "total") == history(run)
    assert client(server.uri).get_run(before["run_id"]).info.status == "FINISHED"
    assert shipped(run)["whole"] == 1


def test_a_server_that_hangs_holds_up_neither_the_run_nor_its_end(project: Project, server: Server) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    process = project.start("research", "train.ipynb", "-p", "wait_at", "1", f"--mlflow={server.uri}")
    project.wait_for_event("metrics", epoch=0)
    run = project.only_run()
    wait_until(lambda: shipped(run).get("metrics"), "metrics in MLflow")
    server.signal(signal.SIGSTOP)
    (project.path / "go").touch()
    done = project.finish(process)
    assert done.code == 0, done.err
    wait_for_end(run)
    assert shipped(run)["whole"] == 0
    server.signal(signal.SIGCONT)
    later = project.grd("mlflow", "export", "last", "--json")
    assert later.code == 0, later.err
    assert points(server.uri, later.json["runs"][0]["run_id"], "total") == history(run)


def test_a_store_that_was_never_there_is_said_and_the_run_completes(project: Project) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{probe.getsockname()[1]}"
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    assert project.grd("research", "train.ipynb", "--mlflow", nowhere).code == 0
    run = project.only_run()
    wait_for_end(run)
    assert shipped(run, nowhere)["whole"] == 0
    told = project.grd("status", run.name).out
    assert f"grd mlflow export {run.name}" in told


def test_two_runs_side_by_side_have_each_its_own_memory(project: Project, store: str) -> None:
    cell = "b = bytearray(mb * 10**6); b[::4096] = b'x' * len(b[::4096])\nimport time; time.sleep(2)"
    project.notebook("hold.ipynb", cell, parameters="mb = 1")
    started = [
        project.start("research", "hold.ipynb", "-p", "mb", size, "--name", f"mb{size}", f"--mlflow={store}")
        for size in ("400", "50")
    ]
    for process in started:
        assert project.finish(process).code == 0
    peaks = {}
    for run in project.run_folders():
        sent = wait_for_all(run)
        peaks[run.name] = points(store, sent["run_id"], "system/process/peak_rss_megabytes")[-1][1]
        own = json.loads((run / "run.json").read_text())["attempts"][0]["resources"]["peak_memory_bytes"]
        assert math.isclose(peaks[run.name], own / 1e6, rel_tol=1e-6)
    small, big = sorted(peaks.values())
    assert small < 250 < 400 < big


def test_where_mlflows_environment_names_the_store_on_is_enough(project: Project, store: str) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    (project.path / "grd.toml").write_text('mlflow = "on"\nmlflow_experiment = "by settings"\n')
    done = project.grd("research", "train.ipynb", env={"MLFLOW_TRACKING_URI": store})
    assert done.code == 0, done.err
    sent = wait_for_all(project.only_run())
    found = client(store).get_run(sent["run_id"])
    assert client(store).get_experiment(found.info.experiment_id).name == "by settings"
    assert project.record()["mlflow"]["uri"] is None
