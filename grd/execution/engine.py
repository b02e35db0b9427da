"""``papermill --engine grd``: the engine's face, cheap to import.

papermill loads every installed engine when it is itself being imported, so nothing of papermill may be
imported here at module level: it would be a circle.
"""

from __future__ import annotations

from typing import Any


class GrdEngine:
    """papermill engine with a whole-notebook deadline, a grace period, truthful states and atomic saving.

    Keyword arguments beyond papermill's: ``grd_timeout`` and ``grd_grace`` (seconds or ``"30m"``) and
    ``grd_max_output`` (bytes or ``"100MB"``). Without them the notebook's metadata ``grd`` (``timeout``,
    ``grace``, ``max_output``) and then GRD_TIMEOUT, GRD_GRACE, GRD_MAX_OUTPUT count.
    """

    @classmethod
    def execute_notebook(cls, nb: Any, kernel_name: str, **kwargs: Any) -> Any:
        """Execute ``nb`` and return it. Raises what papermill's users expect, and NotebookInterrupted."""
        from grd.execution.attempt import execute_for_papermill

        return execute_for_papermill(nb, kernel_name, **kwargs)

    @classmethod
    def nb_kernel_name(cls, nb: Any, name: str | None = None) -> Any:
        """The kernel that the notebook, or the caller, names."""
        from papermill.utils import nb_kernel_name

        from grd.execution.local_files import install

        install()  # before papermill's first write of this execution
        return nb_kernel_name(nb, name)

    @classmethod
    def nb_language(cls, nb: Any, language: str | None = None) -> Any:
        """The language that the notebook, or the caller, names."""
        from papermill.utils import nb_language

        return nb_language(nb, language)
