"""The panel of a run as a person meets it: JupyterLab in Chromium, kernels of both majors of ipykernel."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser_fixtures import browser, lab, lab_project, opened  # noqa: F401
from browser_lab import Page
from conftest import Project, wait_until

pytestmark = pytest.mark.browser

LOAD = "%load_ext grd"
LONG = "run = %grd research train.ipynb -p epochs 4000"

Opened = Callable[..., Page]


@pytest.fixture
def known(lab_project: Project) -> set[Path]:
    """The runs there were before the test."""
    return set(lab_project.run_folders())


def new_runs(project: Project, known: set[Path]) -> list[Path]:
    return sorted(set(project.run_folders()) - known)


def record(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "run.json").read_text()))


def wait_for_state(run: Path, state: str) -> dict[str, Any]:
    wait_until(lambda: record(run)["state"] == state, f"{run.name} to be {state}")
    return record(run)


def log(project: Project) -> list[dict[str, Any]]:
    path = Path(project.environment["GRD_STATE_DIR"], "approvals.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def name_of(page: Page) -> str:
    return page.name.removesuffix(".ipynb")


def test_approve_reload_stop(opened: Opened, lab_project: Project, known: set[Path]) -> None:
    page = opened(LOAD, LONG, "print('the next cell', 6 * 7)", "print(run.state, run.id)")
    page.execute(0)
    page.execute(1)
    page.says(1, "may take long: about")
    assert new_runs(lab_project, known) == []
    page.screenshot(f"{name_of(page)}-1-asked", 1)
    # A second view of the same output, then a double click in both, faster than any answer.
    page.cell(1).locator(".jp-OutputArea-output").first.click(button="right")
    page.page.get_by_text("Create New View for Cell Output").click()
    views = page.page.locator("button.jupyter-button").filter(has_text=re.compile("^Approve$"))
    wait_until(lambda: views.count() == 2, "the second view")
    views.evaluate_all("buttons => buttons.forEach(button => { button.click(); button.click(); })")
    page.says(1, re.compile(r"running.*as of", re.DOTALL))
    (run,) = new_runs(lab_project, known)
    page.screenshot(f"{name_of(page)}-2-two-views")
    page.execute(2)
    page.says(2, "the next cell 42")
    page.says(1, re.compile(r"epochs [1-9][\d.]*/4000, about"))
    budget = record(run)["budget"]
    assert (budget["agreed"], budget["seconds"] > 600) == ("typed", True)
    assert log(lab_project)[-1]["kind"] == "typed"
    assert log(lab_project)[-1]["by"]["how"] == "jupyter"

    page.page.keyboard.press("Control+s")
    page.open()
    panel = page.says(1, re.compile(r"running.*as of", re.DOTALL))
    seen = panel.first.inner_text()
    wait_until(lambda: panel.first.inner_text() != seen, "the panel to go on after the page was loaded anew")
    page.screenshot(f"{name_of(page)}-3-reloaded", 1)
    assert page.button(1, "Stop").get_attribute("title").startswith("Ask the run to save and stop")
    page.button(1, "Stop").click()
    page.says(1, re.compile(r"interrupted \(stopped\)"))
    assert page.button(1, "Stop").count() == 0
    assert wait_for_state(run, "interrupted")["checkpoint"] is not None
    page.screenshot(f"{name_of(page)}-4-stopped", 1)
    page.execute(3)
    page.says(3, f"interrupted {run.name}")
    assert len(new_runs(lab_project, known)) == 1


def test_decline_then_capped(opened: Opened, lab_project: Project, known: set[Path]) -> None:
    page = opened(LOAD, LONG, LONG)
    page.execute(0)
    page.execute(1)
    page.button(1, "Decline").click()
    page.says(1, "declined: nothing was started")
    assert page.cell(1).locator("button.jupyter-button").count() == 0
    page.screenshot(f"{name_of(page)}-1-declined", 1)
    assert new_runs(lab_project, known) == []
    assert log(lab_project)[-1]["kind"] == "declined"
    entries = len(log(lab_project))
    page.execute(2)
    page.button(2, "Run capped at 10m").click()
    page.says(2, re.compile(r"epochs [\d.]+/4000"))
    (run,) = new_runs(lab_project, known)
    assert (record(run)["budget"]["agreed"], record(run)["budget"]["seconds"]) == ("default", 600)
    assert len(log(lab_project)) == entries
    page.screenshot(f"{name_of(page)}-2-capped", 2)


def test_session_then_revoke(opened: Opened, lab_project: Project, known: set[Path]) -> None:
    line = LONG.replace("4000", "1500")
    page = opened(LOAD, line, line)
    page.execute(0)
    page.execute(1)
    page.button(1, "Approve for the session").click()
    page.says(1, re.compile(r"epochs [\d.]+/1500"))
    page.execute(2)
    page.says(2, re.compile(r"epochs [\d.]+/1500"))
    runs = new_runs(lab_project, known)
    assert [record(run)["budget"]["agreed"] for run in runs] == ["grant", "grant"]
    page.screenshot(f"{name_of(page)}-1-granted")
    page.button(1, "Revoke the approval").click()
    for index in (1, 2):
        page.says(index, re.compile(r"interrupted \(revoked\)"))
    for run in runs:
        assert wait_for_state(run, "interrupted")["cause"] == "revoked"
        assert record(run)["checkpoint"] is not None
    page.screenshot(f"{name_of(page)}-2-revoked")


def test_kernel_restart(opened: Opened, lab_project: Project, known: set[Path]) -> None:
    gate = lab_project.path / f"gate-{len(known)}-{id(opened)}"
    page = opened(
        LOAD,
        f"run = %grd research train.ipynb -p epochs 12 -p gate {gate}",
        LOAD,
        "%grd status",
        "%grd status last",
    )
    page.execute(0)
    page.execute(1)
    page.says(1, re.compile(r"epochs [1-9][\d.]*/12"))
    (run,) = new_runs(lab_project, known)
    page.page.keyboard.press("Escape")
    page.page.keyboard.type("00")
    page.page.get_by_role("button", name="Restart", exact=True).or_(
        page.page.locator(".jp-Dialog button.jp-mod-accept")
    ).last.click()
    page.wait_until_idle()
    page.execute(2)
    page.execute(3)
    page.says(3, re.compile(f"Running:.*{run.name}", re.DOTALL))
    page.execute(4)
    page.says(4, re.compile(r"running.*as of", re.DOTALL))
    page.screenshot(f"{name_of(page)}-1-found")
    gate.touch()
    page.says(4, re.compile(r"completed after"))
    assert wait_for_state(run, "completed")["attempt"] == 1
    page.screenshot(f"{name_of(page)}-2-completed", 4)
