"""What a batch is made of, as somebody wrote it: which notebook, with which lists of parameters.

Reads and takes apart; whether notebooks have these parameters is for `grd.batch.plan`.
"""

from __future__ import annotations

import difflib
import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grd.batch import documents
from grd.batch.values import is_range, numbers, split_values
from grd.errors import UsageError
from grd.hardware.pools import POOLS
from grd.settings import MOST_ATTEMPTS

SOURCES = ("grid", "zip", "list", "file")
"""Each gives a list of parameter sets; several of them are combined, each set with each."""

RUN_KEYS = ("notebook", "parameters", "name", "kernel", "timeout", "budget", "inputs")
"""What can be different from run to run."""

BATCH_KEYS = (
    *RUN_KEYS, "notebooks", *SOURCES, "runs", "jobs", "memory", "grace", "start_timeout", "max_output",
    "fail_fast", "allow_unknown", "max_attempts", "gpus", "gpu_pool",
)  # fmt: skip

MOST_RUNS = 100_000


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run as the spec has it: where in the spec it stands, its parameters, and what differs for it."""

    place: str
    parameters: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A batch as submitted."""

    origin: str
    """For people: the file, or what was typed."""
    document: dict[str, Any]
    """The spec as a mapping that can be submitted again."""
    rows: list[Row]
    settings: dict[str, Any]
    """Values of `BATCH_KEYS` for the whole batch, without those that make the rows."""


def read_spec(source: str | Path | Mapping[str, Any], more: Mapping[str, Any] | None = None) -> Spec:
    """The spec in a file or a mapping; ``more`` has keys that were typed besides, which win.

    Raises NotFoundError for a file that is not there, and UsageError with the place for whatever is wrong.
    """
    typed = {name: value for name, value in (more or {}).items() if value is not None}
    if isinstance(source, Mapping):
        origin, value = "spec", dict(source)
    else:
        origin, value = str(source), _document(str(source), typed)
    if not isinstance(value, dict):
        raise UsageError(f"{origin}: a spec is a mapping, such as: notebook: train.ipynb")
    common, besides = value.get("parameters"), typed.get("parameters")
    if isinstance(common, Mapping) and isinstance(besides, Mapping):
        typed["parameters"] = {**common, **besides}
    return take_apart({**value, **typed}, origin)


def _document(name: str, typed: Mapping[str, Any]) -> Any:
    path = Path(name)
    if path.suffix == ".ipynb":
        raise UsageError(f"{name} is a notebook; a grid of it: grd sweep {shlex.quote(name)} -g NAME VALUES")
    if path.suffix.lower() not in documents.SUFFIXES:
        documents.read_text(path, name)
        raise UsageError(f"{name}: a spec is a file that ends with {', '.join(documents.SUFFIXES)}")
    if path.suffix.lower() == ".csv":
        _need_notebook(name, typed)
        return {"file": name}
    value = documents.parse(documents.read_text(path, name), path.suffix.lower(), name)
    if isinstance(value, list):
        _need_notebook(name, typed)
        return {"list": value}
    return value


def _need_notebook(name: str, typed: Mapping[str, Any]) -> None:
    if "notebook" not in typed and "notebooks" not in typed:
        raise UsageError(f"{name} has parameters and no notebook; add --notebook NOTEBOOK")


def take_apart(document: dict[str, Any], origin: str) -> Spec:
    """Check the words of a spec and list its runs. Raises UsageError, NotFoundError for a missing file."""
    documents.check_storable(document, origin)
    _check_keys(document, BATCH_KEYS, origin)
    common = _mapping(document.get("parameters"), f"{origin}: parameters")
    for name in ("grid", "zip"):
        twice = [each for each in common if each in _mapping(document.get(name), f"{origin}: {name}")]
        if twice:
            raise UsageError(f"{origin}: {twice[0]!r} stands in parameters and in {name}: one of them")
    notebooks = _notebooks(document, origin)
    choices = [
        list(found)
        for name in SOURCES
        if document.get(name) is not None
        for found in [_SOURCES[name](document[name], f"{origin}: {name}")]
    ]
    rows: list[Row] = []
    _check_size(choices, notebooks, origin)
    if choices or document.get("runs") is None:
        for combined in itertools.product(*choices):
            row = _combine(combined, common, origin)
            rows += [
                Row(place=row.place, parameters=row.parameters, settings={"notebook": notebook})
                for notebook in notebooks or [""]
            ]
    rows += _runs(document.get("runs"), common, notebooks, f"{origin}: runs")
    if not rows:
        raise UsageError(f"{origin}: no runs")
    for row in rows:
        if not row.settings.get("notebook"):
            raise UsageError(f"{row.place}: no notebook; add: notebook: NOTEBOOK")
    made_of_rows = {"notebook", "notebooks", "parameters", "runs", *SOURCES}
    settings = {name: value for name, value in document.items() if name not in made_of_rows}
    _check_settings(settings, origin)
    return Spec(origin=origin, document=document, rows=rows, settings=settings)


def _grid(value: Any, place: str) -> list[Row]:
    axes = {name: _values(each, f"{place}.{name}") for name, each in _mapping(value, place).items()}
    if not axes:
        raise UsageError(f"{place} is empty")
    return [
        Row(place=place, parameters=dict(zip(axes, values, strict=True)))
        for values in _product(list(axes.values()), place)
    ]


def _zip(value: Any, place: str) -> list[Row]:
    axes = {name: _values(each, f"{place}.{name}") for name, each in _mapping(value, place).items()}
    lengths = {name: len(values) for name, values in axes.items()}
    if not axes:
        raise UsageError(f"{place} is empty")
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UsageError(f"{place}: lists that go together must be equally long ({told})")
    return [
        Row(place=f"{place}[{at}]", parameters=dict(zip(axes, values, strict=True)))
        for at, values in enumerate(zip(*axes.values(), strict=True))
    ]


def _list(value: Any, place: str) -> list[Row]:
    if not isinstance(value, list) or not value:
        raise UsageError(f"{place}: a list of parameter sets, such as: - {{lr: 0.1, seed: 1}}")
    return [
        Row(place=f"{place}[{at}]", parameters=_mapping(each, f"{place}[{at}]"))
        for at, each in enumerate(value)
    ]


def _file(value: Any, place: str) -> list[Row]:
    if not isinstance(value, str | Path):
        raise UsageError(f"{place}: the name of a file ({', '.join(documents.SUFFIXES)})")
    path = Path(value)
    if path.suffix.lower() not in documents.SUFFIXES:
        raise UsageError(f"{place}: {value} does not end with {', '.join(documents.SUFFIXES)}")
    found = documents.parse(documents.read_text(path, f"{value} ({place})"), path.suffix.lower(), str(value))
    if path.suffix.lower() == ".csv":
        if not found:
            raise UsageError(f"{value}: no rows")
        return [Row(place=f"{value}: line {line}", parameters=values) for line, values in found]
    documents.check_storable(found, str(value))
    return _list(found, str(value))


_SOURCES = {"grid": _grid, "zip": _zip, "list": _list, "file": _file}


def _runs(value: Any, common: dict[str, Any], notebooks: Sequence[str], place: str) -> list[Row]:
    if value is None:
        return []
    if not isinstance(value, list) or not value:
        raise UsageError(f"{place}: a list of runs, such as: - {{notebook: a.ipynb, name: first}}")
    rows = []
    for at, each in enumerate(value):
        where = f"{place}[{at}]"
        run = _mapping(each, where)
        _check_keys(run, RUN_KEYS, where)
        settings = {name: item for name, item in run.items() if name != "parameters"}
        _check_settings(settings, where)
        parameters = {**common, **_mapping(run.get("parameters"), f"{where}.parameters")}
        for notebook in [run["notebook"]] if run.get("notebook") else (notebooks or [""]):
            rows.append(Row(place=where, parameters=parameters, settings={**settings, "notebook": notebook}))
    return rows


def _combine(rows: Sequence[Row], common: dict[str, Any], origin: str) -> Row:
    found: dict[str, Any] = {}
    for row in rows:
        twice = set(found) & set(row.parameters)
        if twice:
            raise UsageError(f"{row.place}: {sorted(twice)[0]!r} stands in another list of the spec too")
        found.update(row.parameters)
    place = ", ".join(dict.fromkeys(row.place.removeprefix(f"{origin}: ") for row in rows))
    return Row(place=f"{origin}: {place}" if place else origin, parameters={**common, **found})


def _product(axes: list[list[Any]], place: str) -> Any:
    _check_count([len(axis) for axis in axes], place)
    return itertools.product(*axes)


def _check_size(choices: list[list[Row]], notebooks: Sequence[str], origin: str) -> None:
    _check_count([*map(len, choices), max(1, len(notebooks))], origin)


def _check_count(lengths: list[int], place: str) -> None:
    count = 1
    for length in lengths:
        count *= length
    if count > MOST_RUNS:
        raise UsageError(f"{place}: {count:,} runs; a batch has at most {MOST_RUNS:,}")


def _values(value: Any, place: str) -> list[Any]:
    """The values of one parameter: a list, a range, or text as in ``grd sweep -g``."""
    if isinstance(value, str):
        return _placed(split_values, value, place)
    if isinstance(value, list):
        found: list[Any] = []
        for each in value:
            found += _placed(numbers, each, place) if is_range(each) else [each]
        if not found:
            raise UsageError(f"{place} is empty")
        return found
    if isinstance(value, Mapping) or value is None:
        raise UsageError(f"{place}: a list of values, such as [0.1, 0.01], or a range such as 1..3")
    return [value]


def _placed(read: Any, value: str, place: str) -> list[Any]:
    try:
        return list(read(value))
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from None


def _notebooks(document: Mapping[str, Any], origin: str) -> list[str]:
    one, many = document.get("notebook"), document.get("notebooks")
    if one is not None and many is not None:
        raise UsageError(f"{origin}: notebook or notebooks, not both")
    found = [one] if one is not None else ([] if many is None else many)
    if not isinstance(found, list) or not all(isinstance(each, str | Path) and each for each in found):
        raise UsageError(f"{origin}: a notebook is the name of a file")
    return [str(each) for each in found]


def _mapping(value: Any, place: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise UsageError(f"{place} must be a mapping of names to values")
    return dict(value)


def _check_keys(value: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    for name in value:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
            raise UsageError(f"{place}: unknown key {name!r}; {hint}")


def _check_settings(settings: Mapping[str, Any], place: str) -> None:
    """The kinds of the simple values; durations and sizes are read where they are used."""
    for name, value in settings.items():
        switch = name in ("fail_fast", "allow_unknown")
        if switch and not isinstance(value, bool):
            raise UsageError(f"{place}: {name} is true or false, not {value!r}")
        least = {"jobs": 1, "max_attempts": 1, "gpus": 0}.get(name)
        if least is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise UsageError(f"{place}: {name} is a number from {least} on, not {value!r}")
        if name == "max_attempts" and value > MOST_ATTEMPTS:
            raise UsageError(f"{place}: max_attempts is at most {MOST_ATTEMPTS}, not {value!r}")
        if name == "gpu_pool" and value not in POOLS:
            raise UsageError(f"{place}: gpu_pool is one of {', '.join(POOLS)}, not {value!r}")
        if name in ("name", "kernel") and (not isinstance(value, str) or not value):
            raise UsageError(f"{place}: {name} is text, not {value!r}")
        if name == "inputs" and not (
            isinstance(value, list) and all(isinstance(each, str | Path) and str(each) for each in value)
        ):
            raise UsageError(f"{place}: inputs is a list of files and folders")
