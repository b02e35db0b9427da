"""Real file systems that fill up, run into a quota, or go read-only: small ones of a test's own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from conftest import cannot_be_had

SIZE_MB = 160


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise OSError(f"{command[0]}: {(done.stderr or done.stdout).strip()}")


def _fill(folder: Path) -> None:
    with open(folder / "filler", "ab", buffering=0) as filler, contextlib.suppress(OSError):
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while filler.write(b"x" * size):
                    pass


@dataclass
class Disk:
    """A mounted file system; ``folder`` is where tests may write."""

    mounted: Path
    image: Path
    held: dict[int, BinaryIO] = field(default_factory=dict)
    """Open checkpoints by inode."""
    filled: bool = False

    @property
    def folder(self) -> Path:
        """Where tests may write."""
        return self.mounted

    def make(self) -> None:
        """Make and mount it. Raises OSError where that cannot be."""
        raise NotImplementedError

    def strike(self) -> None:
        """From now on nothing can be written, also where older checkpoints make room for newer ones: what is
        open keeps its room when it is deleted."""
        while self._hold_checkpoints():
            _fill(self.folder)

    def _hold_checkpoints(self) -> bool:
        """Open every checkpoint, half-written ones too; whether one was new, or this is the first look."""
        first, before = self.filled, len(self.held)
        self.filled = True
        try:
            found = list(self.folder.rglob("*checkpoint_epoch*"))
        except OSError:  # a folder vanished meanwhile
            return True
        for path in found:
            with contextlib.suppress(OSError):
                inode = path.stat().st_ino
                if inode not in self.held:
                    self.held[inode] = path.open("rb")
        return not first or len(self.held) > before

    def repair(self) -> None:
        """What a person does about it."""
        self._let_go()
        (self.folder / "filler").unlink()

    def _let_go(self) -> None:
        while self.held:
            self.held.popitem()[1].close()

    def unmount(self) -> None:
        """Give it back, also while somebody uses it."""
        self._let_go()
        if os.path.ismount(self.mounted):
            _run("umount", "-l", self.mounted)

    def _make_image(self, *mkfs: str, size_mb: int) -> None:
        with open(self.image, "wb") as image:
            image.truncate(size_mb << 20)
        _run(*mkfs, self.image)


class FullDisk(Disk):
    """A small tmpfs: ENOSPC."""

    def make(self) -> None:
        _run("mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "tmpfs", self.mounted)


class Quota(Disk):
    """A btrfs subvolume with a limit: EDQUOT."""

    @property
    def folder(self) -> Path:
        return self.mounted / "limited"

    def make(self) -> None:
        self._make_image("mkfs.btrfs", "-q", size_mb=4 * SIZE_MB)
        _run("mount", "-o", "loop", self.image, self.mounted)
        _run("btrfs", "quota", "enable", self.mounted)
        _run("btrfs", "subvolume", "create", self.folder)
        _run("btrfs", "qgroup", "limit", f"{SIZE_MB}M", self.folder)

    def repair(self) -> None:
        super().repair()
        _run("sync", "-f", self.folder)  # the quota hears of it with the next commit


class GoneReadOnly(Disk):
    """An ext4 that the kernel makes read-only after an error of the device, whoever has files open: EROFS."""

    def make(self) -> None:
        self._make_image("mkfs.ext4", "-q", size_mb=4 * SIZE_MB)
        self._mount()

    def _mount(self) -> None:
        _run("mount", "-o", "loop,errors=remount-ro", self.image, self.mounted)

    def strike(self) -> None:
        device = subprocess.run(
            ["findmnt", "-n", "-o", "SOURCE", str(self.mounted)], capture_output=True, text=True, check=True
        ).stdout.strip()
        Path(f"/sys/fs/ext4/{Path(device).name}/trigger_fs_error").write_text("1")

    def repair(self) -> None:
        give_up = time.monotonic() + 30
        while True:
            try:
                _run("umount", self.mounted)
                break
            except OSError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.1)
        subprocess.run(["e2fsck", "-fy", str(self.image)], capture_output=True)  # 1: errors were corrected
        self._mount()


@contextlib.contextmanager
def mounted(kind: type[Disk], place: Path) -> Iterator[Disk]:
    """A disk of ``kind``, made in ``place``; the test is skipped where it cannot be had."""
    place.mkdir(parents=True)
    disk = kind(place / "mounted", place / "image")
    disk.mounted.mkdir()
    try:
        disk.make()
    except (OSError, FileNotFoundError) as error:
        disk.unmount()
        cannot_be_had(f"a {kind.__name__} needs root, loop devices and the file system's tools: {error}")
    try:
        yield disk
    finally:
        disk.unmount()
        shutil.rmtree(place, ignore_errors=True)
