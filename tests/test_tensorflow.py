"""What TensorFlow tells of the hardware, asked of the real package; ``make test-tensorflow`` installs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import grd

pytestmark = [
    pytest.mark.tensorflow,
    pytest.mark.skipif(find_spec("tensorflow") is None, reason="TensorFlow is not installed"),
]

IMPORTED = "'tensorflow' in __import__('sys').modules"


def of_a_fresh_process(program: str, *values: str) -> list[Any]:
    """JSON values of expressions, after ``program`` has run in a Python that has imported nothing yet."""
    environment = {
        **os.environ, "PYTHONPATH": str(Path(grd.__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""
    }  # fmt: skip
    print_them = f"import json\nprint('VALUES', json.dumps([{', '.join(values)}]))"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{print_them}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.split("VALUES", 1)[1])
    assert isinstance(found, list)
    return found


@pytest.fixture(scope="module")
def version() -> str:
    """Of the installed package, whichever of its two names it has, without importing it."""
    for name in ("tensorflow", "tensorflow-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise AssertionError("TensorFlow has neither of its names")


def test_asking_imports_it_and_tells_exactly_the_keys_of_the_plan(version: str) -> None:
    before, info, after = of_a_fresh_process(
        f"from grd.hardware import get_tensorflow_hardware_info\nbefore = {IMPORTED}\n"
        "info = get_tensorflow_hardware_info()",
        "before", "info", IMPORTED,
    )  # fmt: skip
    assert (before, after) == (False, True)
    assert info == {"tensorflow_version": version, "gpu_available": False, "devices": []}


def test_its_own_calls_are_those_that_are_asked_and_memory_goes_by_the_logical_name() -> None:
    """The CPU stands in for the GPU that is not here: what it is asked is TensorFlow's own interface."""
    names, told, physical, logical = of_a_fresh_process(
        "import tensorflow as tf\n"
        "from grd.hardware import frameworks\n"
        "def says(name):\n"
        "    try:\n        tf.config.experimental.get_memory_info(name)\n"
        "    except (ValueError, RuntimeError) as error:\n        return str(error)\n"
        "    return ''\n"
        "(device,) = tf.config.list_physical_devices('CPU')\n"
        "told = frameworks._tensorflow_device(tf, 0, device)",
        "[device.name, device.device_type]", "told", "says('/physical_device:GPU:0')", "says('GPU:0')",
    )  # fmt: skip
    assert names == ["/physical_device:CPU:0", "CPU"]
    assert told == {
        "id": 0, "name": "unknown", "compute_capability": None,
        "current_memory_mb": None, "peak_memory_mb": None,
    }  # fmt: skip
    assert "/physical_device:GPU:0" in physical and "pars" in physical.lower(), "it cannot be parsed"
    assert "pars" not in logical.lower(), "this one can: there is only no such device"


def test_neither_grd_nor_a_profile_imports_it_and_the_profile_has_its_version(version: str) -> None:
    at_import, profile, after = of_a_fresh_process(
        "import grd, grd.experiment, grd.tracking\nfrom grd.hardware import capture_hardware_profile\n"
        f"at_import = {IMPORTED}\nprofile = capture_hardware_profile()",
        "at_import", "profile['frameworks']", IMPORTED,
    )  # fmt: skip
    assert (at_import, after) == (False, False)
    assert profile["tensorflow"] == version


def test_the_command_line_and_a_notebooks_part_leave_it_alone() -> None:
    (after,) = of_a_fresh_process(
        "from grd.interfaces.cli.main import cli\n"
        "cli.main(['hardware', 'show', '--json'], standalone_mode=False)\n"
        "from grd.experiment import training\n"
        "for epoch in training.epochs(2):\n    epoch.log(loss=1.0)",
        IMPORTED,
    )
    assert after is False
