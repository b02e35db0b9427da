"""Deep-learning frameworks: which are installed, and what each of them sees.

Nothing here imports a framework that was not asked for. Keys are those of the source plan's framework
functions (REQUIREMENTS G9.02, G9.03, G9.05 to G9.07).
"""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grd.hardware.facts import Facts, describe

GIBIBYTE = 1024**3
MEBIBYTE = 1024**2

DISTRIBUTIONS = {
    "torch": ("torch",),
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
    "jax": ("jax",),
    "numpy": ("numpy",),
    "papermill": ("papermill",),
    "ipykernel": ("ipykernel",),
}
CUDA_LIBRARIES = {
    "cudnn": ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-cu11"),
    "nccl": ("nvidia-nccl-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu11"),
}
"""Distributions that torch's CUDA builds bring their libraries in."""


@dataclass(frozen=True, kw_only=True)
class TorchBuild:
    """What an installed torch was built for; ``cuda`` and ``hip`` are toolkit versions or None."""

    version: str | None
    cuda: str | None
    hip: str | None

    @property
    def sees_gpus(self) -> bool:
        """Whether this build can use a GPU through ``torch.cuda`` at all."""
        return bool(self.cuda or self.hip)


def parse_torch_version(source: str) -> TorchBuild:
    """The build facts in the text of ``torch/version.py``. Raises SyntaxError for text that is no Python."""
    values: dict[str, Any] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(node.value, ast.Constant):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name):
                values[target.id] = node.value.value
    return TorchBuild(
        version=values.get("__version__"), cuda=values.get("cuda") or None, hip=values.get("hip") or None
    )


def installed_torch() -> TorchBuild | None:
    """What the installed torch was built for, read without importing it (that takes 2 s); None if absent.

    Raises OSError or SyntaxError where there is a torch whose ``version.py`` cannot be read.
    """
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return parse_torch_version((Path(spec.origin).parent / "version.py").read_text("utf-8"))


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def framework_versions() -> Facts:
    """Versions of the frameworks in this environment, from their metadata; None for those not installed."""
    facts = Facts()
    for name, distributions in DISTRIBUTIONS.items():
        facts.ask(name, lambda names=distributions: _version(names), "not installed")  # type: ignore[misc]
    return facts


def gpu_software(driver: str | None, driver_cuda: str | None) -> Facts:
    """driver, driver_cuda (the newest CUDA it supports), torch_cuda, torch_hip, cudnn, nccl. Never raises.

    What torch was built for is read from its files: nothing is imported.
    """
    facts = Facts()
    facts.put("driver", driver, "no GPU's driver answers")
    facts.put("driver_cuda", driver_cuda, "no NVIDIA driver answers")
    try:
        build, unknown = installed_torch(), "torch is not installed"
    except (OSError, SyntaxError, ValueError, ImportError) as error:
        build, unknown = None, describe(error)
    if build is not None:
        unknown = f"torch {build.version} is built without it"
    facts.put("torch_cuda", build.cuda if build else None, unknown)
    facts.put("torch_hip", build.hip if build else None, unknown)
    for name, distributions in CUDA_LIBRARIES.items():
        facts.ask(name, lambda names=distributions: _version(names), "no package of it is installed")  # type: ignore[misc]
    return facts


def get_pytorch_hardware_info() -> dict[str, Any]:
    """What torch sees, as torch says it; imports torch.

    Keys: pytorch_version, cuda_available, cuda_version, cudnn_version, device_count, devices; each device has
    id, name, compute_capability ("9.0"), total_memory_gb (GiB), multi_processor_count. Without torch: the
    same keys, nothing available. A ROCm build adds hip_version (experimental: seen on no AMD device yet).
    """
    info: dict[str, Any] = {
        "pytorch_version": None,
        "cuda_available": False,
        "cuda_version": None,
        "cudnn_version": None,
        "device_count": 0,
        "devices": [],
    }
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError):  # OSError: a shared library of the installation is missing
        return info
    info["pytorch_version"] = str(torch.__version__)
    info["cuda_version"] = torch.version.cuda
    if getattr(torch.version, "hip", None):
        info["hip_version"] = torch.version.hip
    info["cuda_available"] = bool(torch.cuda.is_available())
    if not info["cuda_available"]:
        return info
    info["cudnn_version"] = torch.backends.cudnn.version()
    info["device_count"] = torch.cuda.device_count()
    for index in range(info["device_count"]):
        properties = torch.cuda.get_device_properties(index)
        info["devices"].append(
            {
                "id": index,
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "total_memory_gb": properties.total_memory / GIBIBYTE,
                "multi_processor_count": properties.multi_processor_count,
            }
        )
    return info


def _tensorflow_device(tensorflow: Any, index: int, device: Any) -> dict[str, Any]:
    details = tensorflow.config.experimental.get_device_details(device)
    capability = details.get("compute_capability")
    current, peak = None, None
    try:
        # It wants the logical name; `device.name` is the physical one ("/physical_device:GPU:0").
        memory = tensorflow.config.experimental.get_memory_info(f"GPU:{index}")
        current, peak = memory["current"] / MEBIBYTE, memory["peak"] / MEBIBYTE
    except (ValueError, KeyError, RuntimeError):
        pass  # not told for this kind of device: unknown, not 0
    return {
        "id": index,
        "name": details.get("device_name", "unknown"),
        "compute_capability": ".".join(str(part) for part in capability) if capability else None,
        "current_memory_mb": current,
        "peak_memory_mb": peak,
    }


def get_tensorflow_hardware_info() -> dict[str, Any]:
    """What TensorFlow sees; imports it where it is installed.

    Keys: tensorflow_version, gpu_available, devices; each device has id, name, compute_capability ("8.0" or
    None), current_memory_mb and peak_memory_mb (MiB of TensorFlow's own allocator, or None). Without
    TensorFlow: the same keys, nothing available.
    """
    info: dict[str, Any] = {"tensorflow_version": None, "gpu_available": False, "devices": []}
    try:
        tensorflow = importlib.import_module("tensorflow")
    except (ImportError, OSError):
        return info
    info["tensorflow_version"] = str(tensorflow.__version__)
    devices = tensorflow.config.list_physical_devices("GPU")
    info["gpu_available"] = bool(devices)
    info["devices"] = [_tensorflow_device(tensorflow, i, device) for i, device in enumerate(devices)]
    return info
