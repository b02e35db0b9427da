"""The .ipynb file of a notebook, byte for byte as nbformat writes it, in pieces.

nbformat makes a deep copy of the notebook, a second one of its lines, a list of every token and a string
of all of it: four times the outputs in memory. Here an output is gone before the next one is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grd.runs.notebook_journal import Notebook, without_empty

PIECE_CHARACTERS = 262_144
"""Pieces are written once they are so long; one long output makes a longer piece."""

_SPLIT_KINDS = ("application/javascript", "image/svg+xml")
_TRANSIENT_OF_NOTEBOOK = ("orig_nbformat", "orig_nbformat_minor", "signature")
_TRANSIENT_OF_CELL = ("trusted",)


def _from_bytes(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("ascii")
    raise TypeError(f"a notebook cannot hold a {type(value).__name__}")


_PLACE_OF_OUTPUTS = '\n   "outputs": []'
"""In a cell without outputs; nowhere else is this key at this depth."""

_string = json.JSONEncoder(ensure_ascii=False).encode


class NotebookFile:
    """The bytes of ``notebook``'s file; may be gone through more than once. Plain dicts or NotebookNodes."""

    def __init__(self, notebook: Notebook) -> None:
        self._notebook = notebook
        self.size = 0
        """Bytes in all, once they have been gone through."""

    def __iter__(self) -> Iterator[bytes]:
        self.size = 0
        gathered: list[str] = []
        length = 0
        for text in _texts(self._notebook):
            gathered.append(text)
            length += len(text)
            if length >= PIECE_CHARACTERS:
                yield self._piece(gathered)
                gathered, length = [], 0
        yield self._piece(gathered)

    def _piece(self, texts: list[str]) -> bytes:
        # surrogates from a kernel's undecodable bytes must not lose the rest of the notebook
        piece = "".join(texts).encode("utf-8", "replace")
        self.size += len(piece)
        return piece

    def is_stored_in(self, path: Path) -> bool:
        """Whether ``path`` holds exactly these bytes; no file, or one that cannot be read, does not."""
        try:
            with open(path, "rb") as stream:
                return all(stream.read(len(piece)) == piece for piece in self) and not stream.read(1)
        except OSError:
            return False


def _texts(notebook: Notebook) -> Iterator[str]:
    """The file's text: one string for each output, cell, and other part."""
    # Positions count for the journal's later entries; after the last one there are none.
    ended = notebook["metadata"].get("grd", {}).get("complete", True)
    begin = "{\n "
    for key in sorted(notebook):
        yield f"{begin}{_string(key)}: "
        if key == "cells" and notebook[key]:
            before = "["
            for cell in notebook[key]:
                yield before + "\n  "
                yield from _cell(cell, ended)
                before = ","
            yield "\n ]"
        elif key == "metadata":
            yield _json(_without(notebook[key], _TRANSIENT_OF_NOTEBOOK), "\n ")
        else:
            yield _json(notebook[key], "\n ")
        begin = ",\n "
    yield "\n}\n"


def _cell(cell: dict[str, Any], ended: bool) -> Iterator[str]:
    shown = {**cell, "source": _lines(cell.get("source", ""))}
    if "metadata" in cell:
        shown["metadata"] = _without(cell["metadata"], _TRANSIENT_OF_CELL)
    if "attachments" in cell:
        shown["attachments"] = {name: _bundle(bundle) for name, bundle in cell["attachments"].items()}
    outputs: list[Any] = []
    if cell["cell_type"] == "code":
        outputs = without_empty(cell.get("outputs", [])) if ended else list(cell.get("outputs", []))
        shown["outputs"] = []
    before, place, after = _json(shown, "\n  ").partition(_PLACE_OF_OUTPUTS)
    yield before
    begin = _PLACE_OF_OUTPUTS[:-1]
    for output in outputs:
        yield begin + "\n    " + _json(_output(output), "\n    ")
        begin = ","
    yield ("\n   ]" if outputs else place) + after


def _output(output: dict[str, Any]) -> dict[str, Any]:
    shown = dict(output)
    if "text" in shown:
        shown["text"] = _lines(shown["text"])
    if isinstance(shown.get("data"), dict):
        shown["data"] = _bundle(shown["data"])
    return shown


def _bundle(bundle: Any) -> Any:
    """A MIME bundle with its texts in lines, of the kinds that nbformat splits."""
    if not isinstance(bundle, dict):
        return bundle
    return {
        kind: _lines(value) if kind.startswith("text/") or kind in _SPLIT_KINDS else value
        for kind, value in bundle.items()
    }


def _lines(text: Any) -> Any:
    return text.splitlines(True) if isinstance(text, str) else text


def _without(metadata: Any, names: tuple[str, ...]) -> Any:
    if not any(name in metadata for name in names):
        return metadata
    return {name: value for name, value in metadata.items() if name not in names}


def _json(value: Any, newline: str) -> str:
    parts: list[str] = []
    _add(parts, value, newline)
    return "".join(parts)


def _add(parts: list[str], value: Any, newline: str) -> None:
    """As ``json.dumps(value, indent=1, sort_keys=True)``, which takes twice as long for lists of lines."""
    inner = newline + " "
    if isinstance(value, dict) and value:
        begin = "{" + inner
        for key in sorted(value):
            # JSON's own rule for keys that are no strings
            name = _string(key) if isinstance(key, str) else json.dumps({key: 0})[1:-4]
            parts.append(f"{begin}{name}: ")
            _add(parts, value[key], inner)
            begin = "," + inner
        parts.append(newline + "}")
    elif isinstance(value, (list, tuple)) and value:
        if all(isinstance(item, str) for item in value):
            parts.append("[" + inner + ("," + inner).join(map(_string, value)) + newline + "]")
            return
        begin = "[" + inner
        for item in value:
            parts.append(begin)
            _add(parts, item, inner)
            begin = "," + inner
        parts.append(newline + "]")
    elif isinstance(value, str):
        parts.append(_string(value))
    else:
        parts.append(json.dumps(value, default=_from_bytes))
