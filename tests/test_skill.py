"""``grd skill``: the recipes for agents, put where agents look and never over somebody's own words."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import Project

from grd.interfaces.cli.main import cli

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "templates" / "skills" / "grd" / "SKILL.md"


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ((), ".claude"),
        ((".claude",), ".claude"),
        ((".agents",), ".agents"),
        ((".agents", ".claude"), ".claude"),
    ],
)
def test_the_skill_goes_where_the_projects_agent_looks(
    project: Project, there: tuple[str, ...], expected: str
) -> None:
    for name in there:
        (project.path / name).mkdir()
    done = project.grd("skill", "install", "--json")
    place = project.path / expected / "skills" / "grd" / "SKILL.md"
    assert done.json == {
        "schema": "grd.skill-install/1",
        "path": str(place),
        "changed": True,
        "replaced": False,
    }
    assert place.read_text().startswith(SHIPPED.read_text().rstrip("\n"))


def test_it_goes_into_the_project_also_from_a_folder_within(project: Project) -> None:
    (project.path / "deep").mkdir()
    done = project.grd("skill", "install", "--to", "deep/skills", "--json")
    assert Path(done.json["path"]) == project.path / "deep" / "skills" / "grd" / "SKILL.md"
    project.path = project.path / "deep"
    done = project.grd("skill", "install", "--json")
    assert Path(done.json["path"]) == project.path.parent / ".claude" / "skills" / "grd" / "SKILL.md"


def test_twice_changes_nothing_and_an_edited_file_stays_unless_it_may_be_replaced(project: Project) -> None:
    place = Path(project.grd("skill", "install", "--json").json["path"])
    written = place.read_bytes()
    again = project.grd("skill", "install", "--json")
    assert (again.code, again.json["changed"]) == (0, False)
    place.write_bytes(written.replace(b"## Exit codes", b"## My exit codes"))
    edited = place.read_bytes()
    refused = project.grd("skill", "install")
    assert (refused.code, refused.out) == (2, "")
    assert len(refused.err.splitlines()) == 1
    assert "grd skill install --replace" in refused.err
    assert place.read_bytes() == edited
    replaced = project.grd("skill", "install", "--replace", "--json")
    assert (replaced.json["changed"], replaced.json["replaced"]) == (True, True)
    assert place.read_bytes() == written


def test_the_command_that_replaces_an_edited_file_can_be_typed_as_it_stands(project: Project) -> None:
    given = ("skill", "install", "--to", "a b")
    assert project.grd(*given).code == 0
    (project.path / "a b" / "grd" / "SKILL.md").write_text("mine")
    refused = project.grd(*given)
    assert refused.code == 2
    command = shlex.split(refused.err.strip().rsplit(": grd ", 1)[1])
    assert project.grd(*command).code == 0


def test_what_an_older_grd_has_written_is_brought_up_to_date_unasked(project: Project) -> None:
    from grd.interfaces.cli.skill import sealed

    place = project.path / ".claude" / "skills" / "grd" / "SKILL.md"
    place.parent.mkdir(parents=True)
    place.write_bytes(sealed(b"---\nname: grd\n---\nan older text\n"))
    done = project.grd("skill", "install", "--json")
    assert (done.code, done.json["changed"], done.json["replaced"]) == (0, True, False)
    assert b"an older text" not in place.read_bytes()


def test_a_place_that_cannot_be_written_is_one_line(project: Project) -> None:
    (project.path / "file").write_text("in the way")
    done = project.grd("skill", "install", "--to", "file")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert "grd skill install --to DIR" in done.err


def test_show_prints_the_skill_as_it_is_shipped(project: Project) -> None:
    assert project.grd("skill", "show").out == SHIPPED.read_text()


def test_the_skill_names_itself_and_types_only_commands_that_exist() -> None:
    text = SHIPPED.read_text()
    _, front, body = text.split("---\n", 2)
    described = yaml.safe_load(front)
    assert described["name"] == SHIPPED.parent.name  # agents demand it
    assert 100 < len(described["description"]) < 1024
    typed = set(re.findall(r"(?:^|`)grd ([a-z]+)", body, re.MULTILINE))
    assert typed >= {"research", "wait", "resume", "result", "logs", "status", "mcp"}
    assert typed <= set(cli.list_commands(None))  # type: ignore[arg-type]
    for needed in ("--detach", "--timeout 540", "--key", "124", "75", "77", "run_wait"):
        assert needed in body, needed
    assert "never give one to yourself" in body


def test_the_skill_has_the_exit_codes_of_the_page_for_agents() -> None:
    def codes(path: Path) -> list[str]:
        return re.findall(r"^\| (\d+) \|", path.read_text(), re.MULTILINE)

    assert codes(SHIPPED) == codes(ROOT / "AGENTS.md") != []
