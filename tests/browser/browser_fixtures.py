"""One JupyterLab and one Chromium for all browser tests; a notebook of its own, with its kernel, for each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from browser_lab import (
    LIMIT_MS,
    ROOT,
    Lab,
    Page,
    environment_without_grd,
    kernelspec,
    write,
)
from conftest import Project, write_notebook

CHROMIUM_OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

PARAMETERS = """
epochs = 4
gate = ''
timeout = None
checkpoint_dir = ''
resume = False
"""
TRAIN = """
import time
from pathlib import Path
from grd.experiment import training

for epoch in training.epochs(epochs, state={}, checkpoint_dir=checkpoint_dir, resume=resume):
    while epoch >= 8 and gate and not Path(gate).exists():
        time.sleep(0.05)
    time.sleep(0.25)
    epoch.log(loss=1.0 / (1 + int(epoch)))
"""


def cannot_be_had(what: str) -> NoReturn:
    """Skip; a failure where GRD_REQUIRE_BROWSER=1 demands the tests."""
    if os.environ.get("GRD_REQUIRE_BROWSER") == "1":
        pytest.fail(f"GRD_REQUIRE_BROWSER=1, but {what}")
    pytest.skip(what)


def python_of(kernel: str) -> Path:
    """The Python that has this major version of ipykernel."""
    python = Path(sys.executable)
    if kernel == "ipykernel6":
        python = ROOT / ".venv-ipykernel6" / "bin" / "python"
    if not python.exists():
        cannot_be_had(f"{python} is not there; make test-browser makes it")
    return python


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        cannot_be_had("there is no chromium; on Debian: apt install chromium fonts-dejavu-core")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        cannot_be_had("playwright is not installed; make test-browser makes a venv that has it")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=CHROMIUM_OPTIONS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def lab_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which a short run has shown how long a long one would take."""
    folder = tmp_path_factory.mktemp("lab")
    environment = environment_without_grd() | {
        "GRD_STATE_DIR": str(folder / "state"),
        "XDG_CONFIG_HOME": str(folder / "config"),
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_PATH": str(folder / "jupyter"),
        "PYTHONPATH": str(ROOT),
    }
    project = Project(folder / "project", environment)
    (project.path / ".planning").mkdir(parents=True)
    write_notebook(project.path / "train.ipynb", TRAIN, parameters=PARAMETERS)
    done = project.grd("research", "train.ipynb", "-p", "epochs", "8")
    assert done.code == 0, done.err
    return project


@pytest.fixture(scope="session")
def lab(lab_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab, with a kernelspec for each major version of ipykernel."""
    try:
        import jupyterlab  # noqa: F401
    except ImportError:
        cannot_be_had("jupyterlab is not installed; make test-browser makes a venv that has it")
    specs = Path(lab_project.environment["JUPYTER_PATH"])
    for name in ("ipykernel6", "ipykernel7"):
        python = python_of(name)
        told = subprocess.run(
            [python, "-c", "import ipykernel; print(ipykernel.version_info[0])"],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert told.stdout.strip() == name[-1], f"{python} has another ipykernel"
        kernelspec(specs, name, python, {"PYTHONPATH": str(ROOT)})
    server = Lab(tmp_path_factory.mktemp("server"), lab_project.path, lab_project.environment)
    try:
        server.wait_until_up()
        yield server
    finally:
        server.end()


@pytest.fixture(params=["ipykernel6", "ipykernel7"])
def opened(
    request: pytest.FixtureRequest, browser: Any, lab: Lab, lab_project: Project
) -> Iterator[Callable[..., Page]]:
    """Opens a notebook of the given cells; nothing it has started or agreed to is left for the next test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    outside: list[str] = []
    context.on(
        "request",
        lambda asked: (
            None
            if asked.url.startswith((lab.base, "data:", "blob:", "ws://127.0.0.1"))
            else outside.append(asked.url)
        ),
    )
    before = set(lab_project.run_folders())

    def make(*cells: str) -> Page:
        name = f"{request.node.originalname.removeprefix('test_')[:40]}-{request.param}.ipynb"
        write(lab_project.path / name, request.param, *cells)
        shown = Page(lab, context.new_page(), name)
        shown.page.set_default_timeout(LIMIT_MS)
        shown.open()
        return shown

    try:
        yield make
        assert outside == [], "a request left this machine"
    finally:
        context.close()
        lab.end_kernels()
        lab_project.grd("revoke", "--all")
        for folder in set(lab_project.run_folders()) - before:
            lab_project.grd("stop", folder.name, "--now")
            shutil.rmtree(folder, ignore_errors=True)
