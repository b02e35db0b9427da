"""Parameters are checked before any kernel starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Project

from grd.errors import NotebookError, ParameterError
from grd.execution.parameters import RawText, read_parameters_cell, resolve

DECLARATIONS = """
%matplotlib inline
from typing import Literal, Optional
epochs = 20
lr: float = 0.1
name = "a"
flag = False
nothing = None
half = 1 / 2
maybe: int | None = None
optional: Optional[float] = 0.5
either: "int | str" = 3
mode: Literal["fast", "slow", 3] = "fast"
sizes = [1, 2]
layers: list[int] = [1]
options = {"a": 1}
pair = (1, 2)
negative = -1
a, b = 1, "x"
timeout = None
checkpoint_dir = ""
resume = False
"""


def cell(source: str = DECLARATIONS, language: str = "python") -> Any:
    notebook = {
        "cells": [
            {"cell_type": "code", "source": source, "metadata": {"tags": ["parameters"]}, "outputs": []}
        ]
    }
    return read_parameters_cell(notebook, language)


FITS = [
    ("epochs", RawText("7"), 7),
    ("epochs", 7, 7),
    ("lr", RawText("1"), 1.0),
    ("lr", RawText("1e-3"), 0.001),
    ("lr", 2, 2.0),
    ("name", RawText("123"), "123"),
    ("name", RawText("True"), "True"),
    ("flag", RawText("true"), True),
    ("flag", RawText("False"), False),
    ("flag", True, True),
    ("nothing", RawText("3.5"), 3.5),
    ("nothing", ["x"], ["x"]),
    ("half", RawText("text"), "text"),
    ("maybe", RawText("None"), None),
    ("maybe", RawText("4"), 4),
    ("optional", RawText("2"), 2.0),
    ("optional", None, None),
    ("either", RawText("5"), 5),
    ("either", RawText("five"), "five"),
    ("mode", RawText("slow"), "slow"),
    ("mode", RawText("3"), 3),
    ("sizes", RawText("[3, 4]"), [3, 4]),
    ("sizes", (3, 4), [3, 4]),
    ("layers", [3, 4], [3, 4]),
    ("options", {"b": 2}, {"b": 2}),
    ("pair", [3, 4], [3, 4]),
    ("negative", RawText("-3"), -3),
    ("a", RawText("9"), 9),
    ("b", RawText("9"), "9"),
    ("epochs", RawText("None"), None),
]


@pytest.mark.parametrize(("name", "value", "expected"), FITS)
def test_a_value_that_fits_is_coerced_to_what_the_notebook_declares(
    name: str, value: Any, expected: Any
) -> None:
    found = resolve({name: value}, cell())[name]
    assert found == expected
    assert type(found) is type(expected)


MISFITS = [
    ("epochs", RawText("abc")),
    ("epochs", RawText("1.5")),
    ("epochs", 1.5),
    ("epochs", RawText("True")),
    ("epochs", True),
    ("lr", RawText("fast")),
    ("lr", "0.1"),
    ("lr", False),
    ("name", 3),
    ("flag", RawText("1")),
    ("flag", 1),
    ("maybe", RawText("x")),
    ("mode", RawText("medium")),
    ("sizes", RawText("3")),
    ("layers", ["x"]),
    ("options", [1]),
    ("negative", RawText("")),
]


@pytest.mark.parametrize(("name", "value"), MISFITS)
def test_a_value_of_the_wrong_type_is_refused_and_named(name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=name) as caught:
        resolve({name: value}, cell())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["timeout", "checkpoint_dir", "resume", "my-x", "1x", "", "class", "x y"])
def test_injected_names_and_names_that_are_no_identifiers_are_refused(name: str) -> None:
    with pytest.raises(ParameterError):
        resolve({name: 1}, cell(), allow_unknown=True)


def test_a_misspelt_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ParameterError, match="did you mean 'epochs'"):
        resolve({"epoch": 1}, cell())
    assert resolve({"epoch": RawText("1")}, cell(), allow_unknown=True) == {"epoch": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}, [object()]])
def test_a_value_that_no_record_can_hold_is_refused(value: Any) -> None:
    with pytest.raises(ParameterError):
        resolve({"nothing": value}, cell())


def test_numpy_scalars_and_paths_become_plain_values() -> None:
    numpy = pytest.importorskip("numpy")
    assert resolve({"nothing": numpy.float64(0.5)}, cell()) == {"nothing": 0.5}
    assert resolve({"nothing": Path("a/b")}, cell()) == {"nothing": "a/b"}


def test_other_languages_get_names_and_values_passed_through() -> None:
    bash = cell("lr=0.1\ntimeout=600\n", "bash")
    assert resolve({"lr": RawText("x"), "new": RawText("1")}, bash) == {"lr": "x", "new": 1}
    assert bash.declares("timeout")


def test_a_parameters_cell_that_is_no_python_is_an_error() -> None:
    with pytest.raises(NotebookError, match="line 1"):
        cell("lr = = 1")


def test_a_multi_line_default_declares_no_name_of_its_inside() -> None:
    found = cell("d = dict(\n a=1)\nname: str|None = None\n")
    assert set(found.declared) == {"d", "name"}


# --- the command: exit codes, no kernel, no run folder ---------------------------------------------------

BAD_CALLS: list[tuple[str, list[str], int]] = [
    ("unknown name", ["train.ipynb", "-p", "epoch", "3"], 2),
    ("wrong type", ["train.ipynb", "-p", "epochs", "many"], 2),
    ("injected name", ["train.ipynb", "-p", "resume", "True"], 2),
    ("no identifier", ["train.ipynb", "-p", "my-x", "1"], 2),
    ("yaml that is no mapping", ["train.ipynb", "-y", "[1, 2]"], 2),
    ("broken yaml", ["train.ipynb", "-y", "{a: ["], 2),
    ("missing parameters file", ["train.ipynb", "-f", "nope.yaml"], 66),
    ("bad timeout", ["train.ipynb", "--timeout", "soon"], 2),
    ("zero timeout", ["train.ipynb", "--timeout", "0"], 2),
    ("infinite timeout", ["train.ipynb", "--timeout", "inf"], 2),
    ("negative budget", ["train.ipynb", "--budget", "-5"], 2),
    ("missing notebook", ["nope.ipynb"], 66),
    ("a folder", ["."], 66),
    ("no JSON", ["text.ipynb"], 2),
    ("JSON but no notebook", ["list.ipynb"], 2),
    ("empty notebook", ["empty.ipynb"], 2),
    ("missing kernel", ["alien.ipynb"], 69),
    ("missing kernel by flag", ["train.ipynb", "--kernel", "klingon"], 69),
    ("parameters without a parameters cell", ["bare.ipynb", "-p", "x", "1"], 2),
    ("broken parameters cell", ["broken.ipynb"], 2),
    ("no such option", ["train.ipynb", "--fast"], 2),
    ("no notebook named", [], 2),
    ("runs folder that cannot be", ["train.ipynb", "--runs-dir", "text.ipynb/runs"], 2),
]


@pytest.fixture
def bad_inputs(project: Project) -> Project:
    project.notebook("train.ipynb", "open('ran', 'w')", parameters="epochs = 3\nresume = False")
    project.notebook("bare.ipynb", "open('ran', 'w')")
    project.notebook("broken.ipynb", "open('ran', 'w')", parameters="epochs = = 3")
    project.notebook("alien.ipynb", "open('ran', 'w')", kernel="klingon")
    project.notebook("empty.ipynb")
    (project.path / "text.ipynb").write_text("no notebook")
    (project.path / "list.ipynb").write_text("[1, 2]")
    return project


@pytest.mark.parametrize(("what", "arguments", "code"), BAD_CALLS, ids=[call[0] for call in BAD_CALLS])
def test_a_bad_call_exits_with_its_code_one_line_and_nothing_left(
    bad_inputs: Project, what: str, arguments: list[str], code: int
) -> None:
    finished = bad_inputs.grd("research", *arguments)
    assert finished.code == code, finished.err
    message = [line for line in finished.err.splitlines() if not line.startswith(("Usage:", "Try "))]
    assert len([line for line in message if line.strip()]) == 1, finished.err
    assert "Traceback" not in finished.err
    assert finished.out == ""
    assert bad_inputs.run_folders() == []
    assert not (bad_inputs.path / "ran").exists()


def test_values_reach_the_notebook_as_the_types_it_declares(project: Project) -> None:
    project.notebook(
        "show.ipynb",
        "print(repr((lr, name, n, extra, raw, from_file)))",
        parameters="lr: float = 0.1\nname = 'a'\nn = 1\nextra = None\nraw = ''\nfrom_file = None",
    )
    (project.path / "values.yaml").write_text("from_file: {a: [1, 2]}\nn: 5\n")
    arguments = ["-f", "values.yaml", "-y", "{extra: [true, null]}", "-p", "lr", "1", "-p", "name", "007"]
    finished = project.grd("research", "show.ipynb", *arguments, "-r", "raw", "3", "--json")
    assert finished.code == 0, finished.err
    record = finished.json
    assert record["parameters"] == {
        "from_file": {"a": [1, 2]}, "n": 5, "extra": [True, None], "lr": 1.0, "name": "007", "raw": "3",
    }  # fmt: skip
    assert project.grd("logs", "last").out == "(1.0, '007', 5, [True, None], '3', {'a': [1, 2]})\n"


@pytest.mark.parametrize(
    ("declared", "arguments", "told"),
    [
        ("epochs = None", [], "7"),
        ("epochs: int | None = None", ["-p", "epochs", "2"], "2"),
        ("epochs = 20", [], "20"),
        ("epochs = 10 + 10", [], "20"),
    ],
)
def test_epochs_left_open_are_those_of_the_settings_and_nothing_that_was_said_is_replaced(
    project: Project, declared: str, arguments: list[str], told: str
) -> None:
    (project.path / "grd.toml").write_text("default_epochs = 7\n")
    project.notebook("show.ipynb", "print(epochs)", parameters=declared)
    finished = project.grd("research", "show.ipynb", *arguments, "--json")
    assert finished.code == 0, finished.err
    assert project.grd("logs", "last").out == f"{told}\n"
