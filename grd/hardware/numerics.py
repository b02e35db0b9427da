"""What changes the numbers a program computes: an allow-list of variables, and torch's switches.

Never the whole environment: it holds secrets.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from grd.hardware.facts import Facts, one_line

VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES",
    "CUDNN_DETERMINISTIC", "HIP_VISIBLE_DEVICES", "MKL_CBWR", "MKL_DYNAMIC", "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS", "NVIDIA_TF32_OVERRIDE", "OMP_DYNAMIC", "OMP_NUM_THREADS", "OPENBLAS_CORETYPE",
    "OPENBLAS_NUM_THREADS", "PYTHONHASHSEED", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "ROCR_VISIBLE_DEVICES", "TF_CUDNN_DETERMINISTIC", "TF_DETERMINISTIC_OPS", "TF_ENABLE_ONEDNN_OPTS",
    "TF_FORCE_GPU_ALLOW_GROWTH", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "VECLIB_MAXIMUM_THREADS", "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)  # fmt: skip
NCCL = ("NCCL_ALGO", "NCCL_PROTO", "NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_SOCKET_IFNAME")
"""By name, not by prefix: NCCL_* may hold what a site's administrators keep to themselves."""

LONGEST_VALUE = 200


def numerics_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The allow-listed variables that are set, each on one line of at most 200 characters; "" stays "".

    A CUDA_VISIBLE_DEVICES of "" hides every GPU, so that set and empty is not the same as unset.
    """
    names = sorted({*VARIABLES, *NCCL} & set(environment))
    return {name: one_line(environment[name], LONGEST_VALUE) for name in names}


def torch_switches(modules: Mapping[str, Any] = sys.modules) -> Facts:
    """torch_deterministic, torch_cudnn_benchmark, torch_matmul_precision, torch_threads.

    None where torch is not imported in this process: nothing is imported to ask.
    """
    facts = Facts()
    torch: Any = modules.get("torch")
    asked = {
        "torch_deterministic": lambda: bool(torch.are_deterministic_algorithms_enabled()),
        "torch_cudnn_benchmark": lambda: bool(torch.backends.cudnn.benchmark),
        "torch_matmul_precision": lambda: str(torch.get_float32_matmul_precision()),
        "torch_threads": lambda: int(torch.get_num_threads()),
    }
    for name, question in asked.items():
        if torch is None:
            facts.put(name, None, "torch is not imported in this process")
        else:
            facts.ask(name, question, "torch does not tell")
    return facts
