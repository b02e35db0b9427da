"""Comparing machines, measuring them, and a run that is resumed on another one."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Project
from test_research import PARAMETERS, TRAIN

from grd.errors import RunNotFound, UsageError
from grd.hardware import benchmark as measuring
from grd.hardware import capture_hardware_profile, compare_profiles, matmul_program
from grd.hardware.comparison import machine_change
from grd.interfaces.cli.main import main
from grd.steps.profiles import profile_named

GIB = 1024**3


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRD_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(
        "grd.hardware.profile.cpuinfo_answer", lambda root: {"brand_raw": "A CPU", "arch": "X"}
    )


def changed(profile: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a profile with one other value."""
    other: Any = copy.deepcopy(dict(profile))
    place, *names = other, *path.split(".")
    for name in names[:-1]:
        place = place[name]
    place[names[-1]] = value
    return other  # type: ignore[no-any-return]


# --- comparison


def test_one_machine_twice_does_not_differ() -> None:
    first = capture_hardware_profile()
    again = changed(capture_hardware_profile(), "memory.available_gb", 0.1)
    assert [each.field for each in compare_profiles(first, again) if not each.field.startswith("code.")] == []


@pytest.mark.parametrize(
    ("path", "value", "can_change"),
    [
        ("cpu.brand", "Another CPU", "results"),
        ("cpu.cores_usable", 97, "results"),
        ("frameworks.torch", "9.9", "results"),
        ("frameworks.papermill", "9.9", "nothing"),
        ("numerics.environment", {"NVIDIA_TF32_OVERRIDE": "0"}, "results"),
        ("code.commit", "0" * 40, "results"),
        ("memory.limit_gb", 1.5, "cost"),
        ("disk.fs_type", "nfs4", "cost"),
        ("gpus", [{"name": "NVIDIA H200"}], "results"),
        ("hostname", "elsewhere", "nothing"),
        ("cpu.governor", "a governor", "cost"),
    ],
)
def test_a_difference_says_what_it_can_change(path: str, value: Any, can_change: str) -> None:
    profile = capture_hardware_profile()
    found = compare_profiles(profile, changed(profile, path, value))
    assert found
    assert {each.can_change for each in found} >= {can_change}
    assert all(each.field.startswith(path.split(".")[0]) and each.why for each in found)


def test_what_can_change_results_comes_first_and_old_profiles_can_be_compared() -> None:
    profile = capture_hardware_profile()
    other = changed(changed(profile, "hostname", "x"), "cpu.brand", "y")
    assert [each.field for each in compare_profiles(profile, other)] == ["cpu.brand", "hostname"]
    assert compare_profiles({}, {}) == []
    assert compare_profiles({"cpu": {"brand": "x"}}, {})[0].b is None


def test_a_switch_of_torch_that_only_one_side_could_tell_is_no_difference() -> None:
    profile = changed(capture_hardware_profile(), "numerics.torch_threads", None)
    assert compare_profiles(profile, changed(profile, "numerics.torch_threads", 4)) == []
    four, eight = (changed(profile, "numerics.torch_threads", threads) for threads in (4, 8))
    assert [each.field for each in compare_profiles(four, eight)] == ["numerics.torch_threads"]


def test_other_code_or_another_name_is_no_other_machine() -> None:
    profile = capture_hardware_profile()
    assert machine_change(profile, changed(changed(profile, "code.commit", "0"), "hostname", "x")) is None
    change = machine_change(profile, changed(profile, "cpu.brand", "Another CPU"))
    assert change is not None and change.endswith("-> Another CPU")


@pytest.mark.parametrize(
    ("field", "value", "can_change"),
    [("mig_enabled", True, "results"), ("ecc_enabled", False, "results"), ("compute_mode", "x", "cost")],
)
def test_how_a_device_is_set_is_compared_and_told_at_a_resume(
    field: str, value: Any, can_change: str
) -> None:
    before = {"gpus": [{"mig_enabled": False, "ecc_enabled": True, "compute_mode": "default"}]}
    now = {"gpus": [{**before["gpus"][0], field: value}]}
    (found,) = compare_profiles(before, now)
    assert (found.field, found.can_change) == (f"gpus.0.{field}", can_change)
    change = machine_change(before, now)
    assert change is not None and field in change


def test_what_is_no_profile_can_be_compared_all_the_same() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"cpu": deep}
    assert compare_profiles({"gpus": 3, "cpu": deep}, {"gpus": {"0": 1}}) == []


# --- the commands, and a resume


def test_a_resume_on_another_machine_is_warned_of_and_both_profiles_are_kept(project: Project) -> None:
    project.notebook(
        "train.ipynb", TRAIN, "import os\nif not os.path.exists('ok'): 1 / 0", parameters=PARAMETERS
    )
    assert project.grd("research", "train.ipynb").code == 1
    run = project.only_run()
    first = run / "attempts/1/hardware.json"
    profile = json.loads(first.read_text())
    assert profile["disk"]["checkpoints"]["path"] == str(run / "checkpoints")
    # This machine cannot be changed, so what it was at the first attempt is.
    first.write_text(json.dumps(changed(profile, "cpu.brand", "The Other CPU")))
    (project.path / "ok").touch()
    done = project.grd("resume", "last")
    assert done.code == 0
    (warning,) = [event["message"] for event in project.events() if event["kind"] == "warning"]
    assert "The Other CPU" in warning and "attempt 1" in warning
    assert warning in project.record()["warnings"]
    assert "The Other CPU" in done.err
    assert json.loads((run / "hardware.json").read_text())["cpu"]["brand"] != "The Other CPU"
    command = warning.partition("see: grd ")[2].split()
    told = project.grd(*command, "--json").json
    assert told["can_change_results"] is True
    assert told["differences"][0]["a"] == "The Other CPU"


def test_a_resume_on_the_same_machine_warns_of_nothing(project: Project) -> None:
    project.notebook(
        "train.ipynb", TRAIN, "import os\nif not os.path.exists('ok'): 1 / 0", parameters=PARAMETERS
    )
    assert project.grd("research", "train.ipynb").code == 1
    (project.path / "ok").touch()
    assert project.grd("resume", "last").code == 0
    assert [event for event in project.events() if event["kind"] == "warning"] == []
    assert (project.only_run() / "attempts/2/hardware.json").is_file()


def test_profiles_are_named_by_run_file_or_now_and_mistakes_are_one_line(project: Project) -> None:
    shown = project.grd("hardware", "show", "--json")
    (project.path / "here.json").write_text(shown.out)
    (project.path / "other.json").write_text(json.dumps(changed(shown.json, "cpu.brand", "Z80")))
    (project.path / "no.json").write_text("{}")
    assert "no difference" in project.grd("hardware", "diff", "here.json").out
    told = project.grd("hardware", "diff", "other.json", "here.json").out
    assert told.startswith("cpu.brand Z80 -> ") and "can change results" in told
    for name, code in (("no.json", 2), ("nothing-of-this-name", 66), ("last@x", 2)):
        done = project.grd("hardware", "diff", name)
        assert done.code == code and done.err.count("\n") == 1, done.err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"schema": "grd.hardware/1", "gpus": 3}', "no list of devices"),
        ('{"schema": "grd.hardware/1", "gpus": [3]}', "no list of devices"),
        ('{"schema": "grd.hardware/1", "cpu": {"brand": NaN}}', "JSON compliant"),
        ('{"schema": "grd.hardware/1", "memory": {"limit_gb": 1e999}}', "JSON compliant"),
        ('{"schema": "grd.hardware/1", "cpu": {"brand": "\\ud800"}}', "surrogates"),
        ("[" * 200_000, "nested too deeply"),
    ],
    ids=["gpus", "device", "nan", "infinite", "half a character", "deep"],
)
def test_a_file_that_holds_no_profile_is_one_line(project: Project, text: str, says: str) -> None:
    (project.path / "a.json").write_text(text)
    done = project.grd("hardware", "diff", "a.json", "a.json", "--json")
    assert done.code == 2 and done.err.count("\n") == 1 and says in done.err, done.err


def test_names_that_can_be_no_files_are_one_line(project: Project) -> None:
    for name in ("x" * 300, "x" * 300 + "@1", "last@" + "9" * 5000, f"/home/me@host/{'x' * 300}"):
        done = project.grd("hardware", "diff", name)
        assert done.code in (2, 66) and done.err.count("\n") == 1, done.err


def test_a_file_in_a_folder_that_may_not_be_entered_is_said_to_be_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)  # root may enter any folder
    with pytest.raises(UsageError, match="Permission denied"):
        profile_named("/locked/a.json", tmp_path)


def test_a_run_folder_whose_path_holds_an_at_sign_is_found(tmp_path: Path) -> None:
    run = tmp_path / "me@host/experiments/20260101-000000-train-0a0a"
    for folder, brand in ((run, "newest"), (run / "attempts/1", "first")):
        folder.mkdir(parents=True, exist_ok=True)
        told = {"schema": "grd.hardware/1", "cpu": {"brand": brand}}
        (folder / "hardware.json").write_text(json.dumps(told))
    (run / "run.json").write_text("{}")
    found = [profile_named(f"{run}{at}", tmp_path)["cpu"]["brand"] for at in ("", "@1")]
    assert found == ["newest", "first"]
    with pytest.raises(RunNotFound, match="no run"):
        profile_named(str(run.with_name("another")), tmp_path)


@pytest.mark.parametrize("command", [("explore",), ("hardware", "show"), ("status",)])
def test_a_command_in_a_folder_that_was_deleted_is_one_line(
    project: Project, command: tuple[str, ...]
) -> None:
    place = project.path / "gone"
    place.mkdir()
    program = "import os, sys; os.rmdir(os.getcwd()); from grd.interfaces.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *command],
        cwd=place,
        env={**project.environment, "PYTHONPATH": str(Path(measuring.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "was deleted" in done.stderr


# --- measuring


def load_is(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Others use this share of all processors."""
    load = share * (os.cpu_count() or 1)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))


class Clock:
    """Time that passes only where something is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(matmul_program.time, "perf_counter", lambda: self.now)

    def product(self, size: int, *, first: float = 0.0, prepare: float = 0.0) -> Callable[[], None]:
        """A product on a machine of 1 TFLOP/s, whose first one takes ``first`` seconds more."""
        self.now += prepare * size**2
        more = [first]

        def once() -> None:
            self.now += 2 * size**3 / 1e12 + (more.pop() if more else 0.0)

        return once


def quick(monkeypatch: pytest.MonkeyPatch, asked: list[str]) -> None:
    load_is(monkeypatch, 0.1)

    def compute() -> dict[str, Any]:
        asked.append("compute")
        told = {"device": None, "library": "numpy", "threads": 2}
        return {"matmul": [], "memory_bandwidth_gbs": None, **told}

    def disk(folder: Path) -> dict[str, Any]:
        asked.append("disk")
        return {"path": str(folder), "write_mbs": 1.0, "fsync_ms": 1.0, "bytes": 1}

    monkeypatch.setattr(measuring, "measure_compute", compute)
    monkeypatch.setattr(measuring, "measure_disk", disk)


def test_a_machine_is_measured_once_and_another_one_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    quick(monkeypatch, asked)
    here, other = {"fingerprint": "a"}, {"fingerprint": "b"}
    answers = [measuring.benchmark(tmp_path, profile=profile) for profile in (here, here, other, here)]
    assert [answer["cached"] for answer in answers] == [False, True, False, True]
    assert asked == ["compute", "disk"] * 2
    monkeypatch.setattr(measuring, "_mount_point", lambda folder: "/another")
    monkeypatch.setattr(measuring, "_load", lambda: 0.05)
    later = measuring.benchmark(tmp_path, profile=here)
    assert (later["cached"], asked[4:]) == (False, ["disk"])
    for name in ("measured_at", "seconds", "load"):
        assert later[name] == answers[0][name], "of the products that were measured before"
    assert later["disk"]["measured_at"] >= answers[0]["measured_at"]
    assert measuring.benchmark(tmp_path, profile=here, again=True)["cached"] is False


def test_another_disk_of_the_same_machine_is_measured_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    quick(monkeypatch, asked)
    for mount in ("/", "/scratch", "/scratch"):
        monkeypatch.setattr(measuring, "_mount_point", lambda folder, point=mount: point)
        measuring.benchmark(tmp_path, profile={"fingerprint": "a"})
    assert asked == ["compute", "disk", "disk"]


def test_the_disk_is_really_written_and_nothing_stays(tmp_path: Path) -> None:
    told = measuring.measure_disk(tmp_path, seconds=0.05)
    assert told["bytes"] >= measuring.FIRST_BYTES
    assert told["write_mbs"] > 0 and told["fsync_ms"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_not_filled_to_measure_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = os.statvfs(tmp_path)

    class Full:
        f_bavail, f_frsize = 10, real.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    told = measuring.measure_disk(tmp_path)
    assert told["write_mbs"] is None and "room" in told["reason"]


def test_products_are_really_made_and_rates_are_finite() -> None:
    pytest.importorskip("numpy")
    found = measuring.measure_compute(seconds=0.3)
    assert found.get("reason") is None
    rows = {row["dtype"]: row for row in found["matmul"]}
    assert rows["fp32"]["tflops"] > 0 and rows["fp32"]["repeats"] >= 1
    assert found["memory_bandwidth_gbs"] > 0


def test_a_first_product_that_waits_for_threads_does_not_keep_products_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    found = matmul_program.measure_products(lambda size: clock.product(size, first=0.05), 1.0)
    assert found["size"] >= 2048
    assert found["tflops"] == pytest.approx(1.0)
    assert clock.now <= 101.0


@pytest.mark.parametrize("prepare", [0.0, 1e-8, 1e-7])
def test_measuring_products_ends_in_time_however_long_preparing_takes(
    monkeypatch: pytest.MonkeyPatch, prepare: float
) -> None:
    clock = Clock(monkeypatch)
    matmul_program.measure_products(lambda size: clock.product(size, prepare=prepare), 1.0)
    assert clock.now <= 101.0


def test_measuring_everything_takes_its_seconds_and_no_more(tmp_path: Path) -> None:
    pytest.importorskip("numpy")
    assert measuring.PRODUCT_SECONDS + measuring.DISK_SECONDS <= 5
    found = measuring.measure_compute(seconds=0.6)
    assert 0 < found["seconds"] < 5  # of a machine that may be busy with other tests


def test_figures_of_a_busy_machine_are_told_with_a_warning_and_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    quick(monkeypatch, asked)
    here = {"fingerprint": "a"}
    load_is(monkeypatch, 2.0)
    for _ in range(2):
        busy = measuring.benchmark(tmp_path, profile=here)
        assert busy["cached"] is False and "busy" in busy["warning"]
    assert measuring.last_benchmark("a") is None
    load_is(monkeypatch, 0.1)
    assert measuring.benchmark(tmp_path, profile=here)["warning"] is None
    load_is(monkeypatch, 2.0)
    kept = measuring.benchmark(tmp_path, profile=here)
    assert (kept["cached"], kept["warning"]) == (True, None)
    measuring.benchmark(tmp_path, profile=here, again=True)
    assert measuring.benchmark(tmp_path, profile=here)["load"] == kept["load"]


def test_the_command_warns_of_a_busy_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(monkeypatch, [])
    load_is(monkeypatch, 2.0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["benchmark", "--json"])
    told = capsys.readouterr()
    assert ended.value.code == 0
    assert json.loads(told.out)["warning"] in told.err


@pytest.mark.parametrize(
    "spoil",
    [
        dict.clear,
        lambda entry: entry.pop("disks"),
        lambda entry: entry.update(compute={}),
        lambda entry: entry["disks"].update({"/": 3}),
        lambda entry: entry.update(load=999999.0),
    ],
)
def test_what_is_kept_and_damaged_or_was_measured_under_load_is_measured_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spoil: Callable[[dict[str, Any]], Any]
) -> None:
    asked: list[str] = []
    quick(monkeypatch, asked)
    here = {"fingerprint": "a"}
    measuring.benchmark(tmp_path, profile=here)
    place = tmp_path / "state/benchmarks.json"
    kept = json.loads(place.read_text())
    spoil(kept["machines"]["a"])
    place.write_text(json.dumps(kept))
    assert measuring.benchmark(tmp_path, profile=here)["cached"] is False
    assert asked == ["compute", "disk"] * 2


def test_a_partition_has_no_share_of_the_whole_cards_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(memory: int) -> Any:
        rows = [{"dtype": "bf16", "tflops": 100.0}]
        answer = {"device": "AMD Instinct MI300X", "device_memory_bytes": memory, "matmul": rows}
        monkeypatch.setattr(measuring, "run_limited", lambda *_: json.dumps(answer).encode())
        return measuring.measure_compute()["matmul"][0]["peak_tflops"]

    assert (told(192 * 10**9), told(48 * 10**9)) == (1307.4, None)


def test_a_machine_that_cannot_be_measured_says_why_and_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    quick(monkeypatch, asked)
    reason = {"matmul": [], "memory_bandwidth_gbs": None, "reason": "TimeoutError: no answer"}
    monkeypatch.setattr(measuring, "measure_compute", lambda: reason)
    for _ in range(2):
        answer = measuring.benchmark(tmp_path, profile={"fingerprint": "a"})
        assert (answer["cached"], answer["compute"]["reason"]) == (False, "TimeoutError: no answer")


def test_what_was_measured_stands_in_the_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quick(monkeypatch, [])
    profile = capture_hardware_profile(tmp_path)
    assert profile["measured"] is None and "grd benchmark" in profile["reasons"]["measured"]
    measuring.benchmark(tmp_path, profile=profile)
    measured = capture_hardware_profile(tmp_path)["measured"]
    assert next(iter(measured["disks"].values()))["write_mbs"] == 1.0


def test_measuring_without_torch_uses_numpy_and_without_both_says_so(tmp_path: Path) -> None:
    program = (
        "import sys, json; sys.modules['torch'] = None; exec(sys.argv[1]);"
        "from grd.hardware.matmul_program import measure; print(json.dumps(measure(0.1)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(measuring.__file__).parents[2])}
    answers = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", program, extra],
                env=environment,
                check=True,
                capture_output=True,
                timeout=120,
            ).stdout
        )
        for extra in ("", "sys.modules['numpy'] = None")
    ]
    assert answers[0]["library"].startswith("numpy") and answers[0]["matmul"][0]["tflops"] > 0
    assert "neither" in answers[1]["reason"]
