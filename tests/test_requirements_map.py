"""The map from requirements to tests: every row is on it, and every test it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAP = ROOT / ".planning" / "REQUIREMENTS.md"
ROADMAP = ROOT / ".planning" / "ROADMAP.md"

ROWS_OF = {
    "G0": 42, "G1": 41, "G2": 18, "G3": 31, "G4": 29, "G5": 9, "G6": 8, "G7": 10, "G8": 6, "G9": 9, "G10": 11,
    "G11": 15, "G12": 20, "G13": 13, "G14": 4, "G15": 5, "G16": 15,
}  # fmt: skip
CONTRADICTIONS, DEFECTS = 27, 37
NOTHING_TO_BUILD = {"G0.34"}

ROW = re.compile(r"^\| ([GCD][\d.]+) \| (.+?) \| (.+?) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
OPEN = re.compile(r"open: (\w+)")


def rows() -> dict[str, str]:
    """What shows each row."""
    found = ROW.findall(MAP.read_text())
    ids = [row for row, _, _ in found]
    assert len(ids) == len(set(ids)), f"twice: {sorted({row for row in ids if ids.count(row) > 1})}"
    return {row: shown for row, _, shown in found}


def names_in(path: Path) -> set[str]:
    """Names of the test functions that pytest collects from a file."""
    tree = ast.parse(path.read_text())
    return {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_row_is_on_the_map() -> None:
    owed = {f"{group}.{n:02}" for group, count in ROWS_OF.items() for n in range(1, count + 1)}
    owed |= {f"C{n}" for n in range(1, CONTRADICTIONS + 1)} | {f"D{n}" for n in range(1, DEFECTS + 1)}
    assert set(rows()) == owed


def test_every_row_has_a_test_or_says_what_it_waits_for() -> None:
    bare = {row for row, shown in rows().items() if not TEST.search(shown) and not OPEN.search(shown)}
    assert bare == NOTHING_TO_BUILD


def test_every_named_test_exists() -> None:
    named = {match for shown in rows().values() for match in TEST.findall(shown)}
    assert len(named) > 50
    files = {path for path, _ in named}
    missing = {path for path in files if not (ROOT / path).is_file()}
    assert not missing
    collected = {(path, name) for path in files for name in names_in(ROOT / path)}
    assert named - collected == set()


def test_nothing_but_names_of_tests_and_open_parts_shows_a_row() -> None:
    for row, shown in rows().items():
        rest = OPEN.sub("", TEST.sub("", shown)).replace("<br>", "").replace("nothing to build", "")
        assert rest.strip() == "", f"{row}: {rest!r}"


def test_every_open_part_is_on_the_roadmap() -> None:
    legend = dict(re.findall(r"^\| (\w+) \| (\w.+?) \|$", MAP.read_text().split("\n## ")[0], re.MULTILINE))
    parts = {part for shown in rows().values() for part in OPEN.findall(shown)}
    assert parts <= set(legend)
    roadmap = ROADMAP.read_text()
    for part in parts:
        assert legend[part] in roadmap, f"{part} is not on the roadmap"
