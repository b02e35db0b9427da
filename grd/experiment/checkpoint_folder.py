"""A folder of checkpoint versions: which there are, which is the newest good one, and keeping house.

The newest version is the one of the highest lineage, then epoch, then step. A version is good if its bytes
are those the manifest noted for its name, or, for a file that came from elsewhere, if it is a zip whose own
CRCs hold. Where lines of the manifest are damaged, a file of ours that none of the others vouches for is
taken as one of those: it says its lineage itself, and its own CRCs must hold.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from grd.experiment.checkpoint_file import digest, lineage_in, zip_is_sound
from grd.experiment.manifest import Entry, Lines, append_entry, by_name, host_id, process_start, read_lines
from grd.files import JsonLines, fsync_folder

LATEST_NAME = "checkpoint_latest.pt"
NEVER_FEWER_THAN = 2
_NAME = re.compile(r"checkpoint_epoch_(-?\d+)(?:_step_(\d+))?\.pt")
_TEMPORARY = re.compile(r"\.checkpoint_\S+\.pt\.([0-9a-f]{8})\.(\d+)(?:-(\d+))?\.\d+\.tmp")
_counter = itertools.count()
_in_use: set[str] = set()


def version_name(epoch: int, step: int | None = None) -> str:
    """``checkpoint_epoch_N.pt`` after epoch N, ``checkpoint_epoch_N_step_S.pt`` inside epoch N."""
    return f"checkpoint_epoch_{epoch}.pt" if step is None else f"checkpoint_epoch_{epoch}_step_{step}.pt"


@dataclass(frozen=True)
class Version:
    """One versioned file; ``named_epoch`` is the epoch in its name."""

    path: Path
    named_epoch: int
    step: int | None
    lineage: int
    entries: tuple[Entry, ...]
    may_be_unlisted: bool = False
    """Whether it is a file of ours whose own line may be among the damaged ones of the manifest."""

    @property
    def epoch(self) -> int:
        """The last completed epoch; -1 before the first."""
        return self.named_epoch if self.step is None else self.named_epoch - 1

    @property
    def position(self) -> tuple[int, float]:
        """Where in the training it is; a completed epoch comes after all of its steps."""
        return self.named_epoch, float("inf") if self.step is None else self.step

    @property
    def is_ours(self) -> bool:
        """Whether this attempt wrote the newest content of that name."""
        return bool(self.entries) and self.entries[0].is_ours


@dataclass(frozen=True)
class Found:
    """The newest good version: the file to read, and its manifest entry (None: it came from elsewhere)."""

    path: Path
    version: Version | None
    entry: Entry | None

    @property
    def epoch(self) -> int | None:
        """The last completed epoch, or None where only the file's content tells."""
        if self.version is not None:
            return self.version.epoch
        return self.entry.epoch if self.entry is not None else None

    @property
    def step(self) -> int | None:
        """Steps done in the epoch after that, or None at its beginning."""
        if self.version is not None:
            return self.version.step
        return self.entry.step if self.entry is not None else None


@dataclass(frozen=True)
class Scan:
    """What a look at the folder found.

    ``damaged`` names what was passed over, and why; ``strangers`` the files of later epochs that are not of
    this folder's manifest, and come after all that are; ``damaged_lines`` the manifest's.
    """

    found: Found | None
    damaged: tuple[tuple[Path, str], ...]
    strangers: tuple[Path, ...] = ()
    damaged_lines: tuple[int, ...] = ()


def loop_folders(folder: Path) -> list[Path]:
    """``folder``, in which the first training loop of a run saves, and ``loop-<n>`` of each further one."""
    further = []
    with contextlib.suppress(OSError):
        further = [path for path in folder.glob("loop-*") if path.name[5:].isdecimal() and path.is_dir()]
    return [folder, *sorted(further, key=lambda path: int(path.name[5:]))]


def versions(folder: Path) -> list[Version]:
    """All versioned files, newest first; names that are not ours are ignored."""
    lines = read_lines(folder)
    manifest = by_name(lines.entries)
    newest_lineage = max((entry.lineage for entry in lines.entries), default=0)
    result = []
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is None or not path.is_file():
                continue
            entries = tuple(manifest.get(path.name, ()))
            step = None if match[2] is None else int(match[2])
            lineage = max((entry.lineage for entry in entries), default=0)
            own = lineage_in(path) if lines.damaged else None
            if own is not None:  # one too old to say it is taken as one of the newest
                lineage = max(lineage, own or newest_lineage)
            result.append(Version(path, int(match[1]), step, lineage, entries, own is not None))
    return sorted(result, key=_newest_last, reverse=True)


def _newest_last(version: Version) -> tuple[int, tuple[int, float]]:
    return version.lineage, version.position


def check(path: Path, entries: Collection[Entry]) -> tuple[str | None, Entry | None]:
    """What is wrong with a file (None: nothing), and the entry its bytes belong to.

    Any entry of the name will do, since a crash may fall between a new entry and the rename it announces.
    """
    try:
        if not entries:
            sound = zip_is_sound(path)
            return (None if sound else "it is no zip whose checksums hold"), None
        size = path.stat().st_size
        if all(entry.size != size for entry in entries):
            return f"it has {size} bytes instead of {next(iter(entries)).size}", None
        size, xxh3_128 = digest(path)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}", None
    for entry in entries:
        if (entry.size, entry.xxh3_128) == (size, xxh3_128):
            return None, entry
    return "its bytes are not those that were written", None


def check_version(version: Version) -> tuple[str | None, Entry | None]:
    """`check` of a version; without an entry, but good, may also be one of ours whose line is damaged."""
    reason, entry = check(version.path, version.entries)
    if (
        reason is not None
        and version.may_be_unlisted
        and version.entries
        and check(version.path, ())[0] is None
    ):
        return None, None
    return reason, entry


def scan(folder: Path, *, epoch: int | None = None, passed_over: Collection[Path] = ()) -> Scan:
    """The newest good version, or with ``epoch`` that of this completed epoch.

    Versions are verified from the newest down until one is good; ``passed_over`` are not looked at.
    """
    lines = read_lines(folder)
    present = [item for item in versions(folder) if item.path not in passed_over]
    if epoch is not None:
        present = [item for item in present if item.step is None and item.named_epoch == epoch]
    found, damaged = _newest_good(folder, present, lines, epoch is None, passed_over)
    strangers: list[Path] = []
    if found is not None and found.version is not None and found.version.lineage > 0:
        position = found.version.position
        strangers = [item.path for item in present if item.lineage == 0 and item.position > position]
    return Scan(found, tuple(damaged), tuple(strangers), lines.damaged)


def _newest_good(
    folder: Path,
    present: Sequence[Version],
    lines: Lines,
    with_lone_latest: bool,
    passed_over: Collection[Path],
) -> tuple[Found | None, list[tuple[Path, str]]]:
    candidates = list(present)
    latest = folder / LATEST_NAME
    damaged: list[tuple[Path, str]] = []
    while candidates:
        version = candidates.pop(0)
        reason, entry = check_version(version)
        if reason is None:
            if entry is not None and entry.lineage < version.lineage:
                # A newer lineage announced a file of this name, which never came.
                older = replace(version, lineage=entry.lineage, entries=(entry,), may_be_unlisted=False)
                candidates.append(older)
                candidates.sort(key=_newest_last, reverse=True)
                continue
            return Found(version.path, version, entry), damaged
        damaged.append((version.path, reason))
        if version.entries and latest not in passed_over and _is_other_file(latest, version.path):
            reason, entry = check(latest, version.entries)
            if reason is None:
                return Found(latest, version, entry), damaged
    if with_lone_latest and latest not in passed_over and latest.is_file():
        reason, entry = check(latest, lines.entries)
        if reason is not None and not lines.entries:
            damaged.append((latest, reason))
        elif reason is not None and lines.damaged and lineage_in(latest) is not None:
            reason = check(latest, ())[0]
        if reason is None:
            return Found(latest, None, entry), damaged
    return None, damaged


def _is_other_file(latest: Path, path: Path) -> bool:
    try:
        return not latest.samefile(path)
    except OSError:
        return False


# --- temporary files, latest, pruning ---------------------------------------------------------------------


@contextlib.contextmanager
def temporary_name(folder: Path, name: str) -> Iterator[Path]:
    """A path in ``folder`` that is gone after the block, renamed or not; it names the writing process."""
    writer = f"{os.getpid()}-{start}" if (start := process_start(os.getpid())) else str(os.getpid())
    path = folder / f".{name}.{host_id()}.{writer}.{next(_counter)}.tmp"
    _in_use.add(path.name)
    try:
        yield path
    finally:
        _in_use.discard(path.name)
        with contextlib.suppress(OSError):
            path.unlink()


def abandoned(folder: Path) -> Iterator[Path]:
    """Temporary files in ``folder`` whose writer is dead, or was this process and is done."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            match = _TEMPORARY.fullmatch(path.name)
            if match is None or match[1] != host_id() or path.name in _in_use:
                continue
            if int(match[2]) == os.getpid() or not _is_alive(int(match[2]), match[3]):
                yield path


def sweep(folder: Path) -> None:
    """Remove what is `abandoned`."""
    for path in abandoned(folder):
        with contextlib.suppress(OSError):
            path.unlink()


def _is_alive(pid: int, started: str | None) -> bool:
    """Whether the very process that had this pid and start lives; by the pid alone where that is all."""
    if started is not None and process_start(pid) not in ("", started):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def point_latest(target: Path) -> None:
    """Make ``checkpoint_latest.pt`` the same file as ``target``; a copy where there are no hard links.

    Where neither can be had it is removed: an older state under that name would be a lie.
    """
    latest = target.parent / LATEST_NAME
    with contextlib.suppress(OSError):
        if latest.samefile(target):
            return
    try:
        with temporary_name(target.parent, LATEST_NAME) as temporary:
            try:
                os.link(target, temporary)
            except OSError:
                shutil.copyfile(target, temporary)
                with open(temporary, "rb") as stream:
                    os.fsync(stream.fileno())
            temporary.replace(latest)
    except OSError:
        with contextlib.suppress(OSError):
            latest.unlink()
    fsync_folder(target.parent)


def newest_good(present: Sequence[Version], known_good: Collection[str]) -> Path | None:
    """The newest of ``present`` that is good; those named in ``known_good`` are not verified again."""
    for item in present:
        if item.path.name in known_good or check_version(item)[0] is None:
            return item.path
    return None


def prune(
    present: Sequence[Version], budget: int, known_good: Collection[str], *, dry_run: bool = False
) -> list[Path]:
    """Delete what does not fit into ``budget`` bytes, oldest first, never leaving fewer than two good ones.

    ``present`` are the `versions` of a folder. Steps inside an epoch go first once the epoch is complete.
    Files named in ``known_good`` are not verified again. Returns what was, or with ``dry_run`` would be,
    deleted.
    """
    completed = [item for item in present if item.step is None]
    newest_complete = completed[0] if completed else None

    def is_obsolete(item: Version) -> bool:
        return (
            newest_complete is not None
            and item.step is not None
            and _newest_last(item) < _newest_last(newest_complete)
        )

    deleted = []
    good = kept_bytes = 0
    order = sorted(present, key=lambda item: (not is_obsolete(item), _newest_last(item)), reverse=True)
    for item in order:
        try:
            size = item.path.stat().st_size
        except OSError:
            continue
        if good >= NEVER_FEWER_THAN and (is_obsolete(item) or kept_bytes + size > budget):
            with contextlib.suppress(OSError):
                if not dry_run:
                    item.path.unlink()
                deleted.append(item.path)
            continue
        kept_bytes += size
        if good < NEVER_FEWER_THAN and (item.path.name in known_good or check_version(item)[0] is None):
            good += 1
    return deleted


# --- setting aside ------------------------------------------------------------------------------------------


def available_epochs(folder: Path) -> list[int]:
    """The completed epochs there is a file of, ascending; nothing is verified."""
    return sorted({item.named_epoch for item in versions(Path(folder)) if item.step is None})


def set_aside(folder: Path | str, *, after_epoch: int | None = None, reason: str = "") -> list[Path]:
    """Move versions into a new subfolder ``superseded-<n>``: all, or those later than ``after_epoch`` ended.

    Returns their new paths; needs no torch. The newest one that stays becomes ``checkpoint_latest.pt``.
    Raises OSError.
    """

    def is_moved(version: Version) -> bool:
        return after_epoch is None or version.position > (after_epoch, float("inf"))

    return move_aside(Path(folder), is_moved, reason=reason)


def move_aside(folder: Path, is_moved: Callable[[Version], bool], *, reason: str) -> list[Path]:
    """`set_aside` of the versions for which ``is_moved`` says so."""
    present = versions(folder)
    moving = [version for version in present if is_moved(version)]
    staying = [version for version in present if version not in moving]
    latest = folder / LATEST_NAME
    orphan = not staying and latest.is_file()  # left alone, it would win over whatever comes next
    if not moving and not (orphan and not present):
        return []
    for number in itertools.count(1):
        target = folder / f"superseded-{number}"
        try:
            target.mkdir()
            break
        except FileExistsError:
            continue
    moved = []
    for version in moving:
        for entry in reversed(version.entries):
            append_entry(target, entry)
        version.path.replace(target / version.path.name)
        moved.append(target / version.path.name)
    if staying:
        point_latest(staying[0].path)
    elif orphan:
        latest.replace(target / LATEST_NAME)
    note = JsonLines(folder / "superseded.jsonl")
    try:
        note.append(
            {"t": time.time(), "folder": target.name, "reason": reason, "files": [p.name for p in moved]}
        )
    finally:
        note.close()
    fsync_folder(folder)
    return moved
