"""The Explorer end to end: a kernel profiles the machine, the report and the JSON beside it tell."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from click.testing import CliRunner

import grd
from grd.errors import KernelUnavailable, ReportError, ResourceUnavailable
from grd.files import shipped_file
from grd.interfaces.cli.explore import explore as command
from grd.steps import explorer

START, END = b"<!-- grd:hardware:start -->", b"<!-- grd:hardware:end -->"
NOTEBOOK = "notebooks/hardware_profile.ipynb"


@pytest.fixture(scope="module", autouse=True)
def one_state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRD_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        patch.delenv("GRD_REPORT", raising=False)
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a brace in its name: papermill takes paths for format strings."""
    folder = tmp_path / "my {project} {0}"
    (folder / ".planning").mkdir(parents=True)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.chdir(folder)
    return folder


def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    import papermill

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a kernel was started")

    monkeypatch.setattr(papermill, "execute_notebook", refuse)


def test_explore_writes_the_report_and_the_profile_beside_it_and_cleans_up(folder: Path) -> None:
    lines: list[str] = []
    found = grd.explore(progress=lines.append)
    assert found.report_path == folder / ".planning/DATA_REPORT.md"
    assert found.profile_path == folder / ".planning/hardware_profile.json"
    assert json.loads(found.profile_path.read_text()) == found.profile
    assert found.profile["disk"]["path"] == str(folder)
    report = found.report_path.read_text()
    assert "\n## Hardware Profile\n" in report
    assert f"**Captured:** {found.profile['timestamp']}" in report
    assert lines and found.seconds > 0
    assert list(folder.iterdir()) == [folder / ".planning"]
    assert list(Path(tempfile.gettempdir()).glob("grd-explore-*")) == []


def test_every_other_byte_of_a_report_stays_and_a_second_run_leaves_one_section(folder: Path) -> None:
    report = folder / "mine.md"
    mine = b"\xef\xbb\xbf# Data\r\ncaf\xe9 \xff\r\nno final newline"
    report.write_bytes(mine)
    for _ in range(2):
        explorer.explore(report)
    content = report.read_bytes()
    assert content.startswith(mine)
    assert (content.count(START), content.count(END)) == (1, 1)
    assert (folder / "hardware_profile.json").is_file()


def test_a_report_that_cannot_be_written_is_refused_before_any_kernel_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_kernel(monkeypatch)
    (folder / "file").write_text("in the way")
    damaged = folder / "damaged.md"
    damaged.write_bytes(b"text\n" + START)
    no_folder = Path("/proc/nothing/REPORT.md")  # says that it can be written, at least to root
    for report in (folder, folder / "file/REPORT.md", damaged, no_folder):
        with pytest.raises(ReportError, match=re.escape(str(report))):
            explorer.explore(report)
    assert damaged.read_bytes() == b"text\n" + START


def test_a_profile_that_cannot_be_written_is_refused_before_any_kernel_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_kernel(monkeypatch)
    (folder / ".planning/hardware_profile.json").mkdir()
    with pytest.raises(ReportError, match=r"hardware_profile\.json"):
        explorer.explore()
    assert not (folder / ".planning/DATA_REPORT.md").exists()


def test_the_report_setting_of_the_project_moves_the_report(folder: Path) -> None:
    (folder / "grd.toml").write_text('report = "docs/MACHINE.md"\n')
    (folder / "deep/er").mkdir(parents=True)
    found = explorer.explore(project_dir=folder / "deep/er")
    assert found.report_path == folder / "docs/MACHINE.md"
    assert found.report_path.is_file() and (folder / "docs/hardware_profile.json").is_file()


def test_explore_works_inside_a_running_event_loop(folder: Path) -> None:
    async def in_a_loop() -> Path:
        return explorer.explore().report_path

    assert asyncio.run(in_a_loop()).is_file()


def test_a_missing_kernel_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(shipped_file(NOTEBOOK), as_version=4)
    notebook.metadata["kernelspec"] = {"name": "no-such-kernel", "display_name": "x", "language": "python"}
    other = folder / "other.ipynb"
    nbformat.write(notebook, other)
    monkeypatch.setattr(explorer, "shipped_file", lambda relative: other)
    with pytest.raises(KernelUnavailable, match="no-such-kernel"):
        explorer.explore()
    assert not (folder / ".planning/DATA_REPORT.md").exists()


def test_a_notebook_that_fails_in_its_kernel_leaves_the_report_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = nbformat.read(shipped_file(NOTEBOOK), as_version=4)
    notebook.cells[-1].source = "import a_module_nobody_has"
    other = folder / "other.ipynb"
    nbformat.write(notebook, other)
    monkeypatch.setattr(explorer, "shipped_file", lambda relative: other)
    with pytest.raises(
        ResourceUnavailable, match="ModuleNotFoundError: No module named 'a_module_nobody_has'"
    ):
        explorer.explore()
    assert not (folder / ".planning/DATA_REPORT.md").exists()


def test_json_goes_to_stdout_and_everything_else_to_stderr(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from grd.interfaces.cli.explore import explore; explore()", "--json"],
        env={**os.environ, "PYTHONPATH": str(Path(grd.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    answer = json.loads(done.stdout)
    assert answer["schema"] == "grd.explore/1"
    assert answer["profile"]["schema"] == "grd.hardware/1"
    assert Path(answer["report"]).is_file() and Path(answer["profile_path"]).is_file()
    assert "profiling" in done.stderr


def test_people_are_told_where_the_report_is_and_what_the_machine_is(folder: Path) -> None:
    result = CliRunner().invoke(command, ["--report", "R.md"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].endswith(str(folder / "R.md"))
    assert [line.split()[0] for line in lines[2:]] == ["CPU", "Memory", "Disk", "GPU", "Unknown"]


def test_the_command_line_starts_without_papermill() -> None:
    program = (
        "import sys, grd.interfaces.cli.explore, grd.steps.explorer;"
        "print([m for m in ('papermill', 'torch', 'jinja2', 'nbformat') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(Path(grd.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == "[]"


def test_the_shipped_notebook_is_valid_and_clean() -> None:
    notebook = nbformat.read(shipped_file(NOTEBOOK), as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.metadata.get("tags") for cell in code].count(["parameters"]) == 1
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_an_exploration_shows_itself_in_a_notebook_without_running_what_a_device_is_called() -> None:
    found = explorer.Exploration(
        profile={"gpu": {"name": "<script>", "device_count": 1, "total_memory_gb": 80.0}},
        report_path=Path("/r/<b>.md"),
        profile_path=Path("/r/p.json"),
        seconds=1.23456,
    )
    assert "<script>" not in found._repr_html_() and "<b>" not in found._repr_html_()
    assert found.to_dict()["seconds"] == 1.235
