"""Measure what grd costs, on this machine:

    python -m benchmarks [NAME ...]

Each module of this folder is a benchmark: its ``main()`` prints its table and the ratios in it. Without
names all of them run. What was measured for the documentation stands in RESULTS.md.
"""

from __future__ import annotations

import compileall
import importlib
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import grd
from grd.hardware import capture_hardware_profile

PACKAGES = ("papermill", "nbclient", "jupyter_client", "ipykernel", "tqdm", "torch")


def benchmarks() -> list[str]:
    """The names that can be typed."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def header() -> str:
    """What the figures below depend on: machine, load, versions."""
    cpu = capture_hardware_profile()["cpu"]
    found = [f"grd {grd.__version__}", f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    moment = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    load = os.getloadavg()[0]
    machine = f"{cpu['brand']}, {cpu['cores_usable']} usable cores, load {load:.1f}, {platform.system()}"
    return f"{moment}\n{machine}\n{', '.join(found)}"


def main(names: list[str]) -> int:
    """Run the benchmarks called ``names``, or all; the exit code."""
    unknown = [name for name in names if name not in benchmarks()]
    if unknown:
        print(f"no benchmark {unknown[0]!r}; there are: {', '.join(benchmarks())}", file=sys.stderr)
        return 2
    # As in an installed package, whatever PYTHONDONTWRITEBYTECODE says: each start would compile all of it.
    compileall.compile_dir(str(Path(grd.__file__).parent), quiet=1)
    print(header(), flush=True)
    for name in names or benchmarks():
        print(f"\n== {name}", flush=True)
        importlib.import_module(f"benchmarks.{name}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
