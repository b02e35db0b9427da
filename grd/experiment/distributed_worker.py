"""One worker of `distributed.launch` with a function: ``python -m ... MODULE:FUNCTION ARGUMENTS``."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any


def main(target: str, arguments: str) -> None:
    """Call the function with the JSON list ``arguments``."""
    module, _, name = target.partition(":")
    function: Any = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    function(*json.loads(arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
