"""The order of a save, as the operating system sees it: what a loss of power could leave behind."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import cannot_be_had

pytestmark = pytest.mark.faults

SAVES = """
import os, sys
from grd.experiment import CheckpointHandler
handler = CheckpointHandler(sys.argv[1], install_signal_handlers=False)
for epoch in range(3):
    handler.save_checkpoint(epoch, {"w": list(range(20000))}, step=None if epoch else 5)
    os.write(1, b"saved\\n")
"""
CALLS = (
    "trace=write,pwrite64,writev,ftruncate,fsync,fdatasync,"
    "rename,renameat,renameat2,link,linkat,unlink,unlinkat"
)


def calls_of(folder: Path, tmp_path: Path) -> list[str]:
    """What three saves ask of the system about ``folder``: ``write NAME``, ``rename OLD NEW``, ``saved``."""
    trace = tmp_path / "trace.txt"
    command = ["strace", "-f", "-y", "-s", "64", "-e", CALLS, "-o", str(trace)]
    done = subprocess.run(
        [*command, sys.executable, "-c", SAVES, str(folder)], capture_output=True, text=True, timeout=120
    )
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        cannot_be_had("no process may be traced here")
    assert done.returncode == 0, done.stderr
    seen = []
    for line in trace.read_text(errors="replace").splitlines():
        match = re.match(r"\d+ +(\w+)\((.*)\) += 0?", line)
        if match is None:
            continue
        call, arguments = match.groups()
        if call == "write" and '"saved\\n"' in arguments:
            seen.append("saved")
            continue
        paths = re.findall(rf'(?:<|"){re.escape(str(folder))}(/[^">]*)?[">]', arguments)
        if paths:
            names = (
                re.sub(r"(\.pt)\.[^/]*\.tmp$", r"\1.tmp", path.lstrip("/")) or "FOLDER" for path in paths
            )
            seen.append(" ".join([call, *names]))
    return [call for call, before in zip(seen, ["", *seen], strict=False) if call != before]


def test_bytes_are_on_disk_before_their_name_is_and_the_name_before_the_save_returns(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        cannot_be_had("there is no strace")
    folder = tmp_path.resolve() / "checkpoints"
    folder.mkdir()
    expected = []
    for name in ("checkpoint_epoch_0_step_5.pt", "checkpoint_epoch_1.pt", "checkpoint_epoch_2.pt"):
        expected += [
            f"write .{name}.tmp",
            f"fsync .{name}.tmp",
            "write manifest.jsonl",
            "fsync manifest.jsonl",
            f"rename .{name}.tmp {name}",
            "fsync FOLDER",
            f"link {name} .checkpoint_latest.pt.tmp",
            "rename .checkpoint_latest.pt.tmp checkpoint_latest.pt",
            "fsync FOLDER",
            "saved",
        ]
    assert [call for call in calls_of(folder, tmp_path) if not call.startswith("unlink ")] == expected
