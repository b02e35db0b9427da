"""What is mounted where, from /proc/self/mountinfo (format: proc(5))."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, kw_only=True)
class Mount:
    """One mounted file system: ``root`` is the folder of it that shows at ``point``."""

    root: str
    point: str
    fs_type: str
    options: frozenset[str]
    """Options of the file system itself; for a v1 cgroup hierarchy its controllers."""


def _unescape(text: str) -> str:
    # The kernel escapes space, tab, newline and backslash, nothing else.
    return re.sub(_OCTAL, lambda match: chr(int(match[1], 8)), text)


def parse_mountinfo(text: str) -> list[Mount]:
    """The mounts listed in ``text``, in the order they were made; lines of another shape are skipped."""
    mounts = []
    for line in text.split("\n"):  # names may hold what str.splitlines takes for the end of a line
        before, separator, after = line.partition(" - ")
        left, right = before.split(" "), after.split(" ")
        if not separator or len(left) < 5 or not right[0]:
            continue
        mounts.append(
            Mount(
                root=_unescape(left[3]),
                point=_unescape(left[4]),
                fs_type=right[0],
                options=frozenset(right[2].split(",")) if len(right) > 2 else frozenset(),
            )
        )
    return mounts


def read_mounts(root: Path = Path("/")) -> list[Mount]:
    """The mounts this process sees. Raises OSError where there is no /proc."""
    return parse_mountinfo((root / "proc/self/mountinfo").read_bytes().decode("utf-8", "surrogateescape"))


def mount_of(path: Path, mounts: list[Mount]) -> Mount | None:
    """The mount that holds the absolute ``path``: the deepest, and of several on one point the last made."""
    found = None
    for mount in mounts:
        inside = PurePosixPath(os.fspath(path)).is_relative_to(mount.point)
        if inside and (found is None or len(mount.point) >= len(found.point)):
            found = mount
    return found
