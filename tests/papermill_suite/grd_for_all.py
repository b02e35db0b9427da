"""Makes grd the engine of every papermill of this environment, also of those that name none.

Loaded by papermill itself, as an entry point, while ``papermill.engines`` is being imported.
"""

from __future__ import annotations

import sys

from grd.execution.engine import GrdEngine


class Everywhere(GrdEngine):
    """grd under papermill's own names."""


engines = sys.modules["papermill.engines"]
engines.NBClientEngine = Everywhere  # type: ignore[attr-defined]  # the suite imports it by this name
for name in (None, "nbclient"):
    engines.papermill_engines.register(name, Everywhere)
