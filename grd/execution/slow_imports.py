"""Importing jsonschema, which nbformat and papermill need, without what takes longest and they never use."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from typing import Any

_GRAMMAR = "rfc3987_syntax"


def import_jsonschema() -> None:
    """Import jsonschema; its check of the formats ``iri`` and ``iri-reference`` loads its grammar once asked.

    Building that grammar, where it is installed, takes nine tenths of a second, longer than all of papermill;
    no notebook's schema has such a format. Harmless where jsonschema, or the grammar, is there or missing.
    """
    if "jsonschema" in sys.modules or _GRAMMAR in sys.modules or importlib.util.find_spec(_GRAMMAR) is None:
        return
    stand_in = types.ModuleType(_GRAMMAR)
    stand_in.is_valid_syntax = _is_valid_syntax  # type: ignore[attr-defined]
    sys.modules[_GRAMMAR] = stand_in
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("jsonschema")
    finally:
        sys.modules.pop(_GRAMMAR, None)


def _is_valid_syntax(term: str, value: str) -> Any:
    return importlib.import_module(_GRAMMAR).is_valid_syntax(term, value)
