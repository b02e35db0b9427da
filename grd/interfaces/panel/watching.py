"""One thread that keeps every open panel of this kernel up to date, and ends with the last of them."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Protocol

LOOK_SECONDS = 0.5


class Watched(Protocol):
    """A panel that changes by itself."""

    @property
    def folder(self) -> Path | None:
        """The run it is about, once there is one."""

    def look(self) -> bool:
        """Show what is true now; True once it will not change any more. Never raises."""


class Watch:
    """The panels of this kernel that may still change."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Watched] = []
        self._thread: threading.Thread | None = None

    def add(self, panel: Watched) -> None:
        """Look at ``panel`` from now on, until it says that nothing more will come."""
        with self._lock:
            if panel not in self._open:
                self._open.append(panel)
            if self._thread is None:
                # A daemon: the run goes on without this kernel, and the kernel must be able to end.
                self._thread = threading.Thread(target=self._look, name="grd-panels", daemon=True)
                self._thread.start()

    def find(self, folder: Path) -> Watched | None:
        """The open panel of the run in ``folder``."""
        with self._lock:
            return next((panel for panel in self._open if panel.folder == folder), None)

    def _look(self) -> None:
        while True:
            with self._lock:
                panels = list(self._open)
                if not panels:
                    self._thread = None
                    return
            over = [panel for panel in panels if panel.look()]
            with self._lock:
                self._open = [panel for panel in self._open if panel not in over]
            time.sleep(LOOK_SECONDS)
