"""Reading the files a batch is given as: YAML, JSON, and tables as CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grd.errors import NotFoundError, UsageError
from grd.execution.parameters import RawText

_FLOAT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+")
DEEPEST = 50
"""Levels of lists and mappings in a spec: what is deeper is a mistake, or contains itself."""

SUFFIXES = (".yaml", ".yml", ".json", ".csv")


def read_text(path: Path, origin: str) -> str:
    """The text of a file. Raises NotFoundError or UsageError."""
    try:
        return path.expanduser().read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise NotFoundError(f"no file {origin}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{origin} cannot be read: {reason}") from None


def parse(text: str, suffix: str, origin: str) -> Any:
    """The value in ``text``: rows with their lines for CSV, else the document. Raises UsageError."""
    if suffix == ".csv":
        return read_table(text, origin)
    if suffix == ".json":
        try:
            return json.loads(text, object_pairs_hook=_each_key_once)
        except ValueError as error:
            raise UsageError(f"{origin}: no valid JSON: {error}") from None
        except RecursionError:
            raise UsageError(f"{origin}: no valid JSON: it is nested too deeply") from None
    return _yaml(text, origin)


def check_storable(value: Any, place: str, level: int = 0) -> None:
    """Raises UsageError for what no file can hold: text that is not Unicode, or what contains itself."""
    if level > DEEPEST:
        raise UsageError(f"{place}: nested over {DEEPEST} levels deep, or it contains itself")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{place}: {value!a} is no Unicode text") from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_storable(key, place, level + 1)
            check_storable(item, f"{place}: {key}" if level == 0 else place, level + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            check_storable(item, place, level + 1)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {twice!r} a second time")
    return found


def read_table(text: str, origin: str) -> list[tuple[int, dict[str, Any]]]:
    """Line number and values of each row of a CSV table with a head line; empty cells are left out."""
    reader = csv.reader(io.StringIO(text), strict=True, skipinitialspace=True)
    rows: list[tuple[int, dict[str, Any]]] = []
    try:
        head = [name.strip() for name in next(reader, [])]
        if not head or not all(head):
            raise UsageError(f"{origin}: line 1 must name the parameters, a column each")
        repeated = [name for name in head if head.count(name) > 1]
        if repeated:
            raise UsageError(f"{origin}: line 1 names {repeated[0]!r} twice")
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(head):
                raise UsageError(
                    f"{origin}: line {reader.line_num} has {len(cells)} values for {len(head)} columns"
                )
            values = {
                name: RawText(cell.strip()) for name, cell in zip(head, cells, strict=True) if cell.strip()
            }
            rows.append((reader.line_num, values))
    except csv.Error as error:
        raise UsageError(f"{origin}: line {reader.line_num}: {error}") from None
    return rows


def _yaml(text: str, origin: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML with two of its traps closed: 1e-3 is a number, and a key that stands twice is an error."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            names = [self.construct_object(key, deep=True) for key in keys]
            for at, name in enumerate(names):
                if name in names[:at]:
                    line = keys[at].start_mark.line + 1
                    raise UsageError(f"{origin}: line {line} has {name!r} a second time")
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{origin}: no valid YAML: {' '.join(str(error).split())}") from None
    except (TypeError, ValueError) as error:  # a mapping as a key, a number of thousands of digits
        raise UsageError(f"{origin}: no valid YAML: {error}") from None
    except RecursionError:
        raise UsageError(f"{origin}: no valid YAML: it is nested too deeply") from None
