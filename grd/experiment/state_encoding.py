"""Training state as data that loads without running code, and back.

What is not tensors, numbers, text and containers of them becomes a dictionary with the key ``__grd__``
that says what it was: numpy arrays as .npy bytes, sets, and (only if asked) pickled objects.
"""

from __future__ import annotations

import datetime
import enum
import io
import math
import pickle
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

from grd.errors import CheckpointRefused

MARK = "__grd__"


def encode(
    value: Any, *, allow_pickle: bool = False, blob: Callable[[bytes], Any] = bytes, where: str = ""
) -> Any:
    """``value`` with only what ``torch.load(weights_only=True)`` accepts; unchanged parts are not copied.

    ``blob`` stores the bytes of arrays and pickles. Raises CheckpointRefused naming the key of what would
    need code to be loaded; with ``allow_pickle`` that is pickled instead.
    """
    try:
        return _Encoder(allow_pickle, blob).encode(value, where)
    except RecursionError:
        raise CheckpointRefused(f"cannot store {where or 'the state'}: it contains itself") from None


class _Encoder:
    def __init__(self, allow_pickle: bool, blob: Callable[[bytes], Any]) -> None:
        self.allow_pickle = allow_pickle
        self.blob = blob
        self.torch = sys.modules.get("torch")
        self.numpy = sys.modules.get("numpy")
        self.trusted: set[Any] = set()
        if self.torch is not None:
            torch = self.torch
            self.trusted = {torch.Tensor, torch.nn.Parameter, torch.Size, torch.dtype, torch.device}
            listed = getattr(torch.serialization, "get_safe_globals", None)
            if listed is not None:
                self.trusted.update(item for item in listed() if isinstance(item, type))

    def encode(self, value: Any, where: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, float, str, bytes, complex) or kind in self.trusted:
            return value
        if kind is dict or kind is OrderedDict or kind is defaultdict or kind is Counter:
            return self._mapping(value, where)
        if kind is list or kind is tuple:
            items = [self.encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return kind(items)
        if kind in (set, frozenset):
            return {MARK: kind.__name__, "items": [self.encode(item, f"{where}{{}}") for item in value]}
        if kind is bytearray:
            return bytes(value)
        if self.numpy is not None:
            if isinstance(value, self.numpy.generic):
                item = value.item()
                if type(item) in (bool, int, float, complex, str, bytes):
                    return item
            elif kind is self.numpy.ndarray and not value.dtype.hasobject:
                stream = io.BytesIO()
                self.numpy.save(stream, value, allow_pickle=False)
                return {MARK: "npy", "data": self.blob(stream.getvalue())}
        if self.torch is not None and isinstance(value, self.torch.Tensor) and kind.__module__ == "torch.nn":
            return value
        for base in (bool, int, float, str, bytes):
            if isinstance(value, base):  # an enum, an epoch, a numpy float: the plain value is what counts
                plain: Any = value.value if isinstance(value, enum.Enum) else value
                return base(plain)
        if self.allow_pickle:
            try:
                return {MARK: "pickle", "data": self.blob(pickle.dumps(value, protocol=4))}
            except Exception as error:
                raise CheckpointRefused(f"cannot store {where}: {error}") from error
        raise CheckpointRefused(
            f"cannot store {where or 'the state'} ({kind.__module__}.{kind.__qualname__}): it would need "
            "code to be loaded; store its numbers, text or state_dict(), or pass allow_pickle=True"
        )

    def _mapping(self, value: Any, where: str) -> Any:
        plain_keys = True
        changed = type(value) is defaultdict
        items = []
        for key, item in value.items():
            new_key = self.encode(key, f"key {key!r} of {where or 'the state'}")
            new_item = self.encode(item, f"{where}.{key}" if where else str(key))
            changed = changed or new_key is not key or new_item is not item
            plain_keys = plain_keys and not isinstance(new_key, dict) and new_key != MARK
            items.append((new_key, new_item))
        if not plain_keys:
            return {MARK: "dict", "items": [list(pair) for pair in items]}
        if not changed:
            return value
        if type(value) is OrderedDict:
            ordered = OrderedDict(items)
            vars(ordered).update(vars(value))  # modules keep the versions of their parameters there
            return ordered
        return dict(items)


def decode(value: Any, *, allow_pickle: bool = False, where: str = "") -> Any:
    """Undo `encode`. Raises CheckpointRefused for a pickled object unless ``allow_pickle``."""
    if isinstance(value, Mapping):
        mark = value.get(MARK)
        if mark == "npy":
            import numpy

            return numpy.load(io.BytesIO(_as_bytes(value["data"])), allow_pickle=False)
        if mark == "pickle":
            if not allow_pickle:
                raise CheckpointRefused(
                    f"{where or 'the state'} holds a pickled object, which runs code when it is loaded; pass "
                    "allow_pickle=True if you trust the folder"
                )
            return pickle.loads(_as_bytes(value["data"]))
        if mark in ("set", "frozenset"):
            items = [decode(item, allow_pickle=allow_pickle, where=where) for item in value["items"]]
            return set(items) if mark == "set" else frozenset(items)
        if mark == "dict":
            return {
                decode(key, allow_pickle=allow_pickle, where=where): decode(
                    item, allow_pickle=allow_pickle, where=f"{where}.{key}"
                )
                for key, item in value["items"]
            }
        for key in list(value):
            item = value[key]
            new = decode(item, allow_pickle=allow_pickle, where=f"{where}.{key}" if where else str(key))
            if new is not item:
                value[key] = new  # type: ignore[index]
        return value
    if type(value) in (list, tuple):
        items = [
            decode(item, allow_pickle=allow_pickle, where=f"{where}[{i}]") for i, item in enumerate(value)
        ]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(items)
    return value


def _as_bytes(data: Any) -> bytes:
    if isinstance(data, (bytes, bytearray)):
        return bytes(data)
    return bytes(data.numpy().tobytes()) if data.numel() else b""


def as_json(value: Any, where: str = "metadata") -> Any:
    """``value`` as JSON data: paths and dates as text, sets and arrays as lists, NaN and infinities as null.

    Raises CheckpointRefused naming the key of anything else.
    """
    if hasattr(value, "tolist") and type(value).__module__.split(".")[0] in ("numpy", "torch"):
        value = value.tolist()
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, (bool, str)):
        return value if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, Mapping):
        return {str(key): as_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted((as_json(item, where) for item in value), key=repr)
    raise CheckpointRefused(
        f"cannot store {where} ({type(value).__module__}.{type(value).__qualname__}): metadata must be JSON "
        "data; put state into state= instead"
    )
