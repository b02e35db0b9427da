"""Parameters, checked against the notebook's ``parameters`` cell before any kernel starts.

papermill starts a kernel and then runs with the default when a name is misspelt, or with the text 'abc'
where a number belongs. Here both are usage errors. Only Python cells can be read; for other languages names
and values are passed through.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grd import contract
from grd.errors import NotebookError, ParameterError

_MISSING: Any = object()
_CONTAINERS: dict[str, type] = {"list": list, "dict": dict, "tuple": list, "set": list, "Sequence": list}
_SIMPLE: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}


class RawText(str):
    """A value from a command line: its type is still open, ``str(value)`` is what was typed."""

    __slots__ = ()


@dataclass(frozen=True)
class Declared:
    """One name the ``parameters`` cell assigns."""

    name: str
    annotation: ast.expr | None
    default: Any
    """The literal default; ``...`` for an expression whose value is known only when it runs."""
    source: str


@dataclass(frozen=True)
class ParametersCell:
    """What is known of the notebook's ``parameters`` cell."""

    present: bool
    readable: bool
    """False for a language that cannot be parsed here: names are passed through."""
    declared: Mapping[str, Declared]

    def declares(self, name: str) -> bool:
        """Whether ``name`` is assigned in the cell."""
        return name in self.declared


def read_parameters_cell(notebook: Mapping[str, Any], language: str) -> ParametersCell:
    """The declarations in the first cell tagged ``parameters``.

    Raises NotebookError if that cell is Python which cannot be parsed.
    """
    source = _tagged_source(notebook, "parameters")
    if source is None:
        return ParametersCell(False, language == "python", {})
    if language != "python":
        names = re.findall(
            r"^\s*(?:local |export |let |const |var |val )?\s*([A-Za-z_]\w*)\s*(?:<-|:?=)", source, re.M
        )
        found = {name: Declared(name, None, ..., "") for name in names}
        return ParametersCell(True, False, found)
    try:
        tree = ast.parse(_without_magics(source))
    except SyntaxError as error:
        raise NotebookError(
            f"the notebook's parameters cell is no valid Python (line {error.lineno}: {error.msg})"
        ) from None
    declared: dict[str, Declared] = {}
    for statement in tree.body:
        for target, annotation, value in _assignments(statement):
            declared[target] = Declared(
                target, annotation, _literal(value), ast.unparse(value) if value else ""
            )
    return ParametersCell(True, True, declared)


def resolve(given: Mapping[str, Any], cell: ParametersCell, *, allow_unknown: bool = False) -> dict[str, Any]:
    """The parameters to inject: ``given`` checked and coerced by annotation or literal default.

    Raises ParameterError for the first value that cannot be used, naming it and what would be right.
    """
    resolved: dict[str, Any] = {}
    if given and not cell.present and not allow_unknown:
        name = next(iter(given))
        raise ParameterError(
            f"parameter {name!r}: the notebook has no cell tagged 'parameters'; tag the cell with "
            "the defaults, or pass --allow-unknown to inject at the top"
        )
    for name, value in given.items():
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise ParameterError(f"parameter {name!r} is no identifier, so no notebook can declare it")
        if name in contract.INJECTED_PARAMETERS:
            option = (
                "--checkpoint-dir" if name == "checkpoint_dir" else "--timeout" if name == "timeout" else None
            )
            hint = f"use {option}" if option else "use: grd resume RUN"
            raise ParameterError(f"parameter {name!r} is injected by grd itself; {hint}")
        declared = cell.declared.get(name)
        if declared is None:
            if cell.readable and not allow_unknown:
                raise ParameterError(_unknown(name, cell))
            resolved[name] = _plain(name, _guess(value))
        elif not cell.readable:
            resolved[name] = _plain(name, _guess(value))
        else:
            resolved[name] = _plain(name, _coerce(declared, value))
    return resolved


def _unknown(name: str, cell: ParametersCell) -> str:
    import difflib

    known = [n for n in cell.declared if n not in contract.INJECTED_PARAMETERS]
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"it declares: {', '.join(known) or 'nothing'}"
    return f"parameter {name!r} is not declared in the notebook's parameters cell; {hint}"


def _tagged_source(notebook: Mapping[str, Any], tag: str) -> str | None:
    for cell in notebook["cells"]:
        tags = cell.get("metadata", {}).get("tags", [])
        if cell.get("cell_type") == "code" and isinstance(tags, list) and tag in tags:
            source = cell.get("source", "")
            return source if isinstance(source, str) else "".join(source)
    return None


def _without_magics(source: str) -> str:
    return "\n".join(
        re.sub(r"\S.*", "pass", line) if line.lstrip().startswith(("%", "!", "?")) else line
        for line in source.splitlines()
    )


def _assignments(statement: ast.stmt) -> list[tuple[str, ast.expr | None, ast.expr | None]]:
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return [(statement.target.id, statement.annotation, statement.value)]
    if isinstance(statement, ast.Assign):
        found: list[tuple[str, ast.expr | None, ast.expr | None]] = []
        for target in statement.targets:
            if isinstance(target, ast.Name):
                found.append((target.id, None, statement.value))
            elif isinstance(target, ast.Tuple | ast.List):
                values: list[ast.expr | None] = [None] * len(target.elts)
                if isinstance(statement.value, ast.Tuple | ast.List) and len(statement.value.elts) == len(
                    values
                ):
                    values = list(statement.value.elts)
                found += [
                    (element.id, None, value)
                    for element, value in zip(target.elts, values, strict=True)
                    if isinstance(element, ast.Name)
                ]
        return found
    return []


def _literal(node: ast.expr | None) -> Any:
    if node is None:
        return ...
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return ...


def _guess(value: Any) -> Any:
    """What papermill's ``-p`` makes of a command line's text: True, False, None, int, float or str."""
    if not isinstance(value, RawText):
        return value
    text = str(value)
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _coerce(declared: Declared, value: Any) -> Any:
    if declared.annotation is not None:
        result = _by_annotation(declared.annotation, value)
        if result is _MISSING:
            raise ParameterError(
                f"parameter {declared.name!r}: {str(value)!r} is no {ast.unparse(declared.annotation)} "
                f"(the notebook says {declared.name}: {ast.unparse(declared.annotation)})"
            )
        return result
    default = declared.default
    if default is ... or default is None:
        return _guess(value)
    result = _as_type(type(default) if not isinstance(default, tuple | set) else list, value)
    if result is _MISSING and _guess(value) is None:
        return None
    if result is _MISSING:
        raise ParameterError(
            f"parameter {declared.name!r}: {str(value)!r} is no {type(default).__name__} "
            f"(the notebook's default is {declared.source})"
        )
    return result


def _by_annotation(annotation: ast.expr, value: Any) -> Any:
    """``value`` as the annotation wants it, or _MISSING; an annotation that is not understood fits all."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        try:
            return _by_annotation(ast.parse(annotation.value, mode="eval").body, value)
        except SyntaxError:
            return _guess(value)
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return None if _guess(value) is None else _MISSING
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return _first_fit([annotation.left, annotation.right], value)
    if isinstance(annotation, ast.Subscript):
        return _by_subscript(annotation, value)
    name = _last_name(annotation)
    if name in _SIMPLE:
        return _as_type(_SIMPLE[name], value)
    if name is not None and name.lower() in _CONTAINERS:
        return _as_type(_CONTAINERS[name.lower()], value)
    return _guess(value)


def _by_subscript(annotation: ast.Subscript, value: Any) -> Any:
    name = _last_name(annotation.value)
    inner = annotation.slice
    parts = list(inner.elts) if isinstance(inner, ast.Tuple) else [inner]
    if name == "Optional":
        return None if _guess(value) is None else _by_annotation(inner, value)
    if name == "Union":
        return _first_fit(parts, value)
    if name == "Literal":
        choices = [_literal(part) for part in parts]
        for choice in choices:
            if _guess(value) == choice and type(_guess(value)) is type(choice):
                return choice
            if isinstance(choice, str) and isinstance(value, str) and str(value) == choice:
                return choice
        return _MISSING
    if name in ("Final", "Annotated", "ClassVar"):
        return _by_annotation(parts[0], value)
    if name is not None and name.lower() in _CONTAINERS:
        container = _as_type(_CONTAINERS[name.lower()], value)
        if isinstance(container, list) and len(parts) == 1:
            items = [_by_annotation(parts[0], item) for item in container]
            return _MISSING if any(item is _MISSING for item in items) else items
        return container
    return _guess(value)


def _first_fit(parts: list[ast.expr], value: Any) -> Any:
    # None first: "None" typed for `str | None` means None. Text last: everything on a command line is text.
    def rank(part: ast.expr) -> int:
        if isinstance(part, ast.Constant) and part.value is None:
            return 0
        return 2 if _last_name(part) == "str" else 1

    for part in sorted(parts, key=rank):
        result = _by_annotation(part, value)
        if result is not _MISSING:
            return result
    return _MISSING


def _last_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else None


def _as_type(kind: type, value: Any) -> Any:
    """``value`` as ``kind`` without loss (int fits float; nothing else fits bool), or _MISSING."""
    if kind is str:
        return str(value) if isinstance(value, str) else _MISSING
    value = _from_text(kind, value) if isinstance(value, RawText) else value
    if kind is bool:
        return value if isinstance(value, bool) else _MISSING
    if isinstance(value, bool):
        return _MISSING
    if kind is int:
        return value if isinstance(value, int) else _MISSING
    if kind is float:
        return float(value) if isinstance(value, int | float) else _MISSING
    if kind is list:
        return list(value) if isinstance(value, list | tuple) else _MISSING
    return value if isinstance(value, kind) else _MISSING


def _from_text(kind: type, text: RawText) -> Any:
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), str(text))
    if kind in (list, dict):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return str(text)
    return _guess(text)


def _plain(name: str, value: Any) -> Any:
    """``value`` as JSON values, since the record must hold it and every language must be able to read it."""
    if value is None or isinstance(value, bool | int | float | str):
        if isinstance(value, float) and not math.isfinite(value):
            raise ParameterError(f"parameter {name!r}: {value} cannot be stored; give a finite number")
        return str(value) if isinstance(value, str) else value
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(name, item) for key, item in value.items()}
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0:
        return _plain(name, item())  # a numpy or torch scalar
    if hasattr(value, "__fspath__"):
        return str(value)
    raise ParameterError(
        f"parameter {name!r}: a {builtins.type(value).__name__} cannot be injected; give JSON values"
    )
