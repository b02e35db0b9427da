"""How much output a notebook keeps: the first half of the limit and the last half, and a note between them.

`OutputLimit` is pure bookkeeping: it hears of every output and says which earlier ones to leave out. An
output is known by its cell and its position there; what is left out keeps its position, empty, so that
later updates of displays still find theirs.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Kept:
    cell: int
    at: int
    size: int


@dataclass
class _LeftOut:
    at: int
    outputs: int = 0
    size: int = 0


@dataclass(frozen=True)
class Omission:
    """Put ``text`` in the place of output ``at`` of ``cell``."""

    cell: int
    at: int
    text: str


@dataclass
class OutputLimit:
    """Decides what is kept of ``limit`` bytes; None keeps everything."""

    limit: int | None
    _head: dict[int, int] = field(default_factory=dict)
    _head_size: int = 0
    _tail: deque[_Kept] = field(default_factory=deque)
    _tail_size: int = 0
    _notes: dict[int, _LeftOut] = field(default_factory=dict)
    _left_out: bool = False

    def add(self, cell: int, at: int, size: int) -> list[Omission]:
        """Hear of ``size`` more bytes at position ``at`` of ``cell``; returns what must go for them."""
        if self.limit is None:
            return []
        half = self.limit // 2
        if not self._tail and self._head_size + size <= half:
            self._head[cell] = self._head.get(cell, 0) + size
            self._head_size += size
            return []
        last = self._tail[-1] if self._tail else None
        if last is not None and (last.cell, last.at) == (cell, at):
            last.size += size
        else:
            self._tail.append(_Kept(cell, at, size))
        self._tail_size += size
        omissions: list[Omission] = []
        while self._tail_size > half and len(self._tail) > 1:
            omissions += self._leave_out(self._tail.popleft())
        return omissions

    def cleared(self, cell: int) -> None:
        """Hear that all outputs of ``cell``, which is the last one so far, were cleared."""
        self._head_size -= self._head.pop(cell, 0)
        self._notes.pop(cell, None)
        while self._tail and self._tail[-1].cell == cell:
            self._tail_size -= self._tail.pop().size

    def shortened(self, text: str) -> str:
        """A single text that is longer than a quarter of the limit: its own head and tail."""
        if self.limit is None or len(text) <= self.limit // 4:
            return text
        self._left_out = True
        part = self.limit // 8
        return f"{text[:part]}\n{self._note(1, len(text) - 2 * part)}{text[-part:]}"

    @property
    def left_out(self) -> bool:
        """Whether anything was left out so far."""
        return self._left_out

    def _leave_out(self, kept: _Kept) -> list[Omission]:
        self._tail_size -= kept.size
        self._left_out = True
        note = self._notes.setdefault(kept.cell, _LeftOut(kept.at))
        note.outputs += 1
        note.size += kept.size
        omissions = [Omission(kept.cell, note.at, self._note(note.outputs, note.size))]
        if kept.at != note.at:
            omissions.append(Omission(kept.cell, kept.at, ""))
        return omissions

    def _note(self, outputs: int, size: int) -> str:
        what = "output" if outputs == 1 else "outputs"
        limit = readable_size(self.limit or 0)
        return (
            f"[grd: {readable_size(size)} in {outputs:,} {what} left out here; "
            f"a run keeps the first and the last of {limit}: --max-output]\n"
        )


def readable_size(size: int) -> str:
    """``size`` bytes as people write them, in powers of ten."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} bytes"


def output_size(output: dict[str, Any]) -> int:
    """About how many bytes ``output`` takes in a notebook: the characters of its texts."""
    kind = output.get("output_type")
    if kind == "stream":
        return len(output["text"]) + 64
    if kind == "error":
        return sum(len(line) for line in output.get("traceback", ())) + 64
    return 64 + sum(_characters(value) for value in output.get("data", {}).values())


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(str(key)) + _characters(inner) for key, inner in value.items())
    if isinstance(value, list):
        return sum(_characters(inner) for inner in value)
    return len(str(value))
