"""Reading what a run prints, from its beginning and as it comes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grd.runs import notebook_journal
from grd.runs.folder import AttemptFolder
from grd.steps.run import text_of

POLL_SECONDS = 0.1


def tail_of_file(path: Path, goes_on: Callable[[], bool]) -> Iterator[str]:
    """The text of ``path`` so far, then what is appended, until ``goes_on`` says no. Nothing if missing."""
    try:
        stream = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115 (closed below)
    except OSError:
        return
    with stream:
        yield stream.read()
        while True:
            under_way = goes_on()
            text = stream.read()
            if text:
                yield text
            elif not under_way:
                return
            else:
                time.sleep(POLL_SECONDS)


def tail_of_cells(attempt: AttemptFolder, goes_on: Callable[[], bool]) -> Iterator[str]:
    """What the cells printed so far, then what they go on to print, until ``goes_on`` says no.

    Nothing if there is no notebook yet and none comes. The journal is opened before the notebook is read
    and stays readable when its end removes it.
    """
    while True:
        under_way = goes_on()
        try:
            journal = open(attempt.journal, "rb")  # noqa: SIM115 (closed below)
        except OSError:
            journal = None
        try:
            notebook = notebook_journal.rebuild(attempt.output, attempt.journal)
            break
        except (OSError, ValueError):
            if journal is not None:
                journal.close()
            if not under_way:
                return
            time.sleep(POLL_SECONDS)
    if journal is None:
        yield text_of(notebook)
        return
    with journal:
        # Read once more to a known end: what `rebuild` saw and where following begins must be one place.
        seen = journal.read()
        whole = seen[: seen.rfind(b"\n") + 1]
        if not notebook["metadata"].get("grd", {}).get("complete"):
            notebook = _replayed(attempt, whole)
        yield text_of(notebook)
        rest = seen[len(whole) :]
        while True:
            under_way = goes_on()
            rest += journal.read()
            lines, newline, rest_ = rest.rpartition(b"\n")
            rest = rest_
            if newline:
                yield "".join(_text_of_entry(line) for line in lines.split(b"\n"))
            elif not under_way:
                return
            else:
                time.sleep(POLL_SECONDS)


def _replayed(attempt: AttemptFolder, journal: bytes) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(attempt.output.read_text(encoding="utf-8"))
    for line in journal[int(notebook["metadata"].get("grd", {}).get("journal_bytes", 0)) :].split(b"\n"):
        entry = _entry(line)
        if entry is not None:
            notebook_journal.apply(notebook, entry)
    return notebook


def _text_of_entry(line: bytes) -> str:
    entry = _entry(line)
    if entry is None or entry.get("op") != notebook_journal.OUTPUT:
        return ""
    return text_of({"cells": [{"outputs": [entry["output"]]}]})


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
