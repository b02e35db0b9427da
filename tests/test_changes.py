"""Waiting for changes: told by the system, not looked for."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grd.runs.changes import Changes
from grd.runs.processes import identity

LONG = 60.0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="inotify and pidfd are Linux's")
@pytest.mark.parametrize("what", ["a new file", "the end of a process", "a word", "nothing"])
def test_a_wait_ends_with_what_it_waits_for(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grd.runs.changes.LOOK_SECONDS", LONG)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with Changes(tmp_path) as changes:
            actions = {
                "a new file": (tmp_path / "new").touch,
                "the end of a process": process.kill,
                "a word": changes.wake,
                "nothing": lambda: None,
            }
            threading.Timer(0.3, actions[what]).start()
            began = time.monotonic()
            changes.wait(1.0 if what == "nothing" else LONG, identity(process.pid))
            took = time.monotonic() - began
            assert took > 0.9 if what == "nothing" else took < LONG / 2
            changes.close()
    finally:
        process.kill()
        process.communicate(timeout=10)


def test_a_change_between_two_waits_is_not_lost_and_without_a_folder_only_a_word_is_waited_for(
    tmp_path: Path,
) -> None:
    with Changes(tmp_path) as changes, Changes() as words:
        (tmp_path / "before").touch()
        words.wake()
        began = time.monotonic()
        changes.wait(LONG)
        words.wait(LONG)
        assert time.monotonic() - began < 1.5  # a look comes after 2 s


def test_where_nothing_tells_of_changes_a_wait_is_a_short_pause(tmp_path: Path) -> None:
    with Changes(tmp_path / "not there") as changes:
        began = time.monotonic()
        changes.wait(LONG)
        assert time.monotonic() - began < LONG / 2
