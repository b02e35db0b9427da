"""What a user gets who installs the wheel: everything that is needed, and nothing of the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import write_notebook

ROOT = Path(__file__).resolve().parents[1]
INSTALL_SECONDS = 900

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(INSTALL_SECONDS + 300)]

SNIPPETS = """
import sys, tempfile
from pathlib import Path
from grd.experiment import *
from grd.experiment.timeout_manager import ExperimentTimeoutManager
from grd.experiment.checkpoint_handler import CheckpointHandler

tm = ExperimentTimeoutManager()
assert tm.get_timeout(300) == 600
tm.request_long_running_approval(30)
assert tm.long_running_approved
assert tm.get_timeout(3600) is None

with tempfile.TemporaryDirectory() as d:
    ch = CheckpointHandler(Path(d))
    ch.save_checkpoint(epoch=5, model_state={'w': [1, 2, 3]}, optimizer_state={'lr': 0.01}, loss=0.5,
                       metadata={'test': True})
    loaded = ch.load_checkpoint()
    assert loaded['epoch'] == 5
    assert loaded['loss'] == 0.5
    hints = ch.get_resumability_hints()
    assert hints['has_checkpoint'] == True
assert 'torch' not in sys.modules and 'papermill' not in sys.modules
"""


@dataclass(frozen=True)
class Installed:
    """A venv into which only the wheel was installed, and a folder that is not the checkout."""

    bin: Path
    folder: Path

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run ``command`` of the venv as its users do: from their folder, without this checkout in sight."""
        dropped = ("GRD_", "PYTHON", "JUPYTER", "VIRTUAL_ENV")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
        environment["GRD_STATE_DIR"] = str(self.folder / "state")
        environment["PATH"] = f"{self.bin}{os.pathsep}{environment['PATH']}"
        return subprocess.run(
            [str(self.bin / str(command[0])), *map(str, command[1:])],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
        )

    def ok(self, *command: str | Path) -> str:
        """The standard output of a command that must succeed."""
        done = self.run(*command)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    place = tmp_path_factory.mktemp("installed")
    venv.create(place / "venv", with_pip=True)
    subprocess.run(
        [place / "venv/bin/python", "-m", "pip", "install", "--quiet", str(wheel)],
        check=True,
        stdin=subprocess.DEVNULL,
        timeout=INSTALL_SECONDS,
    )
    (place / "elsewhere").mkdir()
    return Installed(place / "venv/bin", place / "elsewhere")


def test_the_wheel_ships_every_template_and_notebook_and_no_test(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern in (("templates", "*.j2"), ("templates", "*.md"), ("notebooks", "*.ipynb")):
        ours = {f"grd/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob(pattern)}
        assert ours
        assert ours <= names
    assert "grd/py.typed" in names
    assert not [name for name in names if "test" in name.lower() or ".ipynb_checkpoints" in name]


def test_the_wheel_needs_no_torch(installed: Installed) -> None:
    done = installed.run("python", "-c", "import torch")
    assert "ModuleNotFoundError" in done.stderr


def test_the_source_plans_libraries_are_installed_in_versions_that_exist(installed: Installed) -> None:
    code = (
        "import json; from importlib.metadata import distributions\n"
        "print(json.dumps({d.name.lower(): d.version for d in distributions()}))"
    )
    versions = json.loads(installed.ok("python", "-c", code))
    floors = {
        "psutil": 5,
        "gputil": 1,
        "py-cpuinfo": 9,
        "tqdm": 4,
        "rich": 13,
        "nvidia-ml-py": 12,
        "papermill": 2,
    }
    assert {name: floor for name, floor in floors.items() if int(versions[name].split(".")[0]) < floor} == {}
    assert not {"graceful-shutdown", "scrapbook", "nvidia-ml-py3"} & set(versions)
    installed.ok("python", "-c", "import psutil, GPUtil, cpuinfo, tqdm, rich, pynvml")


def test_the_installed_code_is_the_wheels(installed: Installed) -> None:
    place = installed.ok("python", "-c", "import grd; print(grd.__file__)").strip()
    assert Path(place).is_relative_to(installed.bin.parent)


def test_the_installed_explorer_writes_the_report(installed: Installed) -> None:
    installed.ok("grd", "explore", "--report", "reports/DATA_REPORT.md")
    report = (installed.folder / "reports/DATA_REPORT.md").read_text()
    headings = [line for line in report.splitlines() if line.startswith("#")]
    assert headings[:5] == ["## Hardware Profile", "### CPU", "### Memory", "### Disk", "### GPU"]


def test_the_installed_skill_is_the_shipped_one_and_mcp_names_what_it_needs(installed: Installed) -> None:
    assert installed.ok("grd", "skill", "show") == (ROOT / "templates/skills/grd/SKILL.md").read_text()
    done = installed.run("grd", "mcp")
    assert (done.returncode, done.stdout) == (69, "")
    assert "pip install 'grd-notebooks[mcp]'" in done.stderr


def test_the_installed_researcher_completes_a_notebook(installed: Installed) -> None:
    write_notebook(installed.folder / "plain.ipynb", "print('six times', n, 'is', 6 * n)", parameters="n = 1")
    shown = json.loads(installed.ok("grd", "research", "plain.ipynb", "-p", "n", "7", "--json"))
    assert (shown["state"], shown["parameters"]) == ("completed", {"n": 7})
    assert "six times 7 is 42" in installed.ok("grd", "logs", "last")


def test_the_exit_codes_of_the_installed_command_are_the_documented_ones(installed: Installed) -> None:
    write_notebook(installed.folder / "wrong.ipynb", "raise ValueError('no')")
    assert installed.run("grd", "research", "wrong.ipynb").returncode == 1
    assert installed.run("grd", "research", "wrong.ipynb", "-p", "x", "1").returncode == 2
    assert installed.run("grd", "research", "missing.ipynb").returncode == 66
    assert installed.run("grd", "research", "wrong.ipynb", "--kernel", "no-such-kernel").returncode == 69


def test_papermill_finds_the_installed_engine(installed: Installed) -> None:
    write_notebook(installed.folder / "in.ipynb", "print(x + 1)", parameters="x = 0")
    installed.ok("papermill", "--engine", "grd", "in.ipynb", "out.ipynb", "-p", "x", "1")
    done = json.loads((installed.folder / "out.ipynb").read_text())
    assert done["metadata"]["grd"]["state"] == "completed"


def test_the_plans_snippets_pass_without_torch(installed: Installed) -> None:
    installed.ok("python", "-c", SNIPPETS)
