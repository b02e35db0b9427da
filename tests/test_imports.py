"""What importing and looking cost, and that every public name and command is what it says."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from conftest import Project

import grd
from grd.errors import UsageError
from grd.interfaces.cli import exit_codes
from grd.interfaces.cli.answer import Surface
from grd.interfaces.cli.main import cli

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("papermill", "nbclient", "torch", "mlflow", "mcp", "pandas", "dask", "IPython", "ipykernel", "numpy")


def run_python(code: str, folder: Path, *options: str) -> str:
    """Standard output of ``code`` in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith("GRD_")} | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(code: str, folder: Path) -> set[str]:
    """Which of the heavy packages are loaded after ``code``."""
    names = run_python(
        f"{code}\nimport sys\nprint()\nprint(*(n for n in {HEAVY!r} if n in sys.modules))", folder
    )
    return set(names.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import grd",
        "import grd.experiment",
        "import grd.hardware",
        "from grd import Run, estimate_eda_duration, estimate_training_duration, status",
    ],
)
def test_importing_costs_no_heavy_package(code: str, tmp_path: Path) -> None:
    assert loaded_by(code, tmp_path) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["status"],
        ["list"],
        ["status", "--json"],
        ["list", "--json"],
        ["logs", "no-such-run"],
    ],
    ids=" ".join,
)
def test_looking_at_no_runs_costs_no_heavy_package(arguments: list[str], tmp_path: Path) -> None:
    assert loaded_by(in_process(arguments), tmp_path) == set()


def test_looking_at_a_run_costs_no_heavy_package(project: Project) -> None:
    project.notebook("plain.ipynb", "print('seen')")
    assert project.grd("research", "plain.ipynb").code == 0
    assert "seen" in run_python(in_process(["logs", "last"]), project.path)
    for arguments in (
        ["status", "last"],
        ["status"],
        ["list"],
        ["logs", "last"],
        ["result", "last", "--json"],
        ["wait", "last"],
        ["events", "last"],
        ["stop", "last"],
        ["gc", "--dry-run"],
        ["config", "show"],
        ["estimate", "plain.ipynb"],
    ):
        assert loaded_by(in_process(arguments), project.path) == set(), arguments


def in_process(arguments: list[str]) -> str:
    """Code that types ``grd ARGUMENTS``, whatever it exits with."""
    return f"""
from grd.interfaces.cli.main import main
try:
    main({arguments!r})
except SystemExit:
    pass
"""


def test_the_check_for_heavy_packages_can_fail(tmp_path: Path) -> None:
    assert "papermill" in loaded_by("import papermill", tmp_path)


def test_reading_a_notebook_does_not_build_the_grammar_of_iris_and_the_check_still_works(
    tmp_path: Path,
) -> None:
    """jsonschema would build it at its import: nine tenths of a second."""
    pytest.importorskip("lark", reason="the grammar comes with jupyter_server, which is not installed")
    code = """
import sys
from grd.execution.notebooks import parse_notebook
cell = '{"cell_type": "code", "source": "1", "metadata": {}, "outputs": [], "execution_count": null}'
parse_notebook(f'{{"cells": [{cell}], "metadata": {{}}, "nbformat": 4, "nbformat_minor": 4}}', "x.ipynb")
print("rfc3987_syntax" in sys.modules, "rfc3987_syntax.syntax_helpers" in sys.modules)
import jsonschema
checker = jsonschema.FormatChecker()
print([checker.conforms(iri, "iri") for iri in ("http://example.org/\u00e4", "no iri <")])
print("rfc3987_syntax.syntax_helpers" in sys.modules)
"""
    assert run_python(code, tmp_path).splitlines() == ["False False", "[True, False]", "True"]


def test_the_engine_module_costs_no_papermill(tmp_path: Path) -> None:
    assert loaded_by("import grd.execution.engine", tmp_path) == set()


@pytest.mark.parametrize(
    "first",
    [
        "import papermill",
        "import grd.execution.engine",
        "import grd.execution.attempt",
        "import papermill.iorw",
    ],
)
def test_papermill_finds_the_engine_whatever_is_imported_first(first: str, tmp_path: Path) -> None:
    code = f"""
{first}
import grd.execution.engine
from papermill.engines import papermill_engines
assert papermill_engines.get_engine("grd") is grd.execution.engine.GrdEngine
"""
    run_python(code, tmp_path, "-W", "error::ImportWarning")


def test_the_public_names_are_sorted_and_resolve() -> None:
    assert sorted(grd.__all__) == list(grd.__all__)
    for name in grd.__all__:
        assert getattr(grd, name) is not None
    assert set(grd.__all__) <= set(dir(grd))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = grd.no_such_name


def test_every_command_explains_itself() -> None:
    runner = CliRunner()
    shown = runner.invoke(cli, ["--help"]).output
    for name in cli.list_commands(None):  # type: ignore[arg-type]
        command = cli.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        assert name in shown
        assert len(command.help or "") > 20
        assert runner.invoke(cli, [name, "--help"]).exit_code == 0
        for option in command.params:
            assert not isinstance(option, click.Option) or option.help, f"{name} {option.opts}"


@pytest.mark.parametrize("missing", ["mcp", "mcp.server.mcpserver"])
def test_mcp_without_its_package_or_with_an_old_one_is_one_line(
    missing: str, project: Project, tmp_path: Path
) -> None:
    """Version 1 of the SDK has a package ``mcp``, and not what version 2 is imported from."""
    package = tmp_path / "site" / "mcp"
    (package / "server").mkdir(parents=True)
    absent = "raise ModuleNotFoundError('no module named mcp', name='mcp')"
    (package / "__init__.py").write_text(absent if missing == "mcp" else "")
    (package / "server" / "__init__.py").write_text("")
    done = project.grd("mcp", env={"PYTHONPATH": str(tmp_path / "site")})
    assert (done.code, done.out) == (69, "")
    assert len(done.err.splitlines()) == 1
    assert "pip install 'grd-notebooks[mcp]'" in done.err


def test_mcp_takes_no_project_that_is_not_there_and_is_not_served_from_a_notebook(project: Project) -> None:
    done = project.grd("mcp", "--project", "nowhere")
    assert done.code == 2
    assert "nowhere" in done.err
    with pytest.raises(UsageError, match="in a shell"):
        cli.main(["mcp"], standalone_mode=False, obj=Surface(prints=False))


def test_a_misspelt_command_is_answered_with_the_nearest_one(project: Project) -> None:
    done = project.grd("reserch", "a.ipynb")
    assert done.code == 2
    assert "grd research" in done.err


def documented_exit_codes() -> set[int]:
    """The codes of README's table."""
    section = (ROOT / "README.md").read_text().split("## Exit codes", 1)[1].split("\n## ", 1)[0]
    return {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)}


def test_every_exit_code_stands_in_readme() -> None:
    tree = ast.parse(Path(exit_codes.__file__).read_text())
    ours = {
        node.value.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Constant)
    }
    assert len(ours) >= 9
    assert ours <= documented_exit_codes()


def test_readme_says_of_every_extra_how_far_it_was_tested() -> None:
    section = (ROOT / "README.md").read_text().split("## What is tested", 1)[1].split("\n## ", 1)[0]
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", section, re.MULTILINE))
    told = {extra for part in rows if part.startswith("extra") for extra in re.findall(r"`(\w+)`", part)}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert told == set(extras) - {"demo", "dev"}
    said = [text for part, text in rows.items() if part not in ("part", "---")]
    assert all("tested" in text or "experimental" in text for text in said)
    goals = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z0-9-]+)`", section)) <= set(goals)


def test_every_command_that_readme_types_exists() -> None:
    typed = re.findall(r"^\$ grd ([a-z]+)|`grd ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    names = {first or second for first, second in typed}
    assert names >= {"explore", "research", "resume", "status"}
    assert names <= set(cli.list_commands(None))  # type: ignore[arg-type]


def test_json_goes_to_stdout_alone_and_names_its_schema(project: Project) -> None:
    for arguments in (["status", "--json"], ["list", "--json"]):
        done = project.grd(*arguments)
        assert done.code == 0
        assert json.loads(done.out)["schema"].startswith("grd.")
