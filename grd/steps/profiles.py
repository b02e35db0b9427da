"""Profiles by the names people give them: a run, one of its attempts, a file, or this machine now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grd.errors import NotFoundError, UsageError
from grd.files import read_json
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
    if Path(name).is_file():
        return _read(Path(name), f"{name} holds no hardware profile; write one: grd hardware show --json")
    run, at, number = name.rpartition("@")
    if at and not number.isdecimal():
        raise UsageError(f"{name}: what follows @ must be the number of an attempt, as in last@1")
    folder = find_run(runs_dir, run if at else name)
    return _of_run(folder, int(number) if at else None)


def _of_run(folder: RunFolder, number: int | None) -> dict[str, Any]:
    path = folder.hardware if number is None else folder.attempt(number).hardware
    which = folder.run_id if number is None else f"attempt {number} of {folder.run_id}"
    if not path.exists():
        raise NotFoundError(f"what {which} ran on was not recorded; see: grd status {folder.run_id}")
    return _read(path, f"what {which} ran on cannot be read from {path}")


def _read(path: Path, problem: str) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{problem} ({error})") from None
    profile = value.get("profile", value) if isinstance(value, dict) else value
    if not isinstance(profile, dict) or not str(profile.get("schema", "")).startswith("grd.hardware/"):
        raise UsageError(problem)
    return profile
