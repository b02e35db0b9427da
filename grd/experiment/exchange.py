"""A folder in which the processes of one distributed training tell each other things, gone at its end.

A kernel that is killed cannot remove it: in a run it lies in the attempt's folder, where whoever sees the run
to its end sweeps it. By hand it lies among the system's temporary files under the name of its process, and
the next training removes those of processes that are gone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from grd import contract

PREFIX = "grd-distributed-"
_OF_PROCESS = re.compile(re.escape(PREFIX) + r"(\d+)-.+")


@contextlib.contextmanager
def exchange_folder() -> Iterator[Path]:
    """The folder, for the length of a ``with``. Raises OSError where none can be made."""
    made = _in_run() or _by_hand()
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _in_run() -> Path | None:
    events, attempt = os.environ.get(contract.ENV_EVENTS), os.environ.get(contract.ENV_ATTEMPT)
    if not events or not attempt:
        return None
    with contextlib.suppress(OSError):
        place = Path(events).parent / "attempts" / attempt
        return Path(tempfile.mkdtemp(prefix=contract.EXCHANGE_PREFIX, dir=place))
    return None


def _by_hand() -> Path:
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        owner = _OF_PROCESS.fullmatch(path.name)
        with contextlib.suppress(OSError):
            if owner is not None and path.lstat().st_uid == os.getuid() and not _lives(int(owner[1])):
                shutil.rmtree(path, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
