"""Profiles by the names people give them: a run, one of its attempts, a file, or this machine now."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from grd.errors import NotFoundError, RunNotFound, UsageError
from grd.files import read_json
from grd.hardware.facts import one_line
from grd.runs.folder import RunFolder, find_run

NOW = "now"


def profile_named(name: str, runs_dir: Path) -> dict[str, Any]:
    """The hardware profile called ``name``.

    "now" is this machine; a JSON file is a profile or what `grd explore --json` prints; anything else is a
    run (an id, a part of one, a folder, "last"), whose newest attempt counts unless "@N" names another.
    Raises NotFoundError or UsageError.
    """
    if name == NOW:
        from grd.hardware import capture_hardware_profile

        return capture_hardware_profile()
    if _is_file(name):
        return _read(Path(name), f"{name} holds no hardware profile; write one: grd hardware show --json")
    try:
        return _of_run(find_run(runs_dir, name), None)  # a folder's own path may hold an "@"
    except RunNotFound:
        run, at, number = name.rpartition("@")
        if not at or "/" in number:
            raise
    if not _NUMBER.fullmatch(number):
        raise UsageError(f"{name}: what follows @ must be the number of an attempt, as in last@1")
    return _of_run(find_run(runs_dir, run), int(number))


_NUMBER = re.compile(r"[0-9]{1,9}")


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except PermissionError as error:
        raise UsageError(f"{name} cannot be read ({error.strerror}); name another file or a run") from None
    except OSError:
        return False  # such as a name that is longer than any file's


def _of_run(folder: RunFolder, number: int | None) -> dict[str, Any]:
    path = folder.hardware if number is None else folder.attempt(number).hardware
    which = folder.run_id if number is None else f"attempt {number} of {folder.run_id}"
    if not path.exists():
        raise NotFoundError(f"what {which} ran on was not recorded; see: grd status {folder.run_id}")
    return _read(path, f"what {which} ran on cannot be read from {path}")


def _read(path: Path, problem: str) -> dict[str, Any]:
    try:
        value = read_json(path)
        # What can be read and not be printed: NaN, infinite numbers, halves of characters.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (OSError, ValueError) as error:
        raise UsageError(f"{problem} ({one_line(error)})") from None
    except RecursionError:
        raise UsageError(f"{problem} (it is nested too deeply)") from None
    profile = value.get("profile", value) if isinstance(value, dict) else value
    if not isinstance(profile, dict) or not str(profile.get("schema", "")).startswith("grd.hardware/"):
        raise UsageError(problem)
    gpus = profile.get("gpus") or []
    if not isinstance(gpus, list) or not all(isinstance(gpu, dict) for gpu in gpus):
        raise UsageError(f"{problem} (its gpus are no list of devices)")
    return profile
