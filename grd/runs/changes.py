"""Waiting until something happens: in folders (inotify), to processes (pidfd), or because somebody says so.

Where the system has neither inotify nor pidfd, a wait is a short pause, and the caller looks again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import sys
import time
from pathlib import Path
from typing import Any

from grd.runs.processes import open_process

PAUSE_SECONDS = 0.2
"""Between two looks where nothing tells of a change."""

LOOK_SECONDS = 2.0
"""The longest wait for what may change without a word: a lock, a folder of another machine."""

# <sys/inotify.h>: a file was written, closed after writing, renamed into the folder, made, or deleted
_MODIFY, _CLOSE_WRITE, _MOVED_TO, _CREATE, _DELETE = 0x2, 0x8, 0x80, 0x100, 0x200
_EVENTS = _CLOSE_WRITE | _MOVED_TO | _CREATE | _DELETE
_NONBLOCK, _CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC


class Changes:
    """Something to wait on, until `close`. Nothing of a change that came between two waits is lost."""

    def __init__(self, *folders: Path, written: bool = False) -> None:
        """``written``: each write to a file of a folder counts as a change too."""
        self._folders = folders
        self._inotify = _watch(folders, _EVENTS | (_MODIFY if written else 0))
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def wake(self) -> None:
        """End the wait; safe in a signal handler and in any thread."""
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"x")

    def wait(self, seconds: float, *processes: dict[str, Any] | None) -> None:
        """Until a change, the end of one of ``processes`` (identities), `wake`, or so many ``seconds``."""
        poll = select.poll()
        handles = [open_process(int(who["pid"]), who.get("started")) for who in processes if who]
        watched = [fd for fd in handles if fd >= 0]
        told = self._inotify >= 0 or not self._folders
        try:
            for fd in (self._wake_read, *([self._inotify] if self._inotify >= 0 else []), *watched):
                poll.register(fd, select.POLLIN)
            longest = LOOK_SECONDS if told else PAUSE_SECONDS
            poll.poll(1000 * max(0.0, min(seconds, longest)))
        finally:
            for fd in watched:
                os.close(fd)
        for fd in (self._wake_read, self._inotify):
            with contextlib.suppress(OSError):
                if fd >= 0:
                    os.read(fd, 65536)

    def close(self) -> None:
        """Give the descriptors back; closing twice is harmless."""
        for fd in (self._inotify, self._wake_read, self._wake_write):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._inotify = self._wake_read = self._wake_write = -1

    def __enter__(self) -> Changes:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _watch(folders: tuple[Path, ...], events: int) -> int:
    """An inotify descriptor for all of ``folders``, or -1."""
    if not folders or not sys.platform.startswith("linux"):
        return -1
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        fd = int(libc.inotify_init1(_NONBLOCK | _CLOEXEC))
    except (OSError, AttributeError):
        return -1
    if fd < 0:
        return -1
    for folder in folders:
        if libc.inotify_add_watch(fd, os.fsencode(folder), ctypes.c_uint32(events)) < 0:
            os.close(fd)  # too many watches, or the folder is gone
            return -1
    return fd


def pause(seconds: float = PAUSE_SECONDS) -> None:
    """A short pause, for what nothing tells of."""
    time.sleep(seconds)
