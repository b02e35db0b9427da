"""Values as they are typed for a sweep: ``0.1,0.01``, ``1..3``, ``[64],[64,32]``, ``"a,b",c``."""

from __future__ import annotations

import json
import re
from typing import Any

from grd.errors import UsageError
from grd.execution.parameters import RawText

_RANGE = re.compile(r"\s*(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\s*")
_RANGE_LIKE = re.compile(r"\s*[-+.\d eE]+\.\.[-+.\d eE]+\s*")
MOST_VALUES = 100_000
MOST_DIGITS = 18
"""A range beyond that is a slip of the finger, and would take the memory before anybody could see it."""

WIDEST = 40
"""Characters of a value in a line or a table."""

_CLOSING = {"[": "]", "{": "}", "(": ")"}


def split_values(text: str) -> list[Any]:
    """The values in ``text``: separated by commas outside of brackets and quotes, whole numbers as ranges.

    ``1..3`` is 1, 2, 3 and ``0..10..5`` is 0, 5, 10. What is JSON in brackets or quotes is taken as JSON;
    the rest is text whose type the notebook decides (`RawText`). Raises UsageError.
    """
    found: list[Any] = []
    for piece in _pieces(text):
        whole = _RANGE.fullmatch(piece)
        if whole is not None:
            found += numbers(whole[0].strip())
        elif _RANGE_LIKE.fullmatch(piece):
            raise UsageError(f"{piece.strip()!r} is no range: ranges are of whole numbers, such as 1..3")
        else:
            found.append(_value(piece.strip()))
    return found


def is_range(value: Any) -> bool:
    """Whether ``value`` is the text of a range."""
    return isinstance(value, str) and _RANGE.fullmatch(value) is not None


def numbers(text: str) -> list[int]:
    """The numbers of a range, both ends included. Raises UsageError for one that has none."""
    match = _RANGE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no range of whole numbers, such as 1..3")
    if max(map(len, filter(None, match.groups()))) > MOST_DIGITS:
        raise UsageError(f"the range {text[:40]}... has numbers of over {MOST_DIGITS} digits")
    first, last = int(match[1]), int(match[2])
    step = int(match[3]) if match[3] is not None else (1 if last >= first else -1)
    if step == 0 or (last - first) * step < 0:
        raise UsageError(f"the range {text.strip()} has no numbers")
    count = (last - first) // step + 1
    if count > MOST_VALUES:
        many = f"{count:,}" if count < 10**18 else "too many"
        raise UsageError(f"the range {text.strip()[:80]} has {many} numbers; at most {MOST_VALUES:,}")
    return list(range(first, last + (1 if step > 0 else -1), step))


def _pieces(text: str) -> list[str]:
    pieces, open_brackets, quote, start = [], [], "", 0
    for at, sign in enumerate(text):
        if quote:
            if sign == quote and text[at - 1] != "\\":
                quote = ""
        elif sign in "\"'":
            quote = sign
        elif sign in _CLOSING:
            open_brackets.append(_CLOSING[sign])
        elif open_brackets and sign == open_brackets[-1]:
            open_brackets.pop()
        elif sign == "," and not open_brackets:
            pieces.append(text[start:at])
            start = at + 1
    pieces.append(text[start:])
    if quote or open_brackets:
        # No JSON after all, such as an apostrophe: then a comma is a comma.
        pieces = text.split(",")
    if any(not piece.strip() for piece in pieces):
        raise UsageError(f'{text!r} has an empty value; write "" for empty text')
    return pieces


def _value(text: str) -> Any:
    if text[0] in '[{"':
        try:
            return json.loads(text)
        except ValueError:
            return RawText(text)
    if len(text) > 1 and text[0] == text[-1] == "'":
        return text[1:-1]
    return RawText(text)


def value_text(value: Any) -> str:
    """A parameter's value for a line or a table: all its digits, and nothing that moves a cursor."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if not text.isprintable():
        text = f'"{one_line(text)}"'
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def one_line(text: str) -> str:
    """``text`` with its control characters and the like as Python writes them."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
