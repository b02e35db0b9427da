"""One checkpoint file: written whole, hashed while written, and checked before it is read.

With torch a file is what ``torch.save`` makes. Without, it is a zip of ``grd-state.json`` and the raw bytes
of the arrays. Both are zips, whose own CRCs `zip_is_sound` checks; torch.load checks nothing.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import pickletools
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from grd.errors import CheckpointError, CheckpointRefused
from grd.experiment.state_encoding import MARK, decode, encode

FORMAT = "grd.checkpoint/1"
TORCH_FORMAT = "torch"
PLAIN_FORMAT = "grd-plain/1"
_STATE_MEMBER = "grd-state.json"
_CHUNK = 1 << 20
_BEGINNING = 1 << 10
"""Bytes of a pickle in which its first entries lie."""
_PIECE = 4 << 20
"""Bytes written and hashed at one time: few enough to be still in the processor's cache for the second."""
_WORTH_A_THREAD = 256 << 10
"""Bytes from which hashing in another thread gains more than handing them over costs."""


@dataclass(frozen=True)
class Written:
    """What a finished file weighs (bytes), its xxh3_128, and its format."""

    size: int
    xxh3_128: str
    format: str


class _HashingStream:
    """A stream that hashes what goes through it, beside the writing, and keeps the first error.

    The error must not pass through torch's C++ zip writer, whose destructor would end the process.
    """

    def __init__(self, stream: BinaryIO, hashing: ThreadPoolExecutor) -> None:
        self._stream = stream
        self._hashing = hashing
        self._digest = xxhash.xxh3_128()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, view.nbytes, _PIECE):
            if self.error is None:
                self._write_and_hash(view[start : start + _PIECE])
        self.size += view.nbytes
        return view.nbytes

    def _write_and_hash(self, piece: memoryview) -> None:
        hashed = None
        if piece.nbytes >= _WORTH_A_THREAD:
            try:
                hashed = self._hashing.submit(self._digest.update, piece)
            except RuntimeError:
                pass  # the interpreter is ending, and starts no threads any more
        if hashed is None:
            self._digest.update(piece)
        try:
            self._stream.write(piece)
        except OSError as error:
            self.error = error
        finally:
            if hashed is not None:
                _wait_for(hashed)  # whatever happens: the caller's memory may be gone after this

    def flush(self) -> None:
        """Nothing to do: the file is flushed once, at its end."""

    def hexdigest(self) -> str:
        return str(self._digest.hexdigest())


def _wait_for(hashed: Future[None]) -> None:
    """Until it is done; an interruption meanwhile is raised after it."""
    interruption: BaseException | None = None
    while not hashed.done():
        try:
            hashed.exception()
        except BaseException as error:
            interruption = error
    if interruption is not None:
        raise interruption
    hashed.result()


def has_torch() -> bool:
    """Whether torch can be had, without importing it."""
    if "torch" in sys.modules:
        return sys.modules["torch"] is not None
    try:
        return importlib.util.find_spec("torch") is not None
    except (ImportError, ValueError):
        return False


def prepare(state: Mapping[str, Any], *, allow_pickle: bool = False, private: list[Any] | None = None) -> Any:
    """``state`` as it will be written. Raises CheckpointRefused naming the key that cannot be stored.

    What had to be copied for that, and nobody else can change, is added to ``private``.
    """
    torch = _torch()
    if torch is None:
        return encode(dict(state), allow_pickle=allow_pickle)

    def blob(data: bytes) -> Any:  # as bytes, torch's pickle protocol would store half as much again
        if not data:
            return data
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if private is not None:
            private.append(tensor)
        return tensor

    return encode(dict(state), allow_pickle=allow_pickle, blob=blob)


def _torch() -> Any:
    if not has_torch():
        return None
    try:
        import torch
    except ImportError:  # found, but broken: the plain format still saves the work
        return None
    return torch


def write(path: Path, prepared: Any) -> Written:
    """Write what `prepare` returned to a new file ``path``, flushed and synced.

    Raises OSError, also for a full disk; the caller removes what was begun.
    """
    torch = _torch()
    with open(path, "xb") as file, ThreadPoolExecutor(1, "grd-hashing") as hashing:
        stream = _HashingStream(file, hashing)
        if torch is not None:
            torch.save(prepared, stream)
        else:
            _write_plain(stream, prepared)
        if stream.error is not None:
            raise stream.error
        file.flush()
        os.fsync(file.fileno())
    return Written(stream.size, stream.hexdigest(), TORCH_FORMAT if torch is not None else PLAIN_FORMAT)


def digest(path: Path) -> tuple[int, str]:
    """Size in bytes and xxh3_128 of a file. Raises OSError."""
    seen = xxhash.xxh3_128()
    size = 0
    with open(path, "rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK):
            seen.update(chunk)
            size += len(chunk)
    return size, str(seen.hexdigest())


def zip_is_sound(path: Path) -> bool:
    """Whether ``path`` is a zip whose members all match their CRC32. Raises OSError if it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return bool(archive.namelist()) and archive.testzip() is None
    except OSError:
        raise
    except Exception:  # damaged zips raise nearly anything: BadZipFile, EOFError, struct.error, ValueError
        return False


def lineage_in(path: Path) -> int | None:
    """The lineage that a file of ours says it is of, 0 if it is too old to say; None for any other file.

    Only its beginning is looked at, nothing is executed, and torch is not needed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if _STATE_MEMBER in names:
                tree = json.loads(archive.read(_STATE_MEMBER))
                first = ["lineage", tree.get("lineage", 0), "format", tree.get("format")]
            else:
                (name,) = (name for name in names if name.endswith("/data.pkl"))
                with archive.open(name) as stream:
                    first = _first_values(stream.read(_BEGINNING))
    except Exception:  # what is damaged says nothing
        return None
    if first[:1] == ["format"]:
        first = ["lineage", 0, *first]
    is_ours = first[::2] == ["lineage", "format"] and str(first[3]).startswith(FORMAT.partition("/")[0] + "/")
    return first[1] if is_ours and type(first[1]) is int else None


def _first_values(pickled: bytes) -> list[Any]:
    """The first four values in a pickle: two keys of its dictionary, and what they say."""
    values: list[Any] = []
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name.startswith(("BINUNICODE", "BININT")):
            values.append(argument)
        if len(values) == 4:
            break
    return values


def read(path: Path, *, map_location: Any = None, allow_pickle: bool = False) -> dict[str, Any]:
    """The state in a file that was checked before.

    Raises CheckpointRefused for what needs code, CheckpointError where torch is needed and missing,
    ValueError where the file holds no checkpoint.
    """
    with zipfile.ZipFile(path) as archive:
        is_plain = _STATE_MEMBER in archive.namelist()
        value = _read_plain(archive) if is_plain else None
    if not is_plain:
        value = _read_torch(path, map_location)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not a checkpoint's dictionary")
    result: dict[str, Any] = decode(value, allow_pickle=allow_pickle)
    return result


def _read_torch(path: Path, map_location: Any) -> Any:
    torch = _torch()
    if torch is None:
        raise CheckpointError(
            f"{path} was written with torch, which is not installed: pip install torch, then load it again"
        )
    if map_location is None and not torch.cuda.is_available():
        map_location = "cpu"
    import pickle

    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next(
            (line for line in str(error).splitlines() if "GLOBAL" in line), "it holds Python objects"
        )
        raise CheckpointRefused(
            f"{path} needs code to be loaded, which grd never runs: {reason.strip()}"
        ) from error


# --- the format without torch ------------------------------------------------------------------------


def _write_plain(stream: _HashingStream, prepared: Any) -> None:
    members: list[bytes] = []
    tree = _to_json(prepared, members)
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        for number, data in enumerate(members):
            archive.writestr(f"data/{number}", data)
        archive.writestr(_STATE_MEMBER, json.dumps(tree, allow_nan=False))


def _to_json(value: Any, members: list[bytes]) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if value - value == 0 else {MARK: "float", "value": repr(value)}
    if kind is complex:
        return {MARK: "complex", "value": repr(value)}
    if kind is bytes:
        if len(value) <= 64:
            return {MARK: "bytes", "base64": base64.b64encode(value).decode("ascii")}
        members.append(value)
        return {MARK: "bytes", "member": len(members) - 1}
    if kind is list:
        return [_to_json(item, members) for item in value]
    if kind is tuple:
        return {MARK: "tuple", "items": [_to_json(item, members) for item in value]}
    if kind is dict and all(type(key) is str for key in value):
        return {key: _to_json(item, members) for key, item in value.items()}
    pairs = [[_to_json(key, members), _to_json(item, members)] for key, item in value.items()]
    return {MARK: "keys", **({} if kind is dict else {"kind": kind.__name__}), "items": pairs}


def _read_plain(archive: zipfile.ZipFile) -> Any:
    def revive(node: Any) -> Any:
        if isinstance(node, list):
            return [revive(item) for item in node]
        if not isinstance(node, dict):
            return node
        mark = node.get(MARK)
        if mark == "float":
            return float(node["value"])
        if mark == "complex":
            return complex(node["value"])
        if mark == "bytes":
            if "member" in node:
                return archive.read(f"data/{int(node['member'])}")
            return base64.b64decode(node["base64"])
        if mark == "tuple":
            return tuple(revive(item) for item in node["items"])
        if mark == "keys":
            pairs = {revive(key): revive(item) for key, item in node["items"]}
            kind = node.get("kind")
            return (
                OrderedDict(pairs)
                if kind == "OrderedDict"
                else Counter(pairs)
                if kind == "Counter"
                else pairs
            )
        return {key: revive(item) for key, item in node.items()}

    return revive(json.load(io.TextIOWrapper(archive.open(_STATE_MEMBER), encoding="utf-8")))
