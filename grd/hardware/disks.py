"""The disks under a project and its checkpoints: room, file system, and whether it is a network's."""

from __future__ import annotations

import os
from pathlib import Path

from grd.hardware.facts import Facts, describe
from grd.hardware.mounts import mount_of, read_mounts

GIBIBYTE = 1024**3

NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.gcsfuse", "fuse.glusterfs",
    "fuse.juicefs", "fuse.s3fs", "fuse.sshfs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4",
    "orangefs", "panfs", "smb3", "smbfs", "virtiofs", "wekafs",
}  # fmt: skip
"""File systems that another machine serves: slower to fsync, and with locks of their own kind."""
LOCAL = {
    "apfs", "bcachefs", "btrfs", "devtmpfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hfs",
    "jfs", "msdos", "ntfs", "ntfs3", "overlay", "ramfs", "reiserfs", "squashfs", "tmpfs", "ufs", "vfat",
    "xfs", "zfs",
}  # fmt: skip

_NOT_TOLD = "the platform does not tell"


def is_network(fs_type: str | None) -> bool | None:
    """Whether this type of file system is served by another machine; None where the type does not say."""
    if fs_type in NETWORK:
        return True
    return False if fs_type in LOCAL else None


def _nearest_folder(path: Path) -> Path:
    path = Path(os.path.realpath(path))
    return next(folder for folder in (path, *path.parents) if folder.exists())


def disk_facts(path: Path, *, root: Path = Path("/")) -> Facts:
    """total_gb, free_gb (GiB this user may fill), inodes_free, path, mount, fs_type, network.

    A path that does not exist yet stands for its nearest folder that does. Never raises.
    """
    facts = Facts()
    facts.ask("path", lambda: str(_nearest_folder(path)), _NOT_TOLD)
    folder = facts.values["path"]
    try:
        usage = os.statvfs(_nearest_folder(path))
    except OSError as error:
        for name in ("total_gb", "free_gb", "inodes_free"):
            facts.put(name, None, describe(error))
    else:
        # Some network file systems answer 0 blocks: they do not know their size.
        known = usage.f_blocks > 0
        facts.put("total_gb", usage.f_blocks * usage.f_frsize / GIBIBYTE if known else None, _NOT_TOLD)
        facts.put("free_gb", usage.f_bavail * usage.f_frsize / GIBIBYTE if known else None, _NOT_TOLD)
        # btrfs and others make inodes as they need them, and answer 0 of 0.
        facts.put(
            "inodes_free", usage.f_favail if usage.f_files > 0 else None, "it has no fixed number of them"
        )
    try:
        mount = mount_of(Path(folder), read_mounts(root)) if folder else None
        unknown = "no mount is listed for it"
    except OSError as error:
        mount, unknown = None, describe(error)
    facts.put("mount", mount.point if mount else None, unknown)
    facts.put("fs_type", mount.fs_type if mount else None, unknown)
    facts.put(
        "network",
        is_network(mount.fs_type) if mount else None,
        "this type of file system does not say" if mount else unknown,
    )
    return facts
