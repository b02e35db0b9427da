"""An expensive part of a notebook whose result is kept, so that a resume need not compute it again."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import pickle
import platform
import re
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from grd import contract
from grd.errors import CheckpointError, ExperimentInterrupted, UsageError
from grd.experiment import interruption, rng
from grd.experiment.checkpoint_handler import CheckpointHandler
from grd.experiment.events import attempt_number, emit

T = TypeVar("T")


class Stage:
    """What ``training.stage`` hands out. ``reused`` says whether `cached` took a stored result."""

    def __init__(self, name: str, folder: Path | None, resume: bool, depends_on: Any) -> None:
        self.name = name
        self.reused = False
        self._folder = folder
        self._resume = resume
        self._depends_on = depends_on

    def cached(self, function: Callable[[], T]) -> T:
        """``function()``, or on a resume its stored result.

        Stored are tensors, arrays, plain data, and by pickle what is none of these. The result is used again
        only if the function's source, the arguments bound to it (by ``functools.partial`` or as defaults),
        the plain global values it names, ``depends_on`` and the Python version are the same. The random
        generators go on as if it had been computed.
        """
        key = _key(function, self._depends_on)
        handler = None
        if self._folder is not None:
            handler = CheckpointHandler(self._folder, install_signal_handlers=False, report_events=False)
            stored = self._stored(handler, key) if self._resume else None
            if stored is not None:
                rng.restore(stored["rng"])
                self.reused = True
                result: T = stored["state"]["result"]
                return result
        value = function()
        if handler is not None:
            try:
                handler.save_checkpoint(
                    0, metadata={"key": key}, state={"result": value}, rng=rng.capture(), allow_pickle=True
                )
            except CheckpointError as error:
                message = f"the result of stage {self.name!r} is not kept: {error}"
                warnings.warn(f"grd: {message}", RuntimeWarning, stacklevel=3)
                emit(contract.EVENT_WARNING, message=message)
        return value

    def _stored(self, handler: CheckpointHandler, key: str) -> dict[str, Any] | None:
        try:
            stored = handler.load_checkpoint(allow_pickle=True)
        except Exception as error:  # a class that is gone, another version of a library: compute it again
            warnings.warn(f"grd: stage {self.name!r} runs again: {error}", RuntimeWarning, stacklevel=4)
            return None
        if (
            stored is None
            or stored["metadata"].get("key") != key
            or "result" not in (stored.get("state") or {})
        ):
            return None
        return stored


def _key(function: Callable[[], Any], depends_on: Any) -> str:
    bound: list[str] = []
    while isinstance(function, functools.partial):
        bound.append(_content_of((function.args, sorted(function.keywords.items()))))
        function = function.func
    for name in ("__self__", "__defaults__", "__kwdefaults__"):
        value = getattr(function, name, None)
        if value is not None and not inspect.ismodule(value):
            bound.append(_content_of(value))
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = repr(getattr(function, "__qualname__", type(function)))
    code = getattr(function, "__code__", None)
    values = {}
    if code is not None:
        space = function.__globals__
        for name in code.co_names:
            if isinstance(space.get(name), (str, int, float, bool, bytes, type(None))) and name in space:
                values[name] = repr(space[name])
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
            with contextlib.suppress(ValueError):
                if isinstance(cell.cell_contents, (str, int, float, bool, bytes, type(None))):
                    values[name] = repr(cell.cell_contents)
    version = ".".join(platform.python_version_tuple()[:2])
    text = repr((source, sorted(values.items()), repr(depends_on), version, *bound))
    return str(xxhash.xxh3_128_hexdigest(text.encode("utf-8", "backslashreplace")))


class _Hashing:
    """A file that keeps a hash of what is written."""

    def __init__(self) -> None:
        self.digest = xxhash.xxh3_128()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return memoryview(data).nbytes


def _content_of(value: Any) -> str:
    """A hash of ``value``; of what has none a new one each time, so that nothing passes for the same."""
    hashing = _Hashing()
    try:
        pickle.Pickler(hashing, protocol=4).dump(value)
        return hashing.digest.hexdigest()
    except Exception:  # whatever an object raises that cannot be pickled
        return uuid.uuid4().hex


@contextlib.contextmanager
def stage(
    name: str, *, checkpoint_dir: Path | str | None = None, resume: bool | None = None, depends_on: Any = None
) -> Iterator[Stage]:
    """A named part of the notebook; its ``cached`` results lie in ``stages/`` of the checkpoint folder.

    The folder is ``checkpoint_dir``, else that of the run; without either nothing is kept. Results are used
    again if ``resume``, by default in every attempt of a run but the first. ``depends_on`` is what the
    result depends on besides the function's source and the plain global values it names. Raises
    ExperimentInterrupted at its end if somebody asked to stop.
    """
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise UsageError(f"stage name {name!r} must be letters, digits, '_', '-' and '.'")
    root = checkpoint_dir or os.environ.get(contract.ENV_CHECKPOINT_DIR)
    folder = Path(root) / "stages" / name if root else None
    current = Stage(name, folder, attempt_number() > 1 if resume is None else resume, depends_on)
    started = time.monotonic()
    yield current
    emit(
        contract.EVENT_STAGE,
        name=name,
        cached=current.reused,
        seconds=round(time.monotonic() - started, 3),
    )
    reason = interruption.stop_requested()
    if reason is not None:
        interruption.honoured()
        raise ExperimentInterrupted(
            f"stopped after stage {name!r} ({reason}); resume to go on", reason=reason
        )
