"""The notebook on disk: a snapshot and the journal of what came after it.

A snapshot is the whole .ipynb, replaced atomically. The journal has one JSON line for each cell event and
output. ``metadata.grd.journal_bytes`` of a snapshot says how much of the journal it already holds, so that
`rebuild` gives the notebook as it was when the last journal line was written. The same `apply` keeps the
writer's own copy, so what is rebuilt is what was meant. A journal that has become long is started again
after a snapshot; ``journal_part`` of both says whether they belong together.

Everything here is plain JSON values (dicts, lists), no nbformat: recovery runs inside ``grd status``.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from grd.files import read_json, read_json_lines

Notebook = dict[str, Any]

CELL = "cell"  # i, metadata (papermill's), execution_count, execution (nbclient's times)
OUTPUT = "output"  # i, output
CLEAR = "clear"  # i
UPDATE = "update"  # i, at, data, metadata: an earlier display was updated in place
OMIT = "omit"  # i, at, text: an output was left out; text says so, or is empty where a neighbour says it
HEADER = "header"  # papermill, grd: metadata of the notebook
WIDGETS = "widgets"  # widgets, language_info
PART = "part"  # part: first line of a journal that was started again

MERGED_STREAM_CHARACTERS = 65_536
"""Neighbouring pieces of stdout or stderr become one output up to this length: a bar that prints 100,000
times is not 100,000 outputs, and joining stays linear in what was printed."""


def apply(notebook: Notebook, entry: dict[str, Any]) -> int | None:
    """Apply one journal entry in place; returns the index of the cell it changed, None for the header.

    An entry that does not fit (a journal of another notebook) is ignored.
    """
    kind = entry.get("op")
    if kind == HEADER:
        for name in ("papermill", "grd"):
            if name in entry:
                notebook["metadata"].setdefault(name, {}).update(entry[name])
        return None
    if kind == WIDGETS:
        notebook["metadata"].update(entry["metadata"])
        return None
    index = entry.get("i")
    if not isinstance(index, int) or not 0 <= index < len(notebook["cells"]):
        return None
    cell = notebook["cells"][index]
    if kind == CELL:
        cell["metadata"]["papermill"] = dict(entry["metadata"])
        if cell["cell_type"] == "code" and "execution_count" in entry:
            cell["execution_count"] = entry["execution_count"]
        if "execution" in entry:
            cell["metadata"]["execution"] = dict(entry["execution"])
    elif cell["cell_type"] != "code":
        return None
    elif kind == OUTPUT:
        append_output(cell.setdefault("outputs", []), entry["output"])
    elif kind == CLEAR:
        cell["outputs"] = []
    elif kind == UPDATE:
        outputs = cell.get("outputs", [])
        if 0 <= entry["at"] < len(outputs):
            outputs[entry["at"]] = {
                **outputs[entry["at"]],
                "data": entry["data"],
                "metadata": entry["metadata"],
            }
    elif kind == OMIT:
        outputs = cell.get("outputs", [])
        if 0 <= entry["at"] < len(outputs):
            outputs[entry["at"]] = omitted(entry["text"])
    return index


def append_output(outputs: list[Any], output: Any) -> int:
    """Append one output, or join it to the stream that it goes on with; returns its position.

    Nothing in ``outputs`` is changed in place: an output may belong to several documents.
    """
    last = outputs[-1] if outputs else None
    if (
        last is not None
        and output["output_type"] == last["output_type"] == "stream"
        and output["name"] == last["name"]
        and len(last["text"]) + len(output["text"]) <= MERGED_STREAM_CHARACTERS
    ):
        outputs[-1] = type(last)(last, text=last["text"] + output["text"])
    else:
        outputs.append(output)
    return len(outputs) - 1


def omitted(text: str) -> dict[str, Any]:
    """What stands in the place of an output that was left out."""
    return {"output_type": "stream", "name": "stderr", "text": text}


def rebuild(snapshot: Path, journal: Path) -> Notebook:
    """The notebook as it was when the last journal line was written.

    Raises OSError or ValueError if the snapshot cannot be read; a missing journal means nothing came after.
    """
    notebook: Notebook = read_json(snapshot)
    state = notebook["metadata"].get("grd", {})
    if state.get("complete"):
        return notebook
    part = int(state.get("journal_part", 0))
    if journal_part(journal) != part:
        return notebook  # the journal is older than the snapshot, which was written before it was restarted
    _join_lines(notebook)
    for _, entry in read_json_lines(journal, int(state.get("journal_bytes", 0))):
        apply(notebook, entry)
    return notebook


def _join_lines(notebook: Notebook) -> None:
    """Texts as one string each, as entries have them: the file holds lists of lines."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if isinstance(output.get("text"), list):
                output["text"] = "".join(output["text"])


def journal_part(journal: Path) -> int:
    """How many times the journal was restarted, as its first line says."""
    for _, entry in itertools.islice(read_json_lines(journal), 1):
        if entry.get("op") == PART:
            return int(entry["part"])
    return 0


def without_empty(outputs: list[Any]) -> list[Any]:
    """``outputs`` without the empty places of what was left out."""
    return [output for output in outputs if output.get("output_type") != "stream" or output["text"]]


def mark_lost(notebook: Notebook) -> Notebook:
    """Say of a notebook whose runner died what is known: the running cell was interrupted."""
    for cell in notebook["cells"]:
        papermill = cell["metadata"].get("papermill", {})
        if papermill.get("status") == "running":
            papermill["status"] = "interrupted"
            papermill["exception"] = True
            notebook["metadata"].setdefault("papermill", {})["exception"] = True
    return notebook


def count_cells(notebook: Notebook) -> dict[str, int]:
    """Number of code cells by papermill status."""
    counts: dict[str, int] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            status = cell["metadata"].get("papermill", {}).get("status", "pending")
            counts[status] = counts.get(status, 0) + 1
    return counts
