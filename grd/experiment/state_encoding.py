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
MAX_DEPTH = 200
"""Containers inside each other that can be stored: Python and pickle give up soon after."""

_LONGEST_INT_BITS = 1024  # torch's safe loader knows whole numbers of up to 255 bytes
_FACTORIES = {
    kind.__name__: kind
    for kind in (int, float, bool, str, bytes, list, dict, set, tuple, Counter, OrderedDict)
}


def named_factory(factory: Any) -> str | None:
    """The name by which a defaultdict's ``default_factory`` is stored; None where that cannot be."""
    if factory is None:
        return "None"
    return next((name for name, kind in _FACTORIES.items() if kind is factory), None)


def encode(
    value: Any, *, allow_pickle: bool = False, blob: Callable[[bytes], Any] = bytes, where: str = ""
) -> Any:
    """``value`` with only what ``torch.load(weights_only=True)`` accepts; unchanged parts are not copied.

    ``blob`` stores the bytes of arrays and pickles. Attributes that somebody gave to a tensor are left
    behind. Raises CheckpointRefused naming the key of what would need code to be loaded; with
    ``allow_pickle`` that is pickled instead.
    """
    return _Encoder(allow_pickle, blob).encode(value, where, 0)


class _Encoder:
    def __init__(self, allow_pickle: bool, blob: Callable[[bytes], Any]) -> None:
        self.allow_pickle = allow_pickle
        self.blob = blob
        self.torch = sys.modules.get("torch")
        self.numpy = sys.modules.get("numpy")
        self.trusted: set[Any] = set()
        self.tensors: tuple[Any, ...] = ()
        self._encoded: dict[int, Any] = {}
        if self.torch is not None:
            torch = self.torch
            self.tensors = (torch.Tensor, torch.nn.Parameter)
            self.trusted = {torch.Size, torch.dtype, torch.device}
            listed = getattr(torch.serialization, "get_safe_globals", None)
            if listed is not None:
                self.trusted.update(item for item in listed() if isinstance(item, type))

    def encode(self, value: Any, where: str, depth: int) -> Any:
        kind = type(value)
        if value is None or kind in (bool, float, str, bytes, complex) or kind in self.trusted:
            return value
        if kind is int:
            return value if value.bit_length() <= _LONGEST_INT_BITS else {MARK: "int", "hex": hex(value)}
        if kind in self.tensors:
            return self._without_attributes(value) if vars(value) else value
        if depth > MAX_DEPTH:
            raise CheckpointRefused(
                f"cannot store {_shortened(where)}: it contains itself, or more than {MAX_DEPTH} containers "
                "lie inside each other"
            )
        # What is met twice stays one thing: another place that holds it must not become a copy.
        if id(value) not in self._encoded:
            self._encoded[id(value)] = self._encode(value, where, depth + 1)
        return self._encoded[id(value)]

    def _encode(self, value: Any, where: str, depth: int) -> Any:
        kind = type(value)
        if kind in (dict, OrderedDict, defaultdict, Counter):
            return self._mapping(value, where, depth)
        if kind is list or kind is tuple:
            items = [self.encode(item, f"{where}[{i}]", depth) for i, item in enumerate(value)]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return kind(items)
        if kind in (set, frozenset):
            return {
                MARK: kind.__name__,
                "items": [self.encode(item, f"{where}{{}}", depth) for item in value],
            }
        if kind is bytearray:
            return {MARK: "bytearray", "data": self.blob(bytes(value))}
        if self.numpy is not None:
            if isinstance(value, self.numpy.generic) and kind.__module__ == "numpy":
                if not value.dtype.hasobject and value.dtype.kind != "V":
                    return {MARK: "scalar", "dtype": value.dtype.str, "data": value.tobytes()}
            elif kind is self.numpy.ndarray and not value.dtype.hasobject:
                stream = io.BytesIO()
                self.numpy.save(stream, value, allow_pickle=False)
                return {MARK: "npy", "data": self.blob(stream.getvalue())}
        if self.tensors and isinstance(value, self.tensors) and kind.__module__ == "torch.nn":
            return value
        if kind.__module__.partition(".")[0] in ("grd", "torch") and not isinstance(value, enum.Enum):
            # An epoch of the loop, torch's version: what they know besides is of no use later.
            if isinstance(value, int):
                return int(value)
            if isinstance(value, str):
                return str(value)
        if self.allow_pickle:
            try:
                return {MARK: "pickle", "data": self.blob(pickle.dumps(value, protocol=4))}
            except Exception as error:
                raise CheckpointRefused(f"cannot store {_shortened(where)}: {error}") from error
        raise self._refusal(value, where)

    def _refusal(self, value: Any, where: str) -> CheckpointRefused:
        kind = type(value)
        return CheckpointRefused(
            f"cannot store {_shortened(where)} ({kind.__module__}.{kind.__qualname__}): it would need "
            "code to be loaded; store its numbers, text or state_dict(), or pass allow_pickle=True"
        )

    def _without_attributes(self, tensor: Any) -> Any:
        plain = tensor.detach()
        if type(tensor) is self.tensors[1]:
            return self.tensors[1](plain, requires_grad=tensor.requires_grad)
        return plain.requires_grad_(tensor.requires_grad)

    def _mapping(self, value: Any, where: str, depth: int) -> Any:
        plain_keys = True
        changed = False
        items = []
        for key, item in value.items():
            new_key = self.encode(key, f"key {key!r} of {where or 'the state'}", depth)
            new_item = self.encode(item, f"{where}.{key}" if where else str(key), depth)
            changed = changed or new_key is not key or new_item is not item
            plain_keys = plain_keys and not isinstance(new_key, dict) and new_key != MARK
            items.append((new_key, new_item))
        if type(value) is defaultdict:
            return self._defaultdict(value, items, where)
        if type(value) is OrderedDict:
            self._check_attributes(value, where, depth)
        if not plain_keys:
            return {MARK: "dict", "kind": type(value).__name__, "items": [list(pair) for pair in items]}
        if not changed:
            return value
        if type(value) is OrderedDict:
            ordered = OrderedDict(items)
            vars(ordered).update(vars(value))  # modules keep the versions of their parameters there
            return ordered
        return Counter(dict(items)) if type(value) is Counter else dict(items)

    def _check_attributes(self, value: OrderedDict[Any, Any], where: str, depth: int) -> None:
        for name, item in vars(value).items():
            place = f"{where}.{name}" if where else name
            if self.encode(item, place, depth) is not item:
                raise self._refusal(item, place)

    def _defaultdict(self, value: defaultdict[Any, Any], items: list[Any], where: str) -> Any:
        name = named_factory(value.default_factory)
        if name is not None:
            return {MARK: "defaultdict", "factory": name, "items": [list(pair) for pair in items]}
        if self.allow_pickle:
            try:
                return {MARK: "pickle", "data": self.blob(pickle.dumps(value, protocol=4))}
            except Exception as error:
                raise CheckpointRefused(f"cannot store {_shortened(where)}: {error}") from error
        raise CheckpointRefused(
            f"cannot store {_shortened(where)} (a defaultdict): what makes its default values is code; use "
            f"one of {', '.join(sorted(_FACTORIES))}, or dict(...)"
        )


def _shortened(where: str) -> str:
    where = where or "the state"
    return where if len(where) <= 120 else f"{where[:60]}...{where[-40:]}"


def decode(value: Any, *, allow_pickle: bool = False, where: str = "") -> Any:
    """Undo `encode`. Raises CheckpointRefused for a pickled object unless ``allow_pickle``."""
    return _Decoder(allow_pickle).decode(value, where)


class _Decoder:
    def __init__(self, allow_pickle: bool) -> None:
        self.allow_pickle = allow_pickle
        self._decoded: dict[int, tuple[Any, Any]] = {}

    def decode(self, value: Any, where: str) -> Any:
        if not isinstance(value, Mapping) and type(value) not in (list, tuple):
            return value
        if id(value) not in self._decoded:
            # The encoded one is kept too: another must not come to lie at its address meanwhile.
            self._decoded[id(value)] = (value, self._decode(value, where))
        return self._decoded[id(value)][1]

    def _decode(self, value: Any, where: str) -> Any:
        if type(value) in (list, tuple):
            items = [self.decode(item, f"{where}[{i}]") for i, item in enumerate(value)]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(items)
        if value.get(MARK) is not None:
            return self._marked(value, str(value[MARK]), where)
        for key in list(value):
            item = value[key]
            new = self.decode(item, f"{where}.{key}" if where else str(key))
            if new is not item:
                value[key] = new
        return value

    def _marked(self, value: Any, mark: str, where: str) -> Any:
        if mark == "int":
            return int(value["hex"], 16)
        if mark == "bytearray":
            return bytearray(_as_bytes(value["data"]))
        if mark == "scalar":
            import numpy

            dtype = numpy.dtype(value["dtype"])
            data = _as_bytes(value["data"])
            return numpy.frombuffer(data, dtype)[0] if data else numpy.zeros((), dtype)[()]
        if mark == "npy":
            import numpy

            return numpy.load(io.BytesIO(_as_bytes(value["data"])), allow_pickle=False)
        if mark == "pickle":
            if not self.allow_pickle:
                raise CheckpointRefused(
                    f"{where or 'the state'} holds a pickled object, which runs code when it is loaded; pass "
                    "allow_pickle=True if you trust the folder"
                )
            return pickle.loads(_as_bytes(value["data"]))
        if mark in ("set", "frozenset"):
            items = [self.decode(item, where) for item in value["items"]]
            return set(items) if mark == "set" else frozenset(items)
        pairs = {self.decode(key, where): self.decode(item, f"{where}.{key}") for key, item in value["items"]}
        if mark == "defaultdict":
            return defaultdict(_FACTORIES.get(value["factory"]), pairs)
        kind = value.get("kind")
        return OrderedDict(pairs) if kind == "OrderedDict" else Counter(pairs) if kind == "Counter" else pairs


def _as_bytes(data: Any) -> bytes:
    if isinstance(data, (bytes, bytearray)):
        return bytes(data)
    return bytes(data.numpy().tobytes()) if data.numel() else b""


def as_json(value: Any, where: str = "metadata", depth: int = 0) -> Any:
    """``value`` as JSON data: paths and dates as text, sets and arrays as lists, NaN and infinities as null.

    Raises CheckpointRefused naming the key of anything else, and of two keys that become one.
    """
    if depth > MAX_DEPTH:
        raise CheckpointRefused(
            f"cannot store {_shortened(where)}: it contains itself, or more than {MAX_DEPTH} containers lie "
            "inside each other"
        )
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
        plain: dict[str, Any] = {}
        for key, item in value.items():
            if str(key) in plain:
                raise CheckpointRefused(
                    f"cannot store {_shortened(where)}: two of its keys are {str(key)!r} as text"
                )
            plain[str(key)] = as_json(item, f"{where}.{key}", depth + 1)
        return plain
    if isinstance(value, (list, tuple)):
        return [as_json(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted((as_json(item, where, depth + 1) for item in value), key=repr)
    raise CheckpointRefused(
        f"cannot store {_shortened(where)} ({type(value).__module__}.{type(value).__qualname__}): metadata "
        "must be JSON data; put state into state= instead"
    )
