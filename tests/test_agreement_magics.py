"""Agreeing to long runs in a notebook: what its front end says of who is there decides."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Project
from test_magics import Kernel, kernel, loaded  # noqa: F401
from test_research import PARAMETERS, TRAIN

pytestmark = pytest.mark.faults

LONG = "%grd research train.ipynb --timeout 3h --wait"


@pytest.fixture
def notebook(loaded: Kernel, project: Project) -> Kernel:  # noqa: F811
    Path(project.environment["XDG_CONFIG_HOME"], "grd", "config.toml").unlink()
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    return loaded


def test_where_nobody_can_answer_a_long_timeout_is_refused_at_once(
    notebook: Kernel, project: Project
) -> None:
    refused = notebook.type(LONG)
    assert not refused.ok
    assert "grd approve --max 3h" in refused.stderr
    assert not notebook.type("%grd approve --total 4h").ok
    assert not notebook.type("import grd; grd.research('train.ipynb', timeout='3h')").ok
    assert project.run_folders() == []


def test_what_a_person_types_into_a_cell_is_the_agreement(notebook: Kernel, project: Project) -> None:
    notebook.is_attended = True
    done = notebook.type(f"run = {LONG}")
    assert done.ok, done
    record = project.record()
    assert (record["state"], record["budget"]["agreed"]) == ("completed", "typed")
    assert notebook.type("log = %grd approvals --log").ok
    assert notebook.value("log.to_dict()['history'][0]['by']['how']") == "jupyter"


def test_a_grant_given_in_a_notebook_serves_where_nobody_is(notebook: Kernel, project: Project) -> None:
    notebook.is_attended = True
    assert notebook.type("given = %grd approve --total 4h --reason tonight").ok
    notebook.is_attended = False
    done = notebook.type(f"run = {LONG}")
    assert done.ok, done
    assert project.record()["budget"]["agreed"] == "grant"
    headless = project.grd("research", "train.ipynb", "--timeout", "1h", "--json")
    assert headless.code == 0, headless.err
    assert headless.json["budget"]["agreed"] == "grant"
    assert notebook.type("%grd revoke --all").ok
    assert project.grd("research", "train.ipynb", "--timeout", "1h").code == 77
