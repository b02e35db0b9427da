"""docs/json.md says what every command's --json prints, no more and no less."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Project
from test_research import PARAMETERS, TRAIN

PAGE = Path(__file__).resolve().parents[1] / "docs" / "json.md"


def documented(section: str) -> set[str]:
    """The field names of a section: what is in backticks in its list, outside braces and before a colon."""
    body = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    text = next(part for part in body if part.startswith(f"{section}\n"))
    items = re.findall(r"^- (.*(?:\n  .*)*)", text, flags=re.MULTILINE)
    names: set[str] = set()
    for item in items:
        if item.startswith("`attempts`: each with"):
            names.add("attempts")
            continue
        names |= set(re.findall(r"`([a-z0-9_]+)`", item)) - set(re.findall(r"`\{[^}]*\}`", item))
    return names


def documented_of_attempts() -> set[str]:
    text = PAGE.read_text().split("- `attempts`: each with", 1)[1].split("\n\n", 1)[0]
    return set(re.findall(r"`([a-z0-9_]+)`", text))


def check(shown: dict[str, Any], schema: str) -> None:
    assert shown["schema"] == schema
    assert set(shown) == documented(schema), schema


def test_every_command_prints_the_documented_fields(project: Project) -> None:
    project.notebook("train.ipynb", TRAIN, parameters=PARAMETERS)
    project.notebook("bad.ipynb", "1 / 0")
    guess = project.grd("estimate", "train.ipynb", "--json").json
    check(guess, "grd.estimate/1")
    ended = project.grd("research", "train.ipynb", "--json")
    check(ended.json, "grd.run/1")
    assert set(ended.json["attempts"][0]) == documented_of_attempts()
    kept = ended.json["estimate"]
    told_before = set(guess) & {
        "seconds",
        "low_seconds",
        "high_seconds",
        "method",
        "basis",
        "confidence",
        "n_runs",
    }
    assert set(kept) == told_before | {"code_sha256", "speed_mbs", "live_factor", "live_runs", "probe"}
    page = PAGE.read_text()
    assert all(f"`{name}`" in page for name in kept)
    assert all(name in page for name in ended.json["progress"])
    assert project.grd("research", "bad.ipynb").code == 1
    check(project.grd("status", "last", "--json").json, "grd.run/1")
    overview = project.grd("status", "--json").json
    check(overview, "grd.status/1")
    assert set(overview["failed"][0]) == documented("row")
    listed = project.grd("list", "--json").json
    check(listed, "grd.list/1")
    assert {frozenset(row) for row in listed["runs"]} == {frozenset(documented("row"))}
    run = ended.json["run_id"]
    for command, schema in (
        (("wait", run), "grd.wait/1"),
        (("stop", run), "grd.stop/1"),
        (("resume", "--all-interrupted"), "grd.resume-all/1"),
        (("result", run), "grd.result/1"),
        (("config", "show"), "grd.config/1"),
        (("gc", "--dry-run"), "grd.gc/1"),
        (("approve", "--total", "1h"), "grd.approve/1"),
        (("approvals",), "grd.approvals/1"),
        (("revoke", "--all"), "grd.revoke/1"),
        (("rm", run), "grd.rm/1"),
    ):
        done = project.grd(*command, "--json")
        check(done.json, schema)
        for inner in done.json.get("runs", []):
            assert set(inner) == documented("grd.run/1")
        for grant in [*done.json.get("grants", []), *([done.json["grant"]] if "grant" in done.json else [])]:
            assert set(grant) == documented("grant")
        for removed in done.json.get("removed", []):
            assert set(removed) == {"path", "bytes", "what"}
    for line in [*project.grd("events", "last").out.splitlines(), *ended.err.splitlines()]:
        event = json.loads(line)
        wanted = {"v", "t", "kind"} if event["kind"] == "note" else documented("event")
        assert wanted <= set(event), event
        assert event["kind"] == "note" or f"`{event['kind']}` (" in PAGE.read_text()


def test_batches_print_the_documented_fields(project: Project) -> None:
    project.notebook("one.ipynb", "1", parameters=PARAMETERS)
    plan = project.grd("sweep", "one.ipynb", "-g", "epochs", "1", "--dry-run", "--json").json
    check(plan, "grd.batch-plan/1")
    assert set(plan["runs"][0]) == {
        "index", "notebook", "parameters", "timeout", "budget", "key", "completed_run",
    }  # fmt: skip
    ended = project.grd("sweep", "one.ipynb", "-g", "epochs", "1", "--json")
    check(ended.json, "grd.batch/1")
    assert set(ended.json["runs"][0]) == documented("batch run")
    page = PAGE.read_text()
    for line in ended.err.splitlines():
        if line.startswith("{"):
            assert all(f"`{name}`" in page for name in json.loads(line)), line
    listed = project.grd("batch", "list", "--json").json
    check(listed, "grd.batch-list/1")
    assert set(listed["batches"][0]) == documented("grd.batch/1") - {"runs"}


def test_the_commands_for_other_tools_print_the_documented_fields(project: Project, tmp_path: Path) -> None:
    notebook = project.notebook("plain.ipynb", "1")
    check(project.grd("recover", notebook, "--json").json, "grd.recover/1")
    project.environment |= {"JUPYTER_PATH": str(tmp_path / "share" / "jupyter")}
    place = ("--prefix", tmp_path, "--json")
    check(project.grd("kernelspec", "install", *place).json, "grd.kernelspec-install/1")
    listed = project.grd("kernelspec", "list", "--json").json
    check(listed, "grd.kernelspec-list/1")
    fields = {"name", "display_name", "folder", "python", "problem"}
    assert [set(each) for each in listed["kernelspecs"] if each["folder"].startswith(str(tmp_path))] == [
        fields
    ]
    check(project.grd("kernelspec", "remove", *place).json, "grd.kernelspec-remove/1")
    check(project.grd("skill", "install", "--json").json, "grd.skill-install/1")


def test_explore_prints_the_documented_fields(project: Project) -> None:
    explored = project.grd("explore", "--json")
    if explored.code != 0:
        pytest.fail(explored.err)
    check(explored.json, "grd.explore/1")
    assert set(explored.json["profile"]) == documented("grd.hardware/1")


def test_the_machines_commands_print_the_documented_fields(project: Project) -> None:
    shown = project.grd("hardware", "show", "--json")
    check(shown.json, "grd.hardware/1")
    (project.path / "profile.json").write_text(shown.out)
    check(project.grd("hardware", "diff", "profile.json", "now", "--json").json, "grd.hardware-diff/1")
    told = project.grd("gpus", "--mock", "--json").json
    check(told, "grd.gpus/1")
    page = PAGE.read_text().split("## grd.gpus/1", 1)[1].split("\n## ", 1)[0]
    assert all(f"`{name}`" in page for name in told["gpus"][0])
    check(project.grd("benchmark", "--json").json, "grd.benchmark/1")
