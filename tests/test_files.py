"""Files that are replaced whole, by several threads too."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from grd.files import atomic_write


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_has_the_mode_that_open_would_give_it_and_a_replaced_one_keeps_its_own(
    tmp_path: Path,
) -> None:
    plain, ours, secret = tmp_path / "plain", tmp_path / "ours", tmp_path / "secret"
    plain.touch()
    atomic_write(ours, "new")
    assert mode_of(ours) == mode_of(plain)
    secret.touch(mode=0o600)
    atomic_write(secret, "new")
    assert mode_of(secret) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "plain", "secret"]


def test_writing_in_several_threads_leaves_the_umask_alone(tmp_path: Path) -> None:
    """A server's threads write at the same time; a file that all may write would stay for good."""
    before = os.umask(0o027)
    try:
        threads = [
            threading.Thread(
                target=lambda n=number: [
                    atomic_write(tmp_path / f"{n}-{i}", "x", durable=False) for i in range(300)
                ]
            )
            for number in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {mode_of(path) for path in tmp_path.iterdir()} == {0o640}
        assert len(list(tmp_path.iterdir())) == 8 * 300
    finally:
        left = os.umask(before)
    assert left == 0o027


def test_a_replaced_file_keeps_its_owner_and_group_and_its_mode(tmp_path: Path) -> None:
    place = tmp_path / "theirs"
    place.touch()
    if os.geteuid() == 0:
        os.chown(place, 1234, 2345)
    place.chmod(0o2640)
    before = place.stat()
    atomic_write(place, "new")
    after = place.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert place.read_text() == "new"


def test_a_file_of_somebody_who_cannot_be_given_it_is_replaced_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "theirs"
    place.touch()
    asked = []

    def refuse(fd: int, owner: int, group: int) -> None:
        asked.append((owner, group))
        raise PermissionError(1, "Operation not permitted")

    real = os.fstat
    monkeypatch.setattr(os, "fchown", refuse)
    monkeypatch.setattr(
        os, "fstat", lambda fd: SimpleNamespace(st_uid=-2, st_gid=-2, st_size=real(fd).st_size)
    )
    atomic_write(place, "new")
    assert asked == [(place.stat().st_uid, -1), (-1, place.stat().st_gid)]
    assert place.read_text() == "new"
