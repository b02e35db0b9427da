"""The hardware profile, on this machine and on machines that lack something.

There is no GPU on the machines these tests were written on. NVML answers are therefore a replay: a module
with nvidia-ml-py's functions, errors and return shapes, and figures of the kind the named devices report.
GPUtil is the real one, over an nvidia-smi that prints what the real one prints.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

import grd
from grd.hardware import (
    capture_hardware_profile,
    get_pytorch_hardware_info,
    get_tensorflow_hardware_info,
)
from grd.hardware.cpu import cpu_facts, cpuinfo_answer
from grd.hardware.facts import run_limited
from grd.hardware.frameworks import parse_torch_version
from grd.hardware.gpus import find_gpus
from grd.hardware.limits import Limits
from grd.hardware.visible import visible_devices

GIB = 1024**3
HIDING = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")


@pytest.fixture(autouse=True)
def no_gpu_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in HIDING:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module", autouse=True)
def one_state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRD_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        yield


def nulls(value: Any, path: str = "") -> Iterator[str]:
    """Paths of all None values, in the spelling of ``reasons``."""
    if value is None:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from nulls(item, f"{path}.{key}" if path else str(key))


def assert_truthful(profile: dict[str, Any]) -> None:
    """JSON can hold it, and exactly the null values have a reason, which is one short line."""
    reasons = profile["reasons"]
    json.dumps(profile, allow_nan=False)
    assert set(nulls({**profile, "reasons": {}})) == set(reasons)
    assert all(reason and "\n" not in reason for reason in reasons.values())


# --- replay of NVML


class ReplayedNVMLError(Exception):
    """Stands for pynvml.NVMLError."""


@dataclass
class Card:
    """One device as NVML answers for it; an exception as a value is raised."""

    uuid: Any = "GPU-8f6bc7a1-0000-0000-0000-000000000000"
    name: Any = "NVIDIA H200"
    total: Any = 150754820096
    capability: Any = (9, 0)


@dataclass
class Driver:
    """A machine's NVML: the names and shapes of nvidia-ml-py 12 and 13."""

    cards: list[Any] = field(default_factory=list)
    version: Any = "570.133.20"
    cuda: Any = 12080
    init: Exception | None = None
    instances: dict[str, Card] = field(default_factory=dict)

    def module(self) -> types.ModuleType:
        def told(answer: Any) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        def by_uuid(uuid: str) -> Card:
            if uuid not in self.instances:
                raise ReplayedNVMLError("Not Found")
            return self.instances[uuid]

        nvml = types.ModuleType("pynvml")
        functions: dict[str, Callable[..., Any]] = {
            "nvmlInit": lambda: told(self.init),
            "nvmlShutdown": lambda: None,
            "nvmlSystemGetDriverVersion": lambda: told(self.version),
            "nvmlSystemGetCudaDriverVersion_v2": lambda: told(self.cuda),
            "nvmlDeviceGetCount": lambda: len(self.cards),
            "nvmlDeviceGetHandleByIndex": lambda index: told(self.cards[index]),
            "nvmlDeviceGetHandleByUUID": by_uuid,
            "nvmlDeviceGetUUID": lambda card: told(card.uuid),
            "nvmlDeviceGetName": lambda card: told(card.name),
            "nvmlDeviceGetMemoryInfo": lambda card: types.SimpleNamespace(total=told(card.total)),
            "nvmlDeviceGetCudaComputeCapability": lambda card: told(card.capability),
            "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": lambda card: self.cards[0],
        }
        for name, function in functions.items():
            setattr(nvml, name, function)
        nvml.NVMLError = ReplayedNVMLError  # type: ignore[attr-defined]
        return nvml


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Driver], None]:
    return lambda driver: monkeypatch.setitem(sys.modules, "pynvml", driver.module())


@pytest.fixture
def no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


TWO_CARDS = [
    Card(uuid="GPU-aaaa"),
    Card(uuid="GPU-bbbb", name="NVIDIA T4", total=15 * GIB, capability=(7, 5)),
]


def test_the_replay_speaks_only_words_that_nvidia_ml_py_has() -> None:
    pynvml = pytest.importorskip("pynvml")
    replayed = vars(Driver().module())
    words = [name for name in replayed if name.startswith(("nvml", "NVML"))]
    assert len(words) > 10
    assert [name for name in words if not hasattr(pynvml, name)] == []


# --- the profile on this machine


def test_the_profile_of_this_machine_has_the_seeds_keys_and_a_reason_for_every_null(tmp_path: Path) -> None:
    profile = capture_hardware_profile(tmp_path)
    assert_truthful(profile)
    assert profile["schema"] == "grd.hardware/1"
    assert {"brand", "architecture", "cores_physical", "cores_logical", "frequency_mhz"} <= set(
        profile["cpu"]
    )
    assert profile["memory"]["total_gb"] == pytest.approx(psutil.virtual_memory().total / GIB)
    assert 0 < profile["memory"]["available_gb"] <= profile["memory"]["total_gb"]
    assert profile["disk"]["total_gb"] >= profile["disk"]["free_gb"]
    assert profile["disk"]["path"] == str(tmp_path.resolve())
    assert profile["disk"]["root"]["path"] == "/"
    assert 1 <= profile["cpu"]["cores_usable"] <= profile["cpu"]["cores_logical"]
    assert profile["timestamp"].endswith("+00:00")


def test_the_profile_needs_no_arguments_and_imports_no_framework() -> None:
    program = (
        "import sys; from grd.hardware import capture_hardware_profile; capture_hardware_profile();"
        "print([m for m in ('torch', 'tensorflow', 'papermill', 'GPUtil', 'numpy') if m in sys.modules])"
    )
    assert run_python(program).strip() == "[]"


def test_a_project_folder_that_does_not_exist_yet_is_described_by_its_nearest_folder(tmp_path: Path) -> None:
    assert capture_hardware_profile(tmp_path / "not/yet")["disk"]["path"] == str(tmp_path.resolve())


# --- the matrix: something is missing


def without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "nowhere"))
    return capture_hardware_profile(root=tmp_path)


def without_psutil(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    monkeypatch.setitem(sys.modules, "psutil", None)
    return capture_hardware_profile()


def with_psutil_that_always_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("unsupported\nplatform")

    for name in ("cpu_count", "cpu_freq", "virtual_memory", "swap_memory"):
        monkeypatch.setattr(psutil, name, fail)
    return capture_hardware_profile()


def with_unreadable_cgroups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    for name in ("mountinfo", "cgroup"):
        (tmp_path / "proc/self" / name).mkdir(parents=True)
    return capture_hardware_profile(root=tmp_path)


def without_nvml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return capture_hardware_profile()


def without_torch_and_cpuinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    for module in ("grd.hardware.frameworks", "grd.hardware.cpu"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    return capture_hardware_profile(allow_torch_import=True)


def with_an_unusable_state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRD_STATE_DIR", str(tmp_path / "file/state"))
    return capture_hardware_profile()


def with_a_disk_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    def fail(path: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "statvfs", fail)
    return capture_hardware_profile()


MATRIX = {
    without_proc: ["boot_id", "disk.mount", "memory.total_gb"],
    without_psutil: ["cpu.cores_logical", "memory.total_gb", "memory.available_gb", "memory.swap_total_gb"],
    with_psutil_that_always_fails: ["cpu.cores_physical", "cpu.frequency_mhz", "memory.total_gb"],
    with_unreadable_cgroups: ["memory.limit_gb", "disk.mount"],
    without_nvml: [],
    without_torch_and_cpuinfo: [],
    with_an_unusable_state_folder: [],
    with_a_disk_that_cannot_be_asked: ["disk.total_gb", "disk.root.free_gb"],
}


@pytest.mark.parametrize("lacking", MATRIX, ids=lambda function: function.__name__)
def test_a_machine_that_lacks_something_gets_null_with_a_reason_and_no_exception(
    lacking: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    profile = lacking(monkeypatch, tmp_path)
    assert_truthful(profile)
    assert [path for path in MATRIX[lacking] if path not in profile["reasons"]] == []


@pytest.mark.parametrize("answer", [None, types.SimpleNamespace(current=0.0, min=0.0, max=0.0)])
def test_a_frequency_of_none_or_zero_is_unknown(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    monkeypatch.setattr(psutil, "cpu_freq", lambda: answer)
    profile = capture_hardware_profile()
    assert profile["cpu"]["frequency_mhz"] is None
    assert profile["reasons"]["cpu.frequency_mhz"]
    assert_truthful(profile)


def test_no_swap_is_zero_and_not_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "swap_memory", lambda: types.SimpleNamespace(total=0))
    profile = capture_hardware_profile()
    assert profile["memory"]["swap_total_gb"] == 0.0
    assert "memory.swap_total_gb" not in profile["reasons"]


def test_an_address_space_limit_is_the_memory_limit_of_the_profile() -> None:
    program = (
        "import json, resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 29, 3 << 29));"
        "from grd.hardware import capture_hardware_profile;"
        "print(json.dumps(capture_hardware_profile()['memory']))"
    )
    memory = json.loads(run_python(program))
    if memory["limit_gb"] is not None and memory["limit_source"] != "RLIMIT_AS":
        pytest.skip("this machine has a tighter limit already")
    assert memory["limit_gb"] == 1.5
    assert memory["available_gb"] <= 1.5 <= memory["total_gb"]


# --- the processor's name


def test_cpuinfo_is_asked_once_a_boot_and_its_answer_outlives_the_process(tmp_path: Path) -> None:
    cache, asked = tmp_path / "state/cpuinfo.json", []

    def ask() -> dict[str, Any]:
        asked.append(1)
        return {"brand_raw": "AMD EPYC", "arch": "X86_64"}

    for _ in range(3):
        assert cpuinfo_answer(cache=cache, ask=ask)["brand_raw"] == "AMD EPYC"
    assert len(asked) == 1
    # In a folder where no lock can be taken (a read-only one) the answer is still there to be read.
    cache.with_suffix(".lock").unlink()
    cache.with_suffix(".lock").mkdir()
    program = (
        "import sys; from pathlib import Path; from grd.hardware.cpu import cpuinfo_answer;"
        "print(cpuinfo_answer(cache=Path(sys.argv[1]), ask=lambda: {'brand_raw': 'asked'})['brand_raw'])"
    )
    assert run_python(program, str(cache)).strip() == "AMD EPYC"


def test_another_boot_is_asked_anew(tmp_path: Path) -> None:
    cache, answers = tmp_path / "cpuinfo.json", iter(["old", "new"])
    for boot, expected in (("boot-1", "old"), ("boot-2", "new"), ("boot-1", "old")):
        root = tmp_path / boot
        (root / "proc/sys/kernel/random").mkdir(parents=True, exist_ok=True)
        (root / "proc/sys/kernel/random/boot_id").write_text(f"{boot}\n")
        answer = cpuinfo_answer(
            root=root, cache=cache, ask=lambda: {"brand_raw": next(answers), "arch": None}
        )
        assert answer["brand_raw"] == expected


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"boots": 3}', b'{"boots": {"x": 1}}', b"\xff\xfe"])
def test_a_damaged_cache_is_replaced(tmp_path: Path, content: bytes) -> None:
    cache = tmp_path / "cpuinfo.json"
    cache.write_bytes(content)
    assert cpuinfo_answer(cache=cache, ask=lambda: {"brand_raw": "CPU", "arch": None})["brand_raw"] == "CPU"
    assert json.loads(cache.read_bytes())["schema"] == "grd.cpuinfo/1"


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answer = cpuinfo_answer(cache=tmp_path / "file/cpuinfo.json", ask=lambda: {"brand_raw": "CPU"})
    assert answer["brand_raw"] == "CPU"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("  Intel(R)  Xeon(R)\tCPU \x00 @ 2.20GHz ", "Intel(R) Xeon(R) CPU @ 2.20GHz"),
        ("Name\nwith\u202eline", "Name with line"),
    ],
)
def test_a_brand_is_one_clean_line(raw: str, expected: str) -> None:
    facts = cpu_facts(Limits(), {"brand_raw": raw, "arch": "X86_64"})
    assert facts.values["brand"] == expected
    assert "vendor_id" not in " ".join(facts.values)


def test_without_cpuinfo_the_kernels_model_name_is_taken(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\nmodel name\t: Some CPU\n")
    facts = cpu_facts(Limits(), {"reason": "py-cpuinfo is not installed"}, root=tmp_path)
    assert facts.values["brand"] == "Some CPU"


def test_a_processor_without_a_name_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("platform.processor", lambda: "")
    facts = cpu_facts(Limits(), {"reason": "py-cpuinfo: no answer"}, root=tmp_path)
    assert facts.values["brand"] is None
    assert facts.reasons["brand"] == "py-cpuinfo: no answer"


def test_a_probe_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(TimeoutError, match="no answer within"):
        run_limited(["sh", "-c", f"sleep 600 & echo $! > '{pid_file}'; wait"], 3)
    try:
        child = psutil.Process(int(pid_file.read_text()))
        while child.status() != psutil.STATUS_ZOMBIE:  # where nobody reaps orphans it stays one
            time.sleep(0.05)
    except psutil.NoSuchProcess:
        pass


# --- GPUs through NVML


def test_all_gpus_are_listed_and_the_first_one_stands_for_them(install: Any) -> None:
    install(Driver(TWO_CARDS))
    profile = capture_hardware_profile()
    assert_truthful(profile)
    expected = {
        "index": 0,
        "uuid": "GPU-aaaa",
        "name": "NVIDIA H200",
        "total_memory_gb": pytest.approx(140.4, abs=0.1),
        "compute_capability": "9.0",
        "driver_version": "570.133.20",
        "device_count": 2,
    }
    assert {name: profile["gpu"][name] for name in expected} == expected
    assert [gpu["name"] for gpu in profile["gpus"]] == ["NVIDIA H200", "NVIDIA T4"]
    assert profile["gpu_source"] == "nvml"


def test_the_cuda_version_is_the_drivers_where_torch_has_none(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grd.hardware.frameworks.find_spec", lambda name: None)
    install(Driver([Card()]))
    gpu = capture_hardware_profile()["gpu"]
    assert (gpu["cuda_version"], gpu["cuda_version_source"]) == ("12.8", "driver")


def test_names_that_old_bindings_give_as_bytes_become_text(install: Any) -> None:
    install(Driver([Card(uuid=b"GPU-x", name=b"Tesla V100-SXM2-16GB")], version=b"418.40"))
    gpu = capture_hardware_profile()["gpu"]
    assert (gpu["uuid"], gpu["name"], gpu["driver_version"]) == ("GPU-x", "Tesla V100-SXM2-16GB", "418.40")


def test_sensors_that_are_not_supported_or_not_permitted_are_null_with_the_drivers_words(
    install: Any,
) -> None:
    no, denied = ReplayedNVMLError("Not Supported"), ReplayedNVMLError("Insufficient Permissions")
    install(Driver([Card(total=no, uuid=denied)], version=denied, cuda=no))
    profile = capture_hardware_profile()
    assert_truthful(profile)
    assert profile["gpu"]["total_memory_gb"] is None
    assert "Not Supported" in profile["reasons"]["gpu.total_memory_gb"]
    assert "Insufficient Permissions" in profile["reasons"]["gpus.0.uuid"]
    assert profile["gpu"]["driver_version"] is None


def test_a_lost_gpu_is_still_listed_with_nothing_known_about_it(install: Any) -> None:
    install(Driver([Card(), ReplayedNVMLError("GPU is lost")]))
    profile = capture_hardware_profile()
    assert_truthful(profile)
    assert profile["gpu"]["device_count"] == 2
    assert profile["gpus"][1]["name"] is None
    assert "GPU is lost" in profile["reasons"]["gpus.1.name"]


def test_a_driver_without_devices_is_no_gpu_with_a_reason(install: Any) -> None:
    install(Driver([]))
    profile = capture_hardware_profile()
    assert profile["gpu"] is None and profile["gpus"] == []
    assert "lists no device" in profile["reasons"]["gpu"]


@pytest.mark.parametrize(
    "error", [ReplayedNVMLError("Driver Not Loaded"), OSError("libnvidia-ml.so"), AttributeError()]
)
def test_a_broken_driver_is_no_gpu_with_its_own_words(install: Any, error: Exception) -> None:
    install(Driver(init=error))
    profile = capture_hardware_profile()
    assert_truthful(profile)
    assert profile["gpu"] is None
    assert type(error).__name__ in profile["reasons"]["gpu"]


def test_a_gpu_that_the_installed_torch_cannot_use_is_pointed_out(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = parse_torch_version("__version__ = '2.6.0+cpu'\ncuda: Optional[str] = None\n")
    monkeypatch.setattr("grd.hardware.gpus.installed_torch", lambda: build)
    install(Driver([Card()]))
    profile = capture_hardware_profile()
    assert profile["gpu"]["name"] == "NVIDIA H200"
    assert any("2.6.0+cpu" in note for note in profile["notes"])


# --- CUDA_VISIBLE_DEVICES


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1", [1]),
        ("2,0", [2, 0]),
        (" 1 , 2 ", [1, 2]),
        ("0,-1,1", [0]),
        ("0,7,1", [0]),
        ("1,1", []),
        ("GPU-bb", [1]),
        ("GPU-b,GPU-aa", [1, 0]),
        ("GPU-", []),
        ("GPU-zz", []),
        ("MIG-1234", ["MIG-1234"]),
        ("9" * 5000, []),
        ("0," + "9" * 5000 + ",1", [0]),
        ("0" * 5000 + "1", [1]),
        ("\u0662", []),
    ],
)
def test_cuda_visible_devices_selects_as_cuda_does(setting: str | None, expected: list[int | str]) -> None:
    assert visible_devices(setting, ["GPU-aaaa", "GPU-bbbb", None]) == expected


def test_hidden_gpus_are_not_counted_and_the_reason_names_the_variable(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(Driver(TWO_CARDS))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bbbb")
    profile = capture_hardware_profile()
    assert (profile["gpu"]["name"], profile["gpu"]["device_count"]) == ("NVIDIA T4", 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    profile = capture_hardware_profile()
    assert profile["gpu"] is None
    assert (
        profile["reasons"]["gpu"]
        == "nvml: CUDA_VISIBLE_DEVICES='-1' selects none of the 2 GPU(s) of this machine"
    )


def test_positions_among_mixed_models_are_said_to_be_doubtful(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(Driver(TWO_CARDS))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert any("CUDA_DEVICE_ORDER" in note for note in capture_hardware_profile()["notes"])
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert not any("CUDA_DEVICE_ORDER" in note for note in capture_hardware_profile()["notes"])


def test_a_mig_instance_is_shown_with_its_own_memory_and_its_cards_capability(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = Card(
        uuid="MIG-77",
        name="NVIDIA A100 MIG 1g.5gb",
        total=5 * GIB,
        capability=ReplayedNVMLError("Not Supported"),
    )
    install(Driver([Card(name="NVIDIA A100", capability=(8, 0))], instances={"MIG-77": instance}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-77")
    profile = capture_hardware_profile()
    assert_truthful(profile)
    assert (profile["gpu"]["total_memory_gb"], profile["gpu"]["compute_capability"]) == (5.0, "8.0")


# --- GPUtil over an nvidia-smi that prints what the real one prints

SMI_COLUMNS = (
    "{index}, {uuid}, {load}, {total}, {used}, {free}, 550.54.15, {name}, [N/A], Disabled, Disabled, 45"
)


def nvidia_smi(folder: Path, output: str, code: int = 0) -> Mapping[str, str]:
    folder.mkdir(exist_ok=True)
    (folder / "output").write_text(output)
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\ncat '{folder}/output'\nexit {code}\n")
    script.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def smi_line(index: int, **values: Any) -> str:
    shown = {"load": 3, "total": 81920, "used": 512, "free": 81408, "name": "NVIDIA A100-SXM4-80GB"} | values
    return SMI_COLUMNS.format(index=index, uuid=f"GPU-{index}", **shown) + "\n"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_nvml: None) -> Callable[..., Any]:
    def look(output: str, code: int = 0) -> Any:
        monkeypatch.setenv("PATH", nvidia_smi(tmp_path / "bin", output, code)["PATH"])
        return find_gpus()

    return look


def test_a_busy_gpu_still_counts(smi: Any) -> None:
    gpus = smi(smi_line(0, load=97, used=80000, free=1920))
    assert gpus.source == "gputil"
    values = gpus.devices[0].values
    assert (values["name"], values["total_memory_gb"], values["driver_version"]) == (
        "NVIDIA A100-SXM4-80GB",
        80.0,
        "550.54.15",
    )
    assert values["compute_capability"] is None and gpus.devices[0].reasons["compute_capability"]


def test_gputil_honours_cuda_visible_devices(smi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    gpus = smi(smi_line(0) + smi_line(1, name="NVIDIA T4"))
    assert [facts.values["name"] for facts in gpus.devices] == ["NVIDIA T4"]


def test_memory_that_nvidia_smi_does_not_tell_is_null(smi: Any) -> None:
    facts = smi(smi_line(0, total="[N/A]")).devices[0]
    assert facts.values["total_memory_gb"] is None and facts.reasons["total_memory_gb"]


@pytest.mark.parametrize(
    "output", ["NVIDIA-SMI has failed because it couldn't communicate with the driver.\n", ""]
)
def test_an_nvidia_smi_that_fails_is_no_gpu_and_no_exception(smi: Any, output: str) -> None:
    gpus = smi(output, 9)
    assert gpus.devices == () and "gputil: " in gpus.reason


# --- torch, through a package that stands in for a CUDA build


def run_python(program: str, *arguments: str, path: Path | None = None) -> str:
    checkout = str(Path(grd.__file__).parents[1])
    search = [str(path)] if path else []
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*search, checkout])},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout


TORCH = """
from types import SimpleNamespace
from torch import version
__version__ = version.__version__
class cuda:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)
    get_device_properties = staticmethod(lambda index: SimpleNamespace(
        name=f"NVIDIA L4 number {index}", major=8, minor=9, total_memory=23 << 30, multi_processor_count=58,
        uuid=f"0000-{index}"))
class backends:
    class cudnn:
        version = staticmethod(lambda: 90100)
"""


@pytest.fixture
def cuda_torch(tmp_path: Path) -> Path:
    package = tmp_path / "site/torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(TORCH)
    (package / "version.py").write_text("__version__ = '2.6.0+cu124'\ncuda = '12.4'\nhip = None\n")
    return tmp_path / "site"


LOOK = """
import json, sys
sys.modules["pynvml"] = None
from grd.hardware import find_gpus
gpus = find_gpus(allow_torch_import=sys.argv[1] == "yes", environment={"PATH": ""})
print(json.dumps([gpus.source, gpus.reason, "torch" in sys.modules, [f.values for f in gpus.devices]]))
"""


def test_torch_is_asked_where_it_may_be_imported(cuda_torch: Path) -> None:
    source, _, imported, devices = json.loads(run_python(LOOK, "yes", path=cuda_torch))
    assert (source, imported) == ("torch", True)
    assert [device["name"] for device in devices] == ["NVIDIA L4 number 0", "NVIDIA L4 number 1"]
    assert devices[0]["cuda_version"] == "12.4" and devices[0]["cuda_version_source"] == "torch"
    assert devices[1]["uuid"] == "GPU-0000-1" and devices[0]["driver_version"] is None


def test_torch_is_not_imported_where_nobody_allowed_it(cuda_torch: Path) -> None:
    source, reason, imported, devices = json.loads(run_python(LOOK, "no", path=cuda_torch))
    assert (source, imported, devices) == (None, False, [])
    assert "torch: not asked" in reason


def test_a_torch_built_for_cpus_is_never_imported_for_its_gpus(cuda_torch: Path) -> None:
    (cuda_torch / "torch/version.py").write_text(
        "from typing import Optional\n__version__ = '2.6.0+cpu'\ncuda: Optional[str] = None\n"
    )
    _, reason, imported, _ = json.loads(run_python(LOOK, "yes", path=cuda_torch))
    assert not imported
    assert "2.6.0+cpu is a build without GPU support" in reason


def test_a_rocm_build_of_torch_is_known_by_its_version_file() -> None:
    build = parse_torch_version("__version__ = '2.6.0+rocm6.2'\ncuda = None\nhip: Optional[str] = '6.2.4'\n")
    assert build.sees_gpus and build.cuda is None


# --- frameworks

TORCH_KEYS = {"pytorch_version", "cuda_available", "cuda_version", "cudnn_version", "device_count", "devices"}


def test_torch_tells_its_devices_under_the_keys_of_the_plan(cuda_torch: Path) -> None:
    program = "import json; from grd.hardware import *; print(json.dumps(get_pytorch_hardware_info()))"
    info = json.loads(run_python(program, path=cuda_torch))
    assert set(info) == TORCH_KEYS
    assert (info["cuda_available"], info["cuda_version"], info["cudnn_version"]) == (True, "12.4", 90100)
    assert info["devices"][1] == {
        "id": 1,
        "name": "NVIDIA L4 number 1",
        "compute_capability": "8.9",
        "total_memory_gb": 23.0,
        "multi_processor_count": 58,
    }


def test_the_torch_installed_here_tells_the_same_keys() -> None:
    torch = pytest.importorskip("torch")
    info = get_pytorch_hardware_info()
    assert set(info) - {"hip_version"} == TORCH_KEYS
    assert info["pytorch_version"] == torch.__version__
    assert len(info["devices"]) == info["device_count"]


@pytest.mark.parametrize(
    ("module", "ask", "version", "available"),
    [
        ("torch", get_pytorch_hardware_info, "pytorch_version", "cuda_available"),
        ("tensorflow", get_tensorflow_hardware_info, "tensorflow_version", "gpu_available"),
    ],
)
def test_a_framework_that_is_missing_has_nothing_available(
    monkeypatch: pytest.MonkeyPatch, module: str, ask: Any, version: str, available: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    info = ask()
    assert (info[version], info[available], info["devices"]) == (None, False, [])


def test_tensorflow_is_asked_for_memory_by_its_logical_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with TensorFlow's calls and two GPUs; test_tensorflow asks the real one, which sees none."""

    def memory_info(name: str) -> dict[str, int]:
        if name != "GPU:0":
            raise ValueError(f"Failed parsing device name: {name!r}")
        return {"current": 2 << 20, "peak": 8 << 20}

    gpus = [types.SimpleNamespace(name=f"/physical_device:GPU:{i}", device_type="GPU") for i in range(2)]
    details = {gpus[0].name: {"device_name": "NVIDIA A100", "compute_capability": (8, 0)}, gpus[1].name: {}}
    experimental = types.SimpleNamespace(
        get_device_details=lambda gpu: details[gpu.name], get_memory_info=memory_info
    )
    tensorflow = types.ModuleType("tensorflow")
    tensorflow.__version__ = "2.19.0"  # type: ignore[attr-defined]
    tensorflow.config = types.SimpleNamespace(  # type: ignore[attr-defined]
        list_physical_devices=lambda kind: gpus, experimental=experimental
    )
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    info = get_tensorflow_hardware_info()
    assert info == {
        "tensorflow_version": "2.19.0",
        "gpu_available": True,
        "devices": [
            {
                "id": 0,
                "name": "NVIDIA A100",
                "compute_capability": "8.0",
                "current_memory_mb": 2.0,
                "peak_memory_mb": 8.0,
            },
            {
                "id": 1,
                "name": "unknown",
                "compute_capability": None,
                "current_memory_mb": None,
                "peak_memory_mb": None,
            },
        ],
    }
