"""What GPUs can do at most by their datasheets: `peaks.toml`, and the matching of device names to its rows.

A name has an answer only if all of it is known. Guessing from a part of a name takes a T400 for a T4, a
laptop's 4090 for a 4090, and a slice of an A100 for the whole card.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

DTYPES = ("fp32", "tf32", "bf16", "fp16")

_SPELLINGS = {
    "float32": "fp32", "float": "fp32", "single": "fp32", "f32": "fp32",
    "tensorfloat32": "tf32",
    "bfloat16": "bf16",
    "float16": "fp16", "half": "fp16", "f16": "fp16",
}  # fmt: skip
NVIDIA, AMD = "NVIDIA", "AMD"
GIBIBYTE = 1024**3
WHOLE = 0.8
"""Drivers and firmware keep a few hundredths of a card's memory for themselves, and never a fifth."""


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """One row: dense TFLOP/s by number type, memory in GB, bandwidth in GB/s, the source; None is unknown."""

    maker: str
    tflops: Mapping[str, float | None]
    memory_gb: float | None
    bandwidth_gbs: float | None
    source: str


def _row(table: Mapping[str, Any]) -> Peaks:
    return Peaks(
        maker=table.get("maker", NVIDIA),
        tflops=MappingProxyType({name: table.get(name) for name in DTYPES}),
        memory_gb=table.get("memory_gb"),
        bandwidth_gbs=table.get("bandwidth_gbs"),
        source=table["source"],
    )


@cache
def peak_table() -> tuple[tuple[re.Pattern[str], Peaks], ...]:
    """All rows, each with the pattern of the names it is for (without the maker, with single spaces)."""
    tables = tomllib.loads((Path(__file__).parent / "peaks.toml").read_text("utf-8"))["gpu"]
    return tuple(
        (re.compile("|".join(f"(?:{name})" for name in table["names"]), re.IGNORECASE), _row(table))
        for table in tables
    )


def peaks_of(name: object, memory_gb: float | None = None) -> Peaks | None:
    """The row for a device of this name, as NVML or torch report it; None unless all of the name is known.

    A maker in the name must be the row's own. ``memory_gb`` (GiB) is what the device has, where that is
    known: a partition of an AMD card has the whole card's name, but neither its memory nor its rates.
    """
    if not isinstance(name, str):
        return None
    maker, *rest = name.split() or [""]
    named = maker.upper() in (NVIDIA, AMD)
    short = " ".join(rest if named else [maker, *rest])
    row = next((row for pattern, row in peak_table() if pattern.fullmatch(short)), None)
    if row is None or (named and maker.upper() != row.maker):
        return None
    if row.memory_gb and memory_gb and memory_gb * GIBIBYTE < WHOLE * 1e9 * row.memory_gb:
        return None
    return row


def number_type(dtype: str) -> str | None:
    """``dtype`` as one of `DTYPES`; torch's spelling too ("torch.bfloat16"). None for any other."""
    spelled = str(dtype).strip().lower().removeprefix("torch.")
    known = _SPELLINGS.get(spelled, spelled)
    return known if known in DTYPES else None


def peak_tflops(name: object, dtype: str, memory_gb: float | None = None) -> float | None:
    """The datasheet's dense TFLOP/s of the device called ``name`` in ``dtype``; None where it is not known.

    ``memory_gb`` as in `peaks_of`.

    ``dtype`` is fp32, tf32, bf16 or fp16, in torch's spelling too ("torch.bfloat16"). fp16 accumulates in
    fp32, as PyTorch does. Never an estimate: unknown names and types, parts of cards (MIG) and virtual GPUs
    have no answer.
    """
    row = peaks_of(name, memory_gb)
    if row is None:
        return None
    kind = number_type(dtype)
    return None if kind is None else row.tflops[kind]
