"""Many runs on one machine. ``grd.batch(...)`` is `grd.batch.submitting.batch`.

The folder has the name of the function that people call, and Python would put the one in the other's place
as soon as any module of it is imported: so the module itself can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Run many notebooks; see `grd.batch.submitting.batch`."""
        from grd.batch.submitting import batch

        return batch(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
