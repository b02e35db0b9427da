"""A machine with GPUs for tests: recorded NVML answers for this process, or for programs that are started."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from nvml_replay import A100_SPLIT, V100, Device, Machine, memory

TESTS = Path(__file__).parent
ROOT = TESTS.parent

SITE = """
import os, sys
import nvml_replay, gpu_machine
sys.modules["pynvml"] = gpu_machine.machine(*os.environ["TEST_GPUS"].split(",")).module()
import grd.hardware.leases
grd.hardware.leases.DEVICE_FILES = (__file__,)
"""


def uuid(number: int) -> str:
    """Of the card with this number."""
    return f"GPU-{number:08d}-0000-0000-0000-000000000000"


def card(number: int, used_mib: int = 5) -> Device:
    """A card of its own."""
    return V100.but(
        GetUUID=uuid(number), GetMemoryInfo=memory(32768, used_mib), GetComputeRunningProcesses=[]
    )


def machine(*used: str) -> Machine:
    """Cards by the memory in use, in MiB; "split" is one that is split into two instances."""
    devices: list[Any] = [
        A100_SPLIT if each == "split" else card(number, int(each)) for number, each in enumerate(used)
    ]
    return Machine(devices)


def replay(monkeypatch: pytest.MonkeyPatch, *used: str) -> Machine:
    """This process is on such a machine."""
    made = machine(*used)
    monkeypatch.setitem(sys.modules, "pynvml", made.module())
    monkeypatch.setattr("grd.hardware.leases.DEVICE_FILES", (__file__,))
    return made


def environment(folder: Path, *used: str) -> dict[str, str]:
    """Variables with which programs that are started find themselves on such a machine."""
    site = folder / "site"
    site.mkdir(parents=True, exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE)
    path = os.pathsep.join([str(site), str(TESTS), str(ROOT)])
    return {"PYTHONPATH": path, "TEST_GPUS": ",".join(used)}
